"""Wrong files get a clear error naming file and tensor; sharded, tied and half-precision checkpoints load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pagoda.base.config import ModelConfig
from pagoda.base.errors import ConfigError, ModelFileError, UnsupportedModel
from pagoda.models.catalog import build_model, describe
from tests.models import tiny
from tests.models.harness import load, make_runner, score

torch = pytest.importorskip("torch", reason="torch writes the checkpoints; `make setup` installs it")
safetensors = pytest.importorskip("safetensors.torch", reason="writes the checkpoints; `make setup` installs it")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    return tiny.make("llama", tmp_path_factory.mktemp("loading"))[0]


def copy_with(folder: Path, target: Path, change) -> Path:  # type: ignore[no-untyped-def]
    shutil.copytree(folder, target)
    tensors = safetensors.load_file(target / "model.safetensors")
    change(tensors)
    safetensors.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_missing_tensor(folder: Path, tmp_path: Path) -> None:
    path = copy_with(folder, tmp_path / "m", lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(ModelFileError, match=r"lacks the tensors for `layers\.2\.mlp\.up\.weight`"):
        load(path)


def test_wrong_shape(folder: Path, tmp_path: Path) -> None:
    path = copy_with(folder, tmp_path / "m", lambda t: t.update({"model.layers.1.self_attn.k_proj.weight": torch.zeros(7, 64)}))
    with pytest.raises(ModelFileError, match=r"k_proj\.weight.*has shape \(7, 64\).*asks for \(32, 64\)"):
        load(path)


def test_unknown_tensor(folder: Path, tmp_path: Path) -> None:
    path = copy_with(folder, tmp_path / "m", lambda t: t.update({"model.layers.1.surprise.weight": torch.zeros(4)}))
    with pytest.raises(ModelFileError, match="surprise"):
        load(path)


def test_unknown_architecture_names_the_nearest(folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folder, tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalML"]}))
    with pytest.raises(UnsupportedModel, match="did you mean `LlamaForCausalLM`"):
        describe(path, ModelConfig())


def test_unsupported_rope_is_refused(folder: Path) -> None:
    overrides = json.dumps({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}})
    with pytest.raises(UnsupportedModel, match="rope scaling `dynamic`"):
        describe(folder, ModelConfig(hf_overrides=overrides))
    with pytest.raises(ConfigError, match="not valid JSON"):
        describe(folder, ModelConfig(hf_overrides="{"))


def test_sharded_equals_whole(folder: Path, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    ids = list(range(5, 45))
    found = []
    for path in (folder, tmp_path / "shards"):
        loaded, facts = load(path)
        found.append(score(make_runner(loaded, facts, eager=False), facts, ids, [40]))
    np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_half_precision_checkpoints_load_exactly_as_float32(folder: Path, tmp_path: Path, kind: str) -> None:
    dtype = getattr(torch, kind)
    half = copy_with(folder, tmp_path / "half", lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    full = copy_with(folder, tmp_path / "full", lambda t: t.update({k: v.to(dtype).float() for k, v in t.items()}))
    ids = list(range(5, 45))
    found = []
    for path in (half, full):
        loaded, facts = load(path, dtype="float32")
        found.append(score(make_runner(loaded, facts, eager=False), facts, ids, [40]))
    np.testing.assert_array_equal(found[0], found[1])


def test_dummy_weights_need_no_files(folder: Path, tmp_path: Path) -> None:
    path = shutil.copytree(folder, tmp_path / "m")
    (path / "model.safetensors").unlink()
    source = describe(path, ModelConfig())
    model = build_model(source, dtype="bfloat16", max_positions=64, load_format="dummy")
    assert model.nbytes > 2 * source.spec.num_parameters
