"""Server-sent events: one `data:` line, one empty line."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["DONE", "event"]

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


def event(payload: Any) -> bytes:
    """`data: <json>` and the empty line that ends the event. JSON has no raw newline, so one line is always enough."""
    return b"data: " + _encode(payload) + b"\n\n"
