"""The only words brain and muscle exchange, in one process or over a wire.

A plan carries new requests whole and known ones as deltas. Tokens per request are ragged; planned counts are upper
bounds; a plan may be empty. Slots name rows of the worker's table, from admission to release; block tables are per KV
group. Block 0 is the null block: never written, never read.

    forward(plan)          starts the step
    sample(step, masks)    its late half: a grammar's mask delays only the sampling, never the forward
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from pagoda.base.types import SamplingParams, TokenLogprobs

__all__ = ["NOT_FINITE", "BlobRef", "Executor", "Masks", "NewRequest", "Scheduled", "StepPlan", "StepResult", "StepRow"]


NOT_FINITE = "the model produced logits that are not finite for this request"
"""`StepRow.error` of a row whose logits have a NaN or are all infinite."""


class BlobRef(msgspec.Struct, frozen=True):
    """Bytes that are neither ids nor integers (images, prompt embeddings), by reference."""

    handle: str  # name of a shared-memory segment
    dtype: str
    shape: tuple[int, ...]
    content_hash: str  # hex; part of the block hash of the tokens it stands for


class NewRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A request the worker has not seen, or has forgotten (after preemption). Followed by its Scheduled row."""

    slot: int
    request_id: str
    token_ids: list[int]  # prompt and what was generated so far
    num_prompt_tokens: int
    params: SamplingParams  # seed always set
    stop_ids: list[int] = []  # eos and stop token ids, which min_tokens forbids
    block_ids: list[list[int]]  # per KV group, everything allocated so far
    blobs: list[BlobRef] = []
    is_guided: bool = False  # it has a grammar: masks will come with its samples


class Scheduled(msgspec.Struct, array_like=True):
    """One row of the batch: compute tokens [num_computed, num_computed + num_planned) of the request in `slot`.

    The row is sampled when that interval reaches the request's last known token.
    """

    slot: int
    num_computed: int
    num_planned: int
    new_block_ids: list[list[int]] = []  # per KV group, appended to the table; empty for a request in `new`
    draft_token_ids: list[int] = []  # speculation: part of the planned tokens, verified by this step
    appended_ids: list[int] = []  # known behind the last sampled token without being sampled: a grammar forces them


class StepPlan(msgspec.Struct, kw_only=True, omit_defaults=True):
    step: int
    new: list[NewRequest] = []
    scheduled: list[Scheduled] = []  # batch order
    released_slots: list[int] = []  # finished, aborted or preempted since the last plan; freed before `new` is read
    copies: list[tuple[int, int]] = []  # (source, destination) block ids, copied in every plane before the forward

    @property
    def num_tokens(self) -> int:
        return sum(row.num_planned for row in self.scheduled)


class Masks(msgspec.Struct, kw_only=True):
    """Grammar bitmasks for some slots: bit v of row i allows token v (little-endian words of 32 bits)."""

    slots: list[int] = []
    words: bytes = b""  # (len(slots), ceil(vocab / 32)) uint32


class StepRow(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one scheduled request got from the step. No sampled tokens: the chunk ended inside the prompt."""

    slot: int
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] = []  # of the tokens following each computed prompt token of this chunk
    error: str | None = None  # this request failed (non-finite logits); others are untouched


class StepResult(msgspec.Struct, kw_only=True, omit_defaults=True):
    step: int
    rows: list[StepRow] = []  # in the order of `StepPlan.scheduled`
    loaded_ids: list[str] = []  # requests whose KV transfer ended, for connectors
    saved_ids: list[str] = []
    failed_ids: list[str] = []
    forward_seconds: float = 0.0
    sample_seconds: float = 0.0


class Executor(Protocol):
    """Carries plans to one or more workers. `forward` returns at once or blocks; `sample` returns the step's result."""

    def forward(self, plan: StepPlan) -> None: ...

    def sample(self, step: int, masks: Masks | None = None) -> StepResult: ...

    def call(self, method: str, *args: object) -> object:
        """Rare messages to every worker (reload, sleep, adapters)."""

    def check(self) -> None:
        """Raises EngineDead when a worker is gone."""

    def stop(self) -> None: ...
