"""A byte-level tokenizer, a plain chat template and an engine that answers from a script: the server without a model."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import tokenizers
import uvicorn

from pagoda.base.config import ServerConfig
from pagoda.base.errors import EngineDead, InvalidRequest, QueueFull, RequestFailed
from pagoda.base.types import (
    CompletionOutput,
    FinishReason,
    Logprob,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    SamplingParams,
    TokenLogprobs,
)
from pagoda.engine.stats import EngineStats
from pagoda.serve.app import build_app
from pagoda.serve.context import ModelContext, ServerState
from pagoda.serve.server import cut_connection, tls_options
from pagoda.text.output import TextState
from pagoda.text.tokenizer import Tokenizer

MODEL = "fake/bytes"
MAX_MODEL_LEN = 512


def byte_tokenizer() -> Tokenizer:
    """256 bytes and two special tokens; nothing is merged."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<bos>", "<eos>"])
    return Tokenizer(backend, special_tokens={"bos_token": "<bos>", "eos_token": "<eos>"}, eos_ids=[257])


class PlainTemplate:
    """`role: content` lines; what it was given is kept for the test to see."""

    sources: dict[str, str] = {}

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}

    def render(self, messages: list[dict[str, Any]], tools: Any = None, documents: Any = None, **kwargs: Any) -> str:
        self.last = {"tools": tools, "documents": documents, **kwargs}
        if messages[-1].get("role") == "explode":
            raise InvalidRequest("the chat template refused: no such role", param="messages")
        lines = []
        for message in messages:
            content = message.get("content") or ""
            if not isinstance(content, str):
                content = "".join(part if isinstance(part, str) else part.get("text") or part.get("refusal") or "" for part in content)
            lines.append(f"{message['role']}: {content}")
        text = "\n".join(lines)
        return text + "\nassistant: " if kwargs["add_generation_prompt"] else text


def infill_tokenizer() -> Tokenizer:
    """As `byte_tokenizer`, with the marks of a gap to fill."""
    backend = byte_tokenizer().backend
    backend.add_special_tokens(["<fim_prefix>", "<fim_suffix>", "<fim_middle>"])
    return Tokenizer(backend, special_tokens={"bos_token": "<bos>", "eos_token": "<eos>"}, eos_ids=[257])


class FakeEngine:
    """Answers `reply` byte by byte, one byte a step. Prompts that contain `!word` make it misbehave in that way."""

    def __init__(self, tokenizer: Tokenizer, reply: str = "Hello wörld, this is it.") -> None:
        self.tokenizer, self.reply = tokenizer, reply
        self.delay = 0.0  # seconds a step
        self.core_stats = EngineStats()
        self.is_dead = False
        self.params: dict[str, SamplingParams] = {}
        self.prompts: dict[str, dict[str, Any]] = {}
        self.priorities: dict[str, int] = {}
        self.salts: dict[str, str] = {}
        self.live: set[str] = set()
        self.dropped: list[str] = []  # left before their end
        self._aborted: set[str] = set()

    async def check_health(self) -> None:
        if self.is_dead:
            raise EngineDead("the engine process has stopped")

    async def stats(self) -> EngineStats:
        return self.core_stats

    async def reset_prefix_cache(self) -> bool:
        return not self.live

    async def abort(self, request_id: str) -> None:
        self._aborted.add(request_id)

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, priority: int = 0, cache_salt: str = ""
    ) -> AsyncIterator[RequestOutput]:
        self.params[request_id], self.prompts[request_id] = sampling_params, prompt
        self.priorities[request_id], self.salts[request_id] = priority, cache_salt
        self._check(prompt, priority)
        self.live.add(request_id)
        is_ended = False
        try:
            async for output in self._steps(prompt, sampling_params, request_id):
                is_ended = output.finished
                yield output
        finally:
            self.live.discard(request_id)
            if not is_ended:
                self.dropped.append(request_id)

    def _check(self, prompt: Any, priority: int) -> None:
        text = prompt["prompt"] or ""
        if not prompt["prompt_token_ids"]:
            raise InvalidRequest("the prompt is empty", param="prompt")
        if (num := len(prompt["prompt_token_ids"])) >= MAX_MODEL_LEN:
            raise InvalidRequest(f"the prompt has {num} tokens, but the context is {MAX_MODEL_LEN} tokens long", param="prompt")
        if priority and "!priority" not in text:
            raise InvalidRequest("`priority` needs --scheduling-policy priority", param="priority")
        if "!full" in text:
            raise QueueFull("too many requests are waiting")
        if "!bug" in text:
            raise ZeroDivisionError("a secret of ours")

    async def _steps(self, prompt: Any, params: SamplingParams, request_id: str) -> AsyncIterator[RequestOutput]:
        ids = prompt["prompt_token_ids"]
        text = prompt["prompt"] or ""
        samples = [_Sample(self.tokenizer, params, ids, i, self._script(params, i)) for i in range(params.n)]
        is_first, step = True, 0
        while any(not sample.is_finished for sample in samples):
            await asyncio.sleep(self.delay)
            step += 1
            if "!fail" in text and step == 3:
                raise RequestFailed("logits are not finite")
            if "!nan" in text and step == 3:
                samples[0].end("error")
            if "!hang" in text and step == 3:
                while request_id not in self._aborted:
                    await asyncio.sleep(0.01)
            for sample in samples:
                if not sample.is_finished:
                    sample.end("abort") if request_id in self._aborted else sample.step()
            is_finished = all(sample.is_finished for sample in samples)
            if params.output_kind is RequestOutputKind.DELTA or is_finished:
                yield RequestOutput(
                    request_id=request_id,
                    prompt=prompt["prompt"],
                    prompt_token_ids=ids,
                    prompt_logprobs=self._prompt_logprobs(ids, params) if is_first else None,
                    outputs=[out for sample in samples if (out := sample.take()) is not None],
                    finished=is_finished,
                    metrics=RequestMetrics(arrival_time=1.0, queued_time=1.0, scheduled_time=1.1, first_token_time=1.2, last_token_time=1.5),
                    num_cached_tokens=min(4, len(ids) - 1),
                )
                is_first = False

    def _script(self, params: SamplingParams, index: int) -> list[int]:
        text = self.reply if index == 0 else f"{self.reply[:5]} {index}"
        return [*self.tokenizer.encode(text, add_special_tokens=False), 257]

    def _prompt_logprobs(self, ids: list[int], params: SamplingParams) -> list[dict[int, Logprob] | None] | None:
        if params.prompt_logprobs is None:
            return None
        rest = [{i: Logprob(-0.5, 1, self.tokenizer.token_str(i))} for i in ids[1:]]
        return [None, *rest]


