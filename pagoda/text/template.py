"""Chat templates: messages to the text that the model was trained on, by the Jinja program that comes with it.

The environment is the one models are published for (Hugging Face's): sandboxed, `trim_blocks`, `lstrip_blocks`, loop
controls, a `tojson` that does not escape HTML, `raise_exception`, `strftime_now`, and the tag `generation`, which
marks what an assistant said and changes nothing here.

A template is a program of others: it has RENDER_SECONDS, and cannot make strings or numbers beyond MAX_PRODUCT by multiplying.

A rendered prompt already has its special tokens in it: encode it with `add_special_tokens=False`.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pagoda.base.errors import ConfigError, InvalidRequest, ModelFileError
from pagoda.text.deadline import Deadline
from pagoda.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "load_chat_template"]

Message = Mapping[str, Any]

RENDER_SECONDS = 10.0
MAX_PRODUCT = 1 << 20

_RESERVED = frozenset(("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"))
_RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_END_MARK = "\ue000end-of-final-message\ue000"  # private-use characters, which no template looks for


class ChatTemplate:
    """The templates of one model, compiled. `render` may be called from any thread."""

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], *, seconds: float = RENDER_SECONDS) -> None:
        """`sources` by name: `default`, and `tool_use` where tools have their own. Raises ModelFileError on bad syntax."""
        environment = _environment()
        self._templates = {name: _compile(environment, name, source) for name, source in sources.items()}
        self._content_format = {name: _content_format(environment, source) for name, source in sources.items()}
        self.sources = dict(sources)
        self._deadline = Deadline(seconds)
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt of a conversation. `kwargs` are the request's `chat_template_kwargs`.

        With `continue_final_message` the prompt ends inside the last message, whose answer it is to go on with.
        Raises InvalidRequest where the template refuses the messages or cannot work with them.
        """
        if not messages:
            raise InvalidRequest("`messages` must not be empty", param="messages")
        if continue_final_message and add_generation_prompt:
            raise InvalidRequest(
                "`continue_final_message` and `add_generation_prompt` exclude each other", param="continue_final_message"
            )
        if clash := sorted(_RESERVED & kwargs.keys()):
            raise InvalidRequest(f"`{clash[0]}` cannot be set here", param="chat_template_kwargs")
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise InvalidRequest(
                f"the model has several chat templates ({', '.join(self._templates)}) and none of them is the default; "
                "start the server with --chat-template",
                param="messages",
            )
        conversation = [_normalized(message, self._content_format[name]) for message in messages]
        if continue_final_message:
            _mark_end(conversation[-1])
        variables = self._special_tokens | kwargs

        def render() -> str:
            return self._templates[name].render(
                messages=conversation,
                tools=list(tools) if tools else None,
                documents=list(documents) if documents else None,
                add_generation_prompt=add_generation_prompt,
                **variables,
            )

        try:
            prompt = self._deadline.run(render)
        except TimeoutError:
            raise InvalidRequest(f"the chat template took longer than {self._deadline.seconds:g} s", param="messages") from None
        except _RENDER_ERRORS as error:
            raise InvalidRequest(f"the chat template refuses these messages: {error}", param="messages") from error
        return _cut_at_mark(prompt) if continue_final_message else prompt


def load_chat_template(tokenizer: Tokenizer, override: str | None = None) -> ChatTemplate | None:
    """The model's templates, or `override`: a file's path or the template itself. None where there is neither.

    Raises ConfigError where `override` is neither, ModelFileError where a template's syntax is wrong.
    """
    if override is None:
        sources = tokenizer.chat_templates
        return ChatTemplate(sources, tokenizer.special_tokens) if sources else None
    if not any(character in override for character in "{}\n"):
        try:
            override = Path(override).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template `{override}` is neither a template nor a readable file: {error}") from error
    return ChatTemplate({"default": override}, tokenizer.special_tokens)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: the text between, in a scope of its own."""

    tags: set[str] = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's, in which no single operation can take all memory."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(x) if isinstance(x, str | list | tuple) else abs(x) if isinstance(x, int) else 0 for x in (left, right)]
        if (operator == "**" and isinstance(right, int) and sizes[0] > 1 and sizes[1] > 64) or sizes[0] * sizes[1] > MAX_PRODUCT:
            raise jinja2.TemplateError(f"the result of `{operator}` is too large")
        return super().call_binop(context, operator, left, right)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _compile(environment: jinja2.Environment, name: str, source: str) -> jinja2.Template:
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise ModelFileError(
            f"line {error.lineno} of the chat template `{name}`: {error.message}; use --chat-template to replace it"
        ) from error


def _content_format(environment: jinja2.Environment, source: str) -> str:
    """How the template reads `content`: "text", "either" (it also loops over parts), or "parts" (it only loops)."""
    tree = environment.parse(source)
    names = {"content"}
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node, names):
            names.add(assignment.target.name)
    if not any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For)):
        return "text"
    tests = {test.name for test in tree.find_all(nodes.Test)}
    return "either" if tests & {"string", "iterable", "sequence", "mapping"} else "parts"


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    """Whether an expression is a message's content, or a variable that was set to it."""
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Filter) and node.node is not None and _is_content(node.node, names)


def _normalized(message: Message, wanted: str) -> dict[str, Any]:
    """A message as templates expect it: content as text or parts, the arguments of tool calls as objects."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest("every message must be an object with a `role`", param="messages")
    result = dict(message)
    content = message.get("content")
    if content is None:
        content = ""
    if isinstance(content, str):
        result["content"] = [{"type": "text", "text": content}] if wanted == "parts" else content
    elif isinstance(content, Sequence):
        texts = [_text_of(part) for part in content]
        is_text = wanted == "text"
        result["content"] = "\n".join(texts) if is_text else [{"type": "text", "text": text} for text in texts]
    else:
        raise InvalidRequest("`content` must be a string or a list of parts", param="messages")
    if message.get("tool_calls"):
        result["tool_calls"] = [_with_parsed_arguments(call) for call in message["tool_calls"]]
    return result


def _text_of(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("text", "input_text", "output_text", "refusal"):
        text = part.get("refusal" if kind == "refusal" else "text")
        if isinstance(text, str):
            return text
    elif kind is not None:
        raise InvalidRequest(f"content of type `{kind}` is not supported by this model; only text is", param="messages")
    raise InvalidRequest("every part of `content` must be an object with `type` and `text`", param="messages")


def _with_parsed_arguments(call: Any) -> Any:
    """Clients send a call's arguments as JSON text; templates print objects."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise InvalidRequest("every tool call must have a `function`", param="messages")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"the arguments of a tool call are not valid JSON: {error}", param="messages") from error
    return {**call, "function": {**function, "arguments": parsed}}


def _mark_end(message: dict[str, Any]) -> None:
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _END_MARK
    else:
        message["content"] = [*content[:-1], {"type": "text", "text": (content[-1]["text"] if content else "") + _END_MARK}]


def _cut_at_mark(prompt: str) -> str:
    at = prompt.rfind(_END_MARK)
    if at < 0:
        raise InvalidRequest(
            "`continue_final_message` is set but the chat template does not show the last message",
            param="continue_final_message",
        )
    return prompt[:at]
