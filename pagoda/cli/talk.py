"""Whom `chat` and `complete` talk to: a server, or a model in this process. Both take the same request body, OpenAI's.

    talker.stream("/v1/chat/completions", {"messages": [...], "temperature": 0}) -> pieces of the answer's text
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from typing import Any, Protocol

import httpx

from pagoda.base import env
from pagoda.base.config import EngineConfig
from pagoda.base.errors import ConfigError, RequestFailed
from pagoda.cli.local import LocalModel, load_model
from pagoda.serve import openai_chat, openai_completions

__all__ = ["CHAT", "COMPLETIONS", "HttpTalker", "LocalTalker", "Talker"]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
_PARSERS = {CHAT: openai_chat.parse, COMPLETIONS: openai_completions.parse}


class Talker(Protocol):
    """`name` is what the model is called."""

    name: str

    def stream(self, route: str, body: Mapping[str, Any]) -> Generator[str, None, None]:
        """Text as it comes. Closing the iterator ends the request. Raises PagodaError when it is refused or fails."""

    def close(self) -> None: ...


class LocalTalker:
    """Loads the model and runs it in a thread; the answer is pulled piece by piece."""

    def __init__(self, config: EngineConfig) -> None:
        self._runner = asyncio.Runner()
        self.model: LocalModel = load_model(config)
        self.name = self.model.name
        self._ids = itertools.count()

    def stream(self, route: str, body: Mapping[str, Any]) -> Generator[str, None, None]:
        call = _PARSERS[route](json.dumps({**body, "stream": True}).encode(), None, self.model.context)
        outputs = self.model.answer(call, f"talk-{next(self._ids)}")
        try:
            while (text := self._runner.run(_next_text(outputs))) is not None:
                yield text
        finally:
            self._runner.run(outputs.aclose())

    def close(self) -> None:
        self._runner.run(self.model.engine.shutdown())
        self._runner.close()


async def _next_text(outputs: AsyncGenerator[Any, None]) -> str | None:
    """The next piece, or None at the end."""
    async for output in outputs:
        return "".join(sample.text for sample in output.outputs)
    return None


class HttpTalker:
    """A server of OpenAI's API, ours or another. `url` may end in /v1 or not."""

    def __init__(self, url: str, *, api_key: str | None = None, model: str | None = None, timeout: float = 600.0) -> None:
        """Raises ConfigError when nothing answers there."""
        self._url = url.rstrip("/").removesuffix("/v1")
        key = api_key or env.api_key()
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            self._client = httpx.Client(base_url=self._url, headers=headers, timeout=httpx.Timeout(timeout, connect=5.0), trust_env=False)
        except (httpx.InvalidURL, ValueError) as error:
            raise ConfigError(f"`--url {url}` is not a URL: {error}") from None
        self.name = model or self._first_model()

    def _first_model(self) -> str:
        try:
            answer = self._client.get("/v1/models")
        except httpx.UnsupportedProtocol:
            raise ConfigError(f"`--url {self._url}` must start with http:// or https://") from None
        except httpx.HTTPError as error:
            raise ConfigError(f"no server answers at {self._url}: {error}; start one with `pagoda serve`, or leave out --url") from None
        if answer.status_code != 200:
            raise RequestFailed(f"{self._url} answers {answer.status_code}: {_message_of(answer.text)}")
        try:
            return str(answer.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise RequestFailed(f"{self._url}/v1/models lists no model; use --model-name") from None

    def stream(self, route: str, body: Mapping[str, Any]) -> Generator[str, None, None]:
        try:
            with self._client.stream("POST", route, json={"model": self.name, **body, "stream": True}) as answer:
                if answer.status_code != 200:
                    raise RequestFailed(f"the server answers {answer.status_code}: {_message_of(answer.read().decode('utf-8', 'replace'))}")
                yield from _texts(answer.iter_lines())
        except httpx.HTTPError as error:
            raise RequestFailed(f"the connection to {self._url} broke: {error or type(error).__name__}") from None

    def close(self) -> None:
        self._client.close()


def _texts(lines: Iterator[str]) -> Iterator[str]:
    """Text of a stream of server-sent events, chat's or completion's."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise RequestFailed(_message_of(data))
        for choice in event.get("choices", ()):
            if text := choice["delta"].get("content") if "delta" in choice else choice.get("text"):
                yield text


def _message_of(text: str) -> str:
    """The message in an error body, or the body itself."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return text.strip()[:500] or "nothing"
