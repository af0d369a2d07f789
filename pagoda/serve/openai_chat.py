"""POST /v1/chat/completions: OpenAI's chat, with vLLM's extra fields.

`parse` is a pure function of the body and the model's facts. A stream says, in order: one role event per sample, deltas, the
finish reason exactly once per sample together with its last delta, usage if it was asked for, `[DONE]`.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

import msgspec

from pagoda import __version__
from pagoda.base.errors import InvalidRequest
from pagoda.base.prepared import prepared
from pagoda.base.types import CompletionOutput, RequestMetrics, RequestOutput, Thinking
from pagoda.serve.context import ModelContext
from pagoda.serve.errors import from_msgspec
from pagoda.serve.generation import Call
from pagoda.serve.logprobs import ChatLogprobs, PromptLogprob, TokenNamer, chat_logprobs, prompt_logprobs
from pagoda.serve.reasoning import ReasoningCount, marks_of
from pagoda.serve.sse import DONE, event
from pagoda.serve.tools import FunctionCall, ToolCall, ToolCallDelta, ToolPlan, call_id, guided, plan_tools
from pagoda.serve.wire import (
    CompletionTokensDetails,
    GenerationFields,
    Int,
    PromptTokensDetails,
    StreamOptions,
    Timings,
    Usage,
    check_common,
    decode_body,
    given_or,
    sampling_params,
    structured_outputs,
    structured_warnings,
    timings,
)

__all__ = [
    "ChatCompletion",
    "ChatCompletionChunk",
    "ChatCompletionRequest",
    "ChatMessage",
    "chat_prompt",
    "check_messages",
    "parse",
]

FINGERPRINT = f"pagoda-{__version__}"


class ContentPart(msgspec.Struct, kw_only=True):
    type: str
    text: str | None = None
    refusal: str | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[str | ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChatCompletionRequest(GenerationFields, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None

    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class AnswerMessage(msgspec.Struct, kw_only=True):
    role: str
    content: str | None
    refusal: str | None = None
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = FINGERPRINT
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    metrics: Timings | msgspec.UnsetType = msgspec.UNSET


class Delta(msgspec.Struct, kw_only=True, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | msgspec.UnsetType | None = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletionChunk(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str | None = FINGERPRINT
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    metrics: Timings | msgspec.UnsetType = msgspec.UNSET


def check_messages(messages: list[dict[str, Any]]) -> None:
    """Types and kinds of content, before a template sees them. Raises InvalidRequest naming the place."""
    if not messages:
        raise InvalidRequest("`messages` must not be empty", param="messages")
    for i, raw in enumerate(messages):
        where = f"messages[{i}]"
        try:
            message = msgspec.convert(raw, prepared(ChatMessage))
        except msgspec.ValidationError as exc:
            raise from_msgspec(exc, where) from None
        if message.content is None and not (message.role == "assistant" and message.tool_calls):
            raise InvalidRequest(f"`{where}.content` is missing", param=f"{where}.content")
        for j, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if isinstance(part, ContentPart):
                _check_part(part, f"{where}.content[{j}]")


def _check_part(part: ContentPart, where: str) -> None:
    if part.type == "refusal":
        if part.refusal is None:
            raise InvalidRequest(f"`{where}.refusal` is missing", param=f"{where}.refusal")
    elif part.type not in ("text", "input_text", "output_text"):
        raise InvalidRequest(f"`{where}`: content of type `{part.type}` is not supported by this version of Pagoda; only text is", param=where)
    elif part.text is None:
        raise InvalidRequest(f"`{where}.text` is missing", param=f"{where}.text")


def chat_prompt(body: Any, context: ModelContext, **template_kwargs: Any) -> tuple[str, list[int]]:
    """Messages of a chat or tokenize body -> prompt text and its tokens. Raises InvalidRequest."""
    check_messages(body.messages)
    generation_prompt = body.add_generation_prompt is not False
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise InvalidRequest("`continue_final_message` and `add_generation_prompt` exclude each other", param="continue_final_message")
    template = context.template_for(body.chat_template)
    if template is None:
        raise InvalidRequest("this model has no chat template; use /v1/completions, or start the server with --chat-template", param="messages")
    kwargs = {**context.default_template_kwargs, **template_kwargs, **(body.chat_template_kwargs or {})}
    reserved = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"} & kwargs.keys()
    if reserved:
        raise InvalidRequest(f"`chat_template_kwargs` must not set `{min(reserved)}`: it is a field of its own", param="chat_template_kwargs")
    text = template.render(
        body.messages,
        tools=body.tools,
        documents=getattr(body, "documents", None),
        add_generation_prompt=generation_prompt and not continues,
        continue_final_message=continues,
        **kwargs,
    )
    return text, context.tokenizer.encode(text, add_special_tokens=bool(body.add_special_tokens))


def parse(raw: bytes, given_id: str | None, context: ModelContext) -> Call:
    """Body -> Call. Raises InvalidRequest (400) or NotFound (404)."""
    body, warnings = decode_body(raw, ChatCompletionRequest)
    context.check_model(body.model)
    check_common(body)
    _check_features(body)
    plan = plan_tools(body, context, warnings)
    logprobs = _num_logprobs(body, context)
    extra = {} if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort}
    text, token_ids = chat_prompt(body, context, **extra)
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    max_tokens = getattr(body, name)
    context.check_max_tokens(name, max_tokens)
    wanted = plan.grammar or structured_outputs(body)
    warnings += structured_warnings(wanted)
    if wanted is not None:
        wanted = guided(wanted, plan, text, context)
    changes: dict[str, Any] = {"logprobs": logprobs, "structured_outputs": wanted, **({} if max_tokens is None else {"max_tokens": max_tokens})}
    if body.thinking_token_budget is not None:
        changes["thinking"] = _thinking(plan, text, context)
    if _sees_special(plan, context):
        changes["skip_special_tokens"] = False
    params = sampling_params(body, {"max_tokens": None, **context.default_params}, **changes)
    response_id = f"chatcmpl-{given_id or body.request_id or uuid.uuid4().hex}"
    return Call(
        response_id=response_id,
        prompts=[{"prompt_token_ids": token_ids, "prompt": text}],
        params=params,
        renderer=ChatRenderer(response_id, body, context, plan, text),
        stream=bool(body.stream),
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        warnings=warnings,
    )


def _thinking(plan: ToolPlan, prompt: str, context: ModelContext) -> Thinking | None:
    reasoning = plan.format.reasoning
    marks = marks_of(reasoning, context.tokenizer)
    return None if reasoning is None or marks is None else Thinking(*marks, reasoning.is_open(prompt))


def _sees_special(plan: ToolPlan, context: ModelContext) -> bool:
    """Whether the markers that the parsers look for are special tokens of this model, which are skipped otherwise."""
    tokenizer = context.tokenizer
    return any(tokenizer.token_to_id(marker) in tokenizer.special_ids for marker in plan.format.markers)


def _check_features(body: ChatCompletionRequest) -> None:
    if body.modalities is not None and body.modalities != ["text"]:
        raise InvalidRequest("`modalities` other than text are not supported by this version of Pagoda", param="modalities", code="unsupported")


def _num_logprobs(body: ChatCompletionRequest, context: ModelContext) -> int | None:
    top = body.top_logprobs
    if top and body.logprob_token_ids is not None:
        raise InvalidRequest("`top_logprobs` and `logprob_token_ids` exclude each other", param="logprob_token_ids")
    if top is not None:
        if not body.logprobs:
            if top == 0:
                return None
            raise InvalidRequest("`top_logprobs` needs `logprobs`: true", param="top_logprobs")
        if top < -1 or (context.max_logprobs != -1 and (top > context.max_logprobs or top == -1)):
            raise InvalidRequest(f"`top_logprobs` must be between 0 and {context.max_logprobs} (--max-logprobs), got {top}", param="top_logprobs")
    return (top or 0) if body.logprobs else None


class ChatRenderer:
    """Engine outputs -> OpenAI's chat objects."""

    def __init__(self, response_id: str, body: ChatCompletionRequest, context: ModelContext, plan: ToolPlan, prompt: str) -> None:
        self._id, self._created, self._model = response_id, int(time.time()), context.model_names[0]
        self._role = context.response_role
        self._num_samples = body.n or 1
        self._has_logprobs, self._num_top = bool(body.logprobs), -1 if body.logprob_token_ids else body.top_logprobs or 0
        self._has_token_ids = bool(body.return_token_ids)
        self._namer = TokenNamer(context.tokenizer, given_or(body.return_tokens_as_token_ids, context.names_tokens_by_id))
        self._echo = _echoed(body, context.response_role)
        options = body.stream_options or StreamOptions()
        self._has_usage = bool(options.include_usage) or context.forces_usage
        self._has_running_usage = bool(options.continuous_usage_stats) and self._has_usage
        self._prompt_token_ids: list[int] = []
        self._num_cached = 0
        self._num_generated = 0
        self._parsers = [plan.format.parser(prompt, plan.schemas) for _ in range(self._num_samples)]
        self._looks_for_calls = plan.format.tools is not None or bool(plan.schemas)
        self._has_reasoning = body.include_reasoning is not False
        self._tool_format = context.tool_format
        self._tells_timings = context.tells_timings
        self._measured: list[RequestMetrics] = []
        thinks = plan.format.reasoning is not None or plan.format.is_harmony
        self._counts = [ReasoningCount(plan.format, prompt, context.tokenizer) for _ in self._parsers] if thinks else []
        self.tool_results: dict[str, int] = {}

    def whole(self, outputs: list[RequestOutput]) -> bytes:
        output = outputs[0]
        self._note(output)
        answer = ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[self._choice(sample) for sample in sorted(output.outputs, key=lambda s: s.index)],
            usage=self._usage(),
            prompt_logprobs=prompt_logprobs(output.prompt_logprobs),
            prompt_token_ids=output.prompt_token_ids if self._has_token_ids else msgspec.UNSET,
            metrics=self._timings(),
        )
        return msgspec.json.encode(answer)

    def opening(self) -> bytes:
        chunks = [self._event(i, Delta(role=self._role, content="")) for i in range(self._num_samples)]
        if self._echo:
            chunks += [self._event(i, Delta(content=self._echo)) for i in range(self._num_samples)]
        return b"".join(chunks)

    def delta(self, prompt_idx: int, output: RequestOutput) -> bytes:
        is_first = not self._prompt_token_ids
        self._note(output)
        chunks = []
        for sample in output.outputs:
            delta = self._delta(sample)
            if delta is None and not (sample.finish_reason or (sample.token_ids and (self._has_logprobs or self._has_token_ids))):
                continue  # a character, a possible stop string or a call's marker is still incomplete
            choice = ChunkChoice(
                index=sample.index,
                delta=delta or Delta(content="" if self._parsers[sample.index].num_calls == 0 else None),
                logprobs=self._logprobs(sample),
                finish_reason=self._finish_reason(sample),
            )
            if sample.finish_reason is not None:
                choice.stop_reason = sample.stop_reason
            if self._has_token_ids:
                choice.token_ids = sample.token_ids
            chunk = self._chunk([choice])
            if is_first and self._has_token_ids:
                chunk.prompt_token_ids = output.prompt_token_ids
                is_first = False
            chunks.append(event(chunk))
        return b"".join(chunks)

    def closing(self) -> bytes:
        if not self._has_usage:
            return DONE
        chunk = self._chunk([])
        chunk.usage, chunk.metrics = self._usage(), self._timings()
        return event(chunk) + DONE

    def _timings(self) -> Timings | msgspec.UnsetType:
        return timings(self._measured, self._num_generated, self._num_samples) if self._tells_timings else msgspec.UNSET

    def _note(self, output: RequestOutput) -> None:
        if output.metrics is not None:
            self._measured.append(output.metrics)
        self._prompt_token_ids = output.prompt_token_ids or self._prompt_token_ids
        self._num_cached = max(self._num_cached, output.num_cached_tokens)
        self._num_generated += sum(len(sample.token_ids) for sample in output.outputs)

    def _usage(self) -> Usage:
        num_prompt = len(self._prompt_token_ids)
        return Usage(
            prompt_tokens=num_prompt,
            completion_tokens=self._num_generated,
            total_tokens=num_prompt + self._num_generated,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._num_cached),
            completion_tokens_details=self._details(),
        )

    def _details(self) -> CompletionTokensDetails | msgspec.UnsetType:
        """Only of models that reason."""
        if not self._counts:
            return msgspec.UNSET
        return CompletionTokensDetails(reasoning_tokens=sum(each.count for each in self._counts))

    def _choice(self, sample: CompletionOutput) -> ChatChoice:
        delta = self._delta(sample) or Delta()
        content = self._echo + (delta.content or "")
        message = AnswerMessage(role=self._role, content=content if content or not (delta.tool_calls or delta.reasoning) else None)
        if delta.reasoning is not None:
            message.reasoning = delta.reasoning
        if delta.tool_calls:
            message.tool_calls = [ToolCall(id=call.id or "", function=call.function) for call in delta.tool_calls]
        return ChatChoice(
            index=sample.index,
            message=message,
            logprobs=self._logprobs(sample),
            finish_reason=self._finish_reason(sample),
            stop_reason=sample.stop_reason,
            token_ids=sample.token_ids if self._has_token_ids else msgspec.UNSET,
        )

    def _finish_reason(self, sample: CompletionOutput) -> str | None:
        """Calls are told by the reason, too; what was cut off or aborted stays that."""
        return "tool_calls" if sample.finish_reason == "stop" and self._parsers[sample.index].num_calls else sample.finish_reason

    def _delta(self, sample: CompletionOutput) -> Delta | None:
        """What the new text of a sample adds to its message; None where that is not known yet."""
        parser = self._parsers[sample.index]
        parts = parser.feed(sample.text)
        if sample.finish_reason is not None:
            parts = [*parts, *parser.close()]
        delta, calls, is_empty = Delta(), dict[int, ToolCallDelta](), True
        for part in parts:
            if part.kind == "reasoning" and not self._has_reasoning:
                continue
            is_empty = False
            if part.kind == "content":
                delta.content = (delta.content or "") + part.text
            elif part.kind == "reasoning":
                delta.reasoning = (delta.reasoning or "") + part.text
            elif part.kind == "call":
                function = FunctionCall(name=part.text, arguments="")
                calls[part.call_idx] = ToolCallDelta(index=part.call_idx, id=part.id or call_id(self._tool_format), type="function", function=function)
            else:
                call = calls.setdefault(part.call_idx, ToolCallDelta(index=part.call_idx, function=FunctionCall(arguments="")))
                call.function.arguments = (call.function.arguments or "") + part.text
        if calls:
            delta.tool_calls = list(calls.values())
        if self._counts:
            said = "".join(part.text for part in parts if part.kind == "reasoning")
            self._counts[sample.index].feed(sample.token_ids, said, is_end=sample.finish_reason is not None)
        if sample.finish_reason is not None and self._looks_for_calls:
            result = "calls" if parser.num_calls else "none"
            self.tool_results[result] = self.tool_results.get(result, 0) + 1
        return None if is_empty else delta

    def _logprobs(self, sample: CompletionOutput) -> ChatLogprobs | None:
        if not self._has_logprobs:
            return None
        return chat_logprobs(sample.token_ids, sample.logprobs or [], self._num_top, self._namer)

    def _event(self, index: int, delta: Delta) -> bytes:
        return event(self._chunk([ChunkChoice(index=index, delta=delta)]))

    def _chunk(self, choices: list[ChunkChoice]) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(id=self._id, created=self._created, model=self._model, choices=choices)
        if self._has_running_usage:
            chunk.usage = self._usage()
        return chunk


def _echoed(body: ChatCompletionRequest, role: str) -> str:
    """vLLM's `echo`: the last message comes back in front of its continuation, if it is the answerer's own."""
    last = body.messages[-1]
    if not body.echo or last.get("role") != role:
        return ""
    content = last.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)
