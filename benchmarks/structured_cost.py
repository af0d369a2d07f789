"""What structured output costs: decode throughput of N streams, free and held by a grammar, in one run.

    python benchmarks/structured_cost.py [--model M] [--streams 32] [--tokens 64] [--rounds 9]

Free and held rounds alternate; the ratio is the median over pairs, so that the machine's other work falls on both. The grammar is a JSON list of long
strings: its masks allow nearly all of the vocabulary, nothing is forced, and it cannot end early. Every stream gives the same number of tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time

from pagoda import LLM, SamplingParams, StructuredOutputsParams

SCHEMA = {"type": "array", "items": {"type": "string", "minLength": 40}, "minItems": 50}


def tokens_per_second(llm: LLM, params: list[SamplingParams]) -> float:
    prompts = ["A list of the longest names, in JSON: "] * len(params)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    llm = LLM(args.model, max_model_len=1024, max_num_seqs=args.streams)
    free = [SamplingParams(temperature=0.8, seed=i, max_tokens=args.tokens, ignore_eos=True) for i in range(args.streams)]
    held = [params.clone(structured_outputs=StructuredOutputsParams(json=SCHEMA)) for params in free]
    for params in (free, held):
        tokens_per_second(llm, params)  # first-use work: the vocabulary, the grammar, the prefix cache
    rounds = [(tokens_per_second(llm, free), tokens_per_second(llm, held)) for _ in range(args.rounds)]
    ratios = [b / a for a, b in rounds]
    print(f"{args.streams} streams of {args.tokens} tokens, {args.rounds} rounds, medians:")
    print(f"  free   {statistics.median(a for a, _ in rounds):8.0f} tokens/s")
    print(f"  held   {statistics.median(b for _, b in rounds):8.0f} tokens/s")
    print(f"  ratio  {statistics.median(ratios):8.3f}   (from {min(ratios):.2f} to {max(ratios):.2f})")
    llm.close()


if __name__ == "__main__":
    main()
