"""Text of one answer -> what a chat message is made of: reasoning, content, tool calls.

    text -> reasoning parser -> (content) -> tool parser -> deltas        or one parser for formats that mix the two (Harmony)

`choose` turns names of formats, or what a chat template shows, into an `OutputFormat`; `OutputFormat.parser` makes one parser per sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from pagoda.base.errors import ConfigError
from pagoda.base.registry import nearest
from pagoda.text.harmony import MARKERS as HARMONY_MARKERS
from pagoda.text.harmony import HarmonyParser
from pagoda.text.reasoning.parser import REASONING_FORMATS, ReasoningFormat, ReasoningParser
from pagoda.text.template import ChatTemplate
from pagoda.text.tools.formats import FORMATS, NAMED, REQUIRED
from pagoda.text.tools.generic import derive
from pagoda.text.tools.parser import Delta, Format, Schemas, ToolParser, joined

__all__ = ["Chosen", "MessageParser", "OutputFormat", "choose", "detect_reasoning", "detect_tools", "output_format"]

HARMONY = "openai"
TEMPLATE = "template"
AUTO, NONE = "auto", "none"

_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (  # tool format -> what its template has, all of it; the first that fits
    (HARMONY, ("<|channel|>", "<|message|>")),
    ("deepseek_v32", ("｜DSML｜", "function_calls")),
    ("deepseek_v4", ("｜DSML｜",)),
    ("deepseek_v3", ("<｜tool▁calls▁begin｜>", "```json")),
    ("deepseek_v31", ("<｜tool▁calls▁begin｜>",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("functiongemma", ("<start_function_call>",)),
    ("gemma4", ("<|tool_call>", "<tool_call|>")),
    ("apertus", ("<|tools_prefix|>",)),
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("seed_oss", ("<seed:tool_call>",)),
    ("minicpm5", ('<function name="', "<param name=")),
    ("qwen3_coder", ("<function=", "<parameter=")),
    ("glm45", ("<arg_key>",)),
    ("longcat", ("<longcat_tool_call>",)),
    ("mistral", ("[TOOL_CALLS]",)),
    ("granite", ("<|tool_call|>",)),
    ("internlm", ("<|action_start|>", "<|plugin|>")),
    ("phi4_mini_json", ("functools",)),
    ("lfm2", ("<|tool_call_start|>",)),
    ("olmo3", ("<function_calls>",)),
    ("jamba", ("<tool_calls>",)),
    ("hermes", ("<tool_call>",)),
    ("llama4_pythonic", ("<|python_start|>",)),
    ("llama3_json", ('"parameters"', "<|start_header_id|>")),
    ("llama3_json", ("<|python_tag|>",)),
)
_FOREIGN = ("minimax[>[", "start with <function=")  # formats that look like ours and are not


class _Parser(Protocol):
    def feed(self, text: str) -> list[Delta]: ...

    def close(self) -> list[Delta]: ...


@dataclass(frozen=True)
class OutputFormat:
    """How one request's answers are read. `tools` None: no calls are looked for."""

    tools: Format | None = None
    reasoning: ReasoningFormat | None = None
    is_harmony: bool = False
    max_calls: int | None = None  # 1 without parallel calls

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts the parsers must see: special tokens among them must not be skipped."""
        found: tuple[str, ...] = HARMONY_MARKERS if self.is_harmony else ()
        if self.tools is not None:
            found += self.tools.triggers + self.tools.markers
        if self.reasoning is not None:
            found += (self.reasoning.start, self.reasoning.end)
        return found

    def parser(self, prompt: str, schemas: Schemas) -> MessageParser:
        """A fresh parser for one sample that answers `prompt`."""
        stages: list[_Parser] = []
        if self.is_harmony:
            stages.append(HarmonyParser(prompt))
        elif self.reasoning is not None:
            stages.append(ReasoningParser(self.reasoning, prompt))
        if self.tools is not None:
            stages.append(ToolParser(self.tools, schemas))
        return MessageParser(stages, self.max_calls)


class MessageParser:
    """`feed` and `close` give deltas; however the text is cut they join to the same."""

    def __init__(self, stages: Sequence[_Parser], max_calls: int | None = None) -> None:
        self._stages, self._max_calls = list(stages), max_calls
        self.num_calls = 0

    def feed(self, text: str) -> list[Delta]:
        return self._kept(self._through([Delta("content", text)] if text else [], 0))

    def close(self) -> list[Delta]:
        deltas: list[Delta] = []
        for place, stage in enumerate(self._stages):
            deltas += self._through(stage.close(), place + 1)
        return self._kept(deltas)

    def _through(self, deltas: list[Delta], place: int) -> list[Delta]:
        """Content goes through the stages from `place` on; everything else passes by."""
        for stage in self._stages[place:]:
            passed: list[Delta] = []
            for delta in deltas:
                passed += stage.feed(delta.text) if delta.kind == "content" else [delta]
            deltas = passed
        return deltas

    def _kept(self, deltas: list[Delta]) -> list[Delta]:
        kept = [
            delta for delta in deltas if delta.kind in ("content", "reasoning") or self._max_calls is None or delta.call_idx < self._max_calls
        ]
        self.num_calls += sum(delta.kind == "call" for delta in kept)
        return joined(kept)


def detect_tools(templates: Iterable[str]) -> str | None:
    """The tool format that chat templates show, by what only its templates have."""
    text = "\n".join(templates)
    if ("tool" not in text and "function" not in text) or any(sign in text for sign in _FOREIGN):
        return None
    return next((name for name, signs in _SIGNS if all(sign in text for sign in signs)), None)


def detect_reasoning(templates: Iterable[str]) -> str | None:
    """The reasoning format that chat templates show."""
    text = "\n".join(templates)
    if "<|channel|>" in text and "<|message|>" in text:
        return HARMONY
    order = ("seed_oss", "mistral", "gemma4", "qwen3")
    return next((name for name in order if REASONING_FORMATS[name].start in text and REASONING_FORMATS[name].end in text), None)


class Chosen(NamedTuple):
    """Names of formats; `derived` is the one that `template` stands for."""

    tools: str | None
    reasoning: str | None
    derived: Format | None = None


def choose(tool_parser: str, reasoning_parser: str, template: ChatTemplate | None) -> Chosen:
    """From flags: `auto` looks for formats of the table in the template, and else reads one off it, as `template` does; `none` is None.

    Raises ConfigError for an unknown name.
    """
    templates = {} if template is None else template.sources
    tools = detect_tools(templates.values()) if tool_parser == AUTO else None if tool_parser == NONE else tool_parser
    derived = None
    if template is not None and (tool_parser == TEMPLATE or (tool_parser == AUTO and tools is None and any("tool" in source for source in templates.values()))):
        derived = derive(template)
        tools = None if derived is None else TEMPLATE
    reasoning = detect_reasoning(templates.values()) if reasoning_parser == AUTO else None if reasoning_parser == NONE else reasoning_parser
    reasoning = HARMONY if reasoning == "openai_gptoss" else reasoning
    for flag, name, known in (("tool-call-parser", tools, FORMATS), ("reasoning-parser", reasoning, REASONING_FORMATS)):
        names = sorted([*known, HARMONY, AUTO, NONE, *([TEMPLATE] if known is FORMATS else [])])
        if name is not None and name not in names:
            raise ConfigError(f"`--{flag} {name}` is not known{nearest(name, names)}; there are {', '.join(names)}")
    return Chosen(tools, reasoning, derived)


def output_format(
    tools: str | None,
    reasoning: str | None,
    *,
    derived: Format | None = None,
    forced: str | None = None,
    has_tools: bool = False,
    max_calls: int | None = None,
) -> OutputFormat:
    """For one request: `forced` is "required" or "named" where a grammar holds the answer to calls."""
    is_harmony = HARMONY in (reasoning, tools if has_tools else None)
    format_ = {"required": REQUIRED, "named": NAMED}.get(forced or "")
    if format_ is None and has_tools and tools is not None and not is_harmony:
        format_ = derived if tools == TEMPLATE else FORMATS[tools]
    found = None if reasoning is None or is_harmony else REASONING_FORMATS[reasoning]
    return OutputFormat(format_, found, is_harmony, max_calls)


