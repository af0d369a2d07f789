"""The engine core: admit, plan, launch, settle.

    add -> [launch: scheduler plans, executor.forward] -> [settle: executor.sample, tokens appended, stops checked] -> outputs

`step()` is both halves. They are apart so that steps can overlap: with `pipeline_depth` d, d steps are in flight, and what is
given back while they are stays fenced until they have settled. A request whose tokens the worker draws by itself is planned
ahead of them; where one of them turns out to end it, the step it was planned for is discarded row by row (`is_stale`).

Every sample ends with exactly one output that carries a finish reason: stop, length, abort or error.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from pagoda.base.clock import Clock, monotonic
from pagoda.base.config import EngineConfig
from pagoda.base.errors import InvalidRequest, QueueFull, RequestError
from pagoda.base.log import get_logger
from pagoda.base.plan import NOT_FINITE, Executor, StepRow
from pagoda.base.types import DrawsAhead, EngineOutput, FinishReason, GenerateRequest, ModelFacts
from pagoda.engine.admission import Admission
from pagoda.engine.grammars import Compiler, Grammars, jump_forward
from pagoda.engine.kv_manager import KvManager
from pagoda.engine.limits import ScheduledRequest, Step, even_position_of
from pagoda.engine.request import Request
from pagoda.engine.scheduler import Scheduler
from pagoda.engine.stats import EngineStats, StatsRecorder

__all__ = ["EngineCore", "SampleId"]

SampleId = str | tuple[str, int]
"""A request with all its samples, or (request id, index) for one of them."""

_GRAMMAR_WAIT_SECONDS = 0.005  # between two looks at the inbox, when grammars are all there is

_log = get_logger("engine")


class _Family:
    """The samples of one request that have not ended."""

    __slots__ = ("max_num_generation_tokens", "samples")

    def __init__(self, samples: list[Request]) -> None:
        self.samples = {sample.index: sample for sample in samples}
        self.max_num_generation_tokens = 0


class EngineCore:
    """Single-threaded: every method is called from one thread.

    `config` is resolved; `num_blocks` counts the null block; `max_logits_rows` is what the worker's buffers hold.
    """

    def __init__(
        self,
        config: EngineConfig,
        facts: ModelFacts,
        num_blocks: int,
        executor: Executor,
        *,
        max_logits_rows: int,
        clock: Clock = monotonic,
        pipeline_depth: int = 1,
        draws_ahead: DrawsAhead | None = "is_drawn_on_device",
        overlaps_late: bool = True,
        compiler: Compiler | None = None,
        jumps_forward: bool = True,
    ) -> None:
        """Without `compiler` requests that have a grammar are refused. `draws_ahead` tells whose tokens are planned before they are
        known, because the worker draws them by itself. `overlaps_late` False: a step that draws others is settled before the next one is
        launched. `jumps_forward` appends forced tokens without sampling them."""
        assert isinstance(config.model.max_model_len, int) and config.cache.block_size, "the config is not resolved"
        self.config, self.facts = config, facts
        self.failure: Exception | None = None  # what the executor last raised; the caller decides what it means
        self._executor, self._clock, self._pipeline_depth = executor, clock, pipeline_depth
        self._kv = KvManager(
            num_blocks, config.cache.block_size, facts.kv_groups,
            enable_prefix_caching=config.cache.enable_prefix_caching, watermark=config.scheduler.watermark,
            max_tokens_per_step=int(config.scheduler.max_num_batched_tokens or 0) * pipeline_depth,
        )  # fmt: skip
        self._scheduler = Scheduler(config.scheduler, config.model.max_model_len, max_logits_rows, self._kv, even_position_of(config, facts))
        self._admission = Admission(config, facts, self._kv, max_logits_rows)
        self._recorder = StatsRecorder(config.model.max_model_len, num_blocks - 1)
        self._grammars = None if compiler is None else Grammars(compiler, clock)
        self._jumps_forward = jumps_forward
        self._draws_ahead, self._overlaps_late = draws_ahead if pipeline_depth > 1 else None, overlaps_late
        self._families: dict[str, _Family] = {}
        self._in_flight: deque[Step] = deque()
        self._outputs: list[EngineOutput] = []  # terminal outputs that no step produced

    # ---- requests

    def add(self, request: GenerateRequest) -> None:
        """Queues a request. Raises InvalidRequest or QueueFull, and then it was never here."""
        try:
            self._check_admissible(request)
        except RequestError as error:
            self._recorder.on_rejection(type(error).__name__)
            raise
        now = self._clock()
        samples = self._admission.expand(request, request.arrival_time or now)
        self._families[request.request_id] = _Family(samples)
        self._recorder.on_arrival(request.params.n, request.params.max_tokens)
        for sample in samples:
            sample.metrics.queued_time = now
            sample.runs_ahead = bool(self._draws_ahead and request.grammar is None and getattr(sample.params, self._draws_ahead))
            if request.grammar is None:
                self._scheduler.enqueue(sample)
            else:
                sample.grammar_end_ids = frozenset(request.eos_token_ids)
        if request.grammar is not None and self._grammars is not None:
            self._grammars.start(request, samples)

    def _check_admissible(self, request: GenerateRequest) -> None:
        if request.request_id in self._families:
            raise InvalidRequest(f"request id `{request.request_id}` is already in use", param="request_id")
        self._admission.validate(request)
        if request.grammar is not None and self._grammars is None:
            raise InvalidRequest("structured output is not available in this engine", param="structured_outputs")
        limit = self.config.scheduler.max_num_queued_reqs
        num_queued = len(self._scheduler.waiting) - self._scheduler.slots.num_free
        if limit is not None and num_queued >= limit:
            raise QueueFull(f"{max(0, num_queued)} requests are waiting and --max-num-queued-reqs is {limit}; try again later")

    def submit(self, request: GenerateRequest) -> None:
        """As `add`, for callers that cannot catch: an error becomes the one terminal output of each sample."""
        try:
            self.add(request)
        except RequestError as error:
            self._outputs.extend(
                EngineOutput(
                    request_id=request.request_id, index=index, finish_reason=FinishReason.ERROR,
                    error=error.message, error_type=type(error).__name__, error_param=error.param,
                )
                for index in range(request.params.n)
            )

    def abort(self, ids: Iterable[SampleId], reason: FinishReason = FinishReason.ABORT) -> None:
        """Ends samples in whatever state they are; ids that are unknown or over are passed over.

        Each gets its terminal output with the next `step`. A client that ends a sample itself (a stop string was found,
        `reason` STOP) has forgotten it by then, and ignores that output.
        """
        for name in ids:
            request_id, index = (name, None) if isinstance(name, str) else name
            family = self._families.get(request_id)
            if family is None:
                continue
            for sample in list(family.samples.values()):
                if index is None or sample.index == index:
                    self._outputs.append(self._end(sample, reason))

    # ---- steps

    @property
    def is_idle(self) -> bool:
        return not self._families and not self._in_flight

    def has_work(self) -> bool:
        """Whether `step` would do something."""
        return bool(self._families or self._in_flight or self._outputs)

    def step(self) -> list[EngineOutput]:
        """Launches until the pipeline is full and settles the oldest step. Returns [] when there is nothing to do."""
        if self._grammars is not None:
            self._take_compiled(self._grammars)
        while self._may_launch() and self.launch():
            pass
        assert self._in_flight or self._outputs or not self._families or self._num_compiling, "requests wait, and nothing can be scheduled"
        outputs = self.settle() if self._in_flight else []
        if self._outputs:
            outputs = self._outputs + outputs
            self._outputs = []
        return outputs

    def _may_launch(self) -> bool:
        flying = self._in_flight
        return len(flying) < self._pipeline_depth and (self._overlaps_late or not flying or not flying[-1].has_late)

    @property
    def _num_compiling(self) -> int:
        return 0 if self._grammars is None else len(self._grammars.waiting)

    def _take_compiled(self, grammars: Grammars) -> None:
        """WAITING_GRAMMAR -> WAITING, or the end. With nothing else to do it waits a little for a grammar."""
        is_idle = not (self._in_flight or self._outputs or self._scheduler.running or self._scheduler.waiting)
        for samples, error in grammars.poll(_GRAMMAR_WAIT_SECONDS if is_idle else 0.0):
            for sample in samples:
                if error is None:
                    self._scheduler.enqueue(sample)
                else:
                    output = self._end(sample, FinishReason.ERROR, error.message)
                    output.error_type, output.error_param = type(error).__name__, error.param
                    self._outputs.append(output)

    def launch(self) -> bool:
        """Plans a step and starts its forward. False when nothing can be scheduled now, or the executor failed."""
        if not self._families:
            return False
        step = self._scheduler.schedule()
        if not step.rows:
            self._scheduler.slots.tell_again(step.released_slots)
            return False
        if step.admitted:
            now = self._clock()
            for req in step.admitted:
                looked_up = self.config.cache.enable_prefix_caching and not req.wants_prompt_logprobs
                self._recorder.on_admitted(req, now, looked_up=looked_up)
        self._scheduler.launched(step)
        self._in_flight.append(step)
        if self._grammars is not None:
            self._grammars.begin(step)
        try:
            self._executor.forward(step.plan())
        except BaseException as error:
            self._in_flight.pop()
            while self._in_flight:  # steps settle in order, and these cannot be trusted any more
                self._fail(self._in_flight.popleft(), error)
            self._fail(step, error)
            if not isinstance(error, Exception):
                raise
            return False
        return True

    def settle(self) -> list[EngineOutput]:
        """Waits for the oldest step in flight; returns what it gave. At least one step must be in flight."""
        step = self._in_flight.popleft()
        try:
            result = self._executor.sample(step.number, None if self._grammars is None else self._grammars.finish(step))
            if result.step != step.number or len(result.rows) != len(step.rows):
                raise RuntimeError(f"step {step.number} with {len(step.rows)} rows: the worker answered step {result.step}, {len(result.rows)} rows")
        except BaseException as error:
            self._fail(step, error)
            if not isinstance(error, Exception):
                raise
            return []
        self._scheduler.settled(step)
        self._scheduler.pace.observe(step, result.forward_seconds + result.sample_seconds)
        now = self._clock()
        outputs: list[EngineOutput] = []
        for row, answer in zip(step.rows, result.rows, strict=True):
            if not row.is_stale and (output := self._settle_row(row, answer, now)) is not None:
                outputs.append(output)
        self._recorder.on_step(step.num_tokens)
        return outputs

    def _settle_row(self, row: ScheduledRequest, answer: StepRow, now: float) -> EngineOutput | None:
        req = row.req
        assert answer.slot == row.slot, f"the row of slot {row.slot} came back as slot {answer.slot}"
        if answer.error is not None:
            self._recorder.stats.corrupted_requests += answer.error == NOT_FINITE
            return self._end(req, FinishReason.ERROR, answer.error)
        self._scheduler.advance(row)
        if req.wants_prompt_logprobs:
            req.prompt_logprobs.extend(answer.prompt_logprobs)
        reached_end = req.num_tokens_computed == len(req.token_ids)
        assert bool(answer.token_ids) == reached_end, f"request `{req.worker_id}`: sampled {len(answer.token_ids)} tokens"
        if not reached_end:
            return None
        new_token_ids, stop = answer.token_ids, None
        for place, token_id in enumerate(new_token_ids):
            req.token_ids.append(token_id)
            if req.guide is not None and (wrong := req.guide.accept(token_id)) is not None:
                return self._end(req, FinishReason.ERROR, f"the grammar of this request cannot go on: {wrong}")
            stop = req.check_stop(token_id)
            if stop is not None:
                new_token_ids = new_token_ids[: place + 1]
                break
        if stop is None and req.guide is not None and self._jumps_forward and req.params.logprobs is None and (forced := req.guide.forced()):
            appended, stop = jump_forward(req, req.guide, forced)
            new_token_ids = [*new_token_ids, *appended]
        self._recorder.on_tokens(req, len(new_token_ids), now)
        output = EngineOutput(
            request_id=req.request_id, index=req.index, new_token_ids=new_token_ids,
            logprobs=None if answer.logprobs is None else answer.logprobs[: len(new_token_ids)],
            prompt_logprobs=req.take_prompt_logprobs() if req.wants_prompt_logprobs else None,
            num_cached_tokens=req.num_tokens_cached,
            metrics=req.metrics if stop is not None or req.metrics.first_token_time == now else None,
        )  # fmt: skip
        if stop is not None:
            output.finish_reason, output.stop_reason = stop
            self._forget(req, stop[0])
        return output

    # ---- ends

    def _fail(self, step: Step, error: BaseException) -> None:
        """The executor raised: every request of the step ends, and what they held is whole again."""
        if isinstance(error, Exception):
            self.failure = error
        _log.error("step %d failed with %d requests: %s: %s", step.number, len(step.rows), type(error).__name__, error)
        self._scheduler.settled(step)
        if self._grammars is not None:
            self._grammars.finish(step)
        message = f"the engine failed while computing this request: {type(error).__name__}: {error}"
        self._outputs.extend(self._end(row.req, FinishReason.ERROR, message) for row in step.rows if not row.is_stale)
        self._scheduler.slots.tell_again(step.released_slots)

    def _end(self, req: Request, reason: FinishReason, error: str | None = None) -> EngineOutput:
        """Ends a sample without a token."""
        output = req.terminal(reason, error)
        self._forget(req, reason)
        return output

    def _forget(self, req: Request, reason: FinishReason) -> None:
        self._scheduler.finish(req)
        self._recorder.on_finished(req, reason, self._clock())
        family = self._families[req.request_id]
        family.max_num_generation_tokens = max(family.max_num_generation_tokens, req.num_output_tokens)
        del family.samples[req.index]
        if not family.samples:
            self._recorder.on_family_finished(family.max_num_generation_tokens)
            del self._families[req.request_id]

    # ---- views and rare calls

    def stats(self) -> EngineStats:
        """A copy, whole as of now."""
        live, scheduler = self._recorder.stats, self._scheduler
        live.num_requests_running = len(scheduler.running)
        live.num_requests_waiting = len(scheduler.waiting) + self._num_compiling
        live.num_requests_waiting_deferred = scheduler.num_deferred + self._num_compiling
        live.kv_cache_usage_perc = self._kv.pool.usage
        live.num_preemptions = scheduler.num_preemptions
        return self._recorder.snapshot()

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes. False, and nothing changed, while any request runs."""
        return self._kv.pool.reset()

    def warm_up_grammars(self, eos_token_ids: list[int]) -> None:
        """Reads the vocabulary for grammars in a thread, so that the first request with one keeps nobody waiting."""
        if self._grammars is not None:
            self._grammars.warm_up(eos_token_ids)

    def close(self) -> None:
        """Ends the threads that compile grammars."""
        if self._grammars is not None:
            self._grammars.close()

    def check_integrity(self) -> None:
        """AssertionError unless queues, slots and blocks agree. O(blocks): for idle moments and tests."""
        self._scheduler.check_integrity()
        unfinished = {id(req) for req in self._scheduler.unfinished()}
        unfinished |= {id(req) for req in (() if self._grammars is None else self._grammars.waiting)}
        known = {id(req) for family in self._families.values() for req in family.samples.values()}
        assert unfinished == known, "a request is in no queue, or in a queue and not known"
