"""vLLM's offline `LLM`; its engine core is a process of its own, as it comes."""

from __future__ import annotations

import argparse

from benchmarks.peers.workers.wire import Generated, Requests, serve


class Vllm:
    def __init__(self, args: argparse.Namespace) -> None:
        from vllm import LLM

        self._llm = LLM(
            args.model, dtype="bfloat16", max_model_len=4096, max_num_seqs=64, max_num_batched_tokens=2048,
            enable_prefix_caching=True, disable_log_stats=True, **args.options,
        )  # fmt: skip

    def generate(self, requests: Requests, *, ignore_eos: bool = True) -> Generated:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        params = [SamplingParams(temperature=0, max_tokens=wanted, ignore_eos=ignore_eos, detokenize=False) for _, wanted in requests]
        found = self._llm.generate(prompts, params, use_tqdm=False)
        return Generated([list(result.outputs[0].token_ids) for result in found])


if __name__ == "__main__":
    serve(Vllm)
