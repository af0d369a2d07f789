"""resolve(): the only place where one setting depends on another, or on the machine, or on the model.

Pure: the user's config, the hardware's facts and the model's facts go in; a complete config and the reason for every
automatic choice come out. The size of the KV cache is the one thing settled later, by `fit_kv_cache`, because it depends
on what the loaded weights left over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pagoda.base.config import CacheConfig, DeviceConfig, EngineConfig, ModelConfig, SchedulerConfig
from pagoda.base.errors import ConfigError, OutOfMemory
from pagoda.base.hardware import HardwareFacts
from pagoda.base.types import ModelFacts

__all__ = ["KvBudget", "Reason", "Resolved", "fit_kv_cache", "resolve"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
MAX_GPU_HEAD_DIM = 512


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
    device = _resolve_device(config, hardware, facts, reasons)
    is_gpu = device.device != "cpu"
    model = _resolve_model(config.model, facts, reasons, device=device.device)
    resolve_cache = _resolve_gpu_cache if is_gpu else _resolve_cache
    cache = resolve_cache(config.cache, model, facts, reasons)
    scheduler = _resolve_scheduler(config.scheduler, model, facts, reasons, is_gpu=is_gpu)
    return Resolved(EngineConfig(model=model, cache=cache, scheduler=scheduler, device=device), tuple(reasons))


def _resolve_device(whole: EngineConfig, hardware: HardwareFacts, facts: ModelFacts, reasons: list[Reason]) -> DeviceConfig:
    config = whole.device
    device = config.device
    if device != "cpu":
        problem = _no_gpu(device, hardware) or _unsuitable(whole, hardware, facts)
        if problem and device != "auto":
            raise ConfigError(f"`--device {device}`: {problem}")
        if device == "auto":
            device = "cpu" if problem else "cuda"
            if hardware.gpu is not None and not problem:
                reasons.append(Reason("device", "cuda", f"{hardware.gpu.name}, {hardware.gpu.memory_total / 2**30:.0f} GiB"))
            else:
                why = f"; not the GPU: {problem}" if hardware.has_cuda else ""
                reasons.append(Reason("device", "cpu", f"{hardware.cpu_model}, {hardware.num_cores} cores for this process{why}"))
    if config.graph_capture_seconds < 0:
        raise ConfigError(f"`--graph-capture-seconds` must not be negative, got {config.graph_capture_seconds}")
    threads = config.num_threads
    if threads is None:
        threads = hardware.num_cores
        reasons.append(Reason("num_threads", str(threads), f"{len(hardware.cpu_ids)} cores by affinity, {hardware.num_cores} after the cgroup's quota"))
    if threads < 1:
        raise ConfigError(f"`--num-threads` must be at least 1, got {threads}")
    return replace(config, device=device, num_threads=threads)


def _no_gpu(device: str, hardware: HardwareFacts) -> str:
    """Why there is no GPU to compute on; "" when there is one, or none is needed."""
    if device == "null" or hardware.gpu is not None:
        return ""
    if hardware.gpu_problem:
        return f"{hardware.gpu_problem}"
    return "this machine has no NVIDIA driver (no /dev/nvidiactl); use `--device cpu`"


def _unsuitable(config: EngineConfig, hardware: HardwareFacts, facts: ModelFacts) -> str:
    """Why a GPU's kernels cannot compute this model as it is asked for; "" when they can."""
    if facts.head_dim % 8 or not 8 <= facts.head_dim <= MAX_GPU_HEAD_DIM:
        return f"attention heads are {facts.head_dim} wide, and a GPU's kernels take multiples of 8 up to {MAX_GPU_HEAD_DIM}; use `--device cpu`"
    if config.model.dtype == "float32" and config.device.device != "null":
        return "float32 is not computed on GPUs; use `--dtype bfloat16` or `--dtype float16`"
    if config.cache.kv_cache_dtype == "int8":
        return "`--kv-cache-dtype int8` is a CPU's; use fp8, which has as few bytes"
    if config.cache.kv_cache_dtype == "float32" and config.device.device != "null":
        return "`--kv-cache-dtype float32` is a CPU's; use auto or fp8"
    return ""


