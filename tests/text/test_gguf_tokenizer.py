"""GGUF vocabularies against llama.cpp's published vectors and against transformers."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

from pagoda.base.errors import ModelFileError
from pagoda.files.gguf import GgufFile, read_gguf
from pagoda.text.gguf_tokenizer import build_gguf_tokenizer
from pagoda.text.pre_tokenizers import PRE_TOKENIZERS
from pagoda.text.tokenizer import Tokenizer, load_tokenizer
from tests.files.gguf_writer import gguf_bytes

NAMES = [
    "bert-bge",
    "command-r",
    "deepseek-coder",
    "deepseek-llm",
    "gemma-4",
    "gpt-2",
    "llama-bpe",
    "llama-spm",
    "mpt",
    "phi-3",
    "qwen2",
    "qwen35",
    "refact",
]
WITH_VOCABULARY = ["bert-bge", "gpt-2", "phi-3", "qwen2"]
PRE_OF = {"gemma-4": "gemma4"}
NOT_SPLIT = {
    "llama-spm": "a sentencepiece vocabulary does not split its text into words",
    "mpt": "its vocabulary has tokens of several spaces that are matched before the text is split",
}


def cases(shared_data: Path, name: str) -> list[tuple[str, list[int]]]:
    stem = shared_data / "tokenizers" / f"ggml-vocab-{name}.gguf"
    with open(f"{stem}.inp", encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{stem}.out").read_text().split("\n")[: len(texts)]
    assert len(texts) == len(lines) >= 46
    return list(zip(texts, ([int(word) for word in line.split()] for line in lines)))


def vocabulary(shared_data: Path, folder: Path, name: str) -> GgufFile:
    path = folder / f"{name}.gguf"
    path.write_bytes(gzip.decompress((shared_data / "tokenizers" / f"ggml-vocab-{name}.gguf.gz").read_bytes()))
    return read_gguf(path)


@pytest.mark.parametrize("name", WITH_VOCABULARY)
def test_vectors(shared_data: Path, tmp_path: Path, name: str) -> None:
    tokenizer = load_tokenizer(vocabulary(shared_data, tmp_path, name))
    wrong = [
        (text, ids, tokenizer.encode(text, add_special_tokens=False))
        for text, ids in cases(shared_data, name)
        if tokenizer.encode(text, add_special_tokens=False) != ids
    ]
    assert not wrong


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITH_VOCABULARY])
def test_vectors_without_vocabulary(shared_data: Path, name: str) -> None:
    """Whether words could be what the vectors' ids were made of: the same word must have the same ids everywhere."""
    if name in NOT_SPLIT:
        pytest.skip(f"no vocabulary of {name} in ../shared/data, and {NOT_SPLIT[name]}")
    splitter = PRE_TOKENIZERS[PRE_OF.get(name, name)].build()
    rows = [([word for word, _ in splitter.pre_tokenize_str(text)], ids) for text, ids in cases(shared_data, name)]
    known = {words[0]: tuple(ids) for words, ids in rows if len(words) == 1}
    for words, ids in rows:
        assert len(words) <= len(ids)
        assert _fits(words, tuple(ids), known), words


def _fits(words: list[str], ids: tuple[int, ...], known: dict[str, tuple[int, ...]]) -> bool:
    """Whether `ids` can be cut into the words' ids: known words as known, others at least one and at most all bytes."""
    ends = {0}
    for word in words:
        if word in known:
            ends = {end + len(known[word]) for end in ends if ids[end : end + len(known[word])] == known[word]}
        else:
            most = 4 * len(word)
            ends = {end + size for end in ends for size in range(1, most + 1) if end + size <= len(ids)}
    return len(ids) in ends


def test_a_wrong_splitter_does_not_fit(shared_data: Path) -> None:
    """The test above can fail: another model's splitter does not explain the ids."""
    whole_words = PRE_TOKENIZERS["gpt-2"].build()
    rows = [([word for word, _ in whole_words.pre_tokenize_str(text)], ids) for text, ids in cases(shared_data, "llama-bpe")]
    known = {words[0]: tuple(ids) for words, ids in rows if len(words) == 1}
    assert not all(len(words) <= len(ids) and _fits(words, tuple(ids), known) for words, ids in rows)


def test_every_expression_compiles_and_loses_nothing() -> None:
    text = "Hello, World's  12345 h\u00e9\u00e9\n\n\t x \u4f60\u597d \u1f7d\u212a <sentinel:1> 1,000 CamelCase"
    for name, row in PRE_TOKENIZERS.items():
        if not row.raw:
            words = "".join(word for word, _ in row.build().pre_tokenize_str(text))
            (whole,) = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
            assert words == whole[0], name


