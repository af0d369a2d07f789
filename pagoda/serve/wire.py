"""What the request bodies of all generating protocols share, and how they become SamplingParams.

Bodies are decoded strictly (a string is no number) and leniently as OpenAI's clients need it: null means "not given",
and unknown fields are reported in a header, not refused. A field whose feature does not exist here is refused by name.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from pagoda.base.errors import InvalidRequest
from pagoda.base.prepared import prepared
from pagoda.base.types import (
    RepetitionDetection,
    RequestMetrics,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)
from pagoda.serve.errors import from_msgspec
from pagoda.structured.closed import closed
from pagoda.structured.translate import translate

__all__ = [
    "CompletionTokensDetails",
    "GenerationFields",
    "Int",
    "PromptTokensDetails",
    "ResponseFormat",
    "StreamOptions",
    "StructuredOutputs",
    "Timings",
    "Usage",
    "check_common",
    "decode_body",
    "given_or",
    "refuse_unknown",
    "sampling_params",
    "structured_outputs",
    "structured_warnings",
    "timings",
]

Int = Annotated[int, Meta(ge=-(2**53), le=2**53)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
T = TypeVar("T", bound=msgspec.Struct)


class StreamOptions(msgspec.Struct, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # never added here, so both values are honoured


class StructuredOutputs(msgspec.Struct, kw_only=True):
    """vLLM's: exactly one of the first six."""

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    disable_fallback: bool | None = None  # there is one backend, so nothing to fall back to
    whitespace_pattern: str | None = None


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """OpenAI's `text`, `json_object` and `json_schema`; vLLM's `structural_tag`, whose other fields are the tag."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None
    format: dict[str, Any] | None = None


class Repetition(msgspec.Struct, kw_only=True):
    """vLLM's: end a sample that says the same again and again."""

    max_pattern_size: Int
    min_pattern_size: Int = 1
    min_count: Int


class GenerationFields(msgspec.Struct, kw_only=True):
    """Fields of chat and completions alike: OpenAI's, then vLLM's."""

    model: str | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Int | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: Int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    top_k: Int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[Int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    allowed_token_ids: list[Int] | None = None
    bad_words: list[str] | None = None
    typical_p: float | None = None
    top_n_sigma: float | None = None
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: Int | None = None
    dry_range: Int | None = None
    dry_sequence_breakers: list[str] | None = None
    mirostat_mode: Int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    banned_strings: list[str] | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    timeout: float | None = None
    vllm_xargs: dict[str, Any] | None = None
    truncate_prompt_tokens: Int | None = None
    truncation_side: typing.Literal["left", "right"] | None = None
    logprob_token_ids: list[Int] | None = None
    thinking_token_budget: Int | None = None
    repetition_detection: Repetition | None = None
    prompt_logprobs: Int | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None


class Timings(msgspec.Struct, kw_only=True):
    """Of one request, its samples together. Milliseconds; null where it did not come so far."""

    time_to_first_token_ms: float | None = None
    generation_time_ms: float | None = None
    queue_time_ms: float | None = None
    mean_itl_ms: float | None = None
    tokens_per_second: float | None = None


def timings(measured: Sequence[RequestMetrics], num_tokens: int, num_samples: int) -> Timings:
    """From the engine's clock, from arrival to the last token; `num_tokens` of all `num_samples` samples."""
    found = Timings()
    begun = [m for m in measured if m.first_token_time > 0]
    if not begun:
        return found
    arrival, first = min(m.arrival_time for m in begun), min(m.first_token_time for m in begun)
    last = max(m.last_token_time for m in begun)
    found.time_to_first_token_ms = round(1e3 * (first - arrival), 3)
    found.generation_time_ms = round(1e3 * (last - first), 3)
    found.queue_time_ms = round(1e3 * max(m.scheduled_time - m.queued_time for m in begun), 3)
    if num_tokens > num_samples:
        found.mean_itl_ms = round(1e3 * (last - first) / (num_tokens / num_samples - 1), 3)
    if last > arrival:
        found.tokens_per_second = round(num_tokens / (last - arrival), 3)
    return found


class PromptTokensDetails(msgspec.Struct, kw_only=True):
    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct, kw_only=True):
    reasoning_tokens: int = 0


