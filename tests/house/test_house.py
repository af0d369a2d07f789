"""The laws of the house, on the source as it stands: who imports whom, sizes, nothing ambient."""

from __future__ import annotations

import ast
import re
import sys

import pytest

from tests.house.source import ROOT, imports_of, modules

FLOORS = {
    "csrc": 0.0,  # C++, and the script that compiles it
    "base": 0.0,
    "files": 0.1,
    "kernels": 0.2,
    "loader": 1.0,
    "quant": 1.1,
    "layers": 1.2,
    "text": 2.0,
    "structured": 2.0,
    "models": 2.0,
    "engine": 3.0,
    "worker": 3.0,
    "executor": 4.0,
    "api": 5.0,
    "serve": 6.0,
    "cli": 7.1,
    "bench": 7.0,
    "router": 7.0,
}
"""A module imports from its own room and from lower floors. Equal numbers are towers that never meet."""

HEAVY = ("torch", "triton", "transformers")
MAY_IMPORT_TORCH = ("pagoda.worker.device", "pagoda.kernels.triton", "pagoda.models.transformers_backend")
ENVIRONMENT_READERS = ("pagoda.base.env", "pagoda.csrc.build")  # the second runs at build time only: CXX
MAX_FILE, MAX_FUNCTION, MAX_CLASS = 800, 80, 300


def room_of(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "pagoda" and len(parts) > 1 and parts[1] in FLOORS else None


def test_every_room_has_a_floor() -> None:
    rooms = {m.room for m in modules()} - {""}
    assert rooms <= set(FLOORS), rooms - set(FLOORS)


def test_imports_go_strictly_down() -> None:
    wrong = []
    for module in modules():
        if not module.room:
            continue
        for line, name in imports_of(module):
            target = room_of(name)
            if target is None or target == module.room:
                continue
            if FLOORS[target] >= FLOORS[module.room]:
                wrong.append(f"{module.path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles_between_modules() -> None:
    names = {m.name for m in modules()}
    edges = {m.name: {_module_of(target, names) for _, target in imports_of(m)} - {None, m.name} for m in modules()}
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        for target in sorted(edges[name], key=str):
            assert target is not None
            if not name.startswith(target + ".") and not target.startswith(name + "."):  # a package and its own modules
                visit(target, [*path, name])
        done.add(name)

    for name in sorted(edges):
        visit(name, [])


def _module_of(dotted: str, names: set[str]) -> str | None:
    parts = dotted.split(".")
    for end in (len(parts), len(parts) - 1):
        if ".".join(parts[:end]) in names:
            return ".".join(parts[:end])
    return None


def test_torch_stays_in_its_rooms() -> None:
    wrong = [
        f"{m.name}:{line} imports {name}"
        for m in modules()
        for line, name in imports_of(m)
        if name.split(".")[0] in HEAVY and not m.name.startswith(MAY_IMPORT_TORCH)
    ]
    assert not wrong, "\n".join(wrong)


def test_sizes() -> None:
    wrong = []
    files = [*(m.path for m in modules()), *(ROOT / "pagoda/csrc").rglob("*.h"), *(ROOT / "pagoda/csrc").rglob("*.cpp")]
    files += [p for p in (ROOT / "tests").rglob("*.py")]
    for path in files:
        if (count := path.read_text(encoding="utf-8").count("\n")) > MAX_FILE:
            wrong.append(f"{path.relative_to(ROOT)}: {count} lines")
    for module in modules():
        for node in ast.walk(module.tree):
            limit = MAX_CLASS if isinstance(node, ast.ClassDef) else MAX_FUNCTION
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                if size > limit:
                    wrong.append(f"{module.name}.{node.name}: {size} lines")
    assert not wrong, "\n".join(wrong)


def test_nothing_ambient() -> None:
    wrong = []
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Global):
                wrong.append(f"{module.name}:{node.lineno} uses `global`")
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and module.name not in ENVIRONMENT_READERS:
                wrong.append(f"{module.name}:{node.lineno} reads the environment; base/env.py is its only reader")
    assert not wrong, "\n".join(wrong)


def test_environment_variables_are_few() -> None:
    from pagoda.base import env

    assert len(env.VARIABLES) <= 10


def test_no_loose_ends() -> None:
    wrong = [f"{m.name}: {found}" for m in modules() for found in re.findall(r"\b(?:TODO|FIXME|XXX|HACK)\b", m.text)]
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                wrong.append(f"{module.name}:{node.lineno} bare except")
            if isinstance(node, ast.Raise) and "NotImplementedError" in ast.dump(node):
                wrong.append(f"{module.name}:{node.lineno} raises NotImplementedError")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", [m for m in modules() if m.room], ids=lambda m: m.name)
def test_public_names_are_declared_and_documented(module) -> None:  # type: ignore[no-untyped-def]
    assert ast.get_docstring(module.tree), f"{module.name} opens without saying what it is"
    declared = [
        [element.value for element in node.value.elts if isinstance(element, ast.Constant)]
        for node in module.tree.body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
        and isinstance(node.value, ast.List | ast.Tuple)
    ]  # fmt: skip
    if not declared:
        return
    defined = {getattr(node, "name", None) for node in module.tree.body}
    for node in module.tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        defined |= {t.id for t in targets if isinstance(t, ast.Name)}
        if isinstance(node, ast.Import | ast.ImportFrom):
            defined |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
    missing = [name for name in declared[0] if name not in defined]
    assert not missing, f"{module.name}.__all__ names what is not there: {missing}"


def test_importing_pagoda_is_light() -> None:
    """`import pagoda` and `pagoda --help` load nothing heavy: their speed follows."""
    import subprocess

    code = (
        "import sys; import pagoda; from pagoda.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'numpy', 'torch', 'starlette', 'uvicorn', 'tokenizers', 'jinja2', 'zmq', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr


def test_no_machine_paths() -> None:
    """Nothing in the repository names a machine's paths."""
    import subprocess

    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT).stdout.split()
    pattern = re.compile(r"(?<![\w.])/(?:work|root|opt/wheels|home/\w+)/")
    wrong = []
    for name in files:
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        wrong += [f"{name}: {line.strip()[:100]}" for line in text.splitlines() if pattern.search(line) and "re.compile" not in line]
    assert not wrong, "\n".join(wrong)
