"""The one handler of all generating protocols: body -> parse -> engine -> render.

A protocol is a pure `parse(raw, headers_id, context) -> Call` and a `Renderer`; nothing here knows OpenAI. Whatever happens, the
client gets exactly one end (whole answer, HTTP error, or the last events of a stream), and a client that leaves
takes its requests out of the engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from pagoda.base.clock import monotonic
from pagoda.base.errors import InvalidRequest, PayloadTooLarge, RequestFailed
from pagoda.base.log import get_logger
from pagoda.base.types import RequestOutput, SamplingParams
from pagoda.serve.arrivals import body_fields
from pagoda.serve.context import ModelContext, ServerState, ServingEngine
from pagoda.serve.errors import describe
from pagoda.serve.sse import DONE, event
from pagoda.serve.stream import StreamWriter
from pagoda.serve.wire import refuse_unknown

__all__ = ["Call", "GenerateEndpoint", "Renderer", "read_json_body", "warning_header"]

logger = get_logger("serve")

_DRAIN_FACTOR = 4  # a refused body is read up to so many times the limit, so that the client reads our answer
_DRAIN_SECONDS = 5.0


class Renderer(Protocol):
    """Events of one call -> bytes of its protocol. `prompt_idx` counts the prompts of the call."""

    def whole(self, outputs: list[RequestOutput]) -> bytes:
        """The body of a call that does not stream; one final output per prompt."""

    def opening(self) -> bytes:
        """What a stream says before its first delta."""

    def delta(self, prompt_idx: int, output: RequestOutput) -> bytes:
        """Events for what is new; empty when there is nothing to say."""

    def closing(self) -> bytes:
        """What a stream says after everything went well."""


@dataclass(kw_only=True)
class Call:
    """A parsed request: what the engine shall do and how to tell about it."""

    response_id: str
    prompts: list[dict[str, Any]]  # {"prompt_token_ids": [...], "prompt": str | None}
    params: SamplingParams
    renderer: Renderer
    stream: bool = False
    priority: int = 0
    cache_salt: str = ""
    warnings: list[str] = field(default_factory=list)
    started: float = 0.0  # seconds, monotonic: when the body had been read


Parse = Callable[[bytes, str | None, ModelContext], Call]


class GenerateEndpoint:
    """ASGI endpoint of one protocol."""

    def __init__(self, state: ServerState, parse: Parse) -> None:
        self._state, self._parse = state, parse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = self._state
        context, engine = state.get()
        headers = Headers(scope=scope)
        raw = await read_json_body(headers, receive, state.config.max_request_body_bytes)
        loop, started = asyncio.get_running_loop(), monotonic()
        given_id = _given_id(headers)
        call = await loop.run_in_executor(state.pool, self._parse, raw, given_id, context)
        call.started = started
        if state.config.strict_fields:
            refuse_unknown(call.warnings)
        if (limit := state.config.request_timeout) is not None:
            call.params.timeout = min(call.params.timeout or limit, limit)
        if state.config.enable_log_requests:
            lengths = [len(p["prompt_token_ids"]) for p in call.prompts]
            asked = " ".join(f"{name}={value!r}" for name, value in body_fields(call.params).items())
            logger.info("request %s: prompt tokens %s, stream=%s %s", call.response_id, lengths, call.stream, asked)
        answer_headers = [(b"x-request-id", (given_id or call.response_id).encode("ascii", "replace"))]
        if call.warnings:
            answer_headers.append((b"x-pagoda-warning", warning_header(call.warnings).encode("ascii")))
        state.metrics.own.server_load += 1
        try:
            async with _cancelled_by_disconnect(receive):
                if call.stream:
                    await self._stream(call, engine, send, answer_headers, scope)
                else:
                    await self._answer(call, engine, send, answer_headers)
        finally:
            state.metrics.own.server_load -= 1
            for result, count in getattr(call.renderer, "tool_results", {}).items():
                key = (context.tool_format or "none", result)
                state.metrics.own.tool_calls[key] = state.metrics.own.tool_calls.get(key, 0) + count

    async def _answer(self, call: Call, engine: ServingEngine, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        finals: dict[int, RequestOutput] = {}
        async with aclosing(self._outputs(call, engine)) as outputs:
            async for prompt_idx, output in outputs:
                finals[prompt_idx] = output
        if len(finals) < len(call.prompts):
            raise RequestFailed("the engine ended this request without an answer")
        body = call.renderer.whole([finals[i] for i in range(len(call.prompts))])
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, call: Call, engine: ServingEngine, send: Send, headers: list[tuple[bytes, bytes]], scope: Scope) -> None:
        """Headers wait for the first output (or the first comment), so that an error before it is a plain HTTP error."""
        config = self._state.config
        writer = StreamWriter(send, headers, keep_alive=config.sse_keep_alive_interval, stall=config.stream_stall_timeout)
        try:
            async with writer, aclosing(self._outputs(call, engine)) as outputs:
                await self._write_events(call, outputs, writer)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not writer.is_stalled or task is None or task.uncancel() > 0:
                raise
            logger.warning("request %s ended: its reader took nothing for %.0f s (--stream-stall-timeout)", call.response_id, config.stream_stall_timeout)
            self._state.metrics.own.stalled_streams += 1
            self._state.drop_connection(scope)
            await asyncio.sleep(0.01)  # until the HTTP server knows that it is gone

    async def _write_events(self, call: Call, outputs: AsyncGenerator[tuple[int, RequestOutput], None], writer: StreamWriter) -> None:
        renderer = call.renderer
        is_open = False
        try:
            async for prompt_idx, output in outputs:
                start = b"" if is_open else renderer.opening()
                chunk = start + renderer.delta(prompt_idx, output)
                if chunk or not is_open:
                    await writer.write(chunk)
                is_open = True
            tail = renderer.closing()
        except Exception as exc:
            if not writer.has_started:
                raise
            status, body = describe(exc)
            if status == 500:
                logger.error("request %s failed: %r", call.response_id, exc)
            tail = event(body) + DONE
        await writer.write(tail, is_last=True)

    async def _outputs(self, call: Call, engine: ServingEngine) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Outputs of all prompts as they come. Closing the iterator aborts what still runs."""
        streams = [self._one(call, engine, i) for i in range(len(call.prompts))]
        source = streams[0] if len(streams) == 1 else _merge(streams)
        async with aclosing(source):
            async for item in source:
                yield item

    async def _one(self, call: Call, engine: ServingEngine, prompt_idx: int) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        state = self._state
        request_id = state.engine_request_id(call.response_id, prompt_idx)
        outputs = engine.generate(call.prompts[prompt_idx], call.params, request_id, priority=call.priority, cache_salt=call.cache_salt)
        state.active.add(request_id)
        if state.recorder is not None or state.config.enable_log_requests:
            outputs = self._noted(outputs, call, request_id, prompt_idx)
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    if any(sample.finish_reason == "error" for sample in output.outputs):
                        raise RequestFailed("the engine could not finish this request")
                    yield prompt_idx, output
        finally:
            state.active.discard(request_id)


    async def _noted(
        self, outputs: AsyncGenerator[RequestOutput, None], call: Call, request_id: str, prompt_idx: int
    ) -> AsyncGenerator[RequestOutput, None]:
        """The same outputs; arrival and end go to the log and to the record."""
        recorder = self._state.recorder
        prompt_token_ids = call.prompts[prompt_idx]["prompt_token_ids"]
        if recorder is not None:
            more: dict[str, Any] = {"stream": call.stream, **({"priority": call.priority} if call.priority else {})}
            more |= {"cache_salt": call.cache_salt} if call.cache_salt else {}
            await asyncio.get_running_loop().run_in_executor(self._state.pool, recorder.arrived, request_id, prompt_token_ids, call.params, more)
        num_tokens, reason, first = 0, None, None
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    num_tokens += sum(len(sample.token_ids) for sample in output.outputs)
                    first = first or monotonic()
                    if output.finished:
                        reason = output.outputs[-1].finish_reason
                    yield output
        finally:
            now = monotonic()
            if self._state.config.enable_log_requests:
                logger.info(
                    "request %s ended: %s, %d prompt tokens, %d output tokens, first output after %.3f s, %.3f s in all",
                    request_id, reason or "left or failed", len(prompt_token_ids), num_tokens, (first or now) - call.started, now - call.started,
                )  # fmt: skip
            if recorder is not None:
                recorder.ended(request_id, num_tokens, reason)


