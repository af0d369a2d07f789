"""Grammars of requests, on the core's side: compiling off the loop, masks while the forward runs, one matcher per sample.

    start    NEW -> WAITING_GRAMMAR   the text compiles in a thread, once for all requests that wait for the same one
    poll     -> ready to enqueue, or failed (bad grammar, or not compiled in time)
    begin    a step was planned: masks of the rows that will be sampled are computed in a thread, while the forward runs
    finish   the masks of that step, before its sampling
    accept   in `Guide`: a sampled token moves the sample's matcher

A preempted sample keeps its guide, which has seen exactly the tokens the sample keeps.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol

from pagoda.base.clock import Clock
from pagoda.base.errors import InvalidRequest, RequestError, RequestFailed
from pagoda.base.plan import Masks
from pagoda.base.types import FinishReason, GenerateRequest
from pagoda.engine.limits import Step
from pagoda.engine.request import Guide, GuideMatcher, Request, RequestState

__all__ = ["COMPILE_SECONDS", "Compiled", "Compiler", "Grammars", "jump_forward"]

COMPILE_SECONDS = 10.0
_COMPILE_THREADS = 2
_MAX_CACHED = 128
_ANY_JSON = '{"grammars": [{"json_schema": {"type": "object"}}]}'


class Compiler(Protocol):
    def compile(self, grammar: str, eos_token_ids: Sequence[int]) -> GuideMatcher:
        """Called in a thread. Raises RequestError."""


class Compiled(NamedTuple):
    """Samples of one request that need not wait any more; with `error` they failed."""

    samples: list[Request]
    error: RequestError | None


class _Waiting(NamedTuple):
    samples: list[Request]
    future: Future[GuideMatcher]
    deadline: float
    starts_after: list[int]
    opens_with: int | None


class Grammars:
    """All grammars of one core. Its methods are called from the core's thread."""

    def __init__(self, compiler: Compiler, clock: Clock, *, seconds: float = COMPILE_SECONDS) -> None:
        self._compiler, self._clock, self._seconds = compiler, clock, seconds
        self._compile_pool = ThreadPoolExecutor(_COMPILE_THREADS, thread_name_prefix="pagoda-grammar")
        self._mask_pool = ThreadPoolExecutor(1, thread_name_prefix="pagoda-masks")
        self._cache: OrderedDict[tuple[str, tuple[int, ...]], Future[GuideMatcher]] = OrderedDict()
        self._waiting: list[_Waiting] = []
        self._masks: dict[int, Future[Masks]] = {}

    @property
    def waiting(self) -> list[Request]:
        """Samples in WAITING_GRAMMAR."""
        return [sample for item in self._waiting for sample in item.samples if sample.state is RequestState.WAITING_GRAMMAR]

    def warm_up(self, eos_token_ids: Sequence[int]) -> None:
        """Compiles what any JSON needs. A failure will be told to the first request that asks for a grammar."""
        self._compile(_ANY_JSON, tuple(eos_token_ids))

    def start(self, request: GenerateRequest, samples: list[Request]) -> None:
        """NEW -> WAITING_GRAMMAR for the samples of a request that has a grammar."""
        assert request.grammar is not None
        future = self._compile(request.grammar, tuple(request.eos_token_ids))
        for sample in samples:
            sample.state = RequestState.WAITING_GRAMMAR
        self._waiting.append(_Waiting(samples, future, self._clock() + self._seconds, request.grammar_starts_after, request.grammar_opens_with))

    def _compile(self, grammar: str, eos_token_ids: tuple[int, ...]) -> Future[GuideMatcher]:
        key = (grammar, eos_token_ids)
        future = self._cache.get(key)
        if future is None:
            future = self._cache[key] = self._compile_pool.submit(self._compiler.compile, *key)
            while len(self._cache) > _MAX_CACHED:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return future

    def poll(self, seconds: float) -> list[Compiled]:
        """Requests whose grammar is there, or has failed; waits up to `seconds` for the first."""
        self._waiting = [item for item in self._waiting if any(not sample.is_finished for sample in item.samples)]
        if seconds and self._waiting:
            wait([item.future for item in self._waiting], seconds, FIRST_COMPLETED)
        now = self._clock()
        over, self._waiting = (
            [item for item in self._waiting if item.future.done() or now >= item.deadline],
            [item for item in self._waiting if not item.future.done() and now < item.deadline],
        )
        return [self._end(item) for item in over]

    def _end(self, item: _Waiting) -> Compiled:
        samples = [sample for sample in item.samples if not sample.is_finished]
        if not item.future.done():
            return Compiled(samples, InvalidRequest(f"the grammar was not compiled within {self._seconds:g} s", param="structured_outputs"))
        error = item.future.exception()
        if error is not None:
            known = isinstance(error, RequestError)
            return Compiled(samples, error if known else RequestFailed(f"the grammar cannot be compiled: {type(error).__name__}: {error}"))  # type: ignore[arg-type]
        for sample in samples:
            avoided = sample.grammar_end_ids if sample.params.ignore_eos else ()
            sample.guide = Guide(item.future.result().copy(), item.starts_after, item.opens_with, avoided)
        return Compiled(samples, None)

    # ---- masks

    def begin(self, step: Step) -> None:
        """Starts on the masks of a step about to be launched."""
        rows = [
            (row.slot, row.req.guide)
            for row in step.rows
            if row.req.guide is not None and row.req.guide.is_on and row.begin + row.num_planned == row.req.num_tokens_total
        ]
        if rows:
            self._masks[step.number] = self._mask_pool.submit(_fill, rows)

    def finish(self, step: Step) -> Masks | None:
        """The masks of a step that was begun, waiting for the thread if it must. None where no row has one."""
        future = self._masks.pop(step.number, None)
        return None if future is None else future.result()

    def close(self) -> None:
        """Ends the threads; what they are compiling is not waited for."""
        self._compile_pool.shutdown(wait=False, cancel_futures=True)
        self._mask_pool.shutdown(wait=False, cancel_futures=True)


def _fill(rows: list[tuple[int, Guide]]) -> Masks:
    """In the thread of the masks."""
    return Masks(slots=[slot for slot, _ in rows], words=b"".join([guide.mask() for _, guide in rows]))


def jump_forward(req: Request, guide: Guide, forced: list[int]) -> tuple[list[int], tuple[FinishReason, int | str | None] | None]:
    """Appends the tokens that the grammar forces, `guide.forced()`: the next forward computes them with the one that was sampled.

    Each would have been the only one its mask allows, so the sample is the same as without. Returns them, and what stopped it.
    """
    appended: list[int] = []
    stop = None
    for token_id in forced:
        if stop is not None or guide.accept(token_id) is not None:
            break
        appended.append(token_id)
        req.token_ids.append(token_id)
        stop = req.check_stop(token_id)
    req.unsent_ids += appended
    return appended, stop
