"""The small JSON and text files of a model folder: configuration, tokenizer, special tokens, chat templates.

Files written by hand and by many tools: what is absent is empty, what is there and malformed is a `ModelFileError`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from pagoda.base.errors import ModelFileError, ModelNotFound

__all__ = ["TokenizerFiles", "read_generation_config", "read_json", "read_model_config", "read_tokenizer_files"]

_SENTENCEPIECE_NAMES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenizerFiles(NamedTuple):
    """What a folder says of its tokenizer. `config` is tokenizer_config.json; templates go by name, `default` first."""

    directory: Path
    tokenizer_json: Path | None
    sentencepiece: Path | None
    config: dict[str, Any]
    special_tokens: dict[str, str]
    chat_templates: dict[str, str]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelFileError where it is unreadable or something else."""
    try:
        value = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise ModelFileError(f"cannot read the file: {error.strerror or error}", path=path) from error
    except (msgspec.DecodeError, RecursionError) as error:
        raise ModelFileError(f"the file is not valid JSON ({error}); fetch it again", path=path) from error
    if not isinstance(value, dict):
        raise ModelFileError("the file is not a JSON object; fetch it again", path=path)
    return value


def read_model_config(directory: Path) -> dict[str, Any]:
    """config.json. Raises ModelNotFound where there is none."""
    path = directory / "config.json"
    if not path.exists():
        raise ModelNotFound("there is no config.json, so this is not a Hugging Face model folder", path=directory)
    return read_json(path)


def read_generation_config(directory: Path) -> dict[str, Any]:
    """generation_config.json, empty where there is none."""
    path = directory / "generation_config.json"
    return read_json(path) if path.exists() else {}


def read_tokenizer_files(directory: Path) -> TokenizerFiles:
    """Everything above but the vocabulary, which the text floor reads."""
    config = _read_optional(directory / "tokenizer_config.json")
    tokenizer_json = directory / "tokenizer.json"
    sentencepiece = next((directory / name for name in _SENTENCEPIECE_NAMES if (directory / name).exists()), None)
    return TokenizerFiles(
        directory,
        tokenizer_json if tokenizer_json.exists() else None,
        sentencepiece,
        config,
        _special_tokens(_read_optional(directory / "special_tokens_map.json")) | _special_tokens(config),
        _chat_templates(directory, config),
    )


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _special_tokens(table: dict[str, Any]) -> dict[str, str]:
    """Roles to texts; a token is written as a string or as an object with `content`."""
    tokens = {}
    for role in _ROLES:
        value = table.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            tokens[role] = text
    return tokens


def _chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """By name, from the least to the most binding place: tokenizer_config.json, chat_template.json, *.jinja."""
    templates: dict[str, str] = {}
    for source in (config, _read_optional(directory / "chat_template.json")):
        value = source.get("chat_template")
        if isinstance(value, str):
            templates["default"] = value
        elif isinstance(value, list):
            templates |= {
                item["name"]: item["template"]
                for item in value
                if isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str)
            }
    for path in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = _read_text(path)
    if (directory / "chat_template.jinja").exists():
        templates["default"] = _read_text(directory / "chat_template.jinja")
    return templates


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"cannot read the template: {error}", path=path) from error
