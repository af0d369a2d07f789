"""transformers' `generate`: static batches of up to 32, padded on the left, each run to its longest answer."""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList

from benchmarks.peers.workers.wire import Generated, Requests, serve

_BATCH, _PAD = 32, 2


class _Clock(LogitsProcessor):
    """Notes when the first logits of a batch were there."""

    def __init__(self) -> None:
        self.first_at: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.first_at = self.first_at or time.perf_counter()
        return scores


class Transformers:
    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(args.threads)
        dtype = getattr(torch, args.options.get("dtype", "bfloat16"))
        self._model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def generate(self, requests: Requests, *, ignore_eos: bool = True) -> Generated:
        clock, tokens = _Clock(), []
        for start in range(0, len(requests), _BATCH):
            part = requests[start : start + _BATCH]
            longest, wanted = max(len(p) for p, _ in part), max(n for _, n in part)
            ids = torch.tensor([[_PAD] * (longest - len(p)) + p for p, _ in part])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, _ in part])
            config = GenerationConfig(
                max_new_tokens=wanted, min_new_tokens=wanted if ignore_eos else None, do_sample=False,
                eos_token_id=None if ignore_eos else _PAD, pad_token_id=_PAD,
            )  # fmt: skip
            found = self._model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=LogitsProcessorList([clock])
            )
            for row, (_, count) in zip(found[:, longest:].tolist(), part, strict=True):
                end = len(row) if ignore_eos or _PAD not in row else row.index(_PAD) + 1
                tokens.append(row[: min(count, end)])
        return Generated(tokens, clock.first_at)

    @torch.inference_mode()
    def logits(self, chunk: list[int]) -> object:
        return self._model(torch.tensor([chunk])).logits[0, :-1].float().numpy()


if __name__ == "__main__":
    serve(Transformers)
