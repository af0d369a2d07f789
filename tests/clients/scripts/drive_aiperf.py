"""aiperf: a profile of streamed chats and one of completions, on synthetic prompts, from its own command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from steps import BASE_URL, FOLDER, MODEL, WORK, run, step

NUM_REQUESTS, NUM_TOKENS = 12, 16


def profile(kind: str, *more: str) -> dict[str, dict[str, float]]:
    """Its report: figure -> unit, average and percentiles."""
    folder = WORK / kind
    command = [
        str(Path(sys.executable).with_name("aiperf")), "profile", "--model", MODEL, "--url", BASE_URL, "--endpoint-type", kind,
        "--tokenizer", str(FOLDER), "--concurrency", "4", "--request-count", str(NUM_REQUESTS),
        "--prompt-input-tokens-mean", "64", "--prompt-input-tokens-stddev", "0", "--prompt-output-tokens-mean", str(NUM_TOKENS),
        "--extra-inputs", "ignore_eos:true", "--output-artifact-dir", str(folder), "--ui", "none", "--workers-max", "2", *more,
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}  # offline it takes no folder for a name
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = max(folder.rglob("profile_export_aiperf.json"), key=lambda path: path.stat().st_mtime)
    figures = json.loads(report.read_text(encoding="utf-8"))
    assert figures["request_count"]["avg"] == NUM_REQUESTS and not figures.get("error_summary"), figures.get("error_summary")
    return figures


@step
def streamed_chat() -> None:
    figures = profile("chat", "--streaming", "--use-server-token-count")
    assert figures["time_to_first_token"]["avg"] > 0 and figures["output_sequence_length"]["avg"] == NUM_TOKENS


@step
def completions() -> None:
    figures = profile("completions")
    assert figures["request_latency"]["avg"] > 0


run("aiperf")
