"""Streams of many requests over one core, for servers and other asyncio programs.

One task reads what the core says and pushes it into the stream of its request; each `generate` takes from its own stream at
its own pace. Leaving a `generate` early, in whatever way, ends the request in the core and frees its blocks.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from pagoda.api.beam import BeamSearch
from pagoda.api.outputs import RequestStream
from pagoda.api.processor import Processed, Processor, Prompt, is_slow
from pagoda.base.clock import monotonic
from pagoda.base.config import config_from_kwargs
from pagoda.base.errors import DeadlineExceeded, EngineDead, InvalidRequest, RequestError, RequestFailed
from pagoda.base.log import get_logger
from pagoda.base.types import EngineOutput, FinishReason, RequestOutput, SamplingParams, StructuredOutputsParams
from pagoda.engine.client import CoreClient, ThreadClient
from pagoda.engine.core import SampleId
from pagoda.engine.stats import EngineStats
from pagoda.structured.translate import translate

__all__ = ["AsyncEngine"]

TIMEOUT = "timeout"
"""`stop_reason` of an answer whose time was over; its `finish_reason` is "length"."""

_log = get_logger("api")


class _Reader:
    """One running `generate`."""

    def __init__(self, stream: RequestStream) -> None:
        self.stream = stream
        self.is_ready = asyncio.Event()
        self.is_late = False  # its time is over: what the core ends now ends by that


class AsyncEngine:
    """For one event loop. `client` runs the core; `on_shutdown` releases what the client's owner holds."""

    def __init__(
        self, client: CoreClient, processor: Processor, *, on_shutdown: Callable[[], None] | None = None, max_pending_nbytes: int | None = None
    ) -> None:
        """A stream of which more than `max_pending_nbytes` wait for their reader ends with RequestFailed, and no other does."""
        self.processor = processor
        self._client = client
        self._on_shutdown, self._max_pending = on_shutdown, max_pending_nbytes or float("inf")
        self._readers: dict[str, _Reader] = {}
        self._searches: dict[str, set[str]] = {}  # beam searches by request id: the requests of their step
        self._dispatcher: asyncio.Task[None] | None = None
        self._serial = itertools.count()
        self._text_pool = ThreadPoolExecutor(1, thread_name_prefix="pagoda-text")  # more would only take cores from the kernels

    @classmethod
    def from_model(cls, model: str | None = None, **kwargs: Any) -> AsyncEngine:
        """Loads a model and runs its core in a thread of this process. Arguments as `LLM`'s.

        Raises ConfigError, ModelFileError, UnsupportedModel or OutOfMemory.
        """
        from pagoda.executor.launch import build_engine  # weights and kernels, which a server's API process never loads

        engine = build_engine(config_from_kwargs(model, **kwargs))
        front = engine.front
        processor = Processor(
            engine.config, engine.facts, front.tokenizer,
            generation_config=front.generation_config, eos_token_ids=front.eos_token_ids,
        )  # fmt: skip
        return cls(ThreadClient(engine.core), processor, on_shutdown=engine.close)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of one request as they come, as `sampling_params.output_kind` says; the last has `finished`.

        Raises InvalidRequest, QueueFull, DeadlineExceeded or EngineDead, and RequestFailed when the engine could not finish. Closing the
        iterator, or cancelling whoever waits for it, aborts the request.
        """
        arrival_time = monotonic()
        if request_id is None:
            request_id = f"request-{next(self._serial)}"
        work = (prompt, sampling_params, request_id)
        more = {"priority": priority, "cache_salt": cache_salt, "arrival_time": arrival_time}
        if _needs_tokenizer(prompt) or is_slow(sampling_params):
            call = functools.partial(self.processor.process, *work, **more)  # type: ignore[arg-type]
            processed = await asyncio.get_running_loop().run_in_executor(self._text_pool, call)
        else:
            processed = self.processor.process(*work, **more)  # type: ignore[arg-type]
        if request_id in self._readers or request_id in self._searches:
            raise InvalidRequest(f"request id `{request_id}` is already in use", param="request_id")
        if processed.request.params.use_beam_search:
            yield await self._search(processed, priority)
            return
        reader = _Reader(RequestStream(processed.request, processed.prompt, self.processor.tokenizer))
        self._start_dispatcher()
        self._readers[request_id] = reader
        seconds = processed.request.params.timeout
        timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, self._expire, reader)
        try:
            self._client.submit(processed.request)
            async for output in self._read(reader):
                yield output
        finally:
            if timer is not None:
                timer.cancel()
            del self._readers[request_id]
            if not reader.stream.is_finished:
                self._client.abort([request_id])

    def _expire(self, reader: _Reader) -> None:
        """The request's time is over. What it has is its answer; it fails if that is nothing."""
        reader.is_late = True
        self._client.abort([reader.stream.request.request_id])
        if not reader.stream.has_tokens:
            reader.stream.fail(DeadlineExceeded("the request's time was over before it had a token", code="timeout"))
            reader.is_ready.set()

    async def _search(self, processed: Processed, priority: int) -> RequestOutput:
        """Beam search: each step's requests run side by side. An abort, or an error of one of them, ends the search."""
        search = BeamSearch(processed.request, self.processor.max_model_len)
        name = processed.request.request_id
        running = self._searches[name] = set()
        is_aborted = False
        deadline = monotonic() + (processed.request.params.timeout or float("inf"))
        try:
            while not search.is_finished and not is_aborted and monotonic() < deadline:
                ids = [f"{name}-beam{next(self._serial)}" for _ in search.prompts()]
                running |= set(ids)
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(self._last(prompt, search.step_params, step_id, priority, processed.request.cache_salt))
                        for prompt, step_id in zip(search.prompts(), ids, strict=True)
                    ]
                answers = [task.result() for task in tasks]
                running.clear()
                is_aborted = any(answer.outputs[0].finish_reason == FinishReason.ABORT for answer in answers)
                if not is_aborted:
                    search.advance(answers)
        except* RequestError as errors:
            raise _first(errors) from None
        finally:
            del self._searches[name]
        return search.output(processed.prompt, self.processor.tokenizer, cut=FinishReason.ABORT if is_aborted else FinishReason.LENGTH)

    async def _last(self, prompt: list[int], params: SamplingParams, request_id: str, priority: int, cache_salt: str) -> RequestOutput:
        async with aclosing(self.generate(prompt, params, request_id, priority, cache_salt)) as outputs:
            async for output in outputs:
                if output.finished:
                    return output
        raise RequestFailed("the engine ended a beam without an answer")

    @staticmethod
    async def _read(reader: _Reader) -> AsyncGenerator[RequestOutput, None]:
        stream = reader.stream
        while True:
            await reader.is_ready.wait()
            reader.is_ready.clear()
            if stream.error is not None:
                raise stream.error
            output = stream.take()
            if output is not None:
                yield output
                if output.finished:
                    return

    # ---- the dispatcher

    def _start_dispatcher(self) -> None:
        if self._dispatcher is None or self._dispatcher.done():
            self._dispatcher = asyncio.get_running_loop().create_task(self._dispatch(), name="pagoda-outputs")

    async def _dispatch(self) -> None:
        try:
            while True:
                self._distribute(await self._client.get_outputs())
        except Exception as error:
            _log.exception("no more outputs can be read from the engine")
            self._fail_all(error)

    def _fail_all(self, error: Exception) -> None:
        for reader in self._readers.values():
            if not reader.stream.is_finished:
                reader.stream.fail(error)
                reader.is_ready.set()

    def _distribute(self, outputs: list[EngineOutput]) -> None:
        stopped: list[SampleId] = []
        for output in outputs:
            reader = self._readers.get(output.request_id)
            if reader is None:
                continue  # it was left; its abort is on the way
            if reader.is_late and output.finish_reason is FinishReason.ABORT:
                output.finish_reason, output.stop_reason = FinishReason.LENGTH, TIMEOUT
            try:
                if reader.stream.push(output):
                    stopped.append((output.request_id, output.index))
                if reader.stream.pending_nbytes > self._max_pending and not reader.stream.is_finished:
                    self._give_up(reader)
            except Exception as error:
                _log.exception("request `%s`: its output cannot be read", output.request_id)
                reader.stream.fail(error)
                self._client.abort([output.request_id], FinishReason.ERROR)
            reader.is_ready.set()
        if stopped:
            self._client.abort(stopped, FinishReason.STOP)

    def _give_up(self, reader: _Reader) -> None:
        """Nobody takes what this request makes."""
        request_id = reader.stream.request.request_id
        _log.warning("request `%s` ended: more than %d bytes wait for its reader (--stream-buffer-bytes)", request_id, self._max_pending)
        reader.stream.fail(RequestFailed("the reader of this stream is too slow: too much was waiting for it", code="slow_reader"))
        self._client.abort([request_id])

    # ---- everything else

    async def abort(self, request_id: str) -> None:
        """Ends a request: its `generate` yields a last output with finish reason "abort". Unknown ids are passed over."""
        self._client.abort([request_id, *self._searches.get(request_id, ())])

    async def check_health(self) -> None:
        """Raises EngineDead when the core's loop has stopped or makes no progress."""
        self._client.check_health()

    async def stats(self) -> EngineStats:
        """The core's figures as of now."""
        return await self._client.stats()

    async def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes. False, and nothing changed, while any request runs."""
        return bool(await self._client.call("reset_prefix_cache"))

    async def warm_up_grammars(self) -> None:
        """Loads what the first structured request would have to wait for, here and in the core."""
        await asyncio.get_running_loop().run_in_executor(self._text_pool, translate, StructuredOutputsParams(json_object=True))
        await self._client.call("warm_up_grammars", self.processor.eos_token_ids)

    async def shutdown(self) -> None:
        """Ends the core. What still runs ends with EngineDead. May be called twice."""
        self._text_pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()
        if self._dispatcher is not None:
            self._dispatcher.cancel()
        self._fail_all(EngineDead("the engine was shut down", code="shutting_down"))
        if self._on_shutdown is not None:
            self._on_shutdown()
            self._on_shutdown = None


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error of a group, however deep."""
    first = errors.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _needs_tokenizer(prompt: Prompt) -> bool:
    """Long texts take milliseconds, which the event loop does not have."""
    return isinstance(prompt, str) or (isinstance(prompt, dict) and prompt.get("prompt_token_ids") is None)
