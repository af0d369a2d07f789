"""One environment per client under build/clients/NAME, made when first needed and kept while its requirements are unchanged."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.peers import environments as peers
from tests.clients.catalog import Client

__all__ = ["CACHE", "ROOT", "Unreachable", "command", "model_folder"]

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build/clients"
SCRIPTS = Path(__file__).parent / "scripts"
_OFFLINE = re.compile(r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ENOTFOUND|ECONNREFUSED|ETIMEDOUT|EAI_AGAIN")
_INSTALL_SECONDS = 1500.0


class Unreachable(Exception):
    """A client that cannot be installed here, through no fault of the requirements: no registry, or no npm."""


def command(client: Client) -> list[str]:
    """The words that run a client's script, its environment made if need be.

    Unreachable where the registry does not answer, CalledProcessError where the installation fails.
    """
    script = SCRIPTS / client.script
    if client.peer:
        try:
            peers.ensure(client.peer)
        except peers.PeerAbsent as error:
            raise Unreachable(str(error)) from None
        return [str(peers.python_of(client.peer)), str(script)]
    folder = CACHE / re.sub(r"\W+", "-", client.name.lower())
    stamp, wanted = folder / "installed", "\n".join(client.needs)
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        _install(client, folder)
        stamp.write_text(wanted, encoding="utf-8")
    if client.is_node:
        # node looks for packages beside the script that imports them
        return ["node", str(shutil.copy(script, folder))]
    return [str(folder / "venv/bin/python"), str(script)]


def _install(client: Client, folder: Path) -> None:
    print(f"installing {client.name} into {folder.relative_to(ROOT)} (log: install.log there)", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "install.log"
    log.unlink(missing_ok=True)
    if client.is_node:
        if not (shutil.which("npm") and shutil.which("node")):
            raise Unreachable("node and npm are not installed")
        (folder / "package.json").write_text('{"private": true, "type": "module"}', encoding="utf-8")
        _run(["npm", "install", "--no-audit", "--no-fund", *client.needs], log, folder)
        return
    python = folder / "venv/bin/python"
    if not python.is_file():
        _run([sys.executable, "-m", "venv", str(folder / "venv")], log, ROOT)
    if client.has_torch:
        _run(["sh", str(ROOT / "scripts/install_torch.sh"), str(python)], log, ROOT)
    _run([str(python), "-m", "pip", "--disable-pip-version-check", "install", *client.needs], log, ROOT)


def _run(words: list[str], log: Path, folder: Path) -> None:
    with open(log, "ab") as out:
        done = subprocess.run(
            ["nice", *words], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, cwd=folder, timeout=_INSTALL_SECONDS
        )
    if done.returncode:
        said = log.read_text(encoding="utf-8", errors="replace")
        tail = " / ".join(said.strip().splitlines()[-4:])[-500:]
        if _OFFLINE.search(said):
            raise Unreachable(f"the registry does not answer: {tail}")
        raise subprocess.CalledProcessError(done.returncode, words, tail)


_WRITE_MODEL = """
import sys, torch, transformers as t
folder, name, out = sys.argv[1:]
t.AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
made = t.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
plain = t.AutoModelForCausalLM.from_config(made.config, dtype=torch.float32)  # one that does not think itself quantized
plain.load_state_dict(made.state_dict())
del plain.config.quantization_config
plain.save_pretrained(out)
"""


def model_folder(model: Path) -> Path:
    """The default model as a Hugging Face folder, made by transformers itself: tokenizer, and weights dequantized to float32."""
    folder = CACHE / "model"
    stamp = folder / "written"
    if not stamp.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "log"
        log.unlink(missing_ok=True)
        _run([sys.executable, "-c", _WRITE_MODEL, str(model.parent), model.name, str(folder)], log, ROOT)
        stamp.touch()
    return folder
