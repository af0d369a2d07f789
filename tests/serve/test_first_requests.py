"""The first requests of a server may come at the same time, and are decoded by several threads."""

from __future__ import annotations

import subprocess
import sys

_CODE = """
import sys, threading
from pagoda.serve.openai_chat import ChatCompletionRequest
from pagoda.serve.openai_completions import CompletionRequest
from pagoda.serve.wire import decode_body

sys.setswitchinterval(1e-6)
for kind in (ChatCompletionRequest, CompletionRequest) * 40:
    fresh = type(kind.__name__, (kind,), {"__annotations__": {"model": str}, "__module__": kind.__module__})
    barrier = threading.Barrier(8)

    def first(fresh=fresh, barrier=barrier):
        barrier.wait()
        decode_body(b'{"model": "m", "prompt": "x", "messages": []}', fresh)

    threads = [threading.Thread(target=first) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print("all decoded")
"""


def test_a_type_is_examined_by_one_thread() -> None:
    """msgspec 0.22 ended the process with a segmentation fault where two threads did."""
    done = subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and done.stdout == "all decoded\n" and done.stderr == "", (done.returncode, done.stderr)
