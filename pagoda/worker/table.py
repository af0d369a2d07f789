"""Per-slot state as arrays: what the worker remembers of every running request, so that a plan need only say what changed.

A slot is given by the brain at admission and released in a later plan. Row `slot` of every array belongs to it:

    tokens_NL        every known token: prompt, then what was sampled          N slots, L max_model_len and one that is never computed
    num_tokens_N     how many of them
    tables_gNB       block ids per KV group g                                  B blocks of a full-length request
    temperature_N .. seed_N                                                    plain sampling parameters
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pagoda.base.plan import NewRequest, Scheduled, StepPlan
from pagoda.base.types import SamplingParams
from pagoda.worker.logits import Chain, LogitsStep, chain_of

__all__ = ["RequestTable", "SlotInfo"]


@dataclass
class SlotInfo:
    """What does not fit in an array."""

    request_id: str
    params: SamplingParams
    num_prompt_tokens: int
    stop_ids: list[int]
    chain: Chain


class RequestTable:
    """`processors` are plug-ins of the logits chain."""

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_model_len: int,
        num_groups: int,
        max_blocks: int,
        processors: Sequence[LogitsStep] = (),
    ) -> None:
        n = max_num_seqs
        self._processors = tuple(processors)
        self.tokens_NL = np.zeros((n, max_model_len + 1), np.int32)
        self.num_tokens_N = np.zeros(n, np.int32)
        self.tables_gNB = np.zeros((num_groups, n, max_blocks), np.int32)
        self.num_blocks_gN = np.zeros((num_groups, n), np.int32)
        self.temperature_N = np.zeros(n, np.float32)
        self.top_p_N = np.ones(n, np.float32)
        self.min_p_N = np.zeros(n, np.float32)
        self.top_k_N = np.zeros(n, np.int32)
        self.seed_N = np.zeros(n, np.uint64)
        self.is_special_N = np.zeros(n, np.bool_)  # wants logprobs or a logits step: not just the fused draw
        self.is_redrawn_N = np.zeros(n, np.bool_)  # special, or its grammar's mask comes after the forward: drawn again behind it
        self.wants_prompt_logprobs_N = np.zeros(n, np.bool_)
        self.infos: list[SlotInfo | None] = [None] * n

    @property
    def has_processors(self) -> bool:
        return bool(self._processors)

    @property
    def nbytes(self) -> int:
        return self.tokens_NL.nbytes + self.tables_gNB.nbytes

    def info(self, slot: int) -> SlotInfo:
        found = self.infos[slot]
        assert found is not None, f"slot {slot} holds no request"
        return found

    def apply(self, plan: StepPlan) -> None:
        """Brings the table up to the plan: releases, then new requests, then block deltas."""
        for slot in plan.released_slots:
            self.infos[slot] = None
            self.num_blocks_gN[:, slot] = 0
        for request in plan.new:
            self._admit(request)
        for row in plan.scheduled:
            if row.new_block_ids:
                self._append_blocks(row)
            for token_id in row.appended_ids:
                self.append_tokens(np.array([row.slot]), np.array([token_id]))

    def _admit(self, new: NewRequest) -> None:
        slot, params = new.slot, new.params
        assert self.infos[slot] is None, f"slot {slot} is taken"
        assert params.seed is not None, "the brain gives every request a seed"
        chain = chain_of(params, self._processors)
        self.infos[slot] = SlotInfo(new.request_id, params, new.num_prompt_tokens, new.stop_ids, chain)
        self.tokens_NL[slot, : len(new.token_ids)] = new.token_ids
        self.num_tokens_N[slot] = len(new.token_ids)
        for group, ids in enumerate(new.block_ids):
            self.tables_gNB[group, slot, : len(ids)] = ids
            self.num_blocks_gN[group, slot] = len(ids)
        self.temperature_N[slot] = params.temperature
        is_open = not chain.is_truncated
        self.top_p_N[slot] = params.top_p if is_open else 1.0
        self.min_p_N[slot] = params.min_p if is_open else 0.0
        self.top_k_N[slot] = max(params.top_k, 0) if is_open else 0
        self.is_special_N[slot] = params.logprobs is not None or bool(chain)
        self.is_redrawn_N[slot] = self.is_special_N[slot] or new.is_guided
        self.wants_prompt_logprobs_N[slot] = params.prompt_logprobs is not None
        self.seed_N[slot] = np.uint64(params.seed & 0xFFFF_FFFF_FFFF_FFFF)

    def _append_blocks(self, row: Scheduled) -> None:
        for group, ids in enumerate(row.new_block_ids):
            if ids:
                start = self.num_blocks_gN[group, row.slot]
                self.tables_gNB[group, row.slot, start : start + len(ids)] = ids
                self.num_blocks_gN[group, row.slot] = start + len(ids)

    def expect_tokens(self, slots: np.ndarray) -> np.ndarray:
        """One more token each, which a step in flight draws. -> the places where `put_tokens` will find them."""
        places: np.ndarray = self.num_tokens_N[slots]
        self.num_tokens_N[slots] = places + 1
        return places

    def put_tokens(self, slots: np.ndarray, places: np.ndarray, ids: np.ndarray) -> None:
        """What had been expected. A place beyond the longest request belongs to one that has ended."""
        fits = places < self.tokens_NL.shape[1]
        self.tokens_NL[slots[fits], places[fits]] = ids[fits]

    def append_tokens(self, slots: np.ndarray, ids: np.ndarray) -> None:
        """Sampled tokens become the next step's input without a round trip through the brain."""
        counts = self.num_tokens_N[slots]
        self.tokens_NL[slots, counts] = ids
        self.num_tokens_N[slots] = counts + 1
