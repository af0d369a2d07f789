"""What only a GPU would show: memory reused while a copy is under way, host arrays among the operands, kernels compiled too late."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton

from pagoda.base.plan import NewRequest, Scheduled, StepPlan
from pagoda.base.resolve import KvBudget, Reason
from pagoda.base.types import SamplingParams
from pagoda.executor import launch_device
from pagoda.executor.launch import LocalEngine
from pagoda.executor.launch_device import warm_up
from pagoda.kernels import ops, table
from pagoda.kernels.triton.launch import Launch, collect
from pagoda.worker.device import Event, Null, Pinned
from pagoda.worker.device_steps import draw_all_ways
from tests.e2e.harness import generate
from tests.gpu.harness import checkpoint, null_engine, runner_of
from tests.gpu.test_device_steps import PARAMS, PROMPTS

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=0: the null device needs the interpreter")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint("llama", tmp_path_factory.mktemp("hazards"), num_hidden_layers=1)


class Late(Null):
    """Copies end when an event behind them is waited for: until then what was to be read must stay as it is, and what was to be
    written holds garbage."""

    def __init__(self) -> None:
        super().__init__()
        self._pinned: set[int] = set()
        self.under_way: list[Callable[[], None]] = []
        self.num_checked = 0

    def pinned(self, shape: Any, dtype: str) -> Pinned:
        made = super().pinned(shape, dtype)
        self._pinned.add(made.tensor.untyped_storage().data_ptr())
        return made

    def copy(self, target: Any, source: Any) -> None:
        if source.untyped_storage().data_ptr() in self._pinned:
            then = source.clone()
            target.copy_(then)

            def check() -> None:
                self.num_checked += 1
                assert torch.equal(source, then), "pinned memory was written while a copy was reading it"

            self.under_way.append(check)
        else:
            value = source.clone()
            target.fill_(-77)
            self.under_way.append(lambda: target.copy_(value))

    def event(self) -> Event:
        return _LateEvent(self)


class _LateEvent:
    def __init__(self, device: Late) -> None:
        self._device, self._behind = device, 0

    def record(self) -> None:
        self._mine, self._device.under_way = self._device.under_way, []

    def wait(self) -> None:
        with torch.inference_mode():
            while self._mine:
                self._mine.pop(0)()


def test_memory_of_copies_is_left_alone_until_they_are_over(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two steps in flight, and everything that travels: changes, packets, ids, log-probabilities, logits for the host."""
    names = ("repeats", "allowed", "plain", "host")
    prompts, params = {n: PROMPTS[n] for n in names}, {n: PARAMS[n].clone(max_tokens=3) for n in names}
    expected = generate(null_engine(llama), prompts, params)
    device = Late()
    monkeypatch.setattr(launch_device, "open_device", lambda kind: device)
    found = generate(null_engine(llama), prompts, params)
    assert {n: a.token_ids for n, a in found.items()} == {n: a.token_ids for n, a in expected.items()}
    assert found["repeats"].logprobs == expected["repeats"].logprobs
    assert device.num_checked >= 6


