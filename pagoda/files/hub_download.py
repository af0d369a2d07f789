"""Hugging Face hub downloads: which files of a repository, and what went wrong in one sentence.

`huggingface_hub` does the work, with its cache, progress bar and token store. When the hub cannot be reached, what the
cache holds is used.
"""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import huggingface_hub
from huggingface_hub import errors as hub_errors

from pagoda.base import env
from pagoda.base.errors import ModelNotFound

__all__ = ["download_file", "download_snapshot"]

_CONNECT_TIMEOUT_S = 3
_ALLOWED = ["*.safetensors", "*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges.txt"]
_IGNORED = ["original/*", "onnx/*", "openvino/*", "coreml/*", "consolidated*", "*.bin", "*.pt", "*.pth", "*.gguf", "*.msgpack"]
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")


def download_snapshot(
    repository: str, *, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None
) -> Path:
    """The folder of a checkpoint: safetensors, configuration and tokenizer. Raises ModelNotFound."""
    folder = _snapshot(repository, repository, _ALLOWED, _IGNORED, revision, token, cache_dir)
    if not any(folder.glob("*.safetensors")):
        raise ModelNotFound(
            "the hub repository has no *.safetensors; pickle files are refused, and a GGUF is named owner/name:file.gguf",
            path=repository,
        )
    return folder


def download_file(
    repository: str,
    file_name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """One GGUF, with its siblings where it is split; returns the named one. Raises ModelNotFound."""
    shards = _SHARD.sub(r"-?????-of-\1.gguf", file_name)
    name = f"{repository}:{file_name}"
    path = _snapshot(repository, name, [shards], None, revision, token, cache_dir) / file_name
    if not path.exists():
        raise ModelNotFound("the hub repository has no such file", path=name)
    return path


def _snapshot(
    repository: str,
    name: str,
    allowed: list[str],
    ignored: list[str] | None,
    revision: str | None,
    token: str | None,
    cache_dir: str | Path | None,
) -> Path:
    try:
        path = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            allow_patterns=allowed,
            ignore_patterns=ignored,
            etag_timeout=_CONNECT_TIMEOUT_S,
            local_files_only=env.hf_offline(),
        )
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError, httpx.HTTPError, ValueError) as error:
        raise _translated(error, name, revision) from error
    return Path(path)


def _translated(error: Exception, name: str, revision: str | None) -> ModelNotFound:
    """One sentence with a remedy; the hub's own text stays attached as the cause."""
    if isinstance(error, hub_errors.GatedRepoError):
        text = "the hub gives this repository only to those who accepted its terms; accept them and set --hf-token or HF_TOKEN"
    elif isinstance(error, hub_errors.RepositoryNotFoundError):
        text = "there is no such file or folder here and no such repository on the hub (a private one needs --hf-token)"
    elif isinstance(error, hub_errors.RevisionNotFoundError):
        text = f"the hub repository has no revision `{revision}`"
    elif isinstance(error, hub_errors.LocalEntryNotFoundError):
        offline = "HF_HUB_OFFLINE is set" if env.hf_offline() else "the hub cannot be reached"
        text = f"{offline} and the model is not in the local cache; name a folder or a .gguf file, or try again online"
    else:
        text = f"the hub download failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return ModelNotFound(text, path=name)