def _resolve_model(config: ModelConfig, facts: ModelFacts, reasons: list[Reason], *, device: str = "cpu") -> ModelConfig:
    dtype = config.dtype
    if dtype == "float16" and device == "cpu":
        raise ConfigError("`--dtype float16`: CPUs do not compute in float16; use bfloat16, or float32 which loses nothing")
    if dtype == "auto" and device != "cpu":
        dtype = "float16" if facts.dtype == "float16" else "bfloat16"
        is_same = dtype == facts.dtype
        reasons.append(Reason("dtype", dtype, "as the checkpoint" if is_same else f"the checkpoint is {facts.dtype}; GPUs compute in 16 bits"))
    if dtype == "auto":
        dtype = "bfloat16"
        why = {"bfloat16": "as the checkpoint", "float32": "the checkpoint is float32; bfloat16 halves memory and time (`--dtype float32` keeps it)",
               "float16": "the checkpoint is float16, which CPUs do not compute in (`--dtype float32` loses nothing)"}.get(facts.dtype)
        reasons.append(Reason("dtype", dtype, why or f"for the weights that are not {facts.dtype} blocks"))
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
    is_shown = device == "cpu" and config.linear_activations == "auto"
    if is_shown and (config.quantization or facts.dtype not in ("float32", "bfloat16", "float16")):
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


def _resolve_gpu_cache(config: CacheConfig, model: ModelConfig, facts: ModelFacts, reasons: list[Reason]) -> CacheConfig:
    block_size = config.block_size
    if block_size is None:
        block_size = 16
        reasons.append(Reason("block_size", "16", "keys of a head in one page are read as one piece"))
    if block_size < 8 or block_size & (block_size - 1):
        raise ConfigError(f"`--block-size` must be a power of two on a GPU, 8 at least, got {block_size}")
    if not 0.0 < config.gpu_memory_utilization <= 1.0:
        raise ConfigError(f"`--gpu-memory-utilization` must be above 0 and at most 1, got {config.gpu_memory_utilization}")
    dtype = config.kv_cache_dtype
    if dtype == "auto":
        dtype = model.dtype
        reasons.append(Reason("kv_cache_dtype", dtype, f"--dtype is {model.dtype}"))
    return replace(config, block_size=block_size, kv_cache_dtype=dtype)


def _resolve_scheduler(
    config: SchedulerConfig, model: ModelConfig, facts: ModelFacts, reasons: list[Reason], *, is_gpu: bool
) -> SchedulerConfig:
    seqs = config.max_num_seqs
    if seqs is None:
        seqs = 256 if is_gpu else 128
        reasons.append(Reason("max_num_seqs", str(seqs), "default on a GPU" if is_gpu else "default on a CPU"))
    if seqs < 1:
        raise ConfigError(f"`--max-num-seqs` must be at least 1, got {seqs}")
    length = facts.max_model_len if model.max_model_len == "auto" else int(model.max_model_len or 0)
    tokens = config.max_num_batched_tokens
    if tokens is None:
        tokens = max(8192 if is_gpu else 512, seqs)
        if not config.enable_chunked_prefill:
            tokens = max(tokens, length)
        why = "enough to fill a GPU" if is_gpu else "chunks short enough for streams beside a long prompt"
        reasons.append(Reason("max_num_batched_tokens", str(tokens), why))
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
    target = config.itl_target_ms
    if target is None and is_gpu:
        target = 0.0
        reasons.append(Reason("itl_target_ms", "0", "a GPU computes a step's prompts in little more time than its decoding"))
    return replace(config, max_num_seqs=seqs, max_num_batched_tokens=tokens, max_num_queued_reqs=queued, itl_target_ms=target)


def fit_kv_cache(config: EngineConfig, facts: ModelFacts, memory_available: int, bytes_per_block: int) -> KvBudget:
    """Number of blocks, from explicit bytes, an explicit count, or a share of `memory_available` (bytes left after loading; on a
    GPU all of them: what --gpu-memory-utilization leaves beside weights, workspace and graphs).

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
        is_gpu = config.device.device != "cpu"
        share = memory_available if is_gpu else int(memory_available * cache.cpu_memory_utilization)
        useful = per_request * int(config.scheduler.max_num_seqs or 1) + 1
        num, why = max(0, share) // bytes_per_block, f"{cache.cpu_memory_utilization:.0%} of {memory_available / 2**30:.1f} GiB available"
        if is_gpu:
            why = f"{share / 2**30:.1f} GiB left of {cache.gpu_memory_utilization:.0%} of the device's memory"
        if useful < num:
            num, why = useful, f"all {config.scheduler.max_num_seqs} requests at full length"
    fits = _longest_request(config, facts, num - 1)
    if auto:
        length = min(length, fits)
        per_request = _blocks_per_request(config, facts, length)
    if length < 1 or num - 1 < per_request:
        raise OutOfMemory(
            f"the KV cache ({why}: {max(0, num) * bytes_per_block / 2**20:.0f} MiB) holds one request of {fits} tokens, but one request of max_model_len={length} needs {(per_request + 1) * bytes_per_block / 2**20:.0f} MiB; "
            f"lower --max-model-len (or `auto`), or raise --kv-cache-memory-bytes{'' if config.device.device == 'cpu' else ' or --gpu-memory-utilization'}"
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
