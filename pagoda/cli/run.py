"""`pagoda run -i requests.jsonl -o answers.jsonl`: OpenAI's batch format without a server.

    in    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
    out   {"id": ..., "custom_id": "a", "response": {"status_code": 200, "request_id": ..., "body": {...}}, "error": null}

Bodies are parsed and rendered by the server's own code. A body that the server would refuse gets its error as the
response; a line that is no request at all gets `error` and no response. Neither stops the others. Answers are written
when they are ready, so their order is that of finishing: `custom_id` tells whose they are.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO

import msgspec
from tqdm import tqdm

from pagoda.base.errors import ConfigError, InvalidRequest, PagodaError, RequestFailed
from pagoda.base.log import get_logger, setup_logging
from pagoda.base.types import RequestOutput
from pagoda.cli.engine_flags import add_engine_flags, engine_config
from pagoda.cli.local import LocalModel, load_model
from pagoda.serve import openai_chat, openai_completions
from pagoda.serve.errors import describe
from pagoda.serve.generation import Call

__all__ = ["BatchLine", "BatchResult", "add_arguments", "answer_line", "run"]

PARSERS = {"/v1/chat/completions": openai_chat.parse, "/v1/completions": openai_completions.parse}
_MOST_AT_ONCE = 1024  # requests read ahead; the engine chooses among them
_log = get_logger("run")


class BatchLine(msgspec.Struct, kw_only=True):
    """A line of the input. The body stays JSON: the protocol of `url` reads it."""

    custom_id: str
    method: str = "POST"
    url: str
    body: msgspec.Raw


class BatchResponse(msgspec.Struct, kw_only=True):
    status_code: int
    request_id: str
    body: msgspec.Raw


class BatchError(msgspec.Struct, kw_only=True):
    code: str
    message: str


class BatchResult(msgspec.Struct, kw_only=True):
    """A line of the output."""

    id: str
    custom_id: str | None
    response: BatchResponse | None = None
    error: BatchError | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-i", "--input-file", required=True, metavar="FILE", help="JSONL of requests; - for stdin")
    parser.add_argument("-o", "--output-file", required=True, metavar="FILE", help="JSONL of answers; - for stdout")
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    """0 when every line was dealt with, whatever became of it."""
    setup_logging()
    lines = _read_lines(args.input_file)
    config = engine_config(args)
    with _output(args.output_file) as out:
        counts = asyncio.run(_run(load_model(config), lines, out))
    print(f"{counts[0]} answered, {counts[1]} refused or failed, of {len(lines)} requests", file=sys.stderr)
    return 0


async def _run(model: LocalModel, lines: list[bytes], out: IO[bytes]) -> tuple[int, int]:
    """-> how many were answered and how many not."""
    places = asyncio.Semaphore(_MOST_AT_ONCE)
    num_answered = 0
    with tqdm(total=len(lines), unit="request", file=sys.stderr) as bar:

        async def one(line: bytes) -> None:
            nonlocal num_answered
            async with places:
                result = await answer_line(line, model)
            out.write(msgspec.json.encode(result) + b"\n")
            out.flush()
            num_answered += result.response is not None and result.response.status_code == 200
            bar.update()

        try:
            await asyncio.gather(*(one(line) for line in lines))
        finally:
            await model.engine.shutdown()
    return num_answered, len(lines) - num_answered


async def answer_line(line: bytes, model: LocalModel) -> BatchResult:
    """One line to its result. Raises nothing but what ends the program."""
    result = BatchResult(id=f"batch_req_{uuid.uuid4().hex}", custom_id=None)
    try:
        asked = _decode(line, result)
    except InvalidRequest as error:
        result.error = BatchError(code=error.code or "invalid_request", message=error.message)
        return result
    request_id = uuid.uuid4().hex
    try:
        call = PARSERS[asked.url](bytes(asked.body), request_id, model.context)
        if call.stream:
            raise InvalidRequest("`stream` is not possible in a batch", param="stream")
        for warning in call.warnings:
            _log.warning("%s: %s", asked.custom_id, warning)
        outputs = await asyncio.gather(*(_answer(model, call, index) for index in range(len(call.prompts))))
        status, body = 200, call.renderer.whole(list(outputs))
    except Exception as error:
        if not isinstance(error, PagodaError):
            _log.exception("%s failed", asked.custom_id)
        status, described = describe(error)
        body = msgspec.json.encode(described)
    result.response = BatchResponse(status_code=status, request_id=request_id, body=msgspec.Raw(body))
    return result


async def _answer(model: LocalModel, call: Call, prompt_idx: int) -> RequestOutput:
    last = None
    async for output in model.answer(call, f"{call.response_id}-{prompt_idx}", prompt_idx):
        last = output
    if last is None or not last.finished:
        raise RequestFailed("the engine ended this request without an answer")
    return last


def _decode(line: bytes, result: BatchResult) -> BatchLine:
    """The line as a request; its custom_id is noted in `result` as soon as it is known. Raises InvalidRequest."""
    try:
        given = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the line is not valid JSON: {error}", code="invalid_json") from None
    if isinstance(given, dict) and isinstance(given.get("custom_id"), str):
        result.custom_id = given["custom_id"]
    try:
        asked = msgspec.json.decode(line, type=BatchLine)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"the line is not a request: {error}", code="invalid_line") from None
    if asked.method != "POST":
        raise InvalidRequest(f"method `{asked.method}` is not possible in a batch; use POST", code="invalid_method")
    if asked.url not in PARSERS:
        raise InvalidRequest(f"url `{asked.url}` is not possible in a batch; known: {', '.join(PARSERS)}", code="invalid_url")
    return asked


def _read_lines(name: str) -> list[bytes]:
    """Lines that are not blank. ConfigError where the file cannot be read."""
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(f"`--input-file {name}` cannot be read: {error.strerror}") from None
    return [line for line in raw.splitlines() if line.strip()]


@contextmanager
def _output(name: str) -> Iterator[IO[bytes]]:
    """Opened before the model loads, so that a path that cannot be written is known at once."""
    try:
        target = nullcontext(sys.stdout.buffer) if name == "-" else open(name, "wb")  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"`--output-file {name}` cannot be written: {error.strerror}") from None
    with target as out:
        yield out