class Usage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | msgspec.UnsetType = msgspec.UNSET


UNSUPPORTED = {
    "suffix": "inserting text before a suffix in a chat",
    "guided_json": "the old name of `structured_outputs.json`",
    "guided_regex": "the old name of `structured_outputs.regex`",
    "guided_choice": "the old name of `structured_outputs.choice`",
    "guided_grammar": "the old name of `structured_outputs.grammar`",
    "structural_tag": "the old name of `structured_outputs.structural_tag`",
    "prompt_embeds": "prompt embeddings",
    "logits_processors": "a logits processor sent with the request (start the server with --logits-processors)",
    "mm_processor_kwargs": "multimodal input",
    "media_io_kwargs": "multimodal input",
    "kv_transfer_params": "KV transfer",
    "ec_transfer_params": "encoder transfer",
    "audio": "audio output",
    "web_search_options": "web search",
    "functions": "the old `functions` interface",
    "function_call": "the old `functions` interface",
}
"""Request fields, OpenAI's or vLLM's, whose feature this version does not have: naming one is an error."""

NO_EFFECT = frozenset(
    {
        "metadata",
        "moderation",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
"""OpenAI's fields about billing, storage and hints, which leave the answer as it is: accepted, without effect."""

_HARMLESS = {"function_call": b'"none"', "suffix": b'""'}


class UnknownField(str):
    """The warning about a field that nobody knows."""

    field: str

    def __new__(cls, field: str) -> UnknownField:
        made = super().__new__(cls, f"unknown field {field} ignored")
        made.field = field
        return made


def refuse_unknown(warnings: Sequence[str]) -> None:
    """--strict-fields. Raises InvalidRequest."""
    for warning in warnings:
        if isinstance(warning, UnknownField):
            raise InvalidRequest(f"unknown field `{warning.field}` (the server runs with --strict-fields)", param=warning.field, code="unknown_field")


def decode_body(raw: bytes, kind: type[T]) -> tuple[T, list[str]]:
    """The body as `kind` and warnings about fields that were not used. Raises InvalidRequest (400) naming the field."""
    try:
        given = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        body = msgspec.json.decode(raw, type=prepared(kind))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise from_msgspec(exc) from None
    warnings: list[str] = []
    known = kind.__struct_fields__
    for name, value in given.items():
        if name in known:
            if name in _objects_of(kind):
                warnings += _unknown_inside(bytes(value), _objects_of(kind)[name], name)
            continue
        if (content := bytes(value)) == b"null":
            continue
        if name in UNSUPPORTED:
            if content != _HARMLESS.get(name):
                raise InvalidRequest(f"`{name}`: {UNSUPPORTED[name]} is not supported by this version of Pagoda", param=name, code="unsupported")
        elif name not in NO_EFFECT:
            warnings.append(UnknownField(_header_safe(name)))
    return body, warnings


@functools.cache
def _objects_of(kind: type[msgspec.Struct]) -> dict[str, type[msgspec.Struct]]:
    """Fields that are objects with fields of their own."""
    found: dict[str, type[msgspec.Struct]] = {}
    for name, hint in typing.get_type_hints(kind).items():
        for option in typing.get_args(hint) or (hint,):
            if isinstance(option, type) and issubclass(option, msgspec.Struct):
                found[name] = option
    return found


def _unknown_inside(raw: bytes, kind: type[msgspec.Struct], where: str) -> list[str]:
    """Warnings about the fields of an object inside a body that has been decoded already."""
    if not raw.startswith(b"{"):
        return []
    warnings: list[str] = []
    for name, value in msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).items():
        if name not in kind.__struct_fields__:
            warnings.append(UnknownField(_header_safe(f"{where}.{name}")))
        elif name in _objects_of(kind):
            warnings += _unknown_inside(bytes(value), _objects_of(kind)[name], f"{where}.{name}")
    return warnings


def _header_safe(name: str, limit: int = 64) -> str:
    return "".join(c for c in name[:limit] if c.isascii() and c.isprintable()) or "?"


_COPIED = [
    "frequency_penalty",
    "presence_penalty",
    "temperature",
    "top_p",
    "n",
    "seed",
    "stop",
    "top_k",
    "min_p",
    "repetition_penalty",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "allowed_token_ids",
    "bad_words",
    "truncate_prompt_tokens",
    "prompt_logprobs",
    "typical_p",
    "top_n_sigma",
    "dynatemp_range",
    "dynatemp_exponent",
    "xtc_probability",
    "xtc_threshold",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_range",
    "dry_sequence_breakers",
    "mirostat_mode",
    "mirostat_tau",
    "mirostat_eta",
    "banned_strings",
    "use_beam_search",
    "length_penalty",
    "timeout",
    "logprob_token_ids",
    "thinking_token_budget",
    "truncation_side",
]


def sampling_params(body: GenerationFields, defaults: dict[str, Any], **more: Any) -> SamplingParams:
    """Request value, else the server's default, else OpenAI's. `more` wins (max_tokens, logprobs). Raises InvalidRequest."""
    values: dict[str, Any] = dict(defaults)
    for name in _COPIED:
        if (value := getattr(body, name)) is not None:
            values[name] = value
    if body.logit_bias:
        values["logit_bias"] = {_token_id(key): bias for key, bias in body.logit_bias.items()}
    if (found := body.repetition_detection) is not None:
        values["repetition_detection"] = RepetitionDetection(
            max_pattern_size=found.max_pattern_size, min_pattern_size=found.min_pattern_size, min_count=found.min_count
        )
    if body.vllm_xargs:
        values["extra_args"] = body.vllm_xargs
    values["output_kind"] = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    values.update(more)
    return SamplingParams(**values)


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 16):
        raise InvalidRequest(f"`logit_bias` has the key `{key[:40]}`; its keys are token ids, as strings", param="logit_bias")
    return int(key)


