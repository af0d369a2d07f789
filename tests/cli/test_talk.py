"""Chat and complete: the conversation with a scripted talker, and the HTTP side against our server over a real socket."""

from __future__ import annotations

import argparse
import http.server
import threading
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import pytest

from pagoda.base.errors import ConfigError, InvalidRequest, RequestFailed
from pagoda.cli import chat, complete
from pagoda.cli.flags import ArgumentParser
from pagoda.cli.main import main
from pagoda.cli.talk import CHAT, COMPLETIONS
from pagoda.cli.talk_flags import open_talker, sampling_fields
from pagoda.cli.talk_http import HttpTalker
from tests.serve.fakes import MODEL, Rig


class _Script:
    """Answers in pieces with what it was asked."""

    name = "script"

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.error: BaseException | None = None

    def stream(self, route: str, body: Mapping[str, Any]) -> Generator[str, None, None]:
        self.asked.append((route, {**body, "messages": [dict(m) for m in body.get("messages", ())]}))
        yield "you said "
        if self.error is not None:
            raise self.error
        yield body["messages"][-1]["content"]

    def close(self) -> None: ...


def _talk(conversation: chat.Conversation, *lines: str | BaseException) -> None:
    waiting = iter(lines)

    def read() -> str:
        line = next(waiting, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    chat._talk(conversation, read)


def test_history_grows_and_is_reset(capsys: pytest.CaptureFixture[str]) -> None:
    script = _Script()
    conversation = chat.Conversation(script, {"temperature": 0}, "be kind")
    _talk(conversation, "one", "", "two\nlines", "/reset", "three", "/exit", "never read")
    says = [[m["content"] for m in body["messages"]] for _, body in script.asked]
    assert says == [
        ["be kind", "one"],
        ["be kind", "one", "you said one", "two\nlines"],
        ["be kind", "three"],
    ]
    assert all(route == CHAT and body["temperature"] == 0 for route, body in script.asked)
    assert "you said two\nlines\n" in capsys.readouterr().out


def test_commands_are_not_messages(capsys: pytest.CaptureFixture[str]) -> None:
    script = _Script()
    _talk(chat.Conversation(script, {}), "/help", "/hlep", "/etc is a folder, what is in it?")
    assert len(script.asked) == 1
    shown = capsys.readouterr().out
    assert "/reset  forget" in shown and "unknown command /hlep" in shown


@pytest.mark.parametrize("error", [InvalidRequest("too long"), KeyboardInterrupt()])
def test_a_message_without_an_answer_is_forgotten(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    script = _Script()
    conversation = chat.Conversation(script, {})
    script.error = error
    _talk(conversation, "one")
    assert conversation.messages == []
    script.error = None
    _talk(conversation, KeyboardInterrupt(), "two")
    assert [m["content"] for m in conversation.messages] == ["two", "you said two"]
    shown = capsys.readouterr()
    assert "too long" in shown.err or "(stopped)" in shown.out


def _args(module: Any, *words: str) -> argparse.Namespace:
    parser = ArgumentParser(prog="test")
    module.add_arguments(parser)
    found: argparse.Namespace = parser.parse_args(list(words))
    return found


def test_only_what_was_set_is_sent() -> None:
    assert sampling_fields(_args(chat)) == {}
    words = ["--temperature", "0", "--max-tokens", "1k", "--stop", "a", "b", "--seed", "7", "--top-p", "0.5"]
    assert sampling_fields(_args(chat, *words)) == {"temperature": 0.0, "max_tokens": 1000, "stop": ["a", "b"], "seed": 7, "top_p": 0.5}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--url", "http://x", "--block-size", "32"], "`--block-size` is for loading a model here"),
        (["--api-key", "k"], "`--api-key` is for a server; give its --url"),
        (["--url", "127.0.0.1:1"], "must start with http"),
        (["--url", "http://127.0.0.1:1"], "no server answers"),
    ],
)
def test_flags_that_do_not_go_together(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_talker(_args(chat, *words))


def test_prompt_given_twice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="twice"):
        complete.run(_args(complete, "a", "-q", "b"))


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Rig(api_key=["key"]).make_ready().running() as running:
        yield running


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_streams_of_a_server(rig: Rig, suffix: str) -> None:
    talker = HttpTalker(rig.base_url + suffix, api_key="key")
    assert talker.name == MODEL
    pieces = list(talker.stream(CHAT, {"messages": [{"role": "user", "content": "hi"}]}))
    assert "".join(pieces) == rig.engine.reply and len(pieces) > 5
    assert "".join(talker.stream(COMPLETIONS, {"prompt": "hi", "max_tokens": 3})) == rig.engine.reply[:3]
    talker.close()


def test_errors_of_a_server(rig: Rig) -> None:
    with pytest.raises(RequestFailed, match="401"):
        HttpTalker(rig.base_url, api_key="wrong")
    talker = HttpTalker(rig.base_url, api_key="key", model="other")
    with pytest.raises(RequestFailed, match="404: the model `other` does not exist"):
        list(talker.stream(COMPLETIONS, {"prompt": "hi"}))
    talker.name = MODEL
    with pytest.raises(RequestFailed, match=r"400: .*temperature"):
        list(talker.stream(COMPLETIONS, {"prompt": "hi", "temperature": 9}))
    got = []
    with pytest.raises(RequestFailed, match="not finite"):
        got.extend(talker.stream(COMPLETIONS, {"prompt": "!fail"}))
    talker.close()


def test_leaving_a_stream_ends_the_request(rig: Rig) -> None:
    rig.engine.delay = 0.01
    talker = HttpTalker(rig.base_url, api_key="key")
    stream = talker.stream(COMPLETIONS, {"prompt": "hi", "max_tokens": 400})
    next(stream)
    stream.close()
    talker.close()
    waiting = threading.Event()
    for _ in range(200):
        if rig.engine.dropped:
            break
        waiting.wait(0.01)
    assert len(rig.engine.dropped) == 1 and not rig.engine.live


def test_one_shot_against_a_server(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", rig.base_url, "--api-key", "key", "-q", "hi", "--system-prompt", "be kind"]) == 0
    assert main(["complete", "hi", "--url", rig.base_url, "--api-key", "key", "--max-tokens", "5", "--echo"]) == 0
    assert capsys.readouterr().out == f"{rig.engine.reply}\nhi{rig.engine.reply[:5]}\n"
    prompts = [prompt["prompt"] for prompt in rig.engine.prompts.values()]
    assert prompts == ["system: be kind\nuser: hi\nassistant: ", "hi"]


def test_a_server_of_something_else() -> None:
    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello")

        def log_message(self, *_: Any) -> None: ...

    server = http.server.HTTPServer(("127.0.0.1", 0), Other)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with pytest.raises(RequestFailed, match="lists no model"):
            HttpTalker(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
