"""The pieces of the GPU's path: inputs made on the device, graphs, memory, backends, and what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import triton

from pagoda.base.config import EngineConfig, config_from_kwargs
from pagoda.base.errors import ConfigError, OutOfMemory
from pagoda.base.hardware import GpuFacts, read_hardware
from pagoda.base.plan import NewRequest, Scheduled, StepPlan
from pagoda.base.resolve import resolve
from pagoda.base.types import KvGroup, ModelFacts, SamplingParams
from pagoda.executor import launch_device
from pagoda.executor.launch import build_engine
from pagoda.kernels.triton.prepare import StateLayout
from pagoda.worker.batch import BatchBuilder, Sizes
from pagoda.worker.device import Null
from pagoda.worker.device_graphs import DeviceForward, graph_sizes
from pagoda.worker.device_runner import DeviceRunner
from pagoda.worker.device_state import DeviceState
from pagoda.worker.device_store import choose_attention, split_tokens
from pagoda.worker.table import RequestTable
from tests.gpu.harness import TINY, checkpoint, null_engine, runner_of

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=0: the null device needs the interpreter")

BLOCK, GROUPS, MAX_LEN = 16, 2, 96
FACTS = ModelFacts(
    architecture="toy", vocab_size=50, max_model_len=MAX_LEN, num_layers=2,
    kv_groups=(KvGroup("full", (0,)), KvGroup("window", (1,), 20)), num_kv_planes=1, num_kv_heads=1, head_dim=64, dtype="bfloat16",
)  # fmt: skip


def table() -> RequestTable:
    return RequestTable(max_num_seqs=6, max_model_len=MAX_LEN, num_groups=GROUPS, max_blocks=6)


def plans() -> list[StepPlan]:
    """Arrivals, chunks, decoding with a new block, forced tokens, a slot given to another."""

    def new(slot: int, count: int, first_block: int) -> NewRequest:
        params = SamplingParams(temperature=0.5 + 0.1 * slot, top_k=slot, top_p=0.9, min_p=0.1 * slot, seed=(slot + 1) * 0x123456789ABC)
        blocks = [[first_block + i + 20 * g for i in range(-(-count // BLOCK))] for g in range(GROUPS)]
        ids = [(slot * 7 + i) % 50 for i in range(count)]
        return NewRequest(slot=slot, request_id=str(slot), token_ids=ids, num_prompt_tokens=count, params=params, block_ids=blocks)

    return [
        StepPlan(step=0, new=[new(4, 30, 1), new(1, 5, 3)], scheduled=[Scheduled(4, 0, 20), Scheduled(1, 0, 5)]),
        StepPlan(step=1, new=[new(2, 16, 4)], scheduled=[Scheduled(4, 20, 10), Scheduled(1, 5, 1), Scheduled(2, 0, 16)]),
        StepPlan(step=2, scheduled=[Scheduled(4, 30, 1), Scheduled(1, 6, 1), Scheduled(2, 16, 1, [[7], [27]])]),
        StepPlan(step=3, released_slots=[1], new=[new(1, 3, 9)], scheduled=[Scheduled(4, 31, 3, [], [], [11, 12]), Scheduled(1, 0, 3)]),
    ]


def test_inputs_are_those_a_cpu_builds() -> None:
    """Batch and draw inputs of every step, made by kernels from deltas, against the host's builder."""
    sizes = Sizes(max_tokens=64, max_seqs=6, max_rows=16, max_blocks=6)
    device, host, mirror = Null(), table(), table()
    state = DeviceState(device, StateLayout(6, MAX_LEN, GROUPS, 6), sizes, BLOCK, num_steps=2)
    builder = BatchBuilder(sizes, GROUPS, BLOCK)
    runner = DeviceRunner(device, host, state, SimpleNamespace(graph_for=lambda n: 0), SimpleNamespace(), sizes, 50, num_steps=2, computes=False)  # type: ignore[arg-type]
    for step, plan in enumerate(plans()):
        mirror.apply(plan)
        rows = builder.build(plan, mirror)
        ids = np.array([(step * 5 + i) % 50 for i in range(rows.num_sampled)], np.int32)
        with device.running():
            host.apply(plan)
            state.changes.take(plan, host)
            mine = runner._rows(plan)
            counts = state.send((mine.slots_S, mine.starts_S, mine.first_S1), (mine.token_R, mine.slot_R, mine.place_R), 0)
        t, s, r = rows.num_tokens, rows.num_seqs, rows.num_rows
        x = state.inputs
        for got, expected in [
            (x.token_ids_T[:t], builder.token_ids_T[:t]), (x.positions_T[:t], builder.positions_T[:t]), (x.seq_lens_S[:s], builder.seq_lens_S[:s]),
            (x.query_start_S1[: s + 1], builder.query_start_S1[: s + 1]), *((x.kv_slots_gT[g, :t], builder.slots_gT[g][:t]) for g in range(GROUPS)),
        ]:  # fmt: skip
            np.testing.assert_array_equal(got.numpy(), expected)
        for g in range(GROUPS):
            for i, length in enumerate(builder.seq_lens_S[:s]):
                used = -(-int(length) // BLOCK)
                np.testing.assert_array_equal(x.tables_gSB[g, i, :used].numpy(), builder.tables_gSB[g][i, :used])
        if mine.is_decode or r == counts.rows:
            np.testing.assert_array_equal(x.logits_idx_R[:r].numpy(), builder.logits_idx_R[:r])
            drawn = mine.place_R >= 0
            for got, expected in zip(x.draw, builder.draw.arrays(), strict=True):
                np.testing.assert_array_equal(got[:r].numpy().view(expected.dtype)[drawn], expected[:r][drawn])
        sampled = np.flatnonzero(rows.is_sampled_S)
        mirror.append_tokens(rows.slots_S[sampled], ids)
        places = mine.ends_S[sampled]
        host.append_tokens(rows.slots_S[sampled], ids)
        row_ids = np.zeros(counts.rows, np.int32)
        row_ids[mine.row_start_S1[sampled + 1] - 1] = ids
        with device.running():
            state.commit(counts, torch.from_numpy(row_ids))
        assert state._state[: 6 * MAX_LEN].reshape(6, MAX_LEN)[rows.slots_S[sampled], places].tolist() == ids.tolist()


def test_a_long_prompt_gets_larger_pinned_memory() -> None:
    device = Null(total=1 << 30)
    sizes = Sizes(max_tokens=64, max_seqs=2, max_rows=4, max_blocks=4096)
    layout = StateLayout(2, 65536, 1, 4096)
    state = DeviceState(device, layout, sizes, BLOCK, num_steps=1)
    wide = RequestTable(max_num_seqs=2, max_model_len=65536, num_groups=1, max_blocks=4096)
    ids = [i % 50 for i in range(60_000)]
    new = NewRequest(slot=1, request_id="a", token_ids=ids, num_prompt_tokens=len(ids), params=SamplingParams(seed=1), block_ids=[list(range(3750))])
    plan = StepPlan(step=0, new=[new], scheduled=[Scheduled(1, 0, 64)])
    with device.running():
        wide.apply(plan)
        state.changes.take(plan, wide)
        one = np.array([1], np.int32)
        state.send((one, 0 * one, np.array([0, 64])), (one[:0], one[:0], one[:0]), 0)
    assert state._state[65536 : 65536 + 60_000].tolist() == ids


def test_tokens_of_a_released_slot_are_forgotten() -> None:
    """A late token and the prompt of the slot's next owner must not be written to one place in one step."""
    state = DeviceState(Null(), StateLayout(6, MAX_LEN, GROUPS, 6), Sizes(64, 6, 16, 6), BLOCK, num_steps=1)
    host = table()
    state.changes.drawn(1, 2, 44)
    state.changes.drawn(3, 5, 33)
    plan = StepPlan(step=0, released_slots=[1], new=[plans()[3].new[0]], scheduled=[Scheduled(1, 0, 3)])
    host.apply(plan)
    state.changes.take(plan, host)
    indices = np.concatenate(state.changes._indices)
    assert len(set(indices.tolist())) == len(indices)
    assert 3 * MAX_LEN + 5 in indices


# ---- graphs


def test_graph_sizes_hold_any_batch() -> None:
    assert graph_sizes(1) == [1] and graph_sizes(5) == [1, 2, 4, 5]
    sizes = graph_sizes(1024)
    assert sizes == sorted(set(sizes)) and sizes[-1] == 1024
    assert all(b - a <= 16 for a, b in itertools.pairwise(sizes))


def test_graphs_are_captured_largest_first_within_their_time() -> None:
    """Sizes that are not reached take the next larger one; with no time at all there is one graph."""
    now = iter(range(100))
    forward = DeviceForward(Null(), None, None, ())  # type: ignore[arg-type]
    forward.capture([1, 2, 4, 8, 16], seconds=2.5, clock=lambda: float(next(now)))
    assert forward._sizes == [4, 8, 16]
    assert [forward.graph_for(n) for n in (1, 3, 4, 5, 16, 17)] == [4, 4, 4, 8, 16, 0]
    assert "2 smaller ones had no time" in forward.why
    forward = DeviceForward(Null(), None, None, ())  # type: ignore[arg-type]
    forward.capture([1, 2, 4], seconds=0.0)
    assert forward._sizes == [4]


def test_padding_of_a_graph_writes_no_key(tmp_path: Path) -> None:
    """One sequence in the graph of four: nothing but its own places of the cache changes."""
    local = null_engine(checkpoint("llama", tmp_path), graph_capture_seconds=0.0)
    runner = runner_of(local)
    assert runner._forward._sizes == [4]
    blocks = [[5]]
    new = NewRequest(slot=2, request_id="a", token_ids=[9], num_prompt_tokens=1, params=SamplingParams(temperature=0, seed=1), block_ids=blocks)
    runner.forward(StepPlan(step=0, new=[new], scheduled=[Scheduled(2, 0, 1)]))
    assert len(runner.sample(0).rows[0].token_ids) == 1 and runner._forward.num_replays == 1
    for plane in runner._store.planes:
        written = plane.k.abs().sum((1, 3)).nonzero().tolist()
        assert written == [[5, 0]]


# ---- memory


def test_no_memory_says_what_to_lower_and_by_how_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint("llama", tmp_path)

    def build(total: int, **kwargs: Any) -> Any:
        monkeypatch.setattr(launch_device, "open_device", lambda kind: Null(total=total))
        return null_engine(path, **{"num_gpu_blocks_override": None, "kv_cache_memory_bytes": None, **kwargs})

    with pytest.raises(OutOfMemory, match=r"no memory left for the weights.*quantize"):
        build(200_000)
    with pytest.raises(OutOfMemory, match=r"nothing is left for the KV cache.*--gpu-memory-utilization 0.5.*raise it by 0\.\d\d"):
        build(400 << 20, gpu_memory_utilization=0.5, max_num_seqs=240, max_num_batched_tokens=240)
    with pytest.raises(OutOfMemory, match=r"no memory left for the KV cache.*lower --gpu-memory-utilization or --kv-cache-memory-bytes by 0\.\d\d GiB"):
        build(80 << 20, kv_cache_memory_bytes=100 << 20)
    with pytest.raises(OutOfMemory) as caught:
        build(64 << 20, max_num_seqs=240, max_num_batched_tokens=240)
    assert "raise it" not in str(caught.value), "which would not help"
    local = build(256 << 20, gpu_memory_utilization=0.9)
    device = runner_of(local)._device
    assert local.ledger.kv_nbytes <= 0.9 * (256 << 20) and device.memory().free >= 0.05 * (256 << 20)
    assert any("workspace" in line for line in local.ledger.lines())
    assert build(256 << 20, kv_cache_memory_bytes=10 << 20).ledger.kv_nbytes <= 10 << 20


def test_splits_are_few_and_whole_tiles() -> None:
    for length in (1, 256, 8192, 8193, 131072, 1 << 20):
        split = split_tokens(length)
        assert split % 64 == 0 and split >= 256 and -(-length // split) <= 32


# ---- what is refused


def config(**kwargs: Any) -> EngineConfig:
    return config_from_kwargs("m", **kwargs)


def with_gpu(facts: ModelFacts = FACTS, **kwargs: Any) -> EngineConfig:
    gpu = GpuFacts(name="G", capability=90, memory_total=80 << 30, memory_free=79 << 30)
    return resolve(config(**kwargs), msgspec.structs.replace(read_hardware(), has_cuda=True, gpu=gpu, gpu_problem=""), facts).config


def test_a_gpu_is_taken_where_there_is_one() -> None:
    found = with_gpu()
    assert (found.device.device, found.model.dtype, found.cache.kv_cache_dtype) == ("cuda", "bfloat16", "bfloat16")
    assert found.scheduler.max_num_seqs == 256 and found.scheduler.itl_target_ms == 0
    assert with_gpu(device="cpu").device.device == "cpu"
    assert with_gpu(msgspec.structs.replace(FACTS, dtype="float16")).model.dtype == "float16"
    assert with_gpu(dtype="float32").device.device == "cpu", "auto takes what can do it"


@pytest.mark.parametrize(
    "kwargs, facts, message",
    [
        ({"dtype": "float32"}, {}, "float32 is not computed on GPUs; use `--dtype bfloat16`"),
        ({"kv_cache_dtype": "int8"}, {}, "use fp8"),
        ({}, {"head_dim": 640}, "heads are 640 wide.*use `--device cpu`"),
        ({}, {"head_dim": 20}, "heads are 20 wide"),
        ({"block_size": 24}, {}, "`--block-size` must be a power of two on a GPU"),
        ({"gpu_memory_utilization": 1.5}, {}, "`--gpu-memory-utilization` must be above 0"),
    ],
)
def test_what_a_gpu_cannot_do_is_said_in_one_line(kwargs: dict[str, Any], facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        with_gpu(msgspec.structs.replace(FACTS, **facts), device="cuda", **kwargs)
    assert "\n" not in str(caught.value)


def test_cuda_where_there_is_none(tmp_path: Path) -> None:
    nothing = msgspec.structs.replace(read_hardware(), has_cuda=False, gpu=None, gpu_problem="")
    with pytest.raises(ConfigError, match=r"`--device cuda`: this machine has no NVIDIA driver.*use `--device cpu`"):
        resolve(config(device="cuda"), nothing, FACTS)
    old = msgspec.structs.replace(nothing, has_cuda=True, gpu_problem="CUDA does not start: the driver is too old")
    with pytest.raises(ConfigError, match="driver is too old"):
        resolve(config(device="cuda"), old, FACTS)
    automatic = resolve(config(), old, FACTS)
    assert automatic.config.device.device == "cpu"
    assert any("driver is too old" in reason.why for reason in automatic.reasons), "falling back is said"
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="`--device cuda`: ") as caught:
        build_engine(config_from_kwargs(str(checkpoint("llama", tmp_path)), **{**TINY, "device": "cuda", "dtype": "bfloat16"}))
    assert "\n" not in str(caught.value)


def test_attention_backends_are_chosen_for_a_reason() -> None:
    assert choose_attention(with_gpu(), FACTS)[0].name == "triton"
    backend, reason = choose_attention(with_gpu(), msgspec.structs.replace(FACTS, head_dim=512))
    assert backend.name == "sdpa" and "not triton: heads of 512" in reason.why
    backend, reason = choose_attention(with_gpu(attention_backend="sdpa"), FACTS)
    assert backend.name == "sdpa" and reason.why == "--attention-backend"
    with pytest.raises(ConfigError, match="no soft cap"):
        choose_attention(with_gpu(attention_backend="sdpa"), FACTS, has_soft_cap=True)
    with pytest.raises(ConfigError, match="sdpa: no fp8 cache"):
        choose_attention(with_gpu(attention_backend="sdpa", kv_cache_dtype="fp8"), FACTS)
    with pytest.raises(ConfigError, match="its results depend on the batch"):
        choose_attention(with_gpu(attention_backend="sdpa", batch_invariant=True), FACTS)
