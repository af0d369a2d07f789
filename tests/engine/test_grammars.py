"""Requests with a grammar in the core: waiting for it, masks, its end, preemption, n, errors that disturb nobody."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest

from pagoda.base.errors import InvalidRequest
from pagoda.base.plan import Masks, StepResult
from pagoda.base.types import GenerateRequest, SamplingParams
from pagoda.engine.core import EngineCore
from pagoda.engine.grammars import Grammars
from tests.engine.fake_executor import EOS, VOCAB
from tests.engine.harness import Harness


class ToyMatcher:
    """Allows exactly the tokens of a list, in order, then EOS. It knows what it has seen."""

    def __init__(self, tokens: list[int], place: int = 0) -> None:
        self.tokens, self.place = tokens, place

    @property
    def wanted(self) -> int:
        return self.tokens[self.place] if self.place < len(self.tokens) else EOS

    def mask(self) -> bytes:
        return (1 << self.wanted).to_bytes((VOCAB + 31) // 32 * 4, "little")

    def accept(self, token_id: int) -> str | None:
        if token_id != self.wanted:
            return f"token {token_id} instead of {self.wanted}"
        self.place += 1
        return None

    def forced(self) -> list[int]:
        """A token above 40 forces those behind it, up to the next one."""
        rest = self.tokens[self.place :]
        if not self.place or self.tokens[self.place - 1] < 40:
            return []
        return list(itertools.takewhile(lambda token: token < 40, rest))

    def copy(self) -> ToyMatcher:
        return ToyMatcher(self.tokens, self.place)


class ToyCompiler:
    """A grammar is numbers with commas. "slow:..." waits for `gate`."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.compiled: list[str] = []

    def compile(self, grammar: str, eos_token_ids: Sequence[int]) -> ToyMatcher:
        if grammar.startswith("slow:"):
            self.gate.wait(20)
            grammar = grammar[5:]
        self.compiled.append(grammar)
        if grammar == "bad":
            raise InvalidRequest("the grammar is bad", param="structured_outputs")
        if grammar == "bug":
            raise ZeroDivisionError("ours")
        return ToyMatcher([int(token) for token in grammar.split(",")])


