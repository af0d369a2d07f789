"""What a device does to logits beside its fused draw, and reports of it, without the host.

    PLAIN    the fused draw is all
    STEPS    biases, banned and allowed tokens, min_tokens, penalties before the draw; log-probabilities behind it
    GUIDED   a grammar's mask, which comes after the forward: logits are kept, and drawn beside the next forward
    HOST     anything else (DRY, Mirostat, shapers, plug-ins, scores of prompts ...): drawn by the CPU's sampler from a copy

A row with STEPS is copied as float32, changed in the order of `worker/logits`, and drawn from the copy, so its token is the CPU's. What the
steps need travels in one packet of the step. Of the tokens a request has seen the device keeps counts per slot, brought up to date from
its own token table where a penalty asks: tokens that the host has not seen are counted like any other.

Log-probabilities go back as what they are made of: the chosen token and the most likely ones, their logits, the rank, and the
logarithm of the sum of exponentials; the host subtracts in float64, as for a row it draws itself.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pagoda.base.plan import Masks, NewRequest, StepPlan
from pagoda.base.types import SamplingParams, TokenLogprobs
from pagoda.kernels import logits_ops, ops
from pagoda.worker.device import TYPES, Device, Pinned
from pagoda.worker.logits.bias import LogitBias
from pagoda.worker.logits.chain import Chain
from pagoda.worker.logits.masks import AllowedTokens, BadWords, MinTokens
from pagoda.worker.logits.penalties import Penalties
from pagoda.worker.staging import Staging
from pagoda.worker.table import RequestTable

__all__ = ["DeviceSteps", "Drawn", "Kind", "Packets", "draw_all_ways", "kind_of", "steps_nbytes"]

Array = Any
_OURS = (AllowedTokens, BadWords, MinTokens, LogitBias, Penalties)
_TOP = (0, 5, 20, 128)  # most likely tokens reported of a step's rows: few sizes, because kernels are compiled for each
_LOWEST = np.float32(-np.inf)


class Kind(enum.IntEnum):
    PLAIN = 0
    STEPS = 1
    GUIDED = 2
    HOST = 3


def kind_of(params: SamplingParams, chain: Chain, *, is_guided: bool) -> Kind:
    """Who draws a request's tokens."""
    if params.logprobs is None and not chain:
        return Kind.GUIDED if is_guided else Kind.PLAIN
    if is_guided or not params.is_drawn_on_device or not all(isinstance(step, _OURS) for step in chain.steps):
        return Kind.HOST
    return Kind.STEPS


