"""What may lower the number of tokens a request gets in a step. A new rule is a new Limiter in the list, nothing else.

    cap      how many of `want` tokens the rule allows now; 0 means none in this step. Changes nothing.
    commit   the request got `count` tokens (called once per scheduled request)
    release  the request stopped running: finished, aborted or preempted
"""

from __future__ import annotations

import heapq

from pagoda.base.config import EngineConfig, SchedulerConfig
from pagoda.base.hashing import BlockHash
from pagoda.base.plan import NewRequest, Scheduled, StepPlan
from pagoda.base.types import ModelFacts
from pagoda.engine.fence import Fence
from pagoda.engine.request import Request, RequestState

__all__ = [
    "Limiter",
    "LogitsRows",
    "LongPrefill",
    "MaxModelLen",
    "PromptPace",
    "ScheduledRequest",
    "Slots",
    "Step",
    "TokenBudget",
    "even_position_of",
    "make_limiters",
]


class ScheduledRequest:
    """One row of a step, as the brain remembers it until the step settles."""

    __slots__ = ("begin", "hashes", "is_ahead", "num_planned", "num_preemptions", "req", "slot")

    def __init__(self, req: Request, slot: int, begin: int, num_planned: int, hashes: list[BlockHash]) -> None:
        self.req = req
        self.slot = slot
        self.begin = begin
        self.num_planned = num_planned
        self.hashes = hashes
        self.is_ahead = False  # the token it draws counts in `num_tokens_ahead`
        self.num_preemptions = req.num_preemptions  # if it has grown since, the result belongs to a life that is over

    @property
    def is_stale(self) -> bool:
        req = self.req
        return req.num_preemptions != self.num_preemptions or req.state is RequestState.FINISHED


class Step:
    """A step being planned, then in flight."""

    __slots__ = (
        "admitted",
        "has_late",
        "new",
        "num_decoding",
        "num_eligible",
        "num_missing",
        "num_prompt_tokens",
        "num_rows",
        "num_tokens",
        "number",
        "preempted",
        "prompt_cost",
        "released_slots",
        "rows",
        "scheduled",
    )

    def __init__(self, number: int, num_eligible: int) -> None:
        self.number = number
        self.num_eligible = num_eligible  # requests that could use the step
        self.num_missing = 0  # tokens the request now being considered lacks, before any limit
        self.num_tokens = 0  # planned so far
        self.num_rows = 0  # rows of logits planned so far
        self.num_decoding = 0  # rows that compute the one token they lack
        self.num_prompt_tokens = 0  # tokens of all other rows
        self.prompt_cost = 0.0  # the same, weighted by what they take
        self.preempted = False
        self.has_late = False  # draws, or scores, a row whose request does not run ahead
        self.rows: list[ScheduledRequest] = []
        self.admitted: list[Request] = []  # those that run for the first time
        self.new: list[NewRequest] = []
        self.scheduled: list[Scheduled] = []
        self.released_slots: list[int] = []

    def plan(self) -> StepPlan:
        return StepPlan(step=self.number, new=self.new, scheduled=self.scheduled, released_slots=self.released_slots)


class Limiter:
    """Base of all rules: allows everything."""

    def cap(self, req: Request, want: int, step: Step) -> int:
        return want

    def commit(self, req: Request, count: int, step: Step) -> None:
        """`req` computes `count` tokens in `step`."""

    def release(self, req: Request) -> None:
        """`req` gives up what it holds."""


class TokenBudget(Limiter):
    """`max_num_batched_tokens`: what one step computes."""

    def __init__(self, max_num_tokens: int) -> None:
        self._max_num_tokens = max_num_tokens

    def cap(self, req: Request, want: int, step: Step) -> int:
        left = self._max_num_tokens - step.num_tokens
        return want if want < left else left

    def commit(self, req: Request, count: int, step: Step) -> None:
        step.num_tokens += count


class LongPrefill(Limiter):
    """`long_prefill_token_threshold`: a long prompt is taken in short chunks while others could use the step."""

    def __init__(self, threshold: int) -> None:
        self._threshold = threshold

    def cap(self, req: Request, want: int, step: Step) -> int:
        return self._threshold if want > self._threshold and step.num_eligible > 1 else want


def even_position_of(config: EngineConfig, facts: ModelFacts) -> int:
    """Where in a context attention takes as long for a token as the layers' weights do; 0: unknown.

    Products of 8-bit activations do 2.5 times as many multiplications a second as attention does (measured on AVX2 and AVX-512), others
    about as many.
    """
    return facts.even_position * 2 // 5 if config.model.linear_activations == "int8" else facts.even_position


