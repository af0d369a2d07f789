"""Text of a model -> reasoning and answer, while it arrives: what stands between two markers is reasoning.

    START --(the start marker, or a prompt that ends with it)--> REASONING --end marker--> ANSWER
      +------------------anything else--------------------------------------------------> ANSWER

White space around the markers belongs to nobody. A reasoning that never ends is reasoning to the last character.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagoda.text.tools.parser import Delta, joined

__all__ = ["REASONING_FORMATS", "ReasoningFormat", "ReasoningParser"]


@dataclass(frozen=True)
class ReasoningFormat:
    start: str
    end: str
    is_assumed: bool = False  # the model thinks without writing the start marker

    def is_open(self, prompt: str) -> bool:
        """Whether the answer to this prompt begins inside the reasoning."""
        opened, closed = prompt.rfind(self.start), prompt.rfind(self.end)
        if prompt.rstrip().endswith(self.start):
            return True
        return self.is_assumed and not (closed > opened and prompt.rstrip().endswith(self.end))

    def is_over(self, prompt: str) -> bool:
        """Whether the prompt has ended the reasoning already (a template told not to think)."""
        return prompt.rstrip().endswith(self.end)


_THINK = ReasoningFormat("<think>", "</think>")
_ALWAYS = ReasoningFormat("<think>", "</think>", is_assumed=True)

REASONING_FORMATS: dict[str, ReasoningFormat] = {
    "deepseek_r1": _ALWAYS,
    "deepseek_v3": _THINK,
    "ernie45": _ALWAYS,
    "gemma4": ReasoningFormat("<|channel>thought", "<channel|>"),
    "glm45": _THINK,
    "glm47": _THINK,
    "granite": ReasoningFormat("Here is my thought process:", "Here is my response:"),
    "holo2": _THINK,
    "hunyuan_a13b": _THINK,
    "kimi_k2": _THINK,
    "mimo": _THINK,
    "minimax_m2": _ALWAYS,
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
    "nemotron_v3": _THINK,
    "olmo3": _ALWAYS,
    "qwen3": _THINK,
    "seed_oss": ReasoningFormat("<seed:think>", "</seed:think>"),
    "step3": _ALWAYS,
    "step3p5": _ALWAYS,
}
"""Names are vLLM's (`--reasoning-parser`)."""


class ReasoningParser:
    """`feed` gives reasoning and content deltas; the content is what a tool parser reads next."""

    def __init__(self, format: ReasoningFormat, prompt: str = "") -> None:
        self._format = format
        self._state = "reasoning" if format.is_open(prompt) else "answer" if format.is_over(prompt) else "start"
        self._held = ""
        self._is_bare = True  # nothing of the present part has been said

    def feed(self, text: str) -> list[Delta]:
        return joined(self._read(self._held + text, is_end=False))

    def close(self) -> list[Delta]:
        return joined(self._read(self._held, is_end=True))

    def _read(self, stream: str, *, is_end: bool) -> list[Delta]:
        self._held = ""
        deltas: list[Delta] = []
        if self._state == "start":
            lead = stream.lstrip()
            if lead.startswith(self._format.start):
                self._state, stream = "reasoning", lead[len(self._format.start) :]
            elif not is_end and self._format.start.startswith(lead):
                self._held = stream
                return []
            else:
                self._state, self._is_bare = "answer", False
        if self._state == "reasoning":
            if self._is_bare and self._format.start.startswith(stream.lstrip()) and not is_end:
                self._held = stream  # an assumed start may still be written
                return []
            if self._is_bare and stream.lstrip().startswith(self._format.start):
                stream = stream.lstrip()[len(self._format.start) :]
            stream = self._reason(stream, deltas, is_end=is_end)
        if self._state == "answer" and stream:
            if self._is_bare:
                stream = stream.lstrip()
                self._is_bare = not stream
            if stream:
                deltas.append(Delta("content", stream))
        return deltas

    def _reason(self, stream: str, deltas: list[Delta], *, is_end: bool) -> str:
        """Says reasoning; returns the answer behind its end."""
        if self._is_bare:
            stream = stream.lstrip()
        at = stream.find(self._format.end)
        if at >= 0:
            said, rest = stream[:at].rstrip(), stream[at + len(self._format.end) :]
            self._state = "answer"
        else:
            tails = range(max(0, len(stream) - len(self._format.end) + 1), len(stream))
            free = next((at for at in tails if self._format.end.startswith(stream[at:])), len(stream))
            said, rest = stream[:free].rstrip(), ""
            if is_end:
                said = stream
            self._held = stream[len(said) :]
        if said:
            deltas.append(Delta("reasoning", said))
            self._is_bare = False
        if self._state == "answer":
            self._is_bare = True
        return rest
