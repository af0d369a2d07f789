"""A streaming client of OpenAI's API that takes the time of every piece. It works against any such server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import msgspec

from pagoda.base.errors import RequestFailed

__all__ = ["Backend", "Client", "Exchange", "gather_all"]

Backend = Literal["openai", "openai-chat"]
ROUTES = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}


@dataclass
class Exchange:
    """One request as the client saw it. Times are seconds since it was sent."""

    input_len: int
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)  # between pieces that carry text
    latency: float = 0.0
    output_len: int = 0  # as the server counts, or the pieces where it does not
    text: str = ""
    error: str = ""

    @property
    def is_ok(self) -> bool:
        return not self.error

    @property
    def tpot(self) -> float:
        """Seconds per token after the first; 0 with one token."""
        return (self.latency - self.ttft) / (self.output_len - 1) if self.output_len > 1 else 0.0


class Client:
    """For one event loop. `model` is the name to ask for."""

    def __init__(self, base_url: str, *, backend: Backend, model: str | None = None, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(
            base_url=base_url.rstrip("/").removesuffix("/v1"),
            headers=headers,
            timeout=httpx.Timeout(None, connect=10.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )
        self._route, self._model = ROUTES[backend], model

    async def first_model(self) -> str:
        """Name of the first model the server lists. RequestFailed when there is no such server."""
        try:
            answer = await self._http.get("/v1/models")
            self._model = str(answer.raise_for_status().json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise RequestFailed(f"{self._http.base_url}v1/models does not answer with a model: {error!r}") from None
        return self._model

    async def send(self, prompt: str | Sequence[int], input_len: int, **fields: Any) -> Exchange:
        """One request to its end, streamed unless `stream` is False. Never raises for what the server does: `error` says it."""
        body: dict[str, Any] = {"model": self._model, "stream": True, **fields}
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        if self._route == ROUTES["openai"]:
            body["prompt"] = prompt
        else:
            body["messages"] = [{"role": "user", "content": prompt}]
        seen = Exchange(input_len)
        try:
            started = time.perf_counter()
            async with self._http.stream("POST", self._route, content=msgspec.json.encode(body), headers=_JSON) as answer:
                if answer.status_code != 200:
                    seen.error = f"status {answer.status_code}: {(await answer.aread())[:500].decode('utf-8', 'replace')}"
                    return seen
                await (_read if body["stream"] else _read_whole)(answer, seen, started)
        except httpx.HTTPError as error:
            seen.error = f"{type(error).__name__}: {error}"
        return seen

    async def close(self) -> None:
        await self._http.aclose()


_JSON = {"Content-Type": "application/json"}


async def _read(answer: httpx.Response, seen: Exchange, started: float) -> None:
    """Fills `seen` from a stream of server-sent events."""
    rest, last, num_pieces = b"", started, 0
    texts: list[str] = []
    async for chunk in answer.aiter_bytes():
        now = time.perf_counter()
        *events, rest = (rest + chunk).split(b"\n\n")
        for raw in events:
            text = _take(raw.strip(), seen)
            if not text:
                continue
            if num_pieces:
                seen.itls.append(now - last)
            else:
                seen.ttft = now - started
            num_pieces, last = num_pieces + 1, now
            texts.append(text)
    seen.latency, seen.text = last - started, "".join(texts)
    seen.output_len = seen.output_len or num_pieces
    if not num_pieces and not seen.error:
        seen.error = "the stream had no text"


async def _read_whole(answer: httpx.Response, seen: Exchange, started: float) -> None:
    """Fills `seen` from an answer that comes in one piece."""
    body = msgspec.json.decode(await answer.aread())
    seen.ttft = seen.latency = time.perf_counter() - started
    seen.output_len = body["usage"]["completion_tokens"]
    first = body["choices"][0]
    seen.text = first["message"]["content"] if "message" in first else first["text"]


def _take(raw: bytes, seen: Exchange) -> str:
    """Text of one event; usage and errors are noted."""
    if not raw.startswith(b"data:") or raw == b"data: [DONE]":
        return ""
    event = msgspec.json.decode(raw[5:])
    if "error" in event:
        seen.error = str(event["error"].get("message", event["error"]))
        return ""
    if usage := event.get("usage"):
        seen.output_len = usage["completion_tokens"]
    for choice in event.get("choices") or ():
        text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
        if text:
            return str(text)
    return ""


async def gather_all(work: Sequence[asyncio.Task[Exchange]]) -> list[Exchange]:
    """All results; when we are cancelled, so are they."""
    try:
        return list(await asyncio.gather(*work))
    finally:
        for task in work:
            task.cancel()