class PromptPace(Limiter):
    """Prompts computed beside decoding requests do not hold these up.

    Without a target, each request that still has a prompt to compute brings SHARE times as many tokens of it as requests decode in the
    step, or MIN_SHARE: one newcomer about doubles the time of a step (a row among more costs less than one of few), a burst of them fills it. The further into its
    context a token lies the more of that it takes: at `even_position` two tokens' worth. With a target in seconds, as many
    tokens as recent steps say fit in it. Never fewer than MIN_TOKENS in all, so that a prompt always gets on.
    """

    MIN_SHARE = 16
    MIN_TOKENS = 8
    SHARE = 2.4

    def __init__(self, target: float | None, even_position: int = 0) -> None:
        self._target = target
        self._even_position = even_position
        self._decode_seconds = 0.0  # of a step that only decodes, smoothed
        self._token_seconds = 0.0  # what one prompt token adds to it, smoothed

    def cap(self, req: Request, want: int, step: Step) -> int:
        if want <= 1 or step.num_decoding == 0:
            return want
        if self._target is None:
            share = max(self.MIN_SHARE, int(self.SHARE * step.num_decoding)) * (step.num_eligible - step.num_decoding)
            left = (share - step.prompt_cost) / self._cost(req)
        else:
            left = self._allowance(self._target) - step.num_prompt_tokens
        return min(want, max(0, int(left), self.MIN_TOKENS - step.num_prompt_tokens))

    def _cost(self, req: Request) -> float:
        """What a prompt token takes, that of a context's first being 1."""
        return 1 + req.num_tokens_computed / self._even_position if self._even_position else 1.0

    def _allowance(self, target: float) -> int:
        if self._token_seconds == 0.0:
            return self.MIN_TOKENS  # nothing is known yet
        return int((target - self._decode_seconds) / self._token_seconds)

    def commit(self, req: Request, count: int, step: Step) -> None:
        if count == 1 and step.num_missing == 1:
            step.num_decoding += 1
        else:
            step.num_prompt_tokens += count
            step.prompt_cost += count * self._cost(req)

    def observe(self, step: Step, seconds: float) -> None:
        """A step took that long. Only with a target: without one, plans do not depend on time."""
        if self._target is None or step.num_decoding == 0:
            return
        if step.num_prompt_tokens == 0:
            self._decode_seconds = seconds if self._decode_seconds == 0.0 else 0.8 * self._decode_seconds + 0.2 * seconds
            return
        added = max(seconds - self._decode_seconds, 1e-6) / step.num_prompt_tokens
        self._token_seconds = added if self._token_seconds == 0.0 else 0.7 * self._token_seconds + 0.3 * added


class MaxModelLen(Limiter):
    """`max_model_len`: no token beyond the context is computed."""

    def __init__(self, max_model_len: int) -> None:
        self._max_model_len = max_model_len

    def cap(self, req: Request, want: int, step: Step) -> int:
        excess = len(req.token_ids) - self._max_model_len
        return want if excess <= 0 else max(0, want - excess)


class LogitsRows(Limiter):
    """Rows of logits a step may produce: one per sampled request, one per token of a prompt whose logprobs are asked for."""

    def __init__(self, max_num_rows: int) -> None:
        assert max_num_rows >= 1
        self._max_num_rows = max_num_rows

    def cap(self, req: Request, want: int, step: Step) -> int:
        left = self._max_num_rows - step.num_rows
        if req.wants_prompt_logprobs:
            return want if want < left else left
        if left >= 1 or want < step.num_missing:
            return want
        return want - 1  # stop short of the token that would be sampled

    def commit(self, req: Request, count: int, step: Step) -> None:
        if req.wants_prompt_logprobs:
            step.num_rows += count
        elif count == step.num_missing:
            step.num_rows += 1


class Slots(Limiter):
    """`max_num_seqs`: rows of the worker's table. A running request holds one; the lowest free one is given out first."""

    def __init__(self, max_num_seqs: int) -> None:
        self._free = list(range(max_num_seqs))  # a heap
        self._released: list[int] = []  # free again, and the worker has not been told
        self._fence: Fence[int] = Fence()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def free(self) -> tuple[int, ...]:
        return tuple(self._free)

    def cap(self, req: Request, want: int, step: Step) -> int:
        return want if req.slot is not None or self._free else 0

    def commit(self, req: Request, count: int, step: Step) -> None:
        if req.slot is None:
            req.slot = heapq.heappop(self._free)

    def release(self, req: Request) -> None:
        if req.slot is None:
            return
        if self._fence.is_open:
            self._give_back(req.slot)
        else:
            self._fence.hold(req.slot)
        req.slot = None

    def _give_back(self, slot: int) -> None:
        heapq.heappush(self._free, slot)
        self._released.append(slot)

    def launch(self, step: int) -> None:
        self._fence.launch(step)

    def settle(self, step: int) -> None:
        for slot in self._fence.settle(step):
            self._give_back(slot)

    def take_released(self) -> list[int]:
        """Slots given back since the last plan, each once."""
        released = sorted(set(self._released))
        self._released.clear()
        return released

    def tell_again(self, slots: list[int]) -> None:
        """The plan that carried these failed: the worker may not have heard. Slots in use again since are left alone."""
        free = set(self._free)
        self._released.extend(slot for slot in slots if slot in free)


def make_limiters(
    config: SchedulerConfig, max_model_len: int, max_logits_rows: int, slots: Slots, pace: PromptPace
) -> list[Limiter]:
    """The rules of a resolved config. Rows of logits come last: they look at what the others left."""
    limiters: list[Limiter] = [slots, TokenBudget(int(config.max_num_batched_tokens or 0)), MaxModelLen(max_model_len)]
    if config.long_prefill_token_threshold > 0 and config.enable_chunked_prefill:
        limiters.append(LongPrefill(config.long_prefill_token_threshold))
    if config.itl_target_ms != 0 and config.enable_chunked_prefill:
        limiters.append(pace)
    return [*limiters, LogitsRows(max_logits_rows)]
