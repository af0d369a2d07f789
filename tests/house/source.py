"""The source tree as the house's tests read it: parsed once."""

from __future__ import annotations

import ast
import functools
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Module(NamedTuple):
    name: str  # dotted
    path: Path
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """First part below `pagoda`, or "" for pagoda/__init__.py."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else ""


@functools.cache
def modules() -> tuple[Module, ...]:
    found = []
    for path in sorted((ROOT / "pagoda").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        found.append(Module(name, path, text, ast.parse(text)))
    return tuple(found)


def imports_of(module: Module) -> list[tuple[int, str]]:
    """(line, dotted name) of everything a module imports, wherever in the file; TYPE_CHECKING blocks left out."""
    skipped: set[int] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped |= {id(child) for statement in node.body for child in ast.walk(statement)}
    found = []
    for node in ast.walk(module.tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.path}:{node.lineno}: relative import"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found