def given_or(value: bool | None, default: bool) -> bool:
    """What the request says, else what the server does."""
    return default if value is None else value


def structured_outputs(body: GenerationFields) -> StructuredOutputsParams | None:
    """What the text must look like, from `response_format` or `structured_outputs`. Raises InvalidRequest."""
    form, given = body.response_format, body.structured_outputs
    wanted = None if form is None else _from_format(form)
    if given is None:
        return wanted
    if wanted is not None:
        raise InvalidRequest("`response_format` and `structured_outputs` exclude each other", param="structured_outputs")
    names = [name for name in given.__struct_fields__ if name != "disable_fallback"]
    return StructuredOutputsParams(**{name: value for name in names if (value := getattr(given, name)) is not None})


def structured_warnings(wanted: StructuredOutputsParams | None) -> list[str]:
    """What of a schema is not enforced. The grammar is made here, off the event loop. Raises InvalidRequest."""
    return [] if wanted is None else [_header_safe(note, 200) for note in translate(wanted).notes]


def _from_format(form: ResponseFormat) -> StructuredOutputsParams | None:
    if form.type == "text":
        return None
    if form.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    if form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema is None:
            raise InvalidRequest("`response_format` of type `json_schema` needs `json_schema.schema`", param="response_format.json_schema")
        schema = form.json_schema.schema
        return StructuredOutputsParams(json=schema if isinstance(schema, bool) else dict(closed(schema)))
    if form.type == "structural_tag":
        tag = {"structures": form.structures, "triggers": form.triggers} if form.structures is not None else {"format": form.format}
        return StructuredOutputsParams(structural_tag=tag)
    known = "`text`, `json_object`, `json_schema` and `structural_tag`"
    raise InvalidRequest(f"`response_format` has the unknown type `{form.type[:40]}`; there are {known}", param="response_format.type")


def check_common(body: GenerationFields) -> None:
    """Rules between fields that all generating protocols share."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("`stream_options` needs `stream`: true", param="stream_options")
    if body.use_beam_search and body.stream:
        raise InvalidRequest("`use_beam_search` cannot be streamed: the best beam is known only at the end", param="stream")
    if body.prompt_logprobs is not None and body.stream:
        raise InvalidRequest("`prompt_logprobs` cannot be streamed", param="prompt_logprobs")
    if body.cache_salt is not None and not 1 <= len(body.cache_salt) <= 1024:
        raise InvalidRequest("`cache_salt` must have 1 to 1024 characters", param="cache_salt")
    if body.request_id is not None and not 1 <= len(body.request_id) <= 256:
        raise InvalidRequest("`request_id` must have 1 to 256 characters", param="request_id")
