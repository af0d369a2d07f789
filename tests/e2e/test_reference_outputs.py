"""Real weights give what transformers gave in float32: every greedy token up to the first near-tie, and its logprobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagoda.base.types import SamplingParams
from tests.e2e.harness import engine, generate

NEAR_TIE = 0.05  # nats between the first and second choice: rounding may decide these


def compare(answers: dict[str, Any], items: list[dict[str, Any]], *, atol: float, near_tie: float) -> int:
    """Tokens agreed on until a near-tie is decided otherwise; returns how many were compared."""
    compared = 0
    for i, item in enumerate(items):
        answer = answers[str(i)]
        for position, (ours, theirs) in enumerate(zip(answer.token_ids, item["output_ids"])):
            top = item["top5"][position]
            if ours != theirs:
                assert item["margin"][position] < near_tie, f"{item['prompt']!r}: token {position} is {ours}, not {theirs}"
                break
            np.testing.assert_allclose(answer.logprobs[position][0], top[0][1], atol=atol)
            compared += 1
    return compared


def run(model: Path, items: list[dict[str, Any]], **kwargs: Any) -> dict[str, Any]:
    local = engine(model, **kwargs)
    prompts = {str(i): item["prompt_ids"] for i, item in enumerate(items)}
    count = max(len(item["output_ids"]) for item in items)
    params = {
        str(i): SamplingParams(temperature=0, max_tokens=max(1, len(item["output_ids"])), logprobs=1, ignore_eos=True)
        for i, item in enumerate(items)
    }
    assert count > 1
    return generate(local, prompts, params)


@pytest.mark.parametrize("weights", ["stories260K-hf", "stories260K-f32.gguf"])
def test_stories260k(shared_data: Path, weights: str) -> None:
    items = json.loads((shared_data / "reference/stories260k_fp32_greedy.json").read_text())["items"]
    answers = run(shared_data / "weights" / weights, items, dtype="float32", max_model_len=512)
    compared = compare(answers, items, atol=2e-3, near_tie=1e-3)
    assert compared >= 0.95 * sum(len(item["output_ids"]) for item in items)


def test_stories260k_writes_its_authors_story(shared_data: Path) -> None:
    story = (shared_data / "reference/stories260k_llama2c_doc_greedy.txt").read_text()
    local = engine(shared_data / "weights/stories260K-hf", dtype="float32")
    bos = [local.tokenizer.bos_id]
    answer = generate(local, {"a": bos}, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))["a"]
    text = local.tokenizer.decode(answer.token_ids).strip()
    published = " ".join(story.split())
    assert published[:300] in " ".join(text.split()) or " ".join(text.split())[:300] in published


def test_smollm2_as_served(shared_data: Path, default_model: Path) -> None:
    """The Q4_1 file itself against its weights dequantized and rounded to bfloat16, run in float32."""
    items = json.loads((shared_data / "reference/smollm2_135m_bf16weights_fp32_greedy.json").read_text())["items"]
    answers = run(default_model, items)
    compared = compare(answers, items, atol=0.12, near_tie=0.2)
    assert compared >= 100


def test_smollm2_bfloat16_weights(shared_data: Path, default_model: Path, tmp_path: Path) -> None:
    """A Hugging Face folder made of the dequantized weights, run in float32 as the reference was."""
    path = write_dequantized(default_model, tmp_path)
    items = json.loads((shared_data / "reference/smollm2_135m_bf16weights_fp32_greedy.json").read_text())["items"]
    answers = run(path, items, dtype="float32")
    compared = compare(answers, items, atol=2e-3, near_tie=2e-3)
    assert compared >= 0.9 * sum(len(item["output_ids"]) for item in items)


def write_dequantized(gguf: Path, folder: Path) -> Path:
    """The default model as bfloat16 safetensors with a config.json, written with our own readers."""
    torch = pytest.importorskip("torch", reason="writes the checkpoint; `make setup` installs it")
    from safetensors.torch import save_file

    from pagoda.base.config import ModelConfig
    from pagoda.loader.names import HF_DECODER
    from pagoda.loader.weights import _source
    from pagoda.models.catalog import describe
    from pagoda.models.gguf import row_order

    source = describe(gguf, ModelConfig())
    assert source.gguf_file is not None
    transform = row_order(source.gguf_file, source.spec)
    theirs = {ours: name for name, ours in HF_DECODER.items() if ours}
    tensors = {}
    for name in source.gguf_file.tensors:
        ours = source.names(name)
        assert ours is not None and transform is not None
        stem, _, kind = ours.rpartition(".")
        number = next((part for part in stem.split(".") if part.isdigit()), None)
        pattern = stem.replace(f".{number}.", ".{i}.") if number else stem
        target = theirs[pattern].replace("{i}", str(number)) + "." + kind
        tensors[target] = torch.from_numpy(transform(ours, _source(source.gguf_file, name)).as_float32().copy()).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**source.hf_config, "torch_dtype": "bfloat16"}))
    return folder