def test_nothing_of_the_loop_lies_on_the_host(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward, the inputs, every step and draw on torch's `meta` tensors: an operand left in host memory, or a value that is
    read back, would fail, as it would on a GPU and not on the null device."""
    local = null_engine(llama, enforce_eager=True)
    runner = runner_of(local)
    state, steps, forward = runner._state, runner._extra, runner._forward
    read: list[Any] = []  # what goes back to the host, all of it by `copy`
    copy = runner._device.copy
    monkeypatch.setattr(runner._device, "copy", lambda to, x: read.append(x) if to.device.type == "cpu" else copy(to, x))
    with torch.inference_mode(), table.backend("cuda"), collect() as launches:
        stagings = (state._staging, steps._packets._staging, steps._late_packets._staging)
        for owner in (state, steps, *stagings, state.inputs, *forward._planes, *_parts(forward._model)):
            _to_meta(owner)
        logits_RV = forward.run(5, 2, 2)
        counts = state.send((np.array([0, 1]), np.array([0, 0]), np.array([0, 2, 5])), (np.array([1, 4]), np.array([0, 1]), np.array([2, 3])), 0)
        ids_R = ops.sample(logits_RV, *(x[:2] for x in state.inputs.draw))
        asked = ("repeats", "allowed")
        new = [
            NewRequest(slot=i, request_id=n, token_ids=[3, 4], num_prompt_tokens=2, params=PARAMS[n].clone(seed=1, logit_bias={3: 1.0}), block_ids=[[1]])
            for i, n in enumerate(asked)
        ]
        plan = StepPlan(step=0, new=new, scheduled=[Scheduled(0, 0, 2), Scheduled(1, 0, 2)])
        runner.table.apply(plan)
        steps.admit(plan)
        slots = np.arange(2, dtype=np.int32)
        words = Pinned(torch.zeros(4096, dtype=torch.int32))
        steps.draw(logits_RV, ids_R, slots, slots, slots, slots + 2, words)
        steps.keep(logits_RV, slots, slots)
        steps.draw_kept(slots, slots + 2, None)
        state.commit(counts, ids_R)
        draw_all_ways(logits_RV)
    on_host = {f"{one.kernel.__name__}: {x.device}" for one in launches for x in one.args if isinstance(x, torch.Tensor) and x.device.type != "meta"}
    assert not on_host and [x.device.type for x in read] == ["meta", "meta"]
    assert {kernel_name(one) for one in launches} >= {"attention", "kv_write", "penalize", "count", "add", "keys", "pick", "sample", "commit"}


def kernel_name(one: Launch) -> str:
    return str(one.kernel.__name__).strip("_").removesuffix("_kernel")


def _parts(model: Any) -> list[Any]:
    """Every object below the model that holds tensors."""
    found, todo, seen = [], [model], set()
    while todo:
        one = todo.pop()
        if id(one) in seen or isinstance(one, (str, int, float, type, torch.Tensor, np.ndarray)) or one is None:
            continue
        seen.add(id(one))
        if isinstance(one, dict):
            todo += one.values()
        elif isinstance(one, (list, tuple, set)):
            todo += one
        elif type(one).__module__.startswith("pagoda."):
            found.append(one)
            todo += vars(one).values() if hasattr(one, "__dict__") else []
    return found


def _to_meta(owner: Any) -> None:
    for name, value in list(vars(owner).items() if hasattr(owner, "__dict__") else ()):
        if isinstance(value, torch.Tensor):
            object.__setattr__(owner, name, value.to("meta"))
        elif isinstance(value, tuple) and value and all(isinstance(x, torch.Tensor) for x in value):
            object.__setattr__(owner, name, tuple(x.to("meta") for x in value))


def test_a_warm_up_leaves_nothing(llama: Path) -> None:
    """Requests of every kind, and nothing of them stays: the answers behind it are the same."""
    local = null_engine(llama)
    runner = runner_of(local)
    prompts, params = {n: PROMPTS[n] for n in ("repeats", "plain")}, {n: PARAMS[n] for n in ("repeats", "plain")}
    warm_up(runner, local.facts, _budget(local))
    assert all(info is None for info in runner.table.infos) and not runner._steps and len(runner._free) == runner.num_steps + 1
    expected = generate(null_engine(llama), prompts, params)
    found = generate(local, prompts, params)
    assert {n: a.token_ids for n, a in found.items()} == {n: a.token_ids for n, a in expected.items()}


def _budget(local: LocalEngine) -> KvBudget:
    ledger = local.ledger
    return KvBudget(ledger.num_blocks, ledger.block_size, ledger.max_model_len, 1, 1, Reason("", "", ""))


def test_a_step_that_failed_leaves_no_place_with_two_words(llama: Path) -> None:
    """What it did not send goes with the next step, which may write the same slot."""
    runner = runner_of(null_engine(llama, enforce_eager=True))
    run = runner._forward.run

    def fails(*args: int) -> Any:
        raise RuntimeError("no")

    def plan(first: int, *released: int) -> StepPlan:
        new = NewRequest(slot=1, request_id="a", token_ids=[first, 9], num_prompt_tokens=2, params=SamplingParams(temperature=0, seed=1), block_ids=[[5]])
        return StepPlan(step=first, new=[new], scheduled=[Scheduled(1, 0, 2)], released_slots=list(released))

    send = runner._state.send
    runner._state.send = fails  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        runner.forward(plan(7))
    runner.abandon()
    runner._state.send, runner._forward.run = send, run  # type: ignore[method-assign]
    runner.forward(plan(8, 1))
    assert runner.sample(8).rows[0].error is None
    assert runner._state.tokens_NL[1, :2].tolist() == [8, 9]
