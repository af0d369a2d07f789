"""POST /tokenize and /detokenize, in vLLM's shapes: a text or a chat -> token ids, and back. GET /tokenizer_info, where it is wanted."""

from __future__ import annotations

from typing import Any

import msgspec

from pagoda.base.errors import InvalidRequest
from pagoda.serve.context import ModelContext
from pagoda.serve.openai_chat import chat_prompt
from pagoda.serve.wire import Int, decode_body

__all__ = ["DetokenizeRequest", "DetokenizeResponse", "TokenizeRequest", "TokenizeResponse", "detokenize", "tokenize", "tokenizer_info"]

_PATHS = {"vocab_file", "merges_file", "name_or_path"}


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None  # default: true for a prompt, false for a chat, whose template writes them
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class TokenizeResponse(msgspec.Struct, kw_only=True):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    model: str | None = None
    tokens: list[Int]


class DetokenizeResponse(msgspec.Struct, kw_only=True):
    prompt: str


def tokenize(raw: bytes, context: ModelContext) -> tuple[TokenizeResponse, list[str]]:
    """Body -> tokens, and warnings. Raises InvalidRequest or NotFound."""
    body, warnings = decode_body(raw, TokenizeRequest)
    context.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("give either `prompt` or `messages`", param="prompt")
    if body.prompt is not None:
        tokens = context.tokenizer.encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    else:
        _, tokens = chat_prompt(body, context)
    strs = [context.tokenizer.token_str(i) for i in tokens] if body.return_token_strs else None
    return TokenizeResponse(count=len(tokens), max_model_len=context.max_model_len, tokens=tokens, token_strs=strs), warnings


def detokenize(raw: bytes, context: ModelContext) -> tuple[DetokenizeResponse, list[str]]:
    """Token ids -> text, special tokens included, and warnings. Raises InvalidRequest for ids outside the vocabulary."""
    body, warnings = decode_body(raw, DetokenizeRequest)
    context.check_model(body.model)
    size = context.tokenizer.vocab_size
    if any(not 0 <= i < size for i in body.tokens):
        raise InvalidRequest(f"`tokens` has ids outside 0..{size - 1}", param="tokens")
    return DetokenizeResponse(prompt=context.tokenizer.decode(body.tokens, skip_special_tokens=False)), warnings


def tokenizer_info(context: ModelContext) -> dict[str, Any]:
    """tokenizer_config.json without paths; tokens as texts, and the chat template that is in force."""
    config = {name: _plain(value) for name, value in context.tokenizer.config.items() if name not in _PATHS}
    config.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    if context.template is not None and "default" in context.template.sources:
        config["chat_template"] = context.template.sources["default"]
    return config


def _plain(value: Any) -> Any:
    """Added tokens, which are objects with a `content`, as that."""
    if isinstance(value, dict):
        return value["content"] if "content" in value else {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
