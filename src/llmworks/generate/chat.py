"""Chat in the terminal: streams completions of any engine, keeps the conversation, cancels on Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TextIO

from llmworks.core.errors import RequestError, UserError
from llmworks.core.types import Engine, Json, Message, Request, Sampling

HELP = (
    "/reset clears the conversation, /system TEXT sets the system message, /exit or Ctrl-D quits, Ctrl-C stops an"
    " answer."
)


class ChatSession:
    """The turns so far, the system message, tools and sampling parameters."""

    def __init__(self, engine: Engine, sampling: Sampling, system: str = "", tools: tuple[Json, ...] = ()) -> None:
        self.engine, self.sampling, self.system, self.tools = engine, sampling, system, tools
        self.turns: list[Message] = []

    def send(self, text: str) -> Iterator[str]:
        """Add a user turn and stream the answer, which becomes a turn when it is complete."""
        head = (Message("system", self.system),) if self.system else ()
        request = Request((*head, *self.turns, Message("user", text)), tools=self.tools, sampling=self.sampling)
        answer = ""
        for delta in self.engine.stream(request):
            answer += delta.text
            yield delta.text
        self.turns += [Message("user", text), Message("assistant", answer)]


def run_chat(
    conversation: ChatSession, message: str | None, source: TextIO | None = None, target: TextIO | None = None
) -> None:
    """Answer `message`, or run a dialogue over `source` (default: standard input) until it ends."""
    source, target = source or sys.stdin, target or sys.stdout
    if message is None and source is None:
        raise UserError("standard input is closed; give the message on the command line")
    if message is not None:
        _print_answer(conversation, message, target)
        return
    interactive = source.isatty()
    if interactive:
        print(f"{conversation.engine.name}. {HELP}", file=target)
    while True:
        line = _read_line(source, target, interactive)
        if line is None or line.strip() in ("/exit", "/quit"):
            return
        text = line.strip()
        if not text:
            continue
        if text == "/reset":
            conversation.turns.clear()
        elif text.startswith("/system"):
            conversation.system = text.removeprefix("/system").strip()
        elif text.startswith("/"):
            print(HELP, file=target)
        else:
            try:
                _print_answer(conversation, text, target)
            except RequestError as error:
                print(f"llmworks: {error}", file=target)


def _read_line(source: TextIO, target: TextIO, interactive: bool) -> str | None:
    if interactive:
        try:
            return input("> ")
        except (EOFError, KeyboardInterrupt):
            print(file=target)
            return None
    return source.readline() or None


def _print_answer(conversation: ChatSession, text: str, target: TextIO) -> None:
    stream = conversation.send(text)
    try:
        for piece in stream:
            print(piece, end="", file=target, flush=True)
    except KeyboardInterrupt:
        print(" [stopped]", end="", file=target)
    print(file=target, flush=True)
