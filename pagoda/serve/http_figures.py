"""What is true of every HTTP request: it has an id, it is counted, its time is taken.

The id is the client's X-Request-Id, or one of ours; it is in the answer's headers whatever the answer is, and in the log where
something went wrong. Counters and histogram have the names of the Prometheus instrumentation that vLLM's server carries.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pagoda.base.log import get_logger
from pagoda.engine.stats import Histogram
from pagoda.serve.figures import FrontFigures

__all__ = ["RequestLog", "families", "note"]

logger = get_logger("serve")

_BOUNDS = [0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0]
_UNKNOWN = "none"  # one label for all paths that are no routes: clients choose those


def note(figures: FrontFigures, handler: str, method: str, status: int, seconds: float) -> None:
    """One request was answered."""
    key = (handler, method, f"{status // 100}xx")
    figures.http_requests[key] = figures.http_requests.get(key, 0) + 1
    figures.http_seconds.setdefault((handler, method), Histogram.of(_BOUNDS)).observe(seconds)


def families(figures: FrontFigures) -> Iterator[Metric]:
    """As Prometheus' collectors yield them."""
    requests = CounterMetricFamily("http_requests", "requests by route and status", labels=["handler", "method", "status"])
    for (handler, method, status), count in sorted(figures.http_requests.items()):
        requests.add_metric([handler, method, status], float(count))
    yield requests
    seconds = HistogramMetricFamily("http_request_duration_seconds", "from a request's headers to its last byte", labels=["handler", "method"])
    for (handler, method), histogram in sorted(figures.http_seconds.items()):
        buckets, total = [], 0
        for bound, count in zip(histogram.bounds, histogram.counts, strict=False):
            total += count
            buckets.append((repr(bound), float(total)))
        seconds.add_metric([handler, method], buckets=[*buckets, ("+Inf", float(histogram.count))], sum_value=histogram.total)
    yield seconds


class RequestLog:
    """ASGI middleware. `paths` are those of the routes; one with a `{parameter}` at its end stands for all that begin like it."""

    def __init__(self, app: ASGIApp, figures: FrontFigures, paths: Sequence[str]) -> None:
        self._app, self._figures = app, figures
        self._paths = frozenset(path for path in paths if "{" not in path)
        self._prefixes = {path.partition("{")[0]: path for path in paths if "{" in path}

    def _route(self, scope: Scope) -> str:
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in self._paths:
            return path
        return next((route for prefix, route in self._prefixes.items() if path.startswith(prefix)), _UNKNOWN)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        name = given if 1 <= len(given) <= 256 and given.isascii() and given.decode("ascii").isprintable() else b"req-" + uuid.uuid4().hex.encode()
        status, started = 499, time.monotonic()  # the client went away

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not any(header == b"x-request-id" for header, _ in message["headers"]):
                    message["headers"] = [*message["headers"], (b"x-request-id", name)]
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        finally:
            route = self._route(scope)
            note(self._figures, route, scope["method"], status, time.monotonic() - started)
            if status >= 500:
                logger.warning("%s %s answered %d, X-Request-Id %s", scope["method"], route, status, name.decode("ascii"))
