"""What a command imports before it has anything to do: help is instant because of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = "{'numpy', 'torch', 'starlette', 'uvicorn', 'uvloop', 'tokenizers', 'jinja2', 'zmq', 'huggingface_hub', 'httpx', 'tqdm', 'yaml', 'msgspec'}"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["bench", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys; from pagoda.cli.main import main\n"
        f"try: main({words!r})\nexcept SystemExit as end: assert not end.code, end\n"
        f"sys.exit(f'imported: {{found}}' if (found := {HEAVY} & set(sys.modules)) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "pagoda" in done.stdout


@pytest.mark.parametrize("name", ["LLM", "AsyncEngine"])
def test_names_load_on_first_use(name: str) -> None:
    code = (
        "import sys, pagoda\n"
        f"assert not {HEAVY} & set(sys.modules)\n"
        f"pagoda.{name}\n"
        "assert 'torch' not in sys.modules and 'starlette' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_unknown_names_are_attribute_errors() -> None:
    import pagoda

    with pytest.raises(AttributeError, match="LMM"):
        pagoda.LMM  # noqa: B018
