"""Pagoda's offline `LLM`, through its public interface, prefix caching on as it comes."""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.peers.workers.wire import Generated, Requests, serve
from pagoda.api.llm import LLM
from pagoda.base.config import config_from_kwargs
from pagoda.base.types import SamplingParams
from pagoda.bench.quality import score
from pagoda.executor.launch import build_engine

_TOKEN_NBYTES = 23040  # of KV cache in 16 bits: 30 layers x 3 heads x 64 values x 2 x 2 bytes


class Pagoda:
    def __init__(self, args: argparse.Namespace) -> None:
        dequantize = args.options.pop("dequantize", False)  # bf16 and float32 from the quantized file: what bf16 folders hold
        budget = {"kv_cache_memory_bytes": args.kv_tokens * _TOKEN_NBYTES, "max_model_len": 4096, "num_threads": args.threads}
        config = config_from_kwargs(args.model, **{**budget, **args.options})
        self._engine = build_engine(config, dequantize=dequantize)
        self._llm = LLM(engine=self._engine)

    def generate(self, requests: Requests, *, ignore_eos: bool = True) -> Generated:
        params = [
            SamplingParams(temperature=0.0, max_tokens=wanted, ignore_eos=ignore_eos, detokenize=False) for _, wanted in requests
        ]
        found = self._llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False)
        firsts = [result.metrics.first_token_time for result in found if result.metrics]
        return Generated([list(result.outputs[0].token_ids) for result in found], min(firsts, default=None))

    def logits(self, chunk: list[int]) -> np.ndarray:
        """Log-probabilities, which serve as logits."""
        return score(self._engine, chunk)


if __name__ == "__main__":
    serve(Pagoda)
