"""What the API side loads: tokenizer, chat template, sampling defaults. No weights, no kernels."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagoda.base.config import EngineConfig, ModelConfig
from pagoda.base.errors import ConfigError
from pagoda.base.garbage import uncollected
from pagoda.files.hub import ModelPath
from pagoda.files.hub import resolve as resolve_path
from pagoda.files.tokenizer_files import read_generation_config
from pagoda.text.template import ChatTemplate, load_chat_template
from pagoda.text.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Front", "load_front"]


@dataclass(frozen=True)
class Front:
    """`template` is None when the model has none: it cannot chat, and says so when asked to."""

    path: Path
    name: str  # what the API calls the model unless --served-model-name says otherwise
    tokenizer: Tokenizer
    template: ChatTemplate | None
    generation_config: dict[str, Any]  # sampling defaults of the model, --override-generation-config applied
    eos_token_ids: list[int]


@uncollected()
def load_front(config: EngineConfig) -> Front:
    """Loads from the model's own files, or `--tokenizer`, `--generation-config` and `--chat-template` where given."""
    m = config.model
    found = _resolve(m, m.model)
    path = found.path
    tokenizer = load_tokenizer(path if m.tokenizer is None else _resolve(m, m.tokenizer).path)
    template = load_chat_template(tokenizer, m.chat_template)
    return Front(path, found.name, tokenizer, template, _generation_config(m, path), list(tokenizer.eos_ids))


def _resolve(m: ModelConfig, name: str | None) -> ModelPath:
    return resolve_path(name, revision=m.revision, token=m.hf_token, download_dir=m.download_dir)


def _generation_config(m: ModelConfig, path: Path) -> dict[str, Any]:
    if m.generation_config == "vllm":
        values = {}
    elif m.generation_config == "auto":
        values = read_generation_config(path) if path.is_dir() else {}
    else:
        folder = Path(m.generation_config)
        if not folder.is_dir():
            raise ConfigError(f"`--generation-config {folder}` is not a folder; use auto, vllm or a folder")
        values = read_generation_config(folder)
    if m.override_generation_config:
        try:
            override = json.loads(m.override_generation_config)
        except ValueError as error:
            raise ConfigError(f"`--override-generation-config` is not valid JSON: {error}") from None
        if not isinstance(override, dict):
            raise ConfigError("`--override-generation-config` must be a JSON object")
        values = {**values, **override}
    return values
