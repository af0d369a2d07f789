"""`pagoda chat`: talk to a model, or to a running server. Answers are printed as they come; the history is kept."""

from __future__ import annotations

import argparse
import contextlib
import select
import sys
from collections.abc import Callable
from contextlib import closing
from typing import Any

from pagoda.base.errors import RequestError
from pagoda.base.log import setup_logging
from pagoda.cli.talk import CHAT, Talker
from pagoda.cli.talk_flags import add_talk_flags, open_talker, print_stream, sampling_fields

__all__ = ["Conversation", "add_arguments", "run"]

HELP = """  /reset  forget the conversation
  /help   this list
  /exit   leave (or Ctrl-D)
Ctrl-C stops an answer. A text of several lines can be pasted."""

_PASTE_SECONDS = 0.03  # lines that follow faster than a hand types belong to one paste


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quick", metavar="MESSAGE", help="answer this one message and leave")
    parser.add_argument("--system-prompt", metavar="TEXT", help="what the model is told before the conversation")
    add_talk_flags(parser, positional_model=True)


def run(args: argparse.Namespace) -> int:
    setup_logging("warning")
    with closing(open_talker(args)) as talker:
        conversation = Conversation(talker, sampling_fields(args), args.system_prompt)
        if args.quick is not None:
            conversation.say(args.quick)
        else:
            _talk(conversation, _reader())
    return 0


class Conversation:
    """Messages so far. One that was refused is taken back, so that the next has a chance."""

    def __init__(self, talker: Talker, fields: dict[str, Any], system_prompt: str | None = None) -> None:
        self._talker, self._fields = talker, fields
        self._opening = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self.messages = list(self._opening)

    def say(self, text: str) -> str:
        """Print and keep the answer. Raises RequestError when there is none."""
        self.messages.append({"role": "user", "content": text})
        try:
            answer = print_stream(self._talker.stream(CHAT, {"messages": self.messages, **self._fields}))
        except BaseException:
            self.messages.pop()
            raise
        self.messages.append({"role": "assistant", "content": answer})
        return answer

    def reset(self) -> None:
        self.messages = list(self._opening)


def _talk(conversation: Conversation, read: Callable[[], str]) -> None:
    """Read, answer, until /exit or the end of the input."""
    while True:
        try:
            text = read().strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(/exit leaves)", flush=True)
            continue
        match text:
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/reset":
                conversation.reset()
                print("(forgotten)", flush=True)
            case "/help":
                print(HELP, flush=True)
            case _ if text.startswith("/") and " " not in text and "\n" not in text:
                print(f"unknown command {text}\n{HELP}", flush=True)
            case _:
                _answer(conversation, text)


def _answer(conversation: Conversation, text: str) -> None:
    try:
        conversation.say(text)
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("\n(stopped)", flush=True)


def _reader() -> Callable[[], str]:
    """What reads a message: with line editing and pastes of several lines at a terminal, line by line from a pipe."""
    if not sys.stdin.isatty():
        return input
    with contextlib.suppress(ImportError):  # some Pythons lack it
        import readline  # noqa: F401 - gives input() editing and history

    def read() -> str:
        try:
            lines = [input("> ")]
        except EOFError:
            print(flush=True)  # the shell's prompt starts on a line of its own
            raise
        while select.select([sys.stdin], [], [], _PASTE_SECONDS)[0]:
            lines.append(input())
        return "\n".join(lines)

    return read
