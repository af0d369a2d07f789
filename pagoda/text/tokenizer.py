"""Text to token ids and back, whatever file the vocabulary came from.

`Tokenizer` wraps one `tokenizers.Tokenizer`. It may be used from any thread; it holds no state of a request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import processors

from pagoda.base.errors import InvalidRequest, ModelFileError
from pagoda.files.gguf import GgufFile, read_gguf
from pagoda.files.tokenizer_files import TokenizerFiles, read_generation_config, read_json, read_tokenizer_files
from pagoda.text.gguf_tokenizer import build_gguf_tokenizer
from pagoda.text.pieces import pieces_of
from pagoda.text.sentencepiece import TokenType, add_tokens, build_sentencepiece, read_sentencepiece

__all__ = ["Tokenizer", "load_tokenizer"]

# Tokenizer classes that put bos and eos around a text as tokenizer_config.json says, whatever tokenizer.json does.
_INFILL = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, Gemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),  # DeepSeek
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),  # Code Llama
)
_CONFIGURED_CLASSES = ("Llama", "CodeLlama", "Gemma", "Cohere")


class Tokenizer:
    """`special_tokens` maps roles (`bos_token`, `eos_token`, ...) to texts; `eos_ids` are all that end an answer;
    `config` is tokenizer_config.json, or what such a file would say where the model has none."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        eos_ids: Iterable[int] = (),
        chat_templates: dict[str, str] | None = None,
        infill_ids: dict[str, int] | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        self.backend = backend
        self.config = config or {"tokenizer_class": "PreTrainedTokenizerFast", **(special_tokens or {})}
        self.special_tokens = special_tokens or {}
        self.chat_templates = chat_templates or {}
        self.infill_ids = infill_ids or _infill_ids(backend)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.vocab_size = max([backend.get_vocab_size(with_added_tokens=True) - 1, *added]) + 1
        self.bos_id = self._id_of("bos_token")
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.pad_id = self._id_of("pad_token")
        self.pieces = pieces_of(backend)
        self.visible_pieces = pieces_of(backend)  # the same, special tokens silent
        if self.visible_pieces is not None:
            self.visible_pieces.update(dict.fromkeys(self.special_ids, b""))

    @property
    def eos_id(self) -> int | None:
        """The first of `eos_ids`."""
        return self.eos_ids[0] if self.eos_ids else None

    @classmethod
    def from_gguf(cls, file: GgufFile) -> Tokenizer:
        """Everything from the metadata of a GGUF file. Raises ModelFileError."""
        try:
            vocabulary = build_gguf_tokenizer(file.metadata)
        except ModelFileError as error:
            raise error if error.path else ModelFileError(str(error), path=file.path) from error
        ids = vocabulary.special_ids
        template = file.metadata.get_str("tokenizer.chat_template")
        return cls(
            vocabulary.backend,
            special_tokens={f"{role}_token": vocabulary.backend.id_to_token(i) or "" for role, i in ids.items()},
            eos_ids=vocabulary.eos_ids,
            chat_templates={} if template is None else {"default": template},
            infill_ids={role: token_id for role, token_id in ids.items() if role.startswith("fim_")},
        )

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """From a Hugging Face folder: tokenizer.json, else a sentencepiece BPE model. Raises ModelFileError."""
        files = read_tokenizer_files(directory)
        backend = _backend_of(files)
        eos_ids = _ids_in(read_generation_config(directory)) + _token_ids(backend, files.special_tokens.get("eos_token"))
        if not eos_ids and (directory / "config.json").exists():
            eos_ids = _ids_in(read_json(directory / "config.json"))
        _configure_template(backend, files)
        return cls(backend, special_tokens=files.special_tokens, eos_ids=eos_ids, chat_templates=files.chat_templates, config=files.config)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises InvalidRequest where it is not valid Unicode."""
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (UnicodeEncodeError, TypeError) as error:
            raise InvalidRequest("the text has an unpaired surrogate, which is not valid Unicode") from error

    def encode_batch(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """As `encode`, one text after the other: the library's own threads would compete with the kernels'."""
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True) -> str:
        """The text of a sequence; ids outside the vocabulary are silent.

        Bytes that are not UTF-8 become U+FFFD. `spaces_between_special_tokens` matters only to decoders that write
        spaces between tokens (WordPiece): without it none is written next to a special token.
        """
        pieces = self.visible_pieces if skip_special_tokens else self.pieces
        if pieces is not None:
            text = b"".join([pieces[token_id] for token_id in ids]).decode("utf-8", "replace")
            return text[1:] if pieces.strips_space and text.startswith(" ") else text
        ids = [token_id for token_id in ids if 0 <= token_id < self.vocab_size]
        if skip_special_tokens or spaces_between_special_tokens:
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        return "".join(self._runs(ids))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token writes inside a text; part of a character is possible."""
        return self.pieces[token_id] if self.pieces is not None else self.token_str(token_id).encode()

    def token_str(self, token_id: int) -> str:
        """The text of a token alone, with U+FFFD where its bytes are only part of a character."""
        if self.pieces is not None:
            return self.pieces[token_id].decode("utf-8", "replace")
        return (self.backend.id_to_token(token_id) or "") if 0 <= token_id < self.vocab_size else ""

    def token_to_id(self, token: str) -> int | None:
        """The id of a token's own spelling, None where there is none."""
        return self.backend.token_to_id(token)

    def _runs(self, ids: Sequence[int]) -> Iterable[str]:
        """Special tokens as they are, what lies between them decoded on its own."""
        run: list[int] = []
        for token_id in ids:
            if token_id not in self.special_ids:
                run.append(token_id)
                continue
            if run:
                yield self.backend.decode(run, skip_special_tokens=False)
            run = []
            yield self.backend.id_to_token(token_id) or ""
        if run:
            yield self.backend.decode(run, skip_special_tokens=False)

    def _id_of(self, role: str) -> int | None:
        text = self.special_tokens.get(role)
        return None if text is None else self.backend.token_to_id(text)


