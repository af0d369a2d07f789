"""`pagoda doctor [MODEL]`: what this machine has, what would be chosen and why, whether a model would run."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from pagoda import __version__
from pagoda.base.errors import PagodaError
from pagoda.base.hardware import read_hardware
from pagoda.cli.engine_flags import add_engine_flags, engine_config
from pagoda.executor.launch import build_engine
from pagoda.kernels import table
from pagoda.kernels.cpu import library

__all__ = ["add_arguments", "run"]

OPTIONAL = ("torch", "triton", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """0 when the model would run; 1 with the reason when not."""
    _print_machine()
    try:
        engine = build_engine(engine_config(args))
    except PagodaError as error:
        print(f"\nModel: would NOT run: {error}")
        return 1
    print(f"\nModel: {args.model or 'the default model'} would run ({engine.source.path})")
    print("\n".join(engine.ledger.lines()))
    engine.close()
    return 0


def _print_machine() -> None:
    hardware = read_hardware()
    gib = 2**30
    print(f"Pagoda {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"CPU:     {hardware.cpu_model} ({hardware.machine}), {hardware.num_cores} cores for this process")
    print(f"Memory:  {hardware.memory_available / gib:.1f} of {hardware.memory_total / gib:.1f} GiB available to this process")
    print(f"GPU:     {'an NVIDIA driver is here; what torch makes of it stands below' if hardware.has_cuda else 'none'}")
    if table.numpy_device() == "cpu":
        lib = library.default()
        print(f"Kernels: native, {lib.isa} of {', '.join(lib.isas)}")
    else:
        print("Kernels: numpy references (slow): the native library was not built; install a C++ compiler and reinstall")
    found = []
    for name in OPTIONAL:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} absent")
    print(f"Python:  {sys.executable}; optional packages: {', '.join(found)}")