class _Sample:
    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_ids: list[int], index: int, script: list[int]) -> None:
        self.index, self.script, self.params = index, script, params
        self.state = TextState(tokenizer, params, prompt_ids)
        self.num = 0
        self.reason: str | None = None
        self.pending = CompletionOutput(index=index, text="", token_ids=[], logprobs=None, cumulative_logprob=-float(index or 30))
        self.is_taken = False

    @property
    def is_finished(self) -> bool:
        return self.reason is not None

    def step(self) -> None:
        token = self.script[self.num]
        self.num += 1
        reason = None
        if token == 257:
            reason = FinishReason.STOP
        elif self.num == (self.params.max_tokens or MAX_MODEL_LEN):
            reason = FinishReason.LENGTH
        logprobs = None
        if (num := self.params.logprobs) is not None:
            others = [(token + k) % 256 for k in range(num)]
            logprobs = [TokenLogprobs([token, *others], [-0.25, *(-0.25 - k for k in range(num))], 1)]
        delta = self.state.push([token], logprobs, reason)
        self.pending.text += delta.text
        self.pending.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.pending.logprobs = (self.pending.logprobs or []) + delta.logprobs
        if delta.finish_reason is not None:
            self.reason = self.pending.finish_reason = delta.finish_reason.value
            self.pending.stop_reason = delta.stop_reason

    def end(self, reason: str) -> None:
        self.reason = self.pending.finish_reason = reason

    def take(self) -> CompletionOutput | None:
        """What is new since the last call; None once the end was taken."""
        if self.is_taken:
            return None
        out, self.is_taken = self.pending, self.is_finished
        self.pending = CompletionOutput(index=self.index, text="", token_ids=[], logprobs=None)
        return out


class Rig:
    """A server on a free port of this machine, in a thread, with a scripted engine behind it."""

    def __init__(self, **config: Any) -> None:
        self.tokenizer = byte_tokenizer()
        self.template = PlainTemplate()
        self.engine = FakeEngine(self.tokenizer)
        self.state = ServerState(ServerConfig(**config))
        self.context = ModelContext(
            model_names=(MODEL, "alias"),
            model_path="/models/bytes",
            max_model_len=MAX_MODEL_LEN,
            max_logprobs=20,
            tokenizer=self.tokenizer,
            template=self.template,
            created=1700000000,
            response_role=self.state.config.response_role,
            server_info={"version": "0", "config": {}},
            cache_facts={"block_size": 16, "num_gpu_blocks": 100},
        )
        self.base_url = ""

    def make_ready(self) -> Rig:
        self.state.ready(self.context, self.engine)
        return self

    @contextlib.contextmanager
    def running(self) -> Iterator[Rig]:
        sock = socket.create_server(("127.0.0.1", 0))
        scheme = "http" if self.state.config.ssl_certfile is None else "https"
        self.base_url = f"{scheme}://127.0.0.1:{sock.getsockname()[1]}"
        config = uvicorn.Config(
            build_app(self.state),
            log_level="critical",
            lifespan="off",
            timeout_graceful_shutdown=2,
            root_path=self.state.config.root_path,
            **tls_options(self.state.config),
        )
        server = uvicorn.Server(config)
        self.state.drop_connection = lambda scope: cut_connection(server, scope)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.should_exit = True
            thread.join(5)
            self.state.close()
            assert not thread.is_alive()
