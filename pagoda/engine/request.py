"""One sample of one request, from arrival to its single terminal event.

                 enqueue             admit
        NEW ---------------> WAITING -------> RUNNING ------------+
         | (core.add)          ^  |             |                 |
         | start       enqueue |  |             | preempt         | finish
         v                     |  | finish      v                 v
      WAITING_GRAMMAR ---------+  +---------> FINISHED <----------+
               |               |                ^  ^
               +---------------|----------------|--+ finish
                               +-- PREEMPTED ---+ finish
                        requeue

    NEW        validated, in no queue
    WAITING_GRAMMAR  in no queue, owns nothing: its grammar is being compiled (`engine/grammars.py`)
    WAITING    owns no block and no slot; computed = 0
    RUNNING    owns a slot and the blocks of all its known tokens
    PREEMPTED  passing state inside `Scheduler.preempt`: everything given back, tokens kept, then WAITING again
    FINISHED   owns nothing; its terminal output exists

There are no phases. Three counts say everything, in the same unit, tokens from the start of the sequence:

    num_tokens_total     known: prompt and what was generated
    num_tokens_computed  their keys and values are in the cache, by steps that have settled
    num_tokens_planned   being computed by steps in flight
    num_tokens_ahead     being drawn by steps in flight: not known, but sure to come, so that they can be planned

A step may compute `total + ahead - computed - planned` more; the one that reaches the last of them samples the next. Tokens
are planned ahead only with steps that overlap, and only for requests whose draw needs nothing from the host (`runs_ahead`).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Protocol

from pagoda.base.hashing import BlockHash, chain_hash
from pagoda.base.types import EngineOutput, FinishReason, RequestMetrics, SamplingParams, TokenLogprobs

__all__ = ["Guide", "GuideMatcher", "Request", "RequestState"]


class RequestState(enum.Enum):
    NEW = "new"
    WAITING_GRAMMAR = "waiting_grammar"
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class GuideMatcher(Protocol):
    """The part of `structured.matcher.Matcher` that the core knows."""

    def mask(self) -> bytes: ...

    def accept(self, token_id: int) -> str | None: ...

    def forced(self) -> list[int]: ...

    def copy(self) -> GuideMatcher: ...


class Guide:
    """One sample's grammar. It holds from the start, or from behind the tokens that end its reasoning.

    With `opens_with` reasoning is the sample's choice: its first token is that one, or one that the grammar allows. `avoided_ids` (the
    end, under ignore_eos) come only where nothing else can.
    """

    __slots__ = ("_avoided_ids", "_is_first", "_matcher", "_opens_with", "_starts_after", "_tail", "is_on")

    def __init__(
        self, matcher: GuideMatcher, starts_after: list[int], opens_with: int | None = None, avoided_ids: Iterable[int] = ()
    ) -> None:
        self._matcher, self._avoided_ids = matcher, tuple(avoided_ids)
        self._starts_after = starts_after
        self._opens_with = opens_with if starts_after else None
        self.is_on = not starts_after or self._opens_with is not None
        self._is_first = True
        self._tail: list[int] = []

    def mask(self) -> bytes:
        """What may come next; only while `is_on`."""
        bits = self._matcher.mask()
        others = bits
        for token_id in self._avoided_ids:
            if bits[token_id >> 3] >> (token_id & 7) & 1:
                others = _with_bit(others, token_id, is_set=False)
        if others is not bits and others.strip(b"\0"):
            bits = others
        if self._opens_with is None or not self._is_first:
            return bits
        return _with_bit(bits, self._opens_with, is_set=True)

    def forced(self) -> list[int]:
        """Tokens that its masks would allow alone, one after the other: they need not be sampled."""
        return self._matcher.forced() if self.is_on else []

    def accept(self, token_id: int) -> str | None:
        """The sample's next token. What is wrong with it, if something is."""
        is_opening = self._is_first and token_id == self._opens_with
        self._is_first = False
        if self.is_on and not is_opening:
            return self._matcher.accept(token_id)
        self._tail = [*self._tail, token_id][-len(self._starts_after) :]
        self.is_on = self._tail == self._starts_after
        return None


def _with_bit(bits: bytes, token_id: int, *, is_set: bool) -> bytes:
    place, bit = divmod(token_id, 8)
    byte = bits[place] | 1 << bit if is_set else bits[place] & ~(1 << bit)
    return bits[:place] + bytes([byte]) + bits[place + 1 :]


