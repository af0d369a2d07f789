"""Which tokens are computed next. The founding sentence: each request's computed tokens catch up with its total tokens.

    for each request, those that run before those that wait, in the order of the policy:
        want = total + ahead - computed - planned; every Limiter may lower it; find blocks, or preempt the last one running

Whoever runs has passed admission, which gave it the blocks of its whole prompt. Nobody is admitted in a step that preempted.
A waiting request that cannot run yet because another is computing blocks for it is skipped, not blocking; the first one
that finds no slot, budget or blocks ends admission, so that a large request is not starved by small ones behind it.

Both queues are sorted by the policy's key. So the victim of a preemption, the last one running, is never a request that
this step has already planned, and the first in order always gets on: there is no livelock.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from operator import attrgetter

from pagoda.base.config import SchedulerConfig
from pagoda.base.plan import NewRequest, Scheduled
from pagoda.engine.kv_manager import KvManager
from pagoda.engine.limits import Limiter, PromptPace, ScheduledRequest, Slots, Step, make_limiters
from pagoda.engine.policy import POLICIES
from pagoda.engine.request import Request, RequestState

__all__ = ["Scheduler"]

_by_key = attrgetter("key")


class Scheduler:
    """Owns the queues; the KV manager owns blocks, the limiters own everything else that is scarce."""

    def __init__(self, config: SchedulerConfig, max_model_len: int, max_logits_rows: int, kv: KvManager, even_position: int = 0) -> None:
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_preemptions = 0
        self.slots = Slots(int(config.max_num_seqs or 0))
        self._kv = kv
        self._policy = POLICIES.get(config.scheduling_policy)
        self._may_chunk = config.enable_chunked_prefill
        self.pace = PromptPace(config.itl_target_ms / 1000 if config.itl_target_ms else None, even_position)
        self._limiters = make_limiters(config, max_model_len, max_logits_rows, self.slots, self.pace)
        # only those that do something, since these loops run once per request and step
        self._cappers = [rule.cap for rule in self._limiters]
        self._committers = [rule.commit for rule in self._limiters if type(rule).commit is not Limiter.commit]
        self._releasers = [rule.release for rule in self._limiters if type(rule).release is not Limiter.release]
        self._num_steps = 0

    # ---- the loop

    def schedule(self) -> Step:
        """Plans one step. What it holds is already taken: unless it is empty, `launched` and `settled` follow."""
        step = Step(self._num_steps, len(self.running) + len(self.waiting))
        self._schedule_running(step)
        if not step.preempted:
            self._schedule_waiting(step)
        step.released_slots = self.slots.take_released()
        return step

    def _schedule_running(self, step: Step) -> None:
        running, place = self.running, 0
        while place < len(running):
            req = running[place]
            place += 1
            count = self._cap(req, req.num_tokens_computed + req.num_tokens_planned, step)
            if count == 0:
                continue
            new_block_ids = self._extend_or_preempt(req, step)
            if new_block_ids is not None:
                self._add(req, count, step, new_block_ids)

    def _extend_or_preempt(self, req: Request, step: Step) -> list[list[int]] | None:
        """Blocks for `req`, at the price of those behind it. None: it must wait for blocks in flight, or was the victim."""
        while (new_block_ids := self._kv.extend(req)) is None:
            if self._kv.pool.num_fenced:
                return None  # they come back when the step in flight settles
            victim = self.running[-1]
            self.preempt(victim)
            step.preempted = True
            if victim is req:
                return None
        return new_block_ids

    def _schedule_waiting(self, step: Step) -> None:
        waiting, place = self.waiting, 0
        while place < len(waiting) and self.slots.num_free:
            req = waiting[place]
            hit = self._kv.look_up(req)
            req.awaited_hash = hit.awaited_hash
            if hit.awaited_hash is not None:
                place += 1
                continue
            count = self._cap(req, hit.num_blocks * self._kv.block_size, step)
            if count == 0 or not self._kv.admit(req, hit, keep_spare=bool(self.running)):
                return
            del waiting[place]
            req.state = RequestState.RUNNING
            insort(self.running, req, key=_by_key)
            if req.num_tokens_cached < 0:
                req.num_tokens_cached = req.num_tokens_computed
                step.admitted.append(req)
            self._add(req, count, step, None)

    def _cap(self, req: Request, begin: int, step: Step) -> int:
        """Tokens `req` gets from `begin` on, 0 for none."""
        want = step.num_missing = len(req.token_ids) + req.num_tokens_ahead - begin
        for cap in self._cappers:
            if want <= 0:
                return 0
            want = cap(req, want, step)
        if want < step.num_missing and not self._may_chunk:
            return 0
        return want

    def _add(self, req: Request, count: int, step: Step, new_block_ids: list[list[int]] | None) -> None:
        """One row of the plan; `new_block_ids` is None for a request the worker does not know."""
        for commit in self._committers:
            commit(req, count, step)
        slot, begin = req.slot, req.num_tokens_computed + req.num_tokens_planned
        assert slot is not None
        if new_block_ids is None:
            step.new.append(self._introduce(req, slot))
            new_block_ids, req.unsent_ids = [], []
        step.scheduled.append(Scheduled(slot, begin, count, new_block_ids))
        if req.unsent_ids:
            step.scheduled[-1].appended_ids, req.unsent_ids = req.unsent_ids, []
        row = ScheduledRequest(req, slot, begin, count, self._kv.mark(req, count))
        step.rows.append(row)
        req.num_tokens_planned += count
        if not req.runs_ahead:
            step.has_late |= count == step.num_missing or req.wants_prompt_logprobs
        elif count == step.num_missing and begin + count + 1 < req.max_tokens_total:
            req.num_tokens_ahead += 1
            row.is_ahead = True

    @staticmethod
    def _introduce(req: Request, slot: int) -> NewRequest:
        params = req.params
        if params.prompt_logprobs is not None and not req.wants_prompt_logprobs:
            params = params.clone(prompt_logprobs=None)  # delivered before a preemption
        return NewRequest(
            slot=slot,
            request_id=req.worker_id,
            token_ids=req.token_ids.copy(),
            num_prompt_tokens=req.num_prompt_tokens,
            params=params,
            stop_ids=req.stop_ids,
            block_ids=[table.copy() for table in req.block_tables],
            is_guided=req.guide is not None,
        )

    # ---- steps in flight

    def launched(self, step: Step) -> None:
        """From now on what is given back waits until `step` has settled."""
        self._num_steps += 1
        self._kv.pool.launch(step.number)
        self.slots.launch(step.number)

    def settled(self, step: Step) -> None:
        """`step`, the oldest in flight, is over, well or badly. Call before looking at its rows."""
        self._kv.pool.settle(step.number)
        self.slots.settle(step.number)
        for row in step.rows:
            if row.hashes:
                self._kv.unmark(row.req, row.hashes)

    def advance(self, row: ScheduledRequest) -> None:
        """The tokens of a row that is not stale were computed: from planned to computed, and full blocks to the index."""
        row.req.num_tokens_planned -= row.num_planned
        row.req.num_tokens_computed += row.num_planned
        if row.is_ahead:
            row.req.num_tokens_ahead -= 1
        self._kv.commit(row.req)

    # ---- states

    def enqueue(self, req: Request) -> None:
        """NEW -> WAITING."""
        req.key = self._policy(req)
        self._wait(req)

    def preempt(self, req: Request) -> None:
        """RUNNING -> PREEMPTED -> WAITING: its blocks serve others, its tokens are computed again later."""
        self._take_from(self.running, req)
        self._give_up(req, RequestState.PREEMPTED)
        req.num_preemptions += 1
        req.metrics.num_preemptions += 1
        self.num_preemptions += 1
        if req.wants_prompt_logprobs:
            req.prompt_logprobs = []
        self._wait(req)

    def finish(self, req: Request) -> None:
        """Any state -> FINISHED, once."""
        assert not req.is_finished
        if req.state is RequestState.RUNNING:
            self._take_from(self.running, req)
        elif req.state is RequestState.WAITING:
            self._take_from(self.waiting, req)
        self._give_up(req, RequestState.FINISHED)

    def _wait(self, req: Request) -> None:
        req.state = RequestState.WAITING
        insort(self.waiting, req, key=_by_key)

    def _give_up(self, req: Request, state: RequestState) -> None:
        req.state = state
        self._kv.release(req)
        for release in self._releasers:
            release(req)
        req.num_tokens_computed = req.num_tokens_planned = req.num_tokens_ahead = 0

    @staticmethod
    def _take_from(queue: list[Request], req: Request) -> None:
        place = bisect_left(queue, req.key, key=_by_key)
        assert queue[place] is req
        del queue[place]

    # ---- views

    @property
    def num_deferred(self) -> int:
        """Waiting requests that another request computes blocks for."""
        return sum(req.awaited_hash is not None for req in self.waiting)

    def unfinished(self) -> Iterable[Request]:
        yield from self.running
        yield from self.waiting

    def check_integrity(self) -> None:
        """AssertionError unless queues, slots and blocks agree."""
        for queue, state in ((self.running, RequestState.RUNNING), (self.waiting, RequestState.WAITING)):
            assert [req.key for req in queue] == sorted({req.key for req in queue}), "a queue is out of order"
            assert all(req.state is state for req in queue), "a request is in the wrong queue"
        slots = [req.slot for req in self.running]
        assert None not in slots and len(set(slots)) == len(slots), "two requests in one slot"
        assert not set(slots) & set(self.slots.free), "a slot in use is free"
        for req in self.running:
            known = req.num_tokens_total + req.num_tokens_ahead
            assert 0 <= req.num_tokens_computed + req.num_tokens_planned <= known < req.max_tokens_total + 1
        assert all(req.slot is None and req.num_tokens_computed == 0 for req in self.waiting)
        self._kv.check_integrity(self.unfinished())
