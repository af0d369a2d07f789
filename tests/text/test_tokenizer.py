"""Tokenizers of Hugging Face folders, against transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from pagoda.base.errors import InvalidRequest, ModelFileError
from pagoda.text.pieces import pieces_of
from pagoda.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Tokenizer:
    return load_tokenizer(shared_data / "weights" / "stories260K-hf")


TEXTS = ["Once upon a time", "", " ", "  two  spaces ", "line\nbreak\n", "na\u00efve \u4f60\u597d \U0001f600", "<s>x</s>"]


def test_folder_equals_transformers(stories: Tokenizer, shared_data: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(shared_data / "weights" / "stories260K-hf")
    for text in TEXTS:
        for special in (True, False):
            ids = stories.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert stories.decode(ids, skip_special_tokens=skip) == expected
    assert (stories.bos_id, stories.eos_ids, stories.vocab_size) == (theirs.bos_token_id, (theirs.eos_token_id,), 512)


def test_gguf_and_folder_agree(stories: Tokenizer, shared_data: Path) -> None:
    gguf = load_tokenizer(shared_data / "weights" / "stories260K-f32.gguf")
    for text in TEXTS:
        assert gguf.encode(text) == stories.encode(text)
    assert gguf.eos_ids == stories.eos_ids


def test_sentencepiece_model_alone(stories: Tokenizer, shared_data: Path, tmp_path: Path) -> None:
    shutil.copy(shared_data / "weights" / "stories260K-hf" / "tokenizer.model", tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert tokenizer.encode(text) == stories.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == stories.decode(stories.encode(text))


@pytest.mark.parametrize(
    "data", [b"", b"\x0a", b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\x0a\x02\x08\x01", b"\x0b", b"text"]
)
def test_damaged_sentencepiece_model(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ModelFileError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_damaged_and_absent_tokenizer_json(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="--tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFileError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)


def byte_level(tmp_path: Path, tokenizer_config: dict[str, object], **files: dict[str, object]) -> Tokenizer:
    backend = Backend(models.BPE({chr(c): i for i, c in enumerate(range(33, 127))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    for name, content in {"tokenizer_config": tokenizer_config, **files}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return load_tokenizer(tmp_path)


def test_eos_of_generation_config_and_of_config(tmp_path: Path) -> None:
    config: dict[str, object] = {"eos_token": {"content": "<eos>"}, "bos_token": "<bos>", "unk_token": None}
    assert byte_level(tmp_path, config).eos_ids == (95,)
    assert byte_level(tmp_path, config, generation_config={"eos_token_id": [3, 95]}).eos_ids == (3, 95)
    assert byte_level(tmp_path, config, generation_config={"eos_token_id": 5}).eos_ids == (5, 95)
    (tmp_path / "generation_config.json").unlink()
    assert byte_level(tmp_path, {}, config={"eos_token_id": 7}).eos_ids == (7,)


def test_bos_follows_the_configuration_where_the_class_does(tmp_path: Path) -> None:
    config: dict[str, object] = {"eos_token": "<eos>", "bos_token": "<bos>", "tokenizer_class": "LlamaTokenizerFast"}
    assert byte_level(tmp_path, config | {"add_bos_token": True}).encode("a") == [94, 64]
    assert byte_level(tmp_path, config | {"add_bos_token": True, "add_eos_token": True}).encode("a") == [94, 64, 95]
    assert byte_level(tmp_path, config | {"add_bos_token": False}).encode("a") == [64]
    other = config | {"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": True}
    assert byte_level(tmp_path, other).encode("a") == [64]


def test_chat_templates_of_a_folder(tmp_path: Path) -> None:
    config: dict[str, object] = {"chat_template": [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]}
    assert byte_level(tmp_path, config).chat_templates == {"default": "A", "tool_use": "B"}
    (tmp_path / "chat_template.jinja").write_text("C")
    assert byte_level(tmp_path, config).chat_templates == {"default": "C", "tool_use": "B"}
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"tokenizer_config\.json.*not valid JSON"):
        load_tokenizer(tmp_path)


def test_surrogates_are_a_request_error(stories: Tokenizer) -> None:
    with pytest.raises(InvalidRequest):
        stories.encode("\ud800")


def test_ids_outside_the_vocabulary_are_silent(stories: Tokenizer) -> None:
    inside = stories.encode("hello", add_special_tokens=False)
    assert stories.decode([*inside, 512, 10**6, -1, 2**40]) == "hello"
    assert stories.token_str(10**6) == "" and stories.token_bytes(-1) == b""


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_pieces_write_what_the_decoder_writes(text: str) -> None:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = Backend(models.BPE({character: index for index, character in enumerate(sorted(alphabet))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    pieces = pieces_of(backend)
    assert pieces is not None
    ids = backend.encode(text).ids
    assert b"".join(pieces[i] for i in ids) == text.encode()
    for cut in (ids[1:], ids[:-1], ids[::2]):
        assert b"".join(pieces[i] for i in cut).decode("utf-8", "replace") == backend.decode(cut)