def steps_nbytes(num_slots: int, vocab_size: int, dtype: str) -> int:
    """Bytes that `DeviceSteps` keeps on the device, and those that drawing kept rows takes beside the next forward."""
    return num_slots * (vocab_size * (4 + TYPES[dtype].itemsize + 4) + 4 * -(-vocab_size // 32))


def draw_all_ways(logits_RV: Array) -> None:
    """The most memory that steps of these rows take beside their forward."""
    rows = torch.arange(logits_RV.shape[0], dtype=torch.int32, device=logits_RV.device)
    x_RV = logits_RV.new_empty(logits_RV.shape, dtype=torch.float32)
    logits_ops.copy_rows(logits_RV, rows, x_RV)
    logits_ops.top_tokens(x_RV, min(_TOP[-1], x_RV.shape[1]))


class Packets:
    """Arrays on their way to the device, in one copy. `num_buffers`: how many may be under way at once."""

    def __init__(self, device: Device, num_buffers: int, num_words: int = 1 << 12) -> None:
        self._staging = Staging(device, num_buffers, num_words)

    def send(self, arrays: dict[str, np.ndarray]) -> dict[str, Array]:
        """-> the same on the device, valid until the next is sent; uint64 as int64. Each begins at a multiple of 16 bytes, so that kernels
        are compiled for one alignment."""
        raw = {name: np.ascontiguousarray(x).view(np.int32) for name, x in arrays.items()}
        places: dict[str, slice] = {}
        end = 0
        for name, words in raw.items():
            places[name] = slice(end, end + words.size)
            end += -(-words.size // 4) * 4
        host = self._staging.take(end)
        for name, words in raw.items():
            host[places[name]] = words
        self._staging.send(end)
        kinds = {name: "int64" if x.dtype == np.uint64 else str(x.dtype) for name, x in arrays.items()}
        return {name: self._staging.words[place].view(TYPES[kinds[name]]) for name, place in places.items()}


@dataclass(frozen=True)
class _Asks:
    """What a request asks of the steps; `edits` are added to its logits, the stop ids' up to position `free_from`."""

    num_prompt: int
    edit_ids: np.ndarray
    edit_values: np.ndarray
    stop_ids: np.ndarray
    free_from: int
    is_masked: bool
    is_penalized: bool
    num_logprobs: int  # -1: none
    wants_logits: bool


@dataclass
class Drawn:
    """Log-probabilities of a step on their way: sequences, what they asked, and L rows of 2 K + 2 words of `words`."""

    seqs: list[int] = field(default_factory=list)
    asks: list[_Asks] = field(default_factory=list)
    num_ids: int = 0
    words: Pinned | None = None

    def logprobs(self) -> list[tuple[int, TokenLogprobs]]:
        """(sequence, its entry), once the step is over."""
        if self.words is None or not self.seqs:
            return []
        k = self.num_ids
        rows_LW = self.words.host[: len(self.seqs) * (2 * k + 2)].reshape(len(self.seqs), -1)
        wants_logits_L1 = np.array([[asks.wants_logits] for asks in self.asks])
        normalizer_L1 = np.where(wants_logits_L1, np.float32(0), rows_LW[:, 2 * k + 1 :].view(np.float32))
        values = (rows_LW[:, k : 2 * k].view(np.float32).astype(np.float64) - normalizer_L1).tolist()
        ids, ranks = rows_LW[:, :k].tolist(), rows_LW[:, 2 * k].tolist()
        counts = [1 + asks.num_logprobs for asks in self.asks]
        return [(s, TokenLogprobs(ids[i][:n], values[i][:n], ranks[i])) for i, (s, n) in enumerate(zip(self.seqs, counts, strict=True))]


class DeviceSteps:
    """`tokens_NL` is the device's token table; `dtype` that of the logits. `num_steps` may be in flight."""

    def __init__(self, device: Device, table: RequestTable, tokens_NL: Array, vocab_size: int, dtype: str, *, num_steps: int) -> None:
        n = len(table.num_tokens_N)
        self._device, self._table, self._tokens_NL, self._vocab_size = device, table, tokens_NL, vocab_size
        self.kind_N = np.zeros(n, np.int8)
        self._asks: list[_Asks | None] = [None] * n
        self._num_logprobs_N = np.full(n, -1, np.int32)
        self._changes_N, self._has_edits_N, self._is_masked_N, self._is_penalized_N = (np.zeros(n, np.bool_) for _ in range(4))
        self._num_prompt_N, self._penalties_N3 = np.zeros(n, np.int32), np.zeros((n, 3), np.float32)
        self._num_counted_N = np.zeros(n, np.int32)
        self._num_words = -(-vocab_size // 32)
        self._seen_NV = device.zeros((n, vocab_size), "int32")
        self._allowed_NW = device.zeros((n, self._num_words), "int32")
        self._kept_NV = device.zeros((n, vocab_size), dtype)
        self._packets = Packets(device, 3 * (num_steps + 1))  # masks, rows and kept rows of a step
        self._late_packets = Packets(device, 1)
        self._late_ids, self._late_event = device.pinned(n, "int32"), device.event()

    # ---- requests

    def admit(self, plan: StepPlan) -> None:
        """New requests, which the table knows already."""
        masks: list[tuple[int, np.ndarray]] = []
        for new in plan.new:
            info = self._table.info(new.slot)
            kind = self.kind_N[new.slot] = kind_of(info.params, info.chain, is_guided=new.is_guided)
            self._asks[new.slot] = asks = self._asks_of(new) if kind == Kind.STEPS else None
            if asks is None:
                continue
            slot, params = new.slot, info.params
            self._num_logprobs_N[slot], self._num_prompt_N[slot] = asks.num_logprobs, asks.num_prompt
            self._has_edits_N[slot] = len(asks.edit_ids) + len(asks.stop_ids) > 0
            self._is_masked_N[slot], self._is_penalized_N[slot] = asks.is_masked, asks.is_penalized
            self._changes_N[slot] = self._has_edits_N[slot] or asks.is_masked or asks.is_penalized
            self._penalties_N3[slot] = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
            if asks.is_penalized:
                self._num_counted_N[new.slot] = 0
                self._seen_NV[new.slot].zero_()
            if asks.is_masked:
                masks.append((new.slot, _mask_of(info.params.allowed_token_ids or [], self._num_words)))
        if masks:
            slots, words = np.array([slot for slot, _ in masks], np.int32), np.concatenate([mask for _, mask in masks])
            sent = self._packets.send({"slot": slots, "words": words})
            for i, (slot, _) in enumerate(masks):
                self._allowed_NW[slot].copy_(sent["words"][i * self._num_words : (i + 1) * self._num_words])

    def _asks_of(self, new: NewRequest) -> _Asks:
        params = new.params
        bias = {token: value for token, value in (params.logit_bias or {}).items() if token < self._vocab_size}
        banned = [word[-1] for word in params.bad_words_token_ids or ()]
        return _Asks(
            num_prompt=new.num_prompt_tokens,
            edit_ids=np.array([*banned, *bias], np.int32),
            edit_values=np.array([*(_LOWEST for _ in banned), *bias.values()], np.float32),
            stop_ids=np.array(new.stop_ids if params.min_tokens > 0 else [], np.int32),
            free_from=new.num_prompt_tokens + params.min_tokens,
            is_masked=params.allowed_token_ids is not None,
            is_penalized=Penalties().wants(params),
            num_logprobs=-1 if params.logprobs is None else params.logprobs,
            wants_logits=(params.logprobs_mode or "").endswith("_logits"),
        )

    # ---- behind the forward

    def draw(self, logits_RV: Array, ids_R: Array, seqs: np.ndarray, rows: np.ndarray, slots: np.ndarray, places: np.ndarray, words: Pinned) -> Drawn:
        """Draws rows anew that have steps, in place of their ids in `ids_R`, and starts log-probabilities towards `words`.

        Sequence, row of logits, slot and position of the token drawn, of each row with STEPS."""
        wants, changes = self._num_logprobs_N[slots] >= 0, self._changes_N[slots]
        order = np.argsort(np.where(changes, np.where(wants, 1, 0), 2), kind="stable")  # changed rows first, those with log-probabilities last
        num_changed, first_wanted = int(changes.sum()), int((changes & ~wants).sum())
        rows, slots, places = rows[order].astype(np.int32), slots[order].astype(np.int32), places[order]
        packet = {"row": rows, "wanted_row": rows[first_wanted:]}
        if num_changed:
            packet |= _draw_inputs(self._table, slots[:num_changed], places[:num_changed])
            packet |= self._step_inputs(slots[:num_changed], places[:num_changed])
        sent = self._packets.send(packet)
        x_MV = logits_RV.new_empty((len(rows), logits_RV.shape[1]), dtype=torch.float32)
        logits_ops.copy_rows(logits_RV, sent["row"], x_MV)
        drawn = Drawn(seqs[order][first_wanted:].tolist(), [a for a in (self._asks[slot] for slot in slots[first_wanted:].tolist()) if a is not None])
        raw = self._raw(x_MV[first_wanted:], drawn)
        if num_changed:
            good = ops.row_is_finite(x_MV[:num_changed])  # a mask would hide what is not
            self._change(x_MV, sent)
            penalized = np.flatnonzero(self._is_penalized_N[slots[:num_changed]])
            if len(penalized):
                self._penalize(x_MV, sent, int((places[penalized] - self._num_counted_N[slots[penalized]]).max()))
                self._num_counted_N[slots[penalized]] = places[penalized]
            logits_ops.put_ids(ids_R, sent["row"][:num_changed], ops.sample(x_MV[:num_changed], *_drawn_by(sent)), good)
        if raw is not None:
            self._report(logits_RV, ids_R, sent["wanted_row"], raw, drawn, words)
        return drawn

    def _step_inputs(self, slots: np.ndarray, places: np.ndarray) -> dict[str, np.ndarray]:
        """Edits, masks and penalties of rows 0, 1, ... in the order given."""
        found: dict[str, np.ndarray] = {}
        ids, values, rows = [], [], []
        for i in np.flatnonzero(self._has_edits_N[slots]).tolist():
            a = self._asks[slots[i]]
            assert a is not None
            banned = a.stop_ids if places[i] < a.free_from else a.stop_ids[:0]
            ids += [a.edit_ids, banned]
            values += [a.edit_values, np.full(len(banned), _LOWEST)]
            rows.append(np.full(len(a.edit_ids) + len(banned), i, np.int32))
        if sum(map(len, ids)):
            found |= {"edit_id": np.concatenate(ids), "edit_value": np.concatenate(values), "edit_row": np.concatenate(rows)}
        masked = np.flatnonzero(self._is_masked_N[slots]).astype(np.int32)
        if len(masked):
            found |= {"mask_row": masked, "mask_slot": slots[masked]}
        penalized = self._is_penalized_N[slots]
        if penalized.any():
            names = ("repetition", "frequency", "presence")
            found |= {
                "seen_slot": np.where(penalized, slots, -1).astype(np.int32), "begin": self._num_counted_N[slots],
                "end": places.astype(np.int32), "num_prompt": self._num_prompt_N[slots],
                **{name: self._penalties_N3[slots, i] for i, name in enumerate(names)},
            }  # fmt: skip
        return found

    def _change(self, x_MV: Array, sent: dict[str, Array]) -> None:
        """The steps before penalties; among them the order makes no difference."""
        if "mask_row" in sent:
            logits_ops.apply_bitmask(x_MV, torch.index_select(self._allowed_NW, 0, sent["mask_slot"]), sent["mask_row"])
        if "edit_id" in sent:
            logits_ops.add_at(x_MV, sent["edit_row"], sent["edit_id"], sent["edit_value"])

    def _penalize(self, x_MV: Array, sent: dict[str, Array], longest: int) -> None:
        """`longest`: tokens that are new to the counts, at most."""
        slots = sent["seen_slot"]
        logits_ops.count_tokens(self._seen_NV, self._tokens_NL, slots, sent["begin"], sent["end"], sent["num_prompt"], longest=longest)
        logits_ops.penalize(x_MV[: len(slots)], self._seen_NV, slots, sent["repetition"], sent["frequency"], sent["presence"])

    def _raw(self, x_LV: Array, drawn: Drawn) -> tuple[Array, Array | None] | None:
        """Of rows that want log-probabilities, before anything changes: normalizers and the most likely tokens."""
        if not drawn.asks:
            return None
        most = max(a.num_logprobs for a in drawn.asks)
        count = min(next(size for size in _TOP if size >= most), self._vocab_size)
        drawn.num_ids = 1 + count
        return ops.row_logsumexp(x_LV), logits_ops.top_tokens(x_LV, count) if count else None

    def _report(self, logits_RV: Array, ids_R: Array, rows: Array, raw: tuple[Array, Array | None], drawn: Drawn, words: Pinned) -> None:
        normalizer_L, top_LK = raw
        chosen_L1 = torch.index_select(ids_R, 0, rows)[:, None]
        ids_LK = chosen_L1 if top_LK is None else torch.cat([chosen_L1, top_LK], dim=1)
        values_LK, rank_L = logits_ops.pick_logprobs(logits_RV, rows, torch.zeros_like(normalizer_L), ids_LK)
        packed = torch.cat([ids_LK, values_LK.view(torch.int32), rank_L[:, None], normalizer_L.view(torch.int32)[:, None]], dim=1)
        drawn.words = words
        self._device.copy(words.tensor[: packed.numel()], packed.view(-1))

    def num_words(self, slots: np.ndarray) -> int:
        """Words that log-probabilities of these slots take at most."""
        counts = self._num_logprobs_N[slots]
        wanted = int((counts >= 0).sum())
        return wanted * (2 * (1 + next(size for size in _TOP if size >= counts.max())) + 2) if wanted else 0

    # ---- grammars

    def keep(self, logits_RV: Array, rows: np.ndarray, slots: np.ndarray) -> None:
        """Puts logits aside until their masks are there."""
        sent = self._packets.send({"row": rows.astype(np.int32), "slot": slots.astype(np.int32)})
        logits_ops.copy_rows(logits_RV, sent["row"], self._kept_NV, sent["slot"])

    def draw_kept(self, slots: np.ndarray, places: np.ndarray, masks: Masks | None) -> np.ndarray:
        """Draws from logits that were kept, by a step that is over, and waits for the ids: beside what the device does meanwhile."""
        number_of = {slot: i for i, slot in enumerate(masks.slots)} if masks else {}
        masked = [i for i, slot in enumerate(slots.tolist()) if slot in number_of]
        packet = {"slot": slots.astype(np.int32), "row": np.arange(len(slots), dtype=np.int32), **_draw_inputs(self._table, slots, places)}
        if masked and masks is not None:
            words_MW = np.frombuffer(masks.words, np.int32).reshape(len(masks.slots), -1)
            packet |= {"mask_row": np.array(masked, np.int32), "words": words_MW[[number_of[slots[i]] for i in masked]].reshape(-1)}
        with self._device.beside():
            sent = self._late_packets.send(packet)
            x_GV = self._kept_NV.new_empty((len(slots), self._vocab_size), dtype=torch.float32)
            logits_ops.copy_rows(self._kept_NV, sent["slot"], x_GV)
            good = ops.row_is_finite(x_GV)
            if masked:
                logits_ops.apply_bitmask(x_GV, sent["words"].view(len(masked), -1), sent["mask_row"])
            ids_G = ops.sample(x_GV, *_drawn_by(sent))
            logits_ops.put_ids(ids_G, sent["row"], ids_G, good)
            self._device.copy(self._late_ids.tensor[: len(slots)], ids_G)
            self._late_event.record()
        self._late_event.wait()
        return self._late_ids.host[: len(slots)].copy()


def _draw_inputs(table: RequestTable, slots: np.ndarray, places: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "seed": table.seed_N[slots], "position": places.astype(np.int64), "temperature": table.temperature_N[slots],
        "top_k": table.top_k_N[slots], "top_p": table.top_p_N[slots], "min_p": table.min_p_N[slots],
    }  # fmt: skip


def _drawn_by(sent: dict[str, Array]) -> tuple[Array, ...]:
    """As `ops.sample` takes them."""
    return tuple(sent[name] for name in ("temperature", "top_k", "top_p", "min_p", "seed", "position"))


def _mask_of(ids: Sequence[int], num_words: int) -> np.ndarray:
    bits = np.zeros(32 * num_words, np.uint8)
    bits[np.asarray(ids)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
