"""resolve(): the only place where one setting depends on another, or on the machine, or on the model.

Pure: the user's config, the hardware's facts and the model's facts go in; a complete config and the reason for every
automatic choice come out. The size of the KV cache is the one thing settled later, by `fit_kv_cache`, because it depends
on what the loaded weights left over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pagoda.base.config import CacheConfig, DeviceConfig, EngineConfig, ModelConfig, SchedulerConfig
from pagoda.base.errors import ConfigError, OutOfMemory
from pagoda.base.hardware import HardwareFacts
from pagoda.base.types import ModelFacts

__all__ = ["KvBudget", "Reason", "Resolved", "fit_kv_cache", "resolve"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Reason:
    """One automatic choice: what, and why in a few words."""

    name: str
    value: str
    why: str


@dataclass(frozen=True)
class Resolved:
    config: EngineConfig
    reasons: tuple[Reason, ...]


@dataclass(frozen=True)
class KvBudget:
    """The KV cache as decided: `num_blocks` includes the null block 0."""

    num_blocks: int
    block_size: int
    max_model_len: int
    bytes_per_block: int
    blocks_per_request: int  # of a request of max_model_len
    reason: Reason

    @property
    def max_concurrency(self) -> float:
        """Requests of max_model_len that fit at once."""
        return (self.num_blocks - 1) / self.blocks_per_request


def resolve(config: EngineConfig, hardware: HardwareFacts, facts: ModelFacts) -> Resolved:
    """Fills every None of `config`, or raises ConfigError saying what to change."""
    reasons: list[Reason] = []
    device = _resolve_device(config.device, hardware, reasons)
    model = _resolve_model(config.model, facts, reasons)
    cache = _resolve_cache(config.cache, model, facts, reasons)
    scheduler = _resolve_scheduler(config.scheduler, model, facts, reasons)
    return Resolved(EngineConfig(model=model, cache=cache, scheduler=scheduler, device=device), tuple(reasons))


def _resolve_device(config: DeviceConfig, hardware: HardwareFacts, reasons: list[Reason]) -> DeviceConfig:
    if config.device == "cuda":
        raise ConfigError("`--device cuda`: this version has no GPU kernels yet; use `--device cpu`")
    device: Literal["cpu"] = "cpu"
    if config.device == "auto":
        reasons.append(Reason("device", "cpu", f"{hardware.cpu_model}, {hardware.num_cores} cores for this process"))
    threads = config.num_threads
    if threads is None:
        threads = hardware.num_cores
        reasons.append(Reason("num_threads", str(threads), f"{len(hardware.cpu_ids)} cores by affinity, {hardware.num_cores} after the cgroup's quota"))
    if threads < 1:
        raise ConfigError(f"`--num-threads` must be at least 1, got {threads}")
    return replace(config, device=device, num_threads=threads)


def _resolve_model(config: ModelConfig, facts: ModelFacts, reasons: list[Reason]) -> ModelConfig:
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16"
        why = {"bfloat16": "as the checkpoint", "float32": "the checkpoint is float32; bfloat16 halves memory and time (`--dtype float32` keeps it)",
               "float16": "the checkpoint is float16, which CPUs do not compute in (`--dtype float32` loses nothing)"}
        reasons.append(Reason("dtype", dtype, why.get(facts.dtype, f"for the weights that are not {facts.dtype} blocks")))
    length = config.max_model_len
    if length is None:
        length = facts.max_model_len
        reasons.append(Reason("max_model_len", str(length), "the length the model was trained for"))
    elif length != "auto":
        if length < 1:
            raise ConfigError(f"`--max-model-len` must be at least 1 or `auto`, got {length}")
        if length > facts.max_model_len:
            raise ConfigError(f"`--max-model-len {length}` is more than the {facts.max_model_len} tokens the model was trained for; lower it")
    activations = config.linear_activations
    if activations == "auto":
        activations = "int16"
    if config.linear_activations == "auto" and (config.quantization or facts.dtype not in ("float32", "bfloat16", "float16")):
        reasons.append(Reason("linear_activations", activations, "what quantized weights are multiplied with; `--linear-activations int8` trades quality for speed"))
    return replace(config, dtype=dtype, max_model_len=length, linear_activations=activations)


def _resolve_cache(config: CacheConfig, model: ModelConfig, facts: ModelFacts, reasons: list[Reason]) -> CacheConfig:
    block_size = config.block_size
    if block_size is None:
        block_size = 16
        reasons.append(Reason("block_size", "16", "one vector register of keys"))
    if block_size < 16 or block_size % 16:
        raise ConfigError(f"`--block-size` must be a multiple of 16, got {block_size}")
    if not 0.0 < config.cpu_memory_utilization <= 1.0:
        raise ConfigError(f"`--cpu-memory-utilization` must be above 0 and at most 1, got {config.cpu_memory_utilization}")
    dtype = config.kv_cache_dtype
    if dtype == "auto":
        dtype = "float32" if model.dtype == "float32" else "bfloat16"
        reasons.append(Reason("kv_cache_dtype", dtype, f"--dtype is {model.dtype}"))
    if dtype not in ("float32", "bfloat16", "int8"):
        hint = "; int8 has as few bytes and needs no hardware for 8-bit floats" if dtype.startswith("fp8") else ""
        raise ConfigError(f"`--kv-cache-dtype {dtype}` is not one of auto, float32, bfloat16, int8{hint}")
    if dtype == "int8" and facts.head_dim % 4:
        raise ConfigError(f"`--kv-cache-dtype int8` needs heads of a multiple of 4, the model's are {facts.head_dim} wide; take bfloat16")
    return replace(config, block_size=block_size, kv_cache_dtype=dtype)


def _resolve_scheduler(config: SchedulerConfig, model: ModelConfig, facts: ModelFacts, reasons: list[Reason]) -> SchedulerConfig:
    seqs = config.max_num_seqs
    if seqs is None:
        seqs = 128
        reasons.append(Reason("max_num_seqs", "128", "default on a CPU"))
    if seqs < 1:
        raise ConfigError(f"`--max-num-seqs` must be at least 1, got {seqs}")
    length = facts.max_model_len if model.max_model_len == "auto" else int(model.max_model_len or 0)
    tokens = config.max_num_batched_tokens
    if tokens is None:
        tokens = max(512, seqs)
        if not config.enable_chunked_prefill:
            tokens = max(tokens, length)
        reasons.append(Reason("max_num_batched_tokens", str(tokens), "chunks short enough for streams beside a long prompt"))
    if tokens < 1:
        raise ConfigError(f"`--max-num-batched-tokens` must be at least 1, got {tokens}")
    if not config.enable_chunked_prefill and tokens < length:
        raise ConfigError(f"without chunked prefill `--max-num-batched-tokens` ({tokens}) must be at least the model length ({length})")
    if not 0.0 <= config.watermark < 1.0:
        raise ConfigError(f"`--watermark` must be at least 0 and below 1, got {config.watermark}")
    if config.long_prefill_token_threshold < 0:
        raise ConfigError(f"`--long-prefill-token-threshold` must not be negative, got {config.long_prefill_token_threshold}")
    if config.itl_target_ms is not None and config.itl_target_ms < 0:
        raise ConfigError(f"`--itl-target-ms` must not be negative, got {config.itl_target_ms}")
    queued = config.max_num_queued_reqs
    queued = None if queued is None or queued < 0 else queued
    return replace(config, max_num_seqs=seqs, max_num_batched_tokens=tokens, max_num_queued_reqs=queued)


def fit_kv_cache(config: EngineConfig, facts: ModelFacts, memory_available: int, bytes_per_block: int) -> KvBudget:
    """Number of blocks, from explicit bytes, an explicit count, or a share of `memory_available` (bytes left after loading).

    Raises OutOfMemory with the numbers when not even one request of max_model_len fits and the length was not `auto`.
    """
    cache, block = config.cache, int(config.cache.block_size or 0)
    auto = config.model.max_model_len == "auto"
    length = facts.max_model_len if auto else int(config.model.max_model_len or 0)
    per_request = _blocks_per_request(config, facts, length)
    if cache.num_gpu_blocks_override is not None:
        num, why = cache.num_gpu_blocks_override + 1, "--num-gpu-blocks-override"
    elif cache.kv_cache_memory_bytes is not None:
        num, why = cache.kv_cache_memory_bytes // bytes_per_block, "--kv-cache-memory-bytes"
    else:
        share = int(memory_available * cache.cpu_memory_utilization)
        useful = per_request * int(config.scheduler.max_num_seqs or 1) + 1
        num, why = share // bytes_per_block, f"{cache.cpu_memory_utilization:.0%} of {memory_available / 2**30:.1f} GiB available"
        if useful < num:
            num, why = useful, f"all {config.scheduler.max_num_seqs} requests at full length"
    fits = _longest_request(config, facts, num - 1)
    if auto:
        length = min(length, fits)
        per_request = _blocks_per_request(config, facts, length)
    if length < 1 or num - 1 < per_request:
        raise OutOfMemory(
            f"the KV cache ({why}: {max(0, num) * bytes_per_block / 2**20:.0f} MiB) holds one request of {fits} tokens, but one request of max_model_len={length} needs {(per_request + 1) * bytes_per_block / 2**20:.0f} MiB; "
            f"lower --max-model-len (or `auto`), or raise --kv-cache-memory-bytes"
        )
    return KvBudget(num, block, length, bytes_per_block, per_request, Reason("num_kv_blocks", str(num), why))


def _blocks_per_request(config: EngineConfig, facts: ModelFacts, length: int) -> int:
    """Blocks a request of `length` tokens owns at most, all KV groups together."""
    block, step = int(config.cache.block_size or 0), int(config.scheduler.max_num_batched_tokens or 0)
    return sum(g.max_live_blocks(length, block_size=block, max_tokens_per_step=step) for g in facts.kv_groups)


def _longest_request(config: EngineConfig, facts: ModelFacts, num_blocks: int) -> int:
    """Tokens of the longest single request that many blocks can hold, at most the model's length (bisection)."""
    low, high = 0, facts.max_model_len
    while low < high:
        middle = (low + high + 1) // 2
        if _blocks_per_request(config, facts, middle) <= num_blocks:
            low = middle
        else:
            high = middle - 1
    return low