def load_tokenizer(path: str | Path | GgufFile) -> Tokenizer:
    """From an open GGUF file, the path of one, or a Hugging Face folder. Raises ModelFileError."""
    if isinstance(path, GgufFile):
        return Tokenizer.from_gguf(path)
    path = Path(path)
    return Tokenizer.from_directory(path) if path.is_dir() else Tokenizer.from_gguf(read_gguf(path))


def _backend_of(files: TokenizerFiles) -> tokenizers.Tokenizer:
    if files.tokenizer_json is not None:
        try:
            backend = tokenizers.Tokenizer.from_file(str(files.tokenizer_json))
        except Exception as error:  # the library raises nothing more precise
            raise ModelFileError(f"cannot be read as a tokenizer: {error}", path=files.tokenizer_json) from error
        backend.no_padding()
        backend.no_truncation()
        return backend
    if files.sentencepiece is None:
        raise ModelFileError(
            "there is no tokenizer.json (nor a tokenizer.model) in the folder; use --tokenizer to name another",
            path=files.directory,
        )
    model = read_sentencepiece(files.sentencepiece)
    unk = next((p for p, kind in zip(model.pieces, model.types.tolist()) if kind == TokenType.UNKNOWN), None)
    vocab = {piece: index for index, piece in enumerate(model.pieces)}
    backend = build_sentencepiece(vocab, model.scores, unk_token=unk, has_prefix=model.has_prefix)
    add_tokens(backend, model.pieces, model.types)
    files.special_tokens.setdefault("bos_token", "<s>")
    files.special_tokens.setdefault("eos_token", "</s>")
    _set_around(backend, files.special_tokens, files.config.get("add_bos_token", True), files.config.get("add_eos_token", False))
    return backend


def _configure_template(backend: tokenizers.Tokenizer, files: TokenizerFiles) -> None:
    """Follow `add_bos_token` and `add_eos_token` of the configuration where its class does and tokenizer.json differs."""
    name = str(files.config.get("tokenizer_class", ""))
    add_bos, add_eos = files.config.get("add_bos_token"), files.config.get("add_eos_token")
    if not name.startswith(_CONFIGURED_CLASSES) or not isinstance(add_bos, bool):
        return
    around = backend.encode("", add_special_tokens=True).ids
    bos, eos = (_token_ids(backend, files.special_tokens.get(role)) for role in ("bos_token", "eos_token"))
    wanted = (bos if add_bos else []) + (eos if add_eos is True else [])
    if around != wanted:
        _set_around(backend, files.special_tokens, add_bos, add_eos is True)


def _set_around(backend: tokenizers.Tokenizer, special_tokens: dict[str, str], add_bos: bool, add_eos: bool) -> None:
    """Put bos in front of a text and eos behind it, as far as there are such tokens."""
    head = [special_tokens["bos_token"]] if add_bos and _token_ids(backend, special_tokens.get("bos_token")) else []
    tail = [special_tokens["eos_token"]] if add_eos and _token_ids(backend, special_tokens.get("eos_token")) else []
    single = [*head, "$A", *tail]
    tokens = [(text, backend.token_to_id(text)) for text in dict.fromkeys([*head, *tail])]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=[*single, "$B:1"], special_tokens=tokens)


def _token_ids(backend: tokenizers.Tokenizer, text: str | None) -> list[int]:
    token_id = None if text is None else backend.token_to_id(text)
    return [] if token_id is None else [token_id]


def _infill_ids(backend: tokenizers.Tokenizer) -> dict[str, int]:
    """The marks of a gap to fill, by the spellings that models use; all three or none."""
    for spellings in _INFILL:
        ids = [token_id for spelling in spellings if (token_id := backend.token_to_id(spelling)) is not None]
        if len(ids) == len(spellings):
            return dict(zip(("fim_prefix", "fim_suffix", "fim_middle"), ids, strict=True))
    return {}


def _ids_in(config: dict[str, Any]) -> list[int]:
    """`eos_token_id` of a configuration, which is a number, a list or absent."""
    value = config.get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    return [item for item in values if type(item) is int and item >= 0]
