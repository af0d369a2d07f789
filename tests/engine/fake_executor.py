"""A worker with a toy model, built from plans only, that notices every mistake of the brain.

Keys and values are simulated: each (block, offset) holds the group it was written for and the hash of the whole prefix that
ends there. A step writes when its forward starts and reads when it is sampled, so a block that is reused too early, a wrong
block table, a stale or missing token all show up as an assertion. The next token is a hash of the prefix and the seed.

As on a GPU, a request's token is known to the worker as soon as the forward started, so that the next step can be
planned before it is told; one with a grammar, or with what only the host does, is drawn when the step is sampled, and may not be
planned ahead.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pagoda.base.plan import Masks, NewRequest, Scheduled, StepPlan, StepResult, StepRow
from pagoda.base.types import GenerateRequest, KvGroup, SamplingParams, TokenLogprobs

VOCAB = 50
EOS = 7


class BrainBug(BaseException):
    """A plan that a worker could not execute rightly. Not an Exception, so that the core cannot take it for a failed step."""


def check(is_right: bool, what: str = "a malformed plan") -> None:
    if not is_right:
        raise BrainBug(what)


def chain(token_ids: list[int], start: list[int] | None = None) -> list[int]:
    """Prefix hashes: element i stands for the tokens 0..i."""
    hashes = list(start or [])
    for token in token_ids[len(hashes) :]:
        hashes.append(hash((hashes[-1] if hashes else 1, token)))
    return hashes


def toy_token(prefix_hash: int, seed: int, forbidden: set[int]) -> int:
    token = hash((prefix_hash, seed, 17)) % VOCAB
    while token in forbidden:
        token = (token + 1) % VOCAB
    return token


def toy_logprob(prefix_hash: int, token: int) -> TokenLogprobs:
    return TokenLogprobs([token], [-((prefix_hash * 31 + token) % 1000) / 100.0], 1)


def toy_generate(request: GenerateRequest, params: SamplingParams, max_model_len: int) -> tuple[list[int], str]:
    """The same model without engine: output tokens and finish reason of one sample (`params.seed` set)."""
    tokens = list(request.prompt_token_ids)
    eos = set() if params.ignore_eos else set(request.eos_token_ids)
    stops = eos | set(params.stop_token_ids or ())
    limit = max_model_len if params.max_tokens is None else min(max_model_len, len(tokens) + params.max_tokens)
    num_prompt = len(tokens)
    hashes = chain(tokens)
    while True:
        forbidden = stops if len(tokens) - num_prompt < params.min_tokens else set()
        tokens.append(toy_token(hashes[-1], params.seed or 0, forbidden))
        hashes = chain(tokens, hashes)
        if tokens[-1] in stops and len(tokens) - num_prompt >= params.min_tokens:
            return tokens[num_prompt:], "stop"
        if len(tokens) >= limit:
            return tokens[num_prompt:], "length"


@dataclass
class _Row:
    """A request as the worker knows it."""

    new: NewRequest
    tokens: list[int]
    tables: list[list[int]]
    hashes: list[int] = field(default_factory=list)


@dataclass
class _Launched:
    row: _Row
    scheduled: Scheduled
    tables: list[list[int]]
    hashes: list[int]


class FakeExecutor:
    """`fail_forward`, `fail_sample`: step numbers that raise. `row_errors`: request ids whose next row is an error."""

    def __init__(self, groups: tuple[KvGroup, ...], block_size: int) -> None:
        self.plans: list[StepPlan] = []
        self.fail_forward: set[int] = set()
        self.fail_after_apply = False
        self.fail_sample: set[int] = set()
        self.row_errors: set[str] = set()
        self.max_rows_of_logits = 0
        self._groups, self._block_size = groups, block_size
        self._slots: dict[int, _Row] = {}
        self._kv: dict[tuple[int, int], tuple[int, int]] = {}  # (block, offset) -> (group, prefix hash)
        self._launched: dict[int, list[_Launched]] = {}

    def forward(self, plan: StepPlan) -> None:
        if plan.step in self.fail_forward:
            self._launched.clear()  # nobody asks for the steps before it any more
        if plan.step in self.fail_forward and not self.fail_after_apply:
            raise RuntimeError("the device fell over")
        self.plans.append(plan)
        self._apply(plan)
        if plan.step in self.fail_forward:
            raise RuntimeError("the device fell over half way")
        written: set[tuple[int, int]] = set()
        launched = []
        for scheduled in plan.scheduled:
            row = self._slots[scheduled.slot]
            row.hashes = chain(row.tokens, row.hashes)
            self._write(row, scheduled, written)
            if scheduled.num_computed + scheduled.num_planned == len(row.tokens) and row.new.params.is_drawn_on_device and not row.new.is_guided:
                row.tokens.append(self._token(row.new, row.hashes))
            launched.append(_Launched(row, scheduled, [table.copy() for table in row.tables], row.hashes.copy()))
        self._launched[plan.step] = launched

    def _apply(self, plan: StepPlan) -> None:
        for slot in plan.released_slots:
            self._slots.pop(slot, None)
        introduced = set()
        in_flight = {entry.scheduled.slot for launched in self._launched.values() for entry in launched}
        for new in plan.new:
            check(new.slot not in in_flight, f"slot {new.slot} is used by a step in flight")
            check(new.slot not in self._slots, f"slot {new.slot} is taken")
            check(new.params.seed is not None and new.params.n == 1)
            self._slots[new.slot] = _Row(new, list(new.token_ids), [list(table) for table in new.block_ids])
            introduced.add(new.slot)
        check(len({row.slot for row in plan.scheduled}) == len(plan.scheduled), "a slot is scheduled twice")
        for scheduled in plan.scheduled:
            if scheduled.new_block_ids:
                check(scheduled.slot not in introduced)
                for table, ids in zip(self._slots[scheduled.slot].tables, scheduled.new_block_ids, strict=True):
                    table.extend(ids)
            check(not scheduled.appended_ids or scheduled.slot not in introduced)
            self._slots[scheduled.slot].tokens += scheduled.appended_ids

    def _write(self, row: _Row, scheduled: Scheduled, written: set[tuple[int, int]]) -> None:
        end = scheduled.num_computed + scheduled.num_planned
        check(scheduled.num_planned > 0 and end <= len(row.tokens))
        for group, table in enumerate(row.tables):
            for position in range(scheduled.num_computed, end):
                place = (table[position // self._block_size], position % self._block_size)
                check(place[0] != 0, "the null block is written")
                check(place not in written, "two rows write one place")
                written.add(place)
                self._kv[place] = (group, row.hashes[position])

    def sample(self, step: int, masks: Masks | None = None) -> StepResult:
        launched = self._launched.pop(step)
        if step in self.fail_sample:
            raise RuntimeError("the device fell over while sampling")
        num_rows = 0
        rows = []
        for entry in launched:
            self._read(entry)
            row = self._answer(entry)
            num_rows += max(bool(row.token_ids), entry.scheduled.num_planned if row.prompt_logprobs else 0)
            rows.append(row)
        self.max_rows_of_logits = max(self.max_rows_of_logits, num_rows)
        return StepResult(step=step, rows=rows)

    def _read(self, entry: _Launched) -> None:
        begin, end = entry.scheduled.num_computed, entry.scheduled.num_computed + entry.scheduled.num_planned
        for group, (kind, table) in enumerate(zip(self._groups, entry.tables, strict=True)):
            first = max(0, begin - kind.window + 1) if kind.kind == "window" else 0
            for position in range(first, end):
                block = table[position // self._block_size]
                check(block != 0, f"position {position} lies in the null block")
                held = self._kv.get((block, position % self._block_size))
                check(held == (group, entry.hashes[position]), f"position {position}: wrong content in block {block}")

    def _answer(self, entry: _Launched) -> StepRow:
        scheduled, new, hashes = entry.scheduled, entry.row.new, entry.hashes
        begin, end = scheduled.num_computed, scheduled.num_computed + scheduled.num_planned
        if new.request_id in self.row_errors:
            return StepRow(slot=scheduled.slot, error="non-finite logits")
        row = StepRow(slot=scheduled.slot)
        if new.params.prompt_logprobs is not None:
            stop = min(end, new.num_prompt_tokens - 1)
            row.prompt_logprobs = [toy_logprob(hashes[i], new.token_ids[i + 1]) for i in range(begin, stop)]
        if end == len(hashes):
            token = self._token(new, hashes)
            row.token_ids = [token]
            if new.params.logprobs is not None:
                row.logprobs = [toy_logprob(hashes[-1], token)]
            if not new.params.is_drawn_on_device or new.is_guided:
                entry.row.tokens.append(token)
        return row

    @staticmethod
    def _token(new: NewRequest, hashes: list[int]) -> int:
        """What is drawn behind the prefix."""
        forbidden = set(new.stop_ids) if len(hashes) - new.num_prompt_tokens < new.params.min_tokens else set()
        return toy_token(hashes[-1], new.params.seed or 0, forbidden)

    def call(self, method: str, *args: object) -> object:
        return None

    def check(self) -> None:
        return None

    def stop(self) -> None:
        return None
