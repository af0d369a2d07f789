"""What routes share: the model as parsers see it, and the server's state from loading to draining.

    LOADING --ready()--> SERVING --drain()--> DRAINING --> process ends
       \\--fail()--> FAILED            (the engine dying shows in check_engine(), whatever the state)
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.types import Scope

from pagoda.base.config import ServerConfig
from pagoda.base.errors import EngineDead, InvalidRequest, NotFound
from pagoda.base.types import RequestOutput, SamplingParams
from pagoda.engine.stats import EngineStats
from pagoda.serve.arrivals import ArrivalRecorder
from pagoda.serve.metrics import ServerMetrics
from pagoda.text.tools.parser import Format

__all__ = ["ChatTemplateLike", "ModelContext", "ServerState", "ServingEngine", "TokenizerLike"]

_STATS_SECONDS = 1.0
_TEXT_THREADS = 2  # templating and tokenizing; more would only take cores from the kernels


class TokenizerLike(Protocol):
    """The part of `text.tokenizer.Tokenizer` that protocols use."""

    vocab_size: int

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    special_ids: frozenset[int]

    config: dict[str, Any]  # as the model's tokenizer_config.json says

    infill_ids: dict[str, int]  # fim_prefix, fim_suffix, fim_middle, where the model has them

    def token_to_id(self, token: str) -> int | None: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def token_str(self, token_id: int) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...


class ChatTemplateLike(Protocol):
    """The part of `text.template.ChatTemplate` that protocols use."""

    sources: dict[str, str]  # by name, `default` first

    def render(
        self,
        messages: Sequence[Any],
        *,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str: ...


class ServingEngine(Protocol):
    """The part of `api.async_engine.AsyncEngine` that the server drives."""

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, priority: int = 0, cache_salt: str = ""
    ) -> AsyncGenerator[RequestOutput, None]: ...

    async def abort(self, request_id: str) -> None: ...

    async def reset_prefix_cache(self) -> bool:
        """False, and nothing changed, while any request runs."""

    async def check_health(self) -> None:
        """Raises EngineDead when the loop is dead or makes no progress."""

    async def stats(self) -> EngineStats:
        """The core's figures as of now."""


@dataclass(frozen=True, kw_only=True)
class ModelContext:
    """All a parser may know: pure data and text tools, no engine."""

    model_names: tuple[str, ...]  # the first is reported back
    model_path: str
    max_model_len: int
    max_logprobs: int
    tokenizer: TokenizerLike
    template: ChatTemplateLike | None
    default_params: dict[str, Any] = field(default_factory=dict)  # the server's sampling defaults
    response_role: str = "assistant"
    tells_timings: bool = False  # --enable-per-request-metrics
    forces_usage: bool = False  # --enable-force-include-usage
    names_tokens_by_id: bool = False  # --return-tokens-as-token-ids
    default_template_kwargs: dict[str, Any] = field(default_factory=dict)
    make_template: Callable[[str], ChatTemplateLike] | None = None  # for requests that bring one; None: not trusted
    tool_format: str | None = None  # names of `text/message.py`
    reasoning_format: str | None = None
    derived_format: Format | None = None  # what the tool format `template` stands for
    created: int = 0  # seconds since 1970, shown by /v1/models
    server_info: dict[str, Any] = field(default_factory=dict)  # answer of /server_info
    cache_facts: dict[str, object] = field(default_factory=dict)  # labels of the metric cache_config_info

    def template_for(self, given: str | None) -> ChatTemplateLike | None:
        """The model's template, or the request's own. Raises InvalidRequest for one that is not trusted or not valid."""
        if given is None:
            return self.template
        if self.make_template is None:
            raise InvalidRequest(
                "`chat_template` in a request needs --trust-request-chat-template (or start the server with --chat-template)",
                param="chat_template", code="unsupported",
            )  # fmt: skip
        return self.make_template(given)

    def check_model(self, name: str | None) -> None:
        """Raises NotFound unless `name` is one of ours, or not given."""
        if name is not None and name not in self.model_names:
            known = ", ".join(f"`{n}`" for n in self.model_names)
            raise NotFound(f"the model `{name}` does not exist; this server has {known}", param="model", code="model_not_found")

    def check_max_tokens(self, name: str, value: int | None) -> None:
        """Raises InvalidRequest where the field `name` asks for more than the whole context; what a prompt leaves of it is not looked at."""
        if value is not None and value > self.max_model_len:
            raise InvalidRequest(
                f"`{name}` is {value}, but the model's context is {self.max_model_len} tokens, prompt included: ask for fewer",
                param=name, code="context_length_exceeded",
            )  # fmt: skip


class ServerState:
    """One per server; routes get it by reference."""

    def __init__(self, config: ServerConfig, *, figures_dir: str | None = None, front: int = 0) -> None:
        """`front` counts API processes from 1 where there are several, with a folder for their figures."""
        self.config = config
        self.metrics = ServerMetrics(figures_dir, front)
        self._front = f"{front}." if front else ""
        self.recorder = None if config.record_arrivals is None else ArrivalRecorder(config.record_arrivals)
        self.pool = ThreadPoolExecutor(_TEXT_THREADS, thread_name_prefix="pagoda-text")
        self.active: set[str] = set()  # engine request ids in flight
        self.failure: str | None = None
        self.is_draining = False
        self.drop_connection: Callable[[Scope], None] = lambda scope: None  # cuts a client's connection; set by who owns it
        self._context: ModelContext | None = None
        self._engine: ServingEngine | None = None
        self._serial = itertools.count()

    def ready(self, context: ModelContext, engine: ServingEngine) -> None:
        """The model is loaded: requests are taken from now on."""
        self._context, self._engine = context, engine
        self.metrics.set_model(context.model_names[0], **context.cache_facts)

    def fail(self, why: str) -> None:
        """Loading failed: every request is answered with `why`."""
        self.failure = why

    def drain(self) -> None:
        """No new requests from now on; those in flight go on."""
        self.is_draining = True

    def get(self) -> tuple[ModelContext, ServingEngine]:
        """Model and engine, or EngineDead (503) while loading, after a failure, and while draining."""
        if self.is_draining:
            raise EngineDead("the server is shutting down", code="shutting_down")
        return self._loaded()

    def _loaded(self) -> tuple[ModelContext, ServingEngine]:
        if self.failure is not None:
            raise EngineDead(f"the engine did not start: {self.failure}", code="engine_failed")
        if self._context is None or self._engine is None:
            raise EngineDead("the model is still loading", code="loading")
        return self._context, self._engine

    async def check_engine(self) -> None:
        """Raises EngineDead unless the engine is loaded and its loop makes progress. Draining is healthy."""
        _, engine = self._loaded()
        await engine.check_health()

    async def refresh_metrics(self) -> None:
        """Fetch the core's figures. In a long step they come late: then the last ones stand."""
        if self._engine is None:
            return
        try:
            async with asyncio.timeout(_STATS_SECONDS):
                self.metrics.update_core(await self._engine.stats())
        except (TimeoutError, EngineDead):
            return

    def engine_request_id(self, response_id: str, prompt_idx: int) -> str:
        """Unique even when a client sends the same X-Request-Id twice, to different API processes perhaps."""
        return f"{response_id}-{prompt_idx}-{self._front}{next(self._serial)}"

    async def abort_all(self) -> None:
        """End everything in flight: each request gets its terminal event."""
        if self._engine is not None:
            for request_id in sorted(self.active):
                await self._engine.abort(request_id)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.recorder is not None:
            self.recorder.close()
