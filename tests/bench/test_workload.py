"""Workloads: the same seed gives the same requests, lengths are as asked, files that do not fit say so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagoda.base.errors import ConfigError
from pagoda.bench.passage import PASSAGE
from pagoda.bench.workload import Workload, WorkloadRequest, make_requests
from pagoda.text.tokenizer import Tokenizer
from tests.serve.fakes import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


def _make(options: Workload, tokenizer: Tokenizer, seed: int = 0, limit: int = 10**6) -> list[WorkloadRequest]:
    return make_requests(options, tokenizer, seed=seed, max_model_len=limit)


def test_seeds_decide(tokenizer: Tokenizer) -> None:
    for name in ("random", "sonnet"):
        options = Workload(dataset_name=name, num_prompts=5)  # type: ignore[arg-type]
        assert _make(options, tokenizer, 1) == _make(options, tokenizer, 1) != _make(options, tokenizer, 2)


def test_random_lengths_and_prefix(tokenizer: Tokenizer) -> None:
    options = Workload(num_prompts=200, input_len=100, output_len=50, random_range_ratio=0.2, random_prefix_len=7)
    requests = _make(options, tokenizer)
    inputs, outputs = [len(r.prompt_token_ids) - 7 for r in requests], [r.output_len for r in requests]
    assert (min(inputs), max(inputs)) == (80, 120) and (min(outputs), max(outputs)) == (40, 60)
    assert len({tuple(r.prompt_token_ids[:7]) for r in requests}) == 1
    assert len({tuple(r.prompt_token_ids[7:20]) for r in requests}) == 200
    assert not {i for r in requests for i in r.prompt_token_ids} & tokenizer.special_ids


def test_fixed_lengths(tokenizer: Tokenizer) -> None:
    requests = _make(Workload(num_prompts=3, input_len=10, output_len=4), tokenizer)
    assert [(len(r.prompt_token_ids), r.output_len) for r in requests] == [(10, 4)] * 3


def test_sonnet_shares_its_prefix(tokenizer: Tokenizer) -> None:
    requests = _make(Workload(dataset_name="sonnet", num_prompts=4, input_len=300, sonnet_prefix_len=100), tokenizer)
    assert {len(r.prompt_token_ids) for r in requests} == {300}
    prefixes = {tuple(r.prompt_token_ids[:100]) for r in requests}
    assert len(prefixes) == 1 and len({tuple(r.prompt_token_ids[100:]) for r in requests}) == 4
    assert tokenizer.decode(list(prefixes.pop())) == "".join(line.strip() + "\n" for line in PASSAGE.splitlines())[:100]


def test_sonnet_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "poem").write_text("ab\n\ncd\n")
    options = Workload(dataset_name="sonnet", dataset_path=str(tmp_path / "poem"), num_prompts=1, input_len=7, sonnet_prefix_len=7)
    assert tokenizer.decode(_make(options, tokenizer)[0].prompt_token_ids) == "ab\ncd\na"


@pytest.mark.parametrize("as_lines", [True, False])
def test_sharegpt(tokenizer: Tokenizer, tmp_path: Path, as_lines: bool) -> None:
    rows = [{"conversations": [{"from": "human", "value": "question" * k}, {"from": "gpt", "value": "answer"}]} for k in (1, 2)]
    rows.append({"conversations": [{"from": "human", "value": "alone"}]})
    (tmp_path / "file").write_text("\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows))
    options = Workload(dataset_name="sharegpt", dataset_path=str(tmp_path / "file"), num_prompts=4, input_len=12)
    requests = _make(options, tokenizer)
    assert sorted(tokenizer.decode(r.prompt_token_ids) for r in requests) == ["question"] * 2 + ["questionques"] * 2
    assert {r.output_len for r in requests} == {6}


def test_custom(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"prompt": "a", "output_tokens": 3}\n{"prompt": "b"}\n')
    options = Workload(dataset_name="custom", dataset_path=str(tmp_path / "file"), num_prompts=2)
    found = {tokenizer.decode(r.prompt_token_ids): r.output_len for r in _make(options, tokenizer)}
    assert found == {"a": 3, "b": 128}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("custom", '{"text": "a"}', "does not look like `custom`"),
        ("custom", "{", "is not valid JSON"),
        ("custom", "", "has no prompts"),
        ("sharegpt", '[{"conversations": [{"v": 1}, {"v": 2}]}]', "does not look like `sharegpt`"),
        ("sharegpt", "[1]", "does not look like"),
    ],
)
def test_files_that_do_not_fit(tokenizer: Tokenizer, tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ConfigError, match=message):
        _make(Workload(dataset_name=name, dataset_path=str(tmp_path / "file")), tokenizer)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Workload(num_prompts=0), "--num-prompts"),
        (Workload(random_range_ratio=1.0), "--random-range-ratio"),
        (Workload(dataset_name="custom"), "needs a file"),
        (Workload(dataset_name="custom", dataset_path="/nowhere/none"), "cannot be read"),
        (Workload(dataset_name="sonnet", input_len=10), "--sonnet-prefix-len"),
        (Workload(input_len=60, output_len=50), "more than the model's context of 100"),
    ],
)
def test_options_that_cannot_be(tokenizer: Tokenizer, options: Workload, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _make(options, tokenizer, limit=100)
