"""Compiles every Triton kernel for GPUs that are not there, as engines of known models would launch it.

    python -m tests.kernels_triton.aot [--targets sm_80,gfx942] [--models llama,qwen] [--only attention,linear]

The ops are called with torch's `meta` tensors, which have shapes and no memory, while launches are collected: the grid, the
compile-time arguments and the types are those of a real engine, and an op that read a value back would fail here.
One JSON object a line: kernel, model, target, shared (bytes), registers, spilled (bytes of stack on NVIDIA, registers on AMD).
Run with TRITON_INTERPRET=0: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pagoda.kernels import logits_ops, ops, table
from pagoda.kernels.triton.embedding import dequantize
from pagoda.kernels.triton.launch import Arch, Launch, collect
from pagoda.kernels.triton.plane import allocate_device_plane
from pagoda.kernels.triton.prepare import (
    Counts,
    StateLayout,
    apply_changes,
    commit_tokens,
    prepare_rows,
    prepare_sequences,
)
from pagoda.kernels.triton.weight import DeviceWeight

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_POINTERS = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8", torch.int8: "*i8",
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """What a kernel sees of a model: the sizes of its arrays, and which extras its layers have."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    dtype: Any = torch.bfloat16
    kv: str = ""  # the type of `dtype` unless said otherwise
    act: str = "silu"
    window: int = 0
    soft_cap: float = 0.0
    has_sinks: bool = False
    has_head_norm: bool = False
    formats: tuple[str, ...] = ()  # of weights, beside plain floats
    fixed_tiles: bool = False

    @property
    def kv_type(self) -> str:
        return self.kv or {torch.bfloat16: "bfloat16", torch.float16: "float16"}[self.dtype]


_QUANTIZED = ("q8_0", "q4_0", "q4_1", "q4_k", "q5_k", "q6_k")
MODELS = {
    "llama-3.1-8b": Model(4096, 32, 8, 128, 14336, 128256, formats=("q8_0", "q4_1")),
    "llama-3.1-8b-fp16": Model(4096, 32, 8, 128, 14336, 128256, dtype=torch.float16, formats=_QUANTIZED),
    "llama-3.1-8b-fp8-kv": Model(4096, 32, 8, 128, 14336, 128256, kv="fp8_e4m3"),
    "llama-3.1-8b-invariant": Model(4096, 32, 8, 128, 14336, 128256, fixed_tiles=True),
    "qwen3-0.6b": Model(1024, 16, 8, 128, 3072, 151936, has_head_norm=True, formats=_QUANTIZED),
    "qwen3-8b": Model(4096, 32, 8, 128, 12288, 151936, has_head_norm=True),
    "smollm2-135m": Model(576, 9, 3, 64, 1536, 49152, formats=("q8_0",)),
    "gpt-oss-like": Model(2880, 64, 8, 64, 2880, 201088, window=128, has_sinks=True),
    "gemma-2-2b": Model(2304, 8, 4, 256, 9216, 256000, act="gelu_tanh", window=4096, soft_cap=50.0),
    "gemma-2-2b-fp8-kv": Model(2304, 8, 4, 256, 9216, 256000, kv="fp8_e4m3", act="gelu_tanh", window=4096, soft_cap=50.0),
    "gemma-2-2b-invariant": Model(2304, 8, 4, 256, 9216, 256000, act="gelu_tanh", soft_cap=50.0, fixed_tiles=True),
    "phi-3-mini": Model(3072, 32, 32, 96, 8192, 32064),
    "falcon-like": Model(4544, 71, 1, 64, 18176, 65024, act="gelu", dtype=torch.float16),
}
_BITS = {"q8_0": 8, "q4_0": 4, "q4_1": 4, "q4_k": 4, "q5_k": 8, "q6_k": 8, "bf16": 16}


def _meta(*shape: int, dtype: Any = torch.float32) -> Any:
    return torch.empty(shape, dtype=dtype, device="meta")


