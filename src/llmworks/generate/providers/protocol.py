"""What tells one provider's API from another: addresses, headers, bodies, replies and events of a stream.

Knows no connection and no retry.

Every provider answers in one form here: text, in which tool calls stand as the models of this project write them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from llmworks.core.types import Completion, FinishReason, Json, Message, Request, ToolCall
from llmworks.tokenize.chat.templates import CALL_CLOSE, CALL_OPEN, render_call


class Passing(Exception):
    """A failure that may be gone at the next attempt; `pause` is what the server asked for, in seconds."""

    def __init__(self, why: str, pause: float = 0.0) -> None:
        super().__init__(why)
        self.pause = pause


class Stream(Protocol):
    """Puts the events of one stream together."""

    def take(self, event: Json) -> str:
        """The new text of an event.

        KeyError, TypeError, ValueError or AttributeError for an event that makes no sense.
        """
        ...

    def end(self) -> tuple[str, Completion]:
        """(text that was not told yet, the whole answer). Passing when the last event has not come."""
        ...


class Wire(Protocol):
    """One API.

    Bodies and replies are parsed JSON; what cannot be read raises KeyError, IndexError, TypeError, ValueError or
    AttributeError.

    `key`: the environment variable that usually holds its key; `can`: what an engine over it offers; `plain`: it takes
    no temperature today.
    """

    key: str
    plain: bool
    can: frozenset[str]

    def headers(self, key: str, *, plain: bool) -> dict[str, str]:
        """What goes with every request."""
        ...

    def address(self, model: str, *, stream: bool) -> str:
        """Path behind the base URL."""
        ...

    def body(self, model: str, request: Request, *, stream: bool, plain: bool) -> Json:
        """What is sent; `plain` leaves out how to sample. RequestError for what the API cannot be asked."""
        ...

    def read(self, reply: Json) -> Completion:
        """The answer in a reply."""
        ...

    def stream(self) -> Stream:
        """A reader of one stream."""
        ...

    def adapt(self, message: str) -> bool:
        """Whether a body that was refused with this message can be sent in another form from now on."""
        ...

    def embedding(self, model: str, texts: Sequence[str]) -> tuple[str, Json]:
        """(path behind the base URL, body) that ask for vectors of texts. RequestError where the API has none."""
        ...

    def vectors(self, reply: Json) -> list[list[float]]:
        """One vector for each text, in their order."""
        ...


@dataclass
class Call:
    """A tool call in the making: its arguments are JSON as text, or parsed."""

    name: str = ""
    arguments: Any = ""


def written(calls: Sequence[Call]) -> str:
    """Tool calls as text. One whose arguments are not JSON is kept as the model wrote it, and will not parse."""
    out: list[str] = []
    for call in calls:
        arguments = call.arguments or {}
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else dict(arguments)
            out.append(render_call(ToolCall(call.name, parsed)))
        except ValueError:
            out.append(f'{CALL_OPEN}{{"name": {json.dumps(call.name)}, "arguments": {arguments}}}{CALL_CLOSE}')
    return "".join(out)


def finish(reason: Any, length: Sequence[str], filtered: Sequence[str]) -> FinishReason:
    """Why an answer ended: by its limit, by a filter, else by itself."""
    return "length" if reason in length else "filtered" if reason in filtered else "stop"


def count(usage: Mapping[str, Any] | None, *names: str) -> int:
    """The sum of these counts; 0 for what is not told."""
    return sum(int((usage or {}).get(name) or 0) for name in names)


def functions(tools: Sequence[Json]) -> list[Json]:
    """The functions of tools, which may be given bare or as OpenAI wraps them."""
    return [tool.get("function", tool) for tool in tools]


def without_system(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """(all system messages as one text, the others), for APIs that keep them apart."""
    return "\n\n".join(m.content for m in messages if m.role == "system"), [m for m in messages if m.role != "system"]


def named(messages: Sequence[Message]) -> list[Message]:
    """The same messages, every tool call with an id and every result with the id and the name of its call: as given,
    else in their order.
    """
    waiting: list[ToolCall] = []
    names: dict[str, str] = {}
    made, out = 0, []
    for message in messages:
        calls: list[ToolCall] = []
        for call in message.tool_calls:
            made += 1
            calls.append(call if call.id else replace(call, id=f"call_{made}"))
        if calls:
            waiting = list(calls)
            names |= {call.id: call.name for call in calls}
            message = replace(message, tool_calls=tuple(calls))
        elif message.role == "tool":
            id = message.tool_call_id or (waiting[0].id if waiting else "")
            waiting = [call for call in waiting if call.id != id]
            message = replace(message, tool_call_id=id, name=message.name or names.get(id, ""))
        out.append(message)
    return out
