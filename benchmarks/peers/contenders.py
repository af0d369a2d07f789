"""Who competes: one row per engine and precision, each in its best setting on a few cores.

Pagoda's 4-bit rows read the original Q4_1 file; its 8-bit row quantizes that file's values to int8 while loading. llama.cpp
has the same file, and Q4_0, which it repacks for speed. OpenVINO's and llama.cpp's other files come from the same values.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers import models
from benchmarks.peers.environments import CACHE, cores_wanted, ensure, python_of

__all__ = ["CONTENDERS", "PEERS", "PRECISIONS", "Contender", "chosen"]

PEERS = ("llama.cpp", "openvino", "vllm", "transformers")
PRECISIONS = ("bf16", "8bit", "4bit")


@dataclass(frozen=True)
class Contender:
    peer: str
    precision: str
    form: str  # of weights and activations, for people
    model: Callable[[], Path]
    options: dict[str, Any] = field(default_factory=dict)
    is_main: bool = True  # False: only told beside; bars are not held against it
    skips: tuple[str, ...] = ()  # workloads it takes minutes for

    @property
    def name(self) -> str:
        return f"{self.peer} {self.form}"

    @property
    def is_ours(self) -> bool:
        return self.peer == "pagoda"

    def prepare(self) -> None:
        """Environment and model. PeerAbsent when they cannot be had."""
        if not self.is_ours:
            ensure(self.peer)
        self.model()

    def command(self, num_threads: int, kv_tokens: int) -> list[str]:
        python = sys.executable if self.is_ours else str(python_of(self.peer))
        module = f"benchmarks.peers.workers.{'llama' if self.peer == 'llama.cpp' else self.peer}"
        options = [f"--option={key}={_text(value)}" for key, value in self.options.items()]
        sizes = ["--threads", str(num_threads), "--kv-tokens", str(kv_tokens)]
        return [python, "-m", module, "--model", str(self.model()), *sizes, *options]

    def environment(self, num_threads: int, kv_tokens: int) -> dict[str, str]:
        """Of the process; a network is never asked for anything."""
        changed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if self.peer == "vllm":
            changed |= {
                "VLLM_CPU_OMP_THREADS_BIND": cores_wanted(num_threads),
                "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(kv_tokens * 23040 / 2**30))),
                "VLLM_CACHE_ROOT": str(CACHE / "vllm/cache"),
                "VLLM_NO_USAGE_STATS": "1",
            }
        if self.peer == "transformers":
            changed |= {"OMP_NUM_THREADS": str(num_threads)}
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}  # an installed package has its bytecode
        return {**inherited, **changed}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _gguf(kind: str) -> Callable[[], Path]:
    return lambda: models.gguf(kind)


def _openvino(precision: str) -> Callable[[], Path]:
    return lambda: models.openvino_folder(precision)


_BYTES = {"linear_activations": "int8", "kv_cache_dtype": "int8"}

CONTENDERS = (
    Contender("llama.cpp", "bf16", "BF16", _gguf("BF16")),
    Contender("llama.cpp", "8bit", "Q8_0", _gguf("Q8_0")),
    Contender("llama.cpp", "4bit", "Q4_1", models.default_file),
    Contender("llama.cpp", "4bit", "Q4_0", _gguf("Q4_0")),
    Contender("openvino", "bf16", "bf16", _openvino("bf16"), {"INFERENCE_PRECISION_HINT": "bf16"}),
    Contender("openvino", "8bit", "int8", _openvino("8bit")),
    Contender("openvino", "4bit", "int4 g64", _openvino("4bit")),
    Contender("vllm", "bf16", "bf16", models.hf_folder),
    Contender("transformers", "bf16", "bf16", models.hf_folder, skips=("W4",)),
    Contender("pagoda", "bf16", "bf16", models.hf_folder),
    Contender("pagoda", "8bit", "int8, int8 activations and KV", models.default_file, {"quantization": "int8", **_BYTES}),
    Contender("pagoda", "4bit", "Q4_1, int8 activations and KV", models.default_file, _BYTES),
    Contender("pagoda", "4bit", "Q4_1, int16 activations", models.default_file, is_main=False),
)


def chosen(peers: Iterable[str], precisions: Iterable[str]) -> list[Contender]:
    """Ours come last. ValueError names what does not exist."""
    peers, precisions = list(peers), list(precisions)
    for kind, given, known in (("peer", peers, PEERS), ("precision", precisions, PRECISIONS)):
        for each in given:
            if each not in known:
                raise ValueError(f"there is no {kind} `{each}`; known: {', '.join(known)}")
    return [c for c in CONTENDERS if c.precision in precisions and (c.is_ours or c.peer in peers)]
