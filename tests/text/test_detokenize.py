"""However ids are cut into calls, the text is the whole's decoding, and no part of a character is handed out."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from pagoda.text.detokenize import BytesDetokenizer, WindowDetokenizer, make_detokenizer
from pagoda.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = [
    "Plain words.",
    "caf\u00e9 \u4f60\u597d, \U0001f468\u200d\U0001f469\u200d\U0001f467 done",
    "",
    "\n\n \t",
    "<|im_end|> x <|endoftext|>",
]


def chunks(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """Cut `ids` into pieces of the given sizes, over and over; the rest is one more piece."""
    pieces, at = [], 0
    for size in sizes:
        pieces.append(ids[at : at + size])
        at += size
    return [*pieces, ids[at:]]


def streamed(tokenizer: Tokenizer, ids: list[int], sizes: list[int], **options: bool) -> tuple[str, list[str]]:
    detokenizer = make_detokenizer(tokenizer, **options)
    deltas = [detokenizer.feed(piece) for piece in chunks(ids, sizes)]
    return "".join(deltas) + detokenizer.flush(), deltas


def byte_level_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>", "<\u4f60\u597d>"])
    return Tokenizer(backend)


def spaced_tokenizer() -> Tokenizer:
    tokens = [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581", "\u2581a", "b", "\u2581\u2581"]
    backend = Backend(models.BPE({token: index for index, token in enumerate(tokens)}, [], byte_fallback=True))
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend)


def wordpiece_tokenizer() -> Tokenizer:
    tokens = ["[UNK]", "a", "##b", "c", ".", "##\u00e9", "[SEP]"]
    backend = Backend(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.add_special_tokens(["[SEP]"])
    return Tokenizer(backend)


MADE = [byte_level_tokenizer(), spaced_tokenizer(), wordpiece_tokenizer()]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_cut_gives_the_whole(data: st.DataObject) -> None:
    tokenizer = data.draw(st.sampled_from(MADE))
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24))
    sizes = data.draw(st.lists(st.integers(0, 5), max_size=12))
    options = {"skip_special_tokens": data.draw(st.booleans()), "spaces_between_special_tokens": data.draw(st.booleans())}
    text, _ = streamed(tokenizer, ids, sizes, **options)
    assert text == tokenizer.decode(ids, **options)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30), st.lists(st.integers(0, 3), max_size=60))
def test_no_part_of_a_character_is_handed_out(text: str, sizes: list[int]) -> None:
    """Valid text never shows the replacement character, and everything handed out is a prefix of it."""
    tokenizer = byte_level_tokenizer()
    _, deltas = streamed(tokenizer, tokenizer.encode(text), sizes)
    shown = ""
    for delta in deltas:
        shown += delta
        assert text.startswith(shown)
    assert shown == text


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20), st.integers(0, 80))
def test_prompt_and_output_join(text: str, cut: int) -> None:
    """A prompt that ends inside a character lets the output complete it."""
    tokenizer = byte_level_tokenizer()
    ids = tokenizer.encode(text)
    cut = min(cut, len(ids))
    detokenizer = make_detokenizer(tokenizer, ids[:cut])
    rest = detokenizer.feed(ids[cut:]) + detokenizer.flush()
    whole_prompt = b"".join(tokenizer.token_bytes(i) for i in ids[:cut]).decode("utf-8", "ignore")
    assert whole_prompt + rest == text


def test_first_space_of_sentencepiece() -> None:
    tokenizer = spaced_tokenizer()
    end = tokenizer.token_to_id("<end>")
    a = tokenizer.token_to_id("\u2581a")
    assert end is not None and a is not None
    for prompt, expected in [([], "a a"), ([end], "a a"), ([a], " a a"), ([a, *[end] * 20], " a a")]:
        detokenizer = make_detokenizer(tokenizer, prompt)
        assert detokenizer.feed([a, a]) == expected, prompt


def test_spaces_between_special_tokens() -> None:
    tokenizer = wordpiece_tokenizer()
    ids = [1, 6, 6, 3]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a [SEP] [SEP] c"
    assert tokenizer.decode(ids, skip_special_tokens=False, spaces_between_special_tokens=False) == "a[SEP][SEP]c"


def test_which_one_is_chosen() -> None:
    assert [type(make_detokenizer(tokenizer)) for tokenizer in MADE] == [BytesDetokenizer, BytesDetokenizer, WindowDetokenizer]


def test_endless_broken_bytes_do_not_pile_up() -> None:
    tokenizer = byte_level_tokenizer()
    window = WindowDetokenizer(tokenizer)
    broken = tokenizer.encode("\u00e9")[:1]
    text = "".join(window.feed(broken) for _ in range(100))
    assert len(text) > 50 and len(window._ids) < 60


@pytest.fixture(scope="module", params=["default", "phi-3", "qwen2"])
def real(request: pytest.FixtureRequest, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "default":
        return request.getfixturevalue("default_tokenizer")
    path: Path = tmp_path_factory.mktemp("vocab") / f"{request.param}.gguf"
    path.write_bytes(gzip.decompress((shared_data / "tokenizers" / f"ggml-vocab-{request.param}.gguf.gz").read_bytes()))
    return load_tokenizer(path)


@pytest.mark.parametrize("cut", [lambda n: [1] * n, lambda n: [2, 3] * n, lambda n: []], ids=["ones", "mixed", "whole"])
def test_real_vocabularies(real: Tokenizer, cut: Callable[[int], list[int]]) -> None:
    for text in TEXTS:
        ids = real.encode(text, add_special_tokens=False)
        for skip in (True, False):
            joined, _ = streamed(real, ids, cut(len(ids)), skip_special_tokens=skip)
            assert joined == real.decode(ids, skip_special_tokens=skip)
            assert joined == real.backend.decode(ids, skip_special_tokens=skip)
