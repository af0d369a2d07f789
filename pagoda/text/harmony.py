"""gpt-oss's Harmony: every message names its channel.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>

analysis is reasoning, final and commentary without a recipient are content, a recipient `functions.NAME` makes a call. Text without any
channel is content.
"""

from __future__ import annotations

import re

from pagoda.text.tools.parser import Delta, joined

__all__ = ["MARKERS", "HarmonyParser"]

MARKERS = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|return|>", "<|call|>", "<|constrain|>")
_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>")
_RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")


class HarmonyParser:
    """States: HEADER (up to <|message|>), BODY (up to an end marker)."""

    def __init__(self, prompt: str = "") -> None:
        inside = prompt.rpartition("<|start|>")[2] if "<|start|>" in prompt else ""
        self._header, _, body = inside.partition("<|message|>")
        self._is_body = bool(body)
        self._kind = self._kind_of(self._header) if self._is_body else ""
        self._held = self._opening = ""
        self._num_calls = 0
        self._has_header = bool(inside) and not self._is_body  # text before a marker is a header, otherwise plain content
        self._is_plain = True  # no message has begun

    def feed(self, text: str) -> list[Delta]:
        return self._read(self._held + text, is_end=False)

    def close(self) -> list[Delta]:
        deltas = self._read(self._held, is_end=True)
        if self._is_plain and not self._is_body and self._opening.strip():
            deltas.append(Delta("content", self._opening))  # a header that nothing followed: the model does not speak Harmony
        return joined(deltas)

    def _read(self, stream: str, *, is_end: bool) -> list[Delta]:
        self._held = ""
        deltas: list[Delta] = []
        while stream:
            markers = _ENDS if self._is_body else ("<|message|>", *_ENDS)
            at, marker = _first(stream, markers, is_end=is_end)
            self._say(stream[:at], deltas)
            if marker is None:
                self._held = stream[at:]
                break
            self._turn(marker, deltas)
            stream = stream[at + len(marker) :]
        return joined(deltas)

    def _say(self, text: str, deltas: list[Delta]) -> None:
        if not text:
            return
        if not self._is_body:
            if self._has_header:
                self._header += text
                self._opening += text if self._is_plain else ""
            elif text.strip():
                deltas.append(Delta("content", text))
        elif self._kind == "arguments":
            deltas.append(Delta("arguments", text, self._num_calls - 1))
        elif self._kind:
            deltas.append(Delta("reasoning" if self._kind == "reasoning" else "content", text))

    def _turn(self, marker: str, deltas: list[Delta]) -> None:
        self._has_header, self._is_plain = True, False
        if marker != "<|message|>":
            self._is_body = False
            if marker in ("<|start|>", "<|end|>", "<|return|>", "<|call|>"):
                self._header = ""
            else:
                self._header += marker
            return
        self._is_body = True
        recipient = _RECIPIENT.search(self._header)
        if recipient is not None and "assistant" not in recipient[1]:
            deltas.append(Delta("call", recipient[1], self._num_calls))
            self._num_calls += 1
            self._kind = "arguments"
        else:
            self._kind = self._kind_of(self._header)
        self._header = ""

    @staticmethod
    def _kind_of(header: str) -> str:
        return "reasoning" if "analysis" in header else "content"


def _first(stream: str, markers: tuple[str, ...], *, is_end: bool) -> tuple[int, str | None]:
    """Where the first marker stands, or may come to stand."""
    found = [(at, marker) for marker in markers if (at := stream.find(marker)) >= 0]
    limit = min(found)[0] if found else len(stream)
    if not is_end:
        for at in range(max(0, len(stream) - 12), limit):
            if any(marker.startswith(stream[at:]) for marker in markers):
                return at, None
    return min(found) if found else (len(stream), None)
