"""What the scripts share: what they are told, and how they tell what they did.

A script is run as `python SCRIPT BASE_URL MODEL FOLDER WORK`: the server without `/v1`, the name it serves, the model as a Hugging Face
folder, and a folder to write in. It knows nothing of the project: only what a user of the client would write.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

BASE_URL, MODEL, FOLDER, WORK = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
URL = f"{BASE_URL}/v1"

QUESTION = "What is the capital of France?"
PARIS = [{"role": "user", "content": QUESTION}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}

_STEPS: list[Callable[[], Any]] = []


def step(function: Callable[[], Any]) -> Callable[[], Any]:
    """One thing that is done with the client; its name, read as words, goes into the table."""
    _STEPS.append(function)
    return function


def run(package: str) -> None:
    """Every step in turn, and the end of the process: status 1 if any failed."""
    print(f"version {package} {version(package)}", flush=True)
    has_failed = False
    for function in _STEPS:
        name = function.__name__.replace("_", " ")
        try:
            result = function()
            if inspect.iscoroutine(result):
                asyncio.run(result)
        except Exception:
            has_failed = True
            print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)
        else:
            print(f"ok {name}", flush=True)
    sys.exit(has_failed)
