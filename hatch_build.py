"""Build hook: compiles the native library into the package and tags the wheel for this platform.

With a C++ compiler the wheel is `py3-none-<platform>`: one for every Python, because the library is plain C called
through ctypes. It has every instruction set of its architecture; an editable install, which stays here, those of this machine. Without
a compiler the wheel is pure; the package then runs on its numpy references and says so.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

__all__ = ["NativeLibrary"]


def _build_module(root: Path) -> ModuleType:
    path = root / "pagoda" / "csrc" / "build.py"
    spec = importlib.util.spec_from_file_location("pagoda_csrc_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class NativeLibrary(BuildHookInterface[Any]):
    """Runs for wheels, editable ones too; a source distribution holds the sources only."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        native = _build_module(Path(self.root))
        try:
            library = native.build(levels=native.levels_here() if version == "editable" else len(native.X86))
        except native.BuildError as error:
            self.app.display_warning(f"native library not built, the package will run on its numpy references:\n{error}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        if version != "editable":
            build_data["force_include"][str(library)] = "pagoda/kernels/cpu/" + library.name
