"""Decoding with the shape of a 1B Llama: how much of the memory's speed one stream gets. `python benchmarks/decode_share.py`

Weights are random (`--load-format dummy`), so that only the shape matters. Every token reads every weight once: the share is
bytes of weights times tokens a second, over what the machine's memory gives. That is measured before and after each run, because
on a shared machine it drifts; shares are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

from workloads import ceilings, run_offline

from pagoda.base.config import config_from_kwargs
from pagoda.executor.launch import LocalEngine, build_engine

LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
    "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip
PRECISIONS = {"bf16": {}, "int8": {"quantization": "int8"}, "int4": {"quantization": "int4"}}


def engine_of(folder: Path, precision: str) -> LocalEngine:
    options = {"load_format": "dummy", "max_model_len": 1024, "kv_cache_memory_bytes": 1 << 28, **PRECISIONS[precision]}
    return build_engine(config_from_kwargs(str(folder), **options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default=",".join(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(LLAMA_1B))
        print("| precision | weights | decode tok/s | GB/s of weights | memory GB/s | share (min to max) |\n|---|---|---|---|---|---|")
        for precision in args.precision.split(","):
            engine = engine_of(Path(name), precision)
            weights, threads = engine.ledger.weights_nbytes, int(engine.config.device.num_threads or 1)
            run_offline(engine, "W1", 999)
            speeds, memory = [], [ceilings(threads)["memory"]]
            for round in range(args.rounds):
                speeds.append(run_offline(engine, "W1", round)["decode tok/s"])
                memory.append(ceilings(threads)["memory"])
            around = [(before + after) / 2 for before, after in pairwise(memory)]
            shares = [weights * speed / 1e9 / limit for speed, limit in zip(speeds, around, strict=True)]
            speed = statistics.median(speeds)
            print(
                f"| {precision} ({', '.join(engine.ledger.formats)}) | {weights / 1e9:.2f} GB | {speed:.1f} | {weights * speed / 1e9:.1f} "
                f"| {statistics.median(around):.1f} | {statistics.median(shares):.0%} ({min(shares):.0%} to {max(shares):.0%}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