class Request:
    """State of one sample. Written by the scheduler, the KV manager and the core only."""

    __slots__ = (
        "_end_ids",
        "_repetition",
        "awaited_hash",
        "block_hashes",
        "block_tables",
        "eos_token_ids",
        "grammar_end_ids",
        "guide",
        "hash_root",
        "index",
        "key",
        "max_tokens_total",
        "metrics",
        "num_blocks_committed",
        "num_blocks_slid",
        "num_preemptions",
        "num_prompt_tokens",
        "num_tokens_ahead",
        "num_tokens_cached",
        "num_tokens_computed",
        "num_tokens_planned",
        "params",
        "priority",
        "prompt_logprobs",
        "request_id",
        "runs_ahead",
        "sequence",
        "slot",
        "state",
        "stop_token_ids",
        "token_ids",
        "unsent_ids",
        "wants_prompt_logprobs",
    )

    def __init__(
        self,
        *,
        request_id: str,
        index: int,
        sequence: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        eos_token_ids: list[int],
        max_tokens_total: int,
        priority: int = 0,
        hash_root: BlockHash | None = None,
        arrival_time: float = 0.0,
    ) -> None:
        self.request_id = request_id  # the client's, shared by the n samples
        self.index = index
        self.sequence = sequence  # order of arrival, unique
        self.priority = priority
        self.key: tuple[int, ...] = ()  # place among others, set by the policy
        self.params = params  # of this sample: n = 1, seed set
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.unsent_ids: list[int] = []  # the last of them, which the worker has not sampled and not been told
        self.max_tokens_total = max_tokens_total  # where LENGTH stops it
        self.eos_token_ids = frozenset(() if params.ignore_eos else eos_token_ids)
        self.grammar_end_ids = frozenset[int]()  # end a sample whose grammar is over, whatever min_tokens and ignore_eos say
        self.guide: Guide | None = None
        self.stop_token_ids = frozenset(params.stop_token_ids or ())
        self._end_ids = self.eos_token_ids | self.stop_token_ids
        self._repetition = params.repetition_detection
        self.state = RequestState.NEW
        self.num_tokens_computed = 0
        self.num_tokens_planned = 0
        self.num_tokens_ahead = 0
        self.runs_ahead = False  # its tokens are drawn on the device, where the next step finds them
        self.num_tokens_cached = -1  # found in the prefix cache at first admission; -1 before it
        self.num_preemptions = 0
        self.slot: int | None = None
        self.block_tables: list[list[int]] = []  # per KV group; null where a window has passed
        self.num_blocks_slid: list[int] = []  # per KV group: leading entries that are null
        self.num_blocks_committed = 0  # full blocks offered to the prefix index
        self.hash_root = hash_root  # None: its blocks are never hashed
        self.block_hashes: list[BlockHash] = []
        self.awaited_hash: BlockHash | None = None  # a block another request is computing for both
        self.wants_prompt_logprobs = params.prompt_logprobs is not None  # until delivered
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self.metrics = RequestMetrics(arrival_time=arrival_time)

    @property
    def num_tokens_total(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        return self.state is RequestState.FINISHED

    @property
    def worker_id(self) -> str:
        """The name in plans and logs."""
        return self.request_id if self.index == 0 else f"{self.request_id}#{self.index}"

    @property
    def stop_ids(self) -> list[int]:
        """What min_tokens forbids, in a fixed order."""
        return sorted(self.eos_token_ids | self.stop_token_ids)

    def block_hash(self, index: int, block_size: int) -> BlockHash:
        """Hash of full block `index`, computed once. The request must have a `hash_root`."""
        hashes = self.block_hashes
        while len(hashes) <= index:
            assert self.hash_root is not None
            parent = hashes[-1] if hashes else self.hash_root
            begin = len(hashes) * block_size
            hashes.append(chain_hash(parent, self.token_ids[begin : begin + block_size]))
        return hashes[index]

    def check_stop(self, token_id: int) -> tuple[FinishReason, int | str | None] | None:
        """Whether the token just appended ends the sample: eos, stop token ids, length, repetition. Returns (reason, stop_reason)."""
        count = len(self.token_ids)
        if count < self.max_tokens_total and token_id not in self._end_ids and self.guide is None and self._repetition is None:
            return None  # nearly always
        num_output = count - self.num_prompt_tokens
        if self.guide is not None and self.guide.is_on and token_id in self.grammar_end_ids:
            return FinishReason.STOP, None
        if num_output >= self.params.min_tokens:
            if token_id in self.eos_token_ids:
                return FinishReason.STOP, None
            if token_id in self.stop_token_ids:
                return FinishReason.STOP, token_id
        if count >= self.max_tokens_total:
            return FinishReason.LENGTH, None
        if self._repetition is not None and self._repetition.finds(self.token_ids, self.num_prompt_tokens):
            return FinishReason.REPETITION, "repetition_detected"
        return None

    def take_prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """The whole prompt's, the first time it is asked for after the prompt was computed; None from then on."""
        if not self.wants_prompt_logprobs:
            return None
        self.wants_prompt_logprobs = False
        delivered: list[TokenLogprobs | None] = [None, *self.prompt_logprobs]
        self.prompt_logprobs = []
        return delivered

    def terminal(self, reason: FinishReason, error: str | None = None) -> EngineOutput:
        """The last output of a sample that ends without a token."""
        return EngineOutput(
            request_id=self.request_id,
            index=self.index,
            finish_reason=reason,
            num_cached_tokens=max(0, self.num_tokens_cached),
            error=error,
            metrics=self.metrics,
        )
