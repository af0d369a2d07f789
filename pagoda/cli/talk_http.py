"""Talking to a server over HTTP: requests out, server-sent events in."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import httpx

from pagoda.base import env
from pagoda.base.errors import ConfigError, RequestFailed

__all__ = ["HttpTalker"]


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
