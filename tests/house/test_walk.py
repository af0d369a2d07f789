"""docs/walk.md names the files a request really visits, in order: a real one is traced and compared."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from tests.house.source import ROOT

WALK = ROOT / "docs/walk.md"


def walk_files() -> list[str]:
    """Files named by the numbered steps of the walk, `pagoda/` left out."""
    return [path for line in WALK.read_text().splitlines() if re.match(r"\d+\. ", line) for path in re.findall(r"`([\w/]+\.py)`", line)]


def trace_request(shared_data: Path) -> list[str]:
    """Files of ours whose functions run during one offline completion, in order of first visit."""
    from pagoda import LLM, SamplingParams

    llm = LLM(str(shared_data / "weights/stories260K-hf"), kv_cache_memory_bytes=16 << 20, max_model_len=64)
    params = SamplingParams(temperature=0, max_tokens=2)
    llm.generate("Once", params, use_tqdm=False)  # first-use imports are not part of the walk
    prefix = str(ROOT / "pagoda") + "/"
    visited: dict[str, None] = {}

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(prefix):
            visited.setdefault(frame.f_code.co_filename.removeprefix(prefix))

    sys.setprofile(profile)
    try:
        llm.generate("Once upon", params, use_tqdm=False)
    finally:
        sys.setprofile(None)
    return list(visited)


def test_the_walk_is_what_happens(shared_data: Path) -> None:
    traced = trace_request(shared_data)
    named = walk_files()
    assert len(named) == len(set(named)), "a file is named twice"
    missing = [path for path in named if path not in traced]
    assert not missing, f"docs/walk.md names files the request did not visit: {missing}"
    forgotten = [path for path in traced if path not in named and not path.startswith(("base/", "worker/logits/"))]
    assert not forgotten, f"the request visited files docs/walk.md does not name: {forgotten}"
    order = [path for path in traced if path in named]
    assert order == named, f"the order of first visits is {order}"
