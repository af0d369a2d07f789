"""guidellm: a run on synthetic data over each of its two generating routes, from its own command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from steps import BASE_URL, FOLDER, MODEL, WORK, run, step

NUM_REQUESTS, NUM_TOKENS = 12, 16


def measured(route: str, *profile: str) -> None:
    report = WORK / f"{route.rpartition('/')[2]}-{profile[0]}.json"
    report.unlink(missing_ok=True)
    command = [
        str(Path(sys.executable).with_name("guidellm")), "run", "--backend", f"kind=openai_http,target={BASE_URL},model={MODEL},request_format={route}",
        "--tokenizer", f"kind=huggingface_auto,model={FOLDER}", "--data", f"kind=synthetic_text,prompt_tokens=64,output_tokens={NUM_TOKENS}",
        "--profile", f"kind={','.join(profile)}", "--constraint", f"kind=max_requests,count={NUM_REQUESTS}",
        "--output", f"kind=json,path={report}", "--disable-console-interactive",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (benchmark,) = json.loads(report.read_text(encoding="utf-8"))["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (NUM_REQUESTS, 0), totals
    tokens = benchmark["metrics"]["output_token_count"]["successful"]
    assert tokens["mean"] == NUM_TOKENS, tokens
    assert benchmark["metrics"]["time_to_first_token_ms"]["successful"]["mean"] > 0


@step
def chat_by_concurrent_streams() -> None:
    measured("/v1/chat/completions", "concurrent", "streams=4")


@step
def completions_one_after_another() -> None:
    measured("/v1/completions", "synchronous")


run("guidellm")