class Rig(Harness):
    """The fake executor, obeying masks: a masked row gets the only token its mask allows."""

    def __init__(self, seconds: float = 60.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.compiler = ToyCompiler()
        self.core._grammars = Grammars(self.compiler, time.monotonic, seconds=seconds)
        self.masks: list[Masks | None] = []
        plain = self.executor.sample

        def sample(step: int, masks: Masks | None = None) -> StepResult:
            self.masks.append(masks)
            result = plain(step)
            size = (VOCAB + 31) // 32 * 4
            rows = {} if masks is None else {slot: masks.words[i * size :][:size] for i, slot in enumerate(masks.slots)}
            for row in result.rows:
                if row.slot in rows and row.token_ids:
                    token = int.from_bytes(rows[row.slot], "little").bit_length() - 1
                    row.token_ids = [token]
                    entry = self.executor._slots[row.slot]
                    entry.tokens[-1] = token
            return result

        self.executor.sample = sample  # type: ignore[method-assign]

    def guided(self, request_id: str, grammar: str, prompt: int = 6, **more: Any) -> None:
        starts_after, opens_with = more.pop("starts_after", []), more.pop("opens_with", None)
        params = SamplingParams(**{"max_tokens": 20, "seed": 1, **more})
        self.core.add(GenerateRequest(
            request_id=request_id, prompt_token_ids=[(3 * i) % VOCAB for i in range(prompt)], params=params, eos_token_ids=[EOS],
            grammar=grammar, grammar_starts_after=starts_after, grammar_opens_with=opens_with,
        ))  # fmt: skip


def test_every_token_is_the_grammars() -> None:
    rig = Rig()
    rig.guided("a", "1,2,3")
    rig.add("free", 5)
    rig.run()
    assert rig.tokens["a", 0] == [1, 2, 3, EOS] and rig.reason("a") == "stop"
    rig.check_sample("free")
    rig.check_whole()
    sizes = [len(masks.slots) for masks in rig.masks if masks is not None]
    assert sizes == [1] * 4  # rows without a grammar, and chunks that are not sampled, have no mask


def test_a_prompt_in_chunks_has_one_mask() -> None:
    rig = Rig(max_num_batched_tokens=8)
    rig.guided("a", "8", prompt=30)
    rig.run()
    assert rig.tokens["a", 0] == [8, EOS]
    assert [masks is not None for masks in rig.masks] == [False] * 3 + [True] * 2


def test_the_end_ends_it_in_spite_of_ignore_eos_and_min_tokens() -> None:
    rig = Rig()
    rig.guided("a", "1", ignore_eos=True, min_tokens=5)
    rig.run()
    assert rig.tokens["a", 0] == [1, EOS] and rig.reason("a") == "stop"


class LooseMatcher(ToyMatcher):
    """As the toy, but it may end anywhere."""

    def mask(self) -> bytes:
        return (1 << self.wanted | 1 << EOS).to_bytes((VOCAB + 31) // 32 * 4, "little")

    def accept(self, token_id: int) -> str | None:
        return None if token_id == EOS else super().accept(token_id)

    def copy(self) -> ToyMatcher:
        return LooseMatcher(self.tokens, self.place)


def test_the_end_is_avoided_under_ignore_eos() -> None:
    """The toy takes the highest bit of a mask: the end, while it is allowed beside tokens below it."""
    found = {}
    for ignores in (False, True):
        rig = Rig()
        rig.compiler.compile = lambda grammar, eos: LooseMatcher([int(token) for token in grammar.split(",")])  # type: ignore[method-assign]
        rig.guided("a", "1,2,3", ignore_eos=ignores)
        rig.run()
        found[ignores] = rig.tokens["a", 0]
    assert found == {False: [EOS], True: [1, 2, 3, EOS]}


def test_samples_have_their_own_places_and_compile_once() -> None:
    rig = Rig()
    rig.guided("a", "4,5,6", n=3, temperature=1.0)
    rig.guided("b", "4,5,6")
    rig.run()
    assert [rig.tokens["a", i] for i in range(3)] == [[4, 5, 6, EOS]] * 3
    assert rig.tokens["b", 0] == [4, 5, 6, EOS]
    assert rig.compiler.compiled == ["4,5,6"]


def test_preempted_samples_go_on_where_they_were() -> None:
    rig = Rig(num_blocks=9, max_num_seqs=4, prefix_caching=False)
    long = ",".join(str(i) for i in range(20, 34))
    for name in "abc":
        rig.guided(name, long)
    rig.run()
    assert rig.core.stats().num_preemptions > 0
    for name in "abc":
        assert rig.tokens[name, 0] == [*range(20, 34), EOS]
    rig.check_whole()


@pytest.mark.parametrize("max_tokens", [20, 6, 5])
@pytest.mark.parametrize("budget", [64, 2])
def test_forced_tokens_are_not_sampled(max_tokens: int, budget: int) -> None:
    """The same tokens in fewer steps, in chunks and cut off too; a stop token id among them ends it."""
    grammar = "1,41,2,3,4,42,5,43,6,8"
    found, num_steps = [], []
    for jumps in (False, True):
        rig = Rig(max_num_batched_tokens=budget, max_num_seqs=2)
        rig.core._jumps_forward = jumps
        rig.guided("a", grammar, prompt=3, max_tokens=max_tokens)
        rig.guided("b", grammar, prompt=3, max_tokens=max_tokens, stop_token_ids=[3])
        rig.run()
        rig.check_whole()
        found.append((rig.tokens["a", 0], rig.reason("a"), rig.tokens["b", 0], rig.reason("b")))
        num_steps.append(len(rig.executor.plans))
        assert any(row.appended_ids for plan in rig.executor.plans for row in plan.scheduled) == (jumps and max_tokens > 5)
    assert budget == 2 or num_steps[1] < num_steps[0]
    assert found[0] == found[1]
    assert found[0][2:] == ([1, 41, 2, 3], "stop")


def test_forced_tokens_with_preemption() -> None:
    found = []
    grammar = "45,1,2,3,46,4,5,6,8,47,9,10,11"
    for jumps in (False, True):
        rig = Rig(num_blocks=9, max_num_seqs=4, prefix_caching=False)
        rig.core._jumps_forward = jumps
        for name in "abc":
            rig.guided(name, grammar)
        rig.run()
        assert rig.core.stats().num_preemptions > 0
        rig.check_whole()
        found.append([rig.tokens[name, 0] for name in "abc"])
    assert found[0] == found[1]


def test_it_begins_behind_the_end_of_reasoning() -> None:
    free = Rig()
    free.add("x", [(3 * i) % VOCAB for i in range(6)], max_tokens=4)
    free.run()
    reasoning = free.tokens["x", 0][:3]
    rig = Rig()
    rig.guided("a", "1,2", starts_after=reasoning[1:])
    rig.run()
    assert rig.tokens["a", 0] == [*reasoning, 1, 2, EOS]


def test_reasoning_may_be_the_models_choice() -> None:
    """The first mask allows the opening token beside the grammar's; the toy takes the highest bit."""
    rig = Rig()
    rig.guided("thinks", "1,2", starts_after=[0], opens_with=40, max_tokens=6)
    rig.guided("answers", "45,2", starts_after=[0], opens_with=40, max_tokens=6)
    rig.run()
    assert rig.tokens["thinks", 0][0] == 40 and len(rig.tokens["thinks", 0]) == 6  # the toy model never ends the reasoning
    assert rig.tokens["answers", 0] == [45, 2, EOS]


def test_a_slow_grammar_holds_up_nobody() -> None:
    rig = Rig()
    rig.guided("slow", "slow:1,2")
    rig.add("free", 5)
    while "free" not in {name for name, _ in rig.finished}:
        rig.step()
    assert rig.core.stats().num_requests_waiting == 1
    rig.check_sample("free")
    assert rig.step() == [] and rig.core.has_work()  # nothing else to do: it looks, and comes back
    rig.compiler.gate.set()
    rig.run()
    assert rig.tokens["slow", 0] == [1, 2, EOS]
    rig.check_whole()


def test_aborted_while_compiling() -> None:
    rig = Rig()
    rig.guided("a", "slow:1", n=2)
    rig.core.abort([("a", 0)])
    rig.step()
    assert rig.reason("a") == "abort"
    rig.core.abort(["a"])
    rig.run()
    assert rig.reason("a", 1) == "abort"
    rig.check_whole()
    rig.compiler.gate.set()


@pytest.mark.parametrize(("grammar", "kind", "message"), [("bad", "InvalidRequest", "is bad"), ("bug", "RequestFailed", "ZeroDivisionError")])
def test_a_wrong_grammar_fails_alone(grammar: str, kind: str, message: str) -> None:
    rig = Rig()
    rig.add("free", 5)
    rig.guided("a", grammar, n=2)
    rig.run()
    for index in (0, 1):
        end = rig.finished["a", index]
        assert end.finish_reason == "error" and end.error_type == kind and message in (end.error or "")
    rig.check_sample("free")
    rig.check_whole()


def test_a_grammar_that_takes_too_long_fails_alone() -> None:
    rig = Rig(seconds=0.05)
    rig.guided("a", "slow:1")
    rig.run()
    end = rig.finished["a", 0]
    assert end.error_type == "InvalidRequest" and "not compiled within" in (end.error or "")
    rig.check_whole()
    rig.compiler.gate.set()


def test_a_token_outside_the_grammar_fails_alone() -> None:
    """As when a grammar becomes too complex on the way: its mask no longer says what it accepts."""
    rig = Rig()
    rig.guided("a", "1,2,3")
    while not rig.core._scheduler.running:
        rig.step()
    rig.add("free", 5)
    rig.core._scheduler.running[0].guide._matcher.tokens[1] = 9  # type: ignore[union-attr, attr-defined]
    masks = ToyMatcher.mask
    try:
        ToyMatcher.mask = lambda self: (1 << 3).to_bytes((VOCAB + 31) // 32 * 4, "little")  # type: ignore[method-assign]
        rig.run()
    finally:
        ToyMatcher.mask = masks  # type: ignore[method-assign]
    assert rig.reason("a") == "error" and "token 3 instead of 9" in (rig.finished["a", 0].error or "")
    rig.check_sample("free")
    rig.check_whole()


def test_an_engine_without_compiler_refuses() -> None:
    rig = Harness()
    assert isinstance(rig.core, EngineCore)
    request = GenerateRequest(request_id="a", prompt_token_ids=[1], params=SamplingParams(), eos_token_ids=[EOS], grammar="1")
    with pytest.raises(InvalidRequest, match="not available"):
        rig.core.add(request)
