"""llama.cpp in this process: its own library, flash attention, continuous batching of up to 32 sequences.

One context for a single long sequence and one for many short ones, as llama.cpp's memory is divided evenly among the
sequences of a context. A step is either prompts, up to the batch size, or the next token of every running sequence, as in
llama-batched-bench; in the order of their numbers, because only neighbours in number are computed together. Sequences
share no prefix, as in llama-server. Greedy sampling is an argmax over the logits in place.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import llama_cpp as lib
import numpy as np

from benchmarks.peers.workers.wire import Generated, Requests, serve

_BATCH = 2048
_MAX_SEQUENCES = 32


@dataclass
class _Sequence:
    index: int
    prompt: list[int]
    wanted: int
    seq_id: int = -1
    num_computed: int = 0
    tokens: list[int] = field(default_factory=list)
    row: int = -1  # of the batch: where its logits come


class Llama:
    def __init__(self, args: argparse.Namespace) -> None:
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        self._model = lib.llama_model_load_from_file(args.model.encode(), params)
        assert self._model, f"{args.model} cannot be loaded"
        self._threads, self._options = args.threads, args.options
        vocab = lib.llama_model_get_vocab(self._model)
        self._vocab_size = lib.llama_vocab_n_tokens(vocab)
        self._eos = lib.llama_vocab_eos(vocab)
        self._kv_tokens = args.kv_tokens
        self._contexts: dict[int, Any] = {}
        self._batch = lib.llama_batch_init(_BATCH, 0, 1)

    def generate(self, requests: Requests, *, ignore_eos: bool = True) -> Generated:
        longest = max(len(prompt) + wanted for prompt, wanted in requests)
        num_sequences = min(_MAX_SEQUENCES, len(requests))
        context = self._context(num_sequences, longest)
        memory = lib.llama_get_memory(context)
        lib.llama_memory_clear(memory, False)
        waiting = deque(_Sequence(i, prompt, wanted) for i, (prompt, wanted) in enumerate(requests))
        free, running, done = set(range(num_sequences)), [], []
        first_at = None
        while waiting or running:
            while waiting and free:
                waiting[0].seq_id = min(free)
                free.remove(waiting[0].seq_id)
                running.append(waiting.popleft())
            self._fill(sorted(running, key=lambda seq: seq.seq_id))
            status = lib.llama_decode(context, self._batch)
            assert status == 0, f"llama_decode gave {status}"
            for seq in [s for s in running if s.row >= 0]:
                seq.tokens.append(self._pick(context, seq.row))
                if len(seq.tokens) == seq.wanted or (not ignore_eos and seq.tokens[-1] == self._eos):
                    lib.llama_memory_seq_rm(memory, seq.seq_id, -1, -1)
                    free.add(seq.seq_id)
                    running.remove(seq)
                    done.append(seq)
            if first_at is None and (done or any(s.tokens for s in running)):
                first_at = time.perf_counter()
        return Generated([s.tokens for s in sorted(done, key=lambda s: s.index)], first_at)

    def logits(self, chunk: list[int]) -> np.ndarray:
        context = self._context(1, len(chunk))
        lib.llama_memory_clear(lib.llama_get_memory(context), False)
        self._batch.n_tokens = 0
        for position, token in enumerate(chunk):
            self._put(token, position, 0, True)
        assert lib.llama_decode(context, self._batch) == 0
        return np.stack([self._row(context, i).copy() for i in range(len(chunk) - 1)])

    def _context(self, num_sequences: int, longest: int) -> Any:
        """One sequence of up to 2,304 tokens, or 32 that share the budget."""
        count = 1 if num_sequences == 1 else _MAX_SEQUENCES
        if count not in self._contexts:
            params = lib.llama_context_default_params()
            params.n_ctx = 2304 if count == 1 else min(self._kv_tokens, count * 1024)
            params.n_batch, params.n_ubatch, params.n_seq_max = _BATCH, self._options.get("ubatch", 512), count
            params.n_threads = self._options.get("decode_threads", self._threads) if count == 1 else self._threads
            params.n_threads_batch = self._threads
            params.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED
            params.no_perf = True
            for side in ("type_k", "type_v"):
                setattr(params, side, {"f16": lib.GGML_TYPE_F16, "f32": lib.GGML_TYPE_F32}[self._options.get("kv", "f16")])
            self._contexts[count] = lib.llama_init_from_model(self._model, params)
            assert self._contexts[count], "llama.cpp made no context"
        room = lib.llama_n_ctx(self._contexts[count]) // count
        assert longest <= room, f"{longest} tokens wanted in a sequence of {room}"
        return self._contexts[count]

    def _fill(self, running: list[_Sequence]) -> None:
        batch = self._batch
        batch.n_tokens = 0
        for seq in running:
            seq.row = -1
        prompts = [seq for seq in running if not seq.tokens]
        for seq in prompts:
            for token in seq.prompt[seq.num_computed : seq.num_computed + _BATCH - batch.n_tokens]:
                seq.num_computed += 1
                is_last = seq.num_computed == len(seq.prompt)
                row = self._put(token, seq.num_computed - 1, seq.seq_id, is_last)
                seq.row = row if is_last else -1
        for seq in running if not prompts else ():
            seq.row = self._put(seq.tokens[-1], seq.num_computed, seq.seq_id, True)
            seq.num_computed += 1

    def _put(self, token: int, position: int, seq_id: int, wants_logits: bool) -> int:
        batch, row = self._batch, self._batch.n_tokens
        batch.token[row], batch.pos[row], batch.n_seq_id[row] = token, position, 1
        batch.seq_id[row][0] = seq_id
        batch.logits[row] = wants_logits
        batch.n_tokens = row + 1
        return row

    def _row(self, context: Any, row: int) -> np.ndarray:
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(context, row), shape=(self._vocab_size,))

    def _pick(self, context: Any, row: int) -> int:
        return int(self._row(context, row).argmax())


if __name__ == "__main__":
    lib.llama_log_set(_QUIET := lib.llama_log_callback(lambda level, text, data: None), ctypes.c_void_p())
    serve(Llama)