async def _merge(streams: list[AsyncGenerator[tuple[int, RequestOutput], None]]) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Items of all streams as they come; the first error ends them all."""
    queue: asyncio.Queue[tuple[int, RequestOutput] | BaseException | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[tuple[int, RequestOutput], None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    queue.put_nowait(item)
            queue.put_nowait(None)
        except Exception as exc:
            queue.put_nowait(exc)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def warning_header(warnings: list[str]) -> str:
    """The value of X-Pagoda-Warning."""
    return "; ".join(warnings)[:1000].encode("ascii", "replace").decode("ascii")


def _given_id(headers: Headers) -> str | None:
    given = headers.get("x-request-id")
    if given is not None and not (1 <= len(given) <= 256 and given.isascii() and given.isprintable()):
        raise InvalidRequest("`X-Request-Id` must have 1 to 256 printable ASCII characters", param="X-Request-Id")
    return given


@asynccontextmanager
async def _cancelled_by_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Cancel the body of the `async with` when the client goes away, and end quietly then: nobody is left to answer."""
    task = asyncio.current_task()
    assert task is not None
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
        watcher.cancel()
        if is_gone:  # cancelled after the last await of the body: take delivery here
            await asyncio.sleep(0)
    except asyncio.CancelledError:
        if not is_gone or task.uncancel() > 0:
            raise
    finally:
        watcher.cancel()


async def read_json_body(headers: Headers, receive: Receive, limit: int) -> bytes:
    """The whole body. Raises InvalidRequest for a content type other than JSON, PayloadTooLarge above `limit` bytes."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise InvalidRequest(f"the content type must be application/json, got `{kind or 'none'}`", param="Content-Type")
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        await _discard(receive, _DRAIN_FACTOR * limit)
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise InvalidRequest("the client went away before its request was complete")
        size += len(message.get("body", b""))
        is_last = not message.get("more_body", False)
        if size > limit:
            await _discard(receive, 0 if is_last else _DRAIN_FACTOR * limit - size)
            raise _too_large(limit)
        chunks.append(message.get("body", b""))
        if is_last:
            return b"".join(chunks)


async def _discard(receive: Receive, num_bytes: int) -> None:
    """Read and forget: a client that is still sending would see a reset connection instead of our 413."""
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            while num_bytes > 0:
                message = await receive()
                num_bytes -= len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the request body is larger than {limit} bytes (--max-request-body-bytes)", code="payload_too_large")