def tiny(tmp_path: Path, **changes: object) -> GgufFile:
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "a", "b", "ab", "\u2581ab", "<tool>"]
    metadata: dict[str, object] = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": -np.arange(10, dtype=np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3, 6, 1, 1, 1, 1, 1, 4], np.int32),
    }
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf_bytes({k: v for k, v in metadata.items() if v is not None}, {}))
    return read_gguf(path)


def test_flags_and_special_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny(tmp_path))
    assert tokenizer.encode("ab ab\n") == [1, 8, 8, 3]
    assert tokenizer.encode("ab<tool>b", add_special_tokens=False) == [8, 9, 4, 6]
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), 10)
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.decode([1, 8, 9, 2]) == "ab<tool>"
    assert tokenizer.decode([1, 8, 2], skip_special_tokens=False) == "<s> ab</s>"
    changed = load_tokenizer(tiny(tmp_path, add_bos_token=False, add_eos_token=True, add_space_prefix=False))
    assert changed.encode("ab ab") == [7, 8, 2]
    assert changed.decode([8, 8]) == " ab ab"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "no vocabulary"),
        ({"tokens": ["a", "a"]}, "there twice"),
        ({"model": "t5"}, "`t5` is not supported; known are gpt2, llama"),
        ({"model": "gpt2", "pre": "made-up"}, "`made-up`.*known are .*qwen2"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["a"]}, "not a pair"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["x y"]}, "do not fit"),
        ({"scores": None}, "one score per token"),
        ({"scores": np.zeros(3, np.float32)}, "one score per token"),
        ({"token_type": np.zeros(3, np.int32)}, "3 token types"),
        ({"bos_token_id": 10}, "`tokenizer.ggml.bos_token_id` is 10"),
    ],
)
def test_bad_vocabularies_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelFileError, match=message) as caught:
        load_tokenizer(tiny(tmp_path, **changes))
    assert "tiny.gguf" in str(caught.value)


def test_split_pairs_keep_tokens_that_begin_with_a_space(tmp_path: Path) -> None:
    metadata = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": ["<bos>", " ", "a", " a", "\n", "\n\n"],
        "tokenizer.ggml.merges": ["  a", "\n \n"],
        "tokenizer.ggml.bos_token_id": 0,
    }
    path = tmp_path / "g.gguf"
    path.write_bytes(gguf_bytes(metadata, {}))
    backend = build_gguf_tokenizer(read_gguf(path).metadata).backend
    assert json.loads(backend.to_str())["model"]["merges"] == [[" ", "a"], ["\n", "\n"]]
    assert backend.encode("\n\n").ids == [0, 5]


@pytest.fixture(scope="module")
def theirs(default_model: Path) -> Backend:
    """transformers' reading of the default model, with the digit splitting that its GGUF conversion leaves out."""
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(default_model.parent, gguf_file=default_model.name)
    backend: Backend = loaded.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), backend.pre_tokenizer])
    return backend


def test_default_model_equals_transformers(default_tokenizer: Tokenizer, theirs: Backend, shared_data: Path) -> None:
    texts = [text for text, _ in cases(shared_data, "gpt-2")]
    questions = (shared_data / "prompts" / "mt_bench_question.jsonl").read_text(encoding="utf-8")
    texts += [json.loads(line)["turns"][0] for line in questions.splitlines()]
    for text in texts:
        ids = default_tokenizer.encode(text)
        assert ids == theirs.encode(text).ids
        assert default_tokenizer.decode(ids) == theirs.decode(ids) == text
    generator = random.Random(0)
    for _ in range(300):
        ids = [generator.randrange(default_tokenizer.vocab_size) for _ in range(generator.randrange(30))]
        for skip in (True, False):
            assert default_tokenizer.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_default_model_facts(default_tokenizer: Tokenizer) -> None:
    assert default_tokenizer.vocab_size == 49152
    assert default_tokenizer.eos_ids[0] == 2 and 0 in default_tokenizer.eos_ids
    assert default_tokenizer.encode("Hi") == default_tokenizer.encode("Hi", add_special_tokens=False)
    assert default_tokenizer.encode("<|im_start|>user") == [1, 4093]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=3))
def test_damaged_vocabularies_raise_only_model_file_error(tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    for changes in ({}, {"model": "gpt2", "pre": "gpt-2", "merges": ["a b"]}, {"model": "bert"}):
        path = Path(tiny(tmp_path, **changes).path)
        data = bytearray(path.read_bytes())
        for position, byte in edits:
            data[position % len(data)] = byte
        damaged = tmp_path / "damaged.gguf"
        damaged.write_bytes(data)
        try:
            tokenizer = load_tokenizer(damaged)
            tokenizer.decode(tokenizer.encode("ab <tool> \u4f60"))
        except ModelFileError:
            continue
