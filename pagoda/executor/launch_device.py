"""From a resolved config to the runner of a GPU. Imported only when a GPU, or the null device, was chosen: torch comes with it.

    weights -> workspace measured -> KV cache sized by what is left -> state, graphs -> runner -> kernels of the draw compiled
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from pagoda.base.config import EngineConfig
from pagoda.base.errors import OutOfMemory
from pagoda.base.hardware import HardwareFacts
from pagoda.base.plan import Masks, NewRequest, Scheduled, StepPlan
from pagoda.base.resolve import KvBudget, fit_kv_cache
from pagoda.base.types import ModelFacts, SamplingParams
from pagoda.executor.parts import BuildModel, RunnerParts
from pagoda.kernels import ops
from pagoda.kernels.triton.attention import scratch_nbytes
from pagoda.kernels.triton.plane import DevicePlane
from pagoda.kernels.triton.prepare import StateLayout
from pagoda.models.decoder import Model
from pagoda.worker.batch import Sizes
from pagoda.worker.device import Device, DevicePlace, memory_errors, open_device, read_gpu
from pagoda.worker.device_graphs import DeviceForward, graph_sizes
from pagoda.worker.device_runner import DeviceRunner
from pagoda.worker.device_state import DeviceState, Inputs
from pagoda.worker.device_steps import draw_all_ways, steps_nbytes
from pagoda.worker.device_store import (
    AttentionBackend,
    DeviceStore,
    choose_attention,
    device_block_nbytes,
    split_tokens,
)
from pagoda.worker.logits import load_processors
from pagoda.worker.table import RequestTable

__all__ = ["build_device_runner", "warm_up", "with_gpu"]

_GRAPH_NBYTES = 8 << 20  # what one graph takes beside the memory that all share, put aside until it can be measured
_GIB = 2**30


def with_gpu(hardware: HardwareFacts) -> HardwareFacts:
    """`hardware` and what torch says of its GPU."""
    found = read_gpu()
    return msgspec.structs.replace(hardware, **({"gpu_problem": found} if isinstance(found, str) else {"gpu": found}))


def build_device_runner(config: EngineConfig, facts: ModelFacts, build: BuildModel) -> RunnerParts:
    """Raises OutOfMemory saying what to lower and by how much."""
    device = open_device(config.device.device)
    with device.running():
        before = device.memory()
        place = DevicePlace(device, config.model.dtype, fixed_tiles=config.device.batch_invariant)
        with memory_errors("the weights", "quantize them (`--quantization int8`), or take a smaller model"):
            model = build(place)
        return _fit(config, facts, device, model, before.total - before.free)


def _fit(config: EngineConfig, facts: ModelFacts, device: Device, model: Model, others_nbytes: int) -> RunnerParts:
    scheduler, cache = config.scheduler, config.cache
    tokens, seqs, block = int(scheduler.max_num_batched_tokens or 0), int(scheduler.max_num_seqs or 0), int(cache.block_size or 0)
    rows = min(tokens, max(seqs, 64))
    wanted = config.model.max_model_len
    longest = facts.max_model_len if wanted == "auto" else int(wanted or 0)
    sizes = Sizes(max_tokens=tokens, max_seqs=min(seqs, tokens), max_rows=rows, max_blocks=-(-longest // block))
    backend, reason = choose_attention(config, facts, has_soft_cap=model.has_soft_cap)
    with memory_errors("a step's workspace", f"lower --max-num-batched-tokens (it is {tokens})"):
        graphs = [] if config.device.enforce_eager or not backend.is_capturable else graph_sizes(sizes.max_seqs)
        workspace, decoding = _measure_workspace(config, facts, device, model, sizes, backend, longest)
    layout = StateLayout(seqs, longest, len(facts.kv_groups), sizes.max_blocks)
    kept = steps_nbytes(seqs, facts.vocab_size, config.model.dtype)
    reserve = len(graphs) * _GRAPH_NBYTES + 4 * layout.num_words + kept
    reserve += max(decoding, _scratch(config, facts, model, sizes)) if graphs else 0  # graphs hold what a step of theirs needs
    memory = device.memory()
    limit = int(memory.total * cache.gpu_memory_utilization)
    left = limit - (memory.total - memory.free) - workspace - reserve
    if left <= 0 and cache.kv_cache_memory_bytes is None and cache.num_gpu_blocks_override is None:
        share = -left / memory.total + 0.01
        raising = f"raise it by {share:.2f}, or " if cache.gpu_memory_utilization + share <= 1 else ""
        raise OutOfMemory(
            f"nothing is left for the KV cache: of {memory.total / _GIB:.1f} GiB, {limit / _GIB:.1f} may be used (--gpu-memory-utilization "
            f"{cache.gpu_memory_utilization:g}); others have {others_nbytes / _GIB:.1f}, weights {model.nbytes / _GIB:.1f}, workspace "
            f"{workspace / _GIB:.1f}, graphs and state {reserve / _GIB:.1f}: {raising}lower --max-num-batched-tokens or --max-num-seqs, "
            f"which take the last two, by what is {-left / _GIB:.2f} GiB too much"
        )
    budget = fit_kv_cache(config, facts, left, device_block_nbytes(facts, dtype=cache.kv_cache_dtype, block_size=block))
    sizes = replace(sizes, max_blocks=-(-budget.max_model_len // block))
    layout = replace(layout, max_len=budget.max_model_len, max_blocks=sizes.max_blocks)
    missing = max(0, budget.num_blocks * budget.bytes_per_block - (memory.free - workspace))
    with memory_errors("the KV cache", f"lower --gpu-memory-utilization or --kv-cache-memory-bytes by {max(missing, 1 << 28) / _GIB:.2f} GiB"):
        store = DeviceStore(
            device, facts, dtype=cache.kv_cache_dtype, block_size=block, num_blocks=budget.num_blocks,
            fixed_tiles=config.device.batch_invariant, split_tokens=split_tokens(budget.max_model_len), backend=backend,
        )  # fmt: skip
    depth = 2 if config.device.async_scheduling else 1
    state = DeviceState(device, layout, sizes, block, num_steps=depth)
    table = RequestTable(
        max_num_seqs=seqs, max_model_len=budget.max_model_len, num_groups=len(facts.kv_groups), max_blocks=sizes.max_blocks,
        processors=load_processors(config.model.logits_processors),
    )  # fmt: skip
    forward = DeviceForward(device, model, state.inputs, store.planes)
    if graphs:
        with memory_errors("graphs", f"lower --gpu-memory-utilization by {0.02:.2f}, or --max-num-seqs, or use --enforce-eager"):
            forward.capture(graphs, seconds=config.device.graph_capture_seconds)
    elif config.device.enforce_eager:
        forward.why = "--enforce-eager"
    else:
        forward.why = f"attention backend {backend.name} cannot be captured"
    runner = DeviceRunner(device, table, state, forward, store, sizes, facts.vocab_size, num_steps=depth, dtype=config.model.dtype)
    if device.compiles:
        warm_up(runner, facts, budget)
    device.synchronize()
    return RunnerParts(
        runner, model, budget, f"triton on {device.name}", state.nbytes + kept, workspace_nbytes=workspace, graphs_nbytes=forward.graphs_nbytes,
        reasons=(reason,),
    )  # fmt: skip


def _measure_workspace(
    config: EngineConfig, facts: ModelFacts, device: Device, model: Model, sizes: Sizes, backend: AttentionBackend, longest: int
) -> tuple[int, int]:
    """Bytes that the largest step, and the largest decoding step, need beside what stays: both are run, of padding, against a cache
    of a single block."""

    def run(num_tokens: int, num_rows: int) -> None:
        store = DeviceStore(
            device, facts, dtype=config.cache.kv_cache_dtype, block_size=int(config.cache.block_size or 0), num_blocks=1,
            fixed_tiles=config.device.batch_invariant, split_tokens=split_tokens(longest), backend=backend,
        )  # fmt: skip
        inputs = Inputs.allocate(device, sizes, len(facts.kv_groups))
        inputs.kv_slots_gT.fill_(-1)
        logits_RV = DeviceForward(device, model, inputs, store.planes).run(num_tokens, sizes.max_seqs, num_rows)
        ops.sample(logits_RV, *(x[:num_rows] for x in inputs.draw))
        draw_all_ways(logits_RV)

    largest = device.peak_of(lambda: run(sizes.max_tokens, sizes.max_rows))
    return largest, device.peak_of(lambda: run(sizes.max_seqs, sizes.max_seqs))


def _scratch(config: EngineConfig, facts: ModelFacts, model: Model, sizes: Sizes) -> int:
    """Bytes of the partial results of the largest decoding step, which graphs keep."""
    plane = DevicePlane(
        config.cache.kv_cache_dtype, int(config.cache.block_size or 0), 1, facts.num_kv_heads, facts.head_dim, None, None,
        split_tokens=split_tokens(sizes.max_blocks * int(config.cache.block_size or 0)),
    )  # fmt: skip
    return scratch_nbytes(sizes.max_seqs, model.max_heads, sizes.max_blocks, plane)


def warm_up(runner: DeviceRunner, facts: ModelFacts, budget: KvBudget) -> None:
    """A prompt and a decoded token of every kind of request that the device draws, so that no later one waits for a compiler. They leave
    nothing but numbers in block 1, which belongs to nobody yet."""
    if budget.max_model_len < 4 or budget.num_blocks < 2 or runner.sizes.max_tokens < 2:
        return
    one: dict[str, Any] = {"seed": 0, "max_tokens": 2, "ignore_eos": True}
    stepped = {**one, "repetition_penalty": 1.1, "logit_bias": {0: 1.0}, "allowed_token_ids": [0, 1]}
    asked = [SamplingParams(**one, top_k=5, top_p=0.9, min_p=0.01), SamplingParams(**one), *(SamplingParams(**stepped, logprobs=n) for n in (0, 5, 20))]
    masks = Masks(slots=[0], words=b"\xff" * (4 * -(-facts.vocab_size // 32)))
    for i, params in enumerate(asked):
        blocks = [[1] for _ in facts.kv_groups]
        new = NewRequest(slot=0, request_id="", token_ids=[0, 0], num_prompt_tokens=2, params=params, block_ids=blocks, is_guided=i == 1)
        released = [0] if i else []
        runner.forward(StepPlan(step=0, new=[new], scheduled=[Scheduled(0, 0, 2)], released_slots=released))
        runner.sample(0, masks if new.is_guided else None)
        runner.forward(StepPlan(step=1, scheduled=[Scheduled(0, 2, 1)]))
        runner.sample(1, masks if new.is_guided else None)
    runner.forward(StepPlan(step=2, released_slots=[0]))
    runner.sample(2)