def _weight(model: Model, format: str, n: int, k: int) -> DeviceWeight:
    bits, padded = _BITS[format], -(-k // 128) * 128
    if bits == 16:
        return DeviceWeight(format, (n, k), model.dtype, 16, _meta(n, k, dtype=model.dtype), fixed_tiles=model.fixed_tiles)
    group = 16 if format == "q6_k" else 32
    data = _meta(n, padded // 2, dtype=torch.uint8) if bits == 4 else _meta(n, padded, dtype=torch.int8)
    scales = _meta(padded // group, n, dtype=torch.float32 if format.endswith("_k") else torch.float16)
    minima = scales if format in ("q4_1", "q4_k", "q5_k") else None
    return DeviceWeight(format, (n, k), model.dtype, bits, data, scales, minima, group, 8 if format == "q4_0" else 0, model.fixed_tiles)


def _forward(model: Model, tokens: int, seqs: int) -> None:
    """One layer, one embedding and one head, as the model's layers call them."""
    positions, ids = _meta(tokens, dtype=torch.int32), _meta(tokens, dtype=torch.int32)
    x = ops.embedding(ids, _weight(model, "bf16", model.vocab, model.hidden), scale=1.0)
    h = ops.rms_norm(x, _meta(model.hidden), eps=1e-6)
    ops.rms_norm(x, _meta(model.hidden), eps=1e-6, residual=h)
    q_width, kv_width = model.heads * model.head_dim, model.kv_heads * model.head_dim
    qkv = ops.linear(h, _weight(model, "bf16", q_width + 2 * kv_width, model.hidden))
    q, k, v = qkv[:, :q_width], qkv[:, q_width : q_width + kv_width], qkv[:, q_width + kv_width :]
    if model.has_head_norm:
        ops.rms_norm(q, _meta(model.head_dim), eps=1e-6, out=q)
    for side in (q, k):
        ops.rope(side, positions, _meta(8192, model.head_dim), head_dim=model.head_dim, out=side)
    plane = allocate_device_plane(
        dtype=model.kv_type, block_size=16, num_blocks=1024, num_kv_heads=model.kv_heads, head_dim=model.head_dim, device="meta",
        fixed_tiles=model.fixed_tiles,
    )  # fmt: skip
    ops.kv_write(k, v, plane, _meta(tokens, dtype=torch.int64))
    o = ops.attention(
        q, plane, _meta(seqs, 512, dtype=torch.int32), _meta(seqs + 1, dtype=torch.int32), _meta(seqs, dtype=torch.int32),
        scale=0.1, head_dim=model.head_dim, window=model.window, soft_cap=model.soft_cap,
        sinks_H=_meta(model.heads) if model.has_sinks else None,
    )  # fmt: skip
    x = ops.linear(o, _weight(model, "bf16", model.hidden, q_width), residual=x)
    gate_up = ops.linear(x, _weight(model, "bf16", 2 * model.ffn, model.hidden))
    y = ops.act_and_mul(gate_up, model.act)
    for format in model.formats:
        wide = -(-model.ffn // 256) * 256
        weight = _weight(model, format, model.hidden, wide)
        ops.linear(_meta(tokens, wide, dtype=model.dtype), weight, residual=x)
        ops.embedding(ids, weight)
        dequantize(weight)  # as a product of many rows does
    logits = ops.linear(y[:, : model.hidden], _weight(model, "bf16", model.vocab, model.hidden))
    ops.soft_cap(logits, 30.0, out=logits)


def _sampling(model: Model, rows: int) -> None:
    logits, ints = _meta(rows, model.vocab), _meta(rows, dtype=torch.int32)
    floats, longs = _meta(rows), _meta(rows, dtype=torch.int64)
    for x in (logits, logits.to(model.dtype)):
        ops.sample(x, floats, ints, floats, floats, longs, longs)
        ops.row_logsumexp(x)
        ops.row_is_finite(x)
        for count in (1, 21):
            logits_ops.pick_logprobs(x, ints, floats, _meta(rows, count, dtype=torch.int32))
        logits_ops.apply_bitmask(x, _meta(rows, -(-model.vocab // 32), dtype=torch.int32), ints)
        for places in (None, ints):
            logits_ops.copy_rows(x, ints, logits if places is None else x, places)
    seen = _meta(rows, model.vocab, dtype=torch.int32)
    logits_ops.penalize(logits, seen, ints, floats, floats, floats)
    logits_ops.add_at(logits, ints, ints, floats)
    logits_ops.put_ids(ints, ints, ints, _meta(rows, dtype=torch.int8))
    logits_ops.top_tokens(logits, 20)
    for longest in (1, 1000):
        logits_ops.count_tokens(seen, _meta(rows, 8192, dtype=torch.int32), ints, ints, ints, ints, longest=longest)


def _preparing(slots: int, num_groups: int) -> None:
    """What a step starts before its forward and behind its draw."""
    layout = StateLayout(slots, 8192, num_groups, 512)
    state, stage = _meta(layout.num_words, dtype=torch.int32), _meta(65536, dtype=torch.int32)
    ints, longs, floats = _meta(slots, dtype=torch.int32), _meta(slots, dtype=torch.int64), _meta(slots)
    counts = Counts(33, slots, slots)
    apply_changes(state, stage, counts.changes)
    prepare_sequences(
        state, layout, stage, counts, ints, ints, ints, ints, _meta(num_groups, slots, 512, dtype=torch.int32),
        _meta(num_groups, 8192, dtype=torch.int64), num_padded=0, block_size=16,
    )  # fmt: skip
    prepare_rows(state, layout, stage, counts, ints, (floats, ints, floats, floats, longs, longs), num_padded=0)
    commit_tokens(state, layout, stage, counts, ints)


def launches(model: Model, target: str) -> list[Launch]:
    """Every launch of a decoding step of 256, of 8, of one row, of a prefill and of sampling, with the tiles of `target`."""
    gpu = TARGETS[target]
    arch = Arch(gpu.backend, int(str(gpu.arch).removeprefix("gfx")))
    with table.backend("cuda"), collect(arch) as found:
        for tokens, seqs in ((256, 256), (8, 8), (1, 1), (160, 4)):
            _forward(model, tokens, seqs)
        _sampling(model, 256)
        _preparing(256, 2 if model.window else 1)
    return found


def specialised(launch: Launch) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Signature, constants and attributes as the compiler of a launch sees them: integers of 1 are constants, and what divides
    by 16 is known to."""  # fmt: skip
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    values = iter(launch.args)
    for i, parameter in enumerate(launch.kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name], constants[i,] = "constexpr", launch.meta[parameter.name]
            continue
        value = next(values)
        is_aligned = isinstance(value, torch.Tensor)
        if isinstance(value, int) and parameter.do_not_specialize:
            signature[parameter.name] = "i32"
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1:
            signature[parameter.name], constants[i,] = "constexpr", 1
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            is_aligned = value % 16 == 0
        if is_aligned:
            attributes[i,] = [["tt.divisibility", 16]]
    assert next(values, None) is None, f"{launch.kernel.__name__} takes fewer arguments than it is given"
    return signature, constants, attributes


def _spilled(compiled: Any, target: GPUTarget) -> tuple[int, int]:
    """Registers of a thread, and what did not fit into them."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        found = {name: int(value) for name, value in re.findall(r"\.(\w+): +(\d+)", text)}
        return found["vgpr_count"], found["vgpr_spill_count"] + found["sgpr_spill_count"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def compile_all(models: list[str], targets: list[str], only: list[str]) -> Iterator[dict[str, Any]]:
    """One record for each different kernel; a kernel that does not compile has `error`."""
    done: set[str] = set()
    for target in targets:
        for name in models:
            for launch in launches(MODELS[name], target):
                kernel = launch.kernel.__name__.strip("_").removesuffix("_kernel")
                arguments = specialised(launch)
                identity = f"{target} {kernel} {arguments} {launch.options}"
                if identity in done or (only and not any(part in kernel for part in only)):
                    continue
                done.add(identity)
                meta = {**launch.meta, **launch.options}
                yield {"kernel": kernel, "model": name, "target": target, "meta": meta, **_compile(launch, arguments, target)}


def _compile(launch: Launch, arguments: tuple[Any, Any, Any], target: str) -> dict[str, Any]:
    try:
        compiled = triton.compile(ASTSource(launch.kernel, *arguments), target=TARGETS[target], options=launch.options)
    except Exception as error:  # reported with its kernel, so that one failure does not hide the others
        return {"error": f"{type(error).__name__}: {error}"[:2000]}
    registers, spilled = _spilled(compiled, TARGETS[target])
    return {"shared": compiled.metadata.shared, "registers": registers, "spilled": spilled}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--models", default="", help="parts of names; all without")
    parser.add_argument("--only", default="", help="parts of kernel names; all without")
    options = parser.parse_args()
    parts = options.models.split(",")
    models = [name for name in MODELS if any(part in name for part in parts)]
    for record in compile_all(models, options.targets.split(","), [part for part in options.only.split(",") if part]):
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
