"""The interface of a provider's API: paths, headers, bodies, replies and stream events.

Does not handle connections and retries.

Every provider's reply becomes the same form: text in which tool calls are written as this project's models write them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from llmworks.core.types import Completion, FinishReason, Json, Message, Request, ToolCall
from llmworks.tokenize.chat.templates import CALL_CLOSE, CALL_OPEN, render_tool_call


class TransientError(Exception):
    """A transient failure: a retry may succeed. `pause` is the wait the server asked for, in seconds."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause


class StreamReader(Protocol):
    """Assembles the events of one stream."""

    def read_event(self, event: Json) -> str:
        """Return an event's new text.

        KeyError, TypeError, ValueError or AttributeError for a malformed event.
        """
        ...

    def finish(self) -> tuple[str, Completion]:
        """Return (text not yet streamed, whole completion). Passing when the last event is missing."""
        ...


class ProviderApi(Protocol):
    """One provider's API.

    Bodies and replies are parsed JSON; malformed ones raise KeyError, IndexError, TypeError, ValueError or
    AttributeError.

    `key`: environment variable that usually holds the API key. `can`: capabilities of an engine over it.
    `omit_sampling`: whether the API takes no sampling parameters today.
    """

    key: str
    omit_sampling: bool
    can: frozenset[str]

    def build_headers(self, key: str, *, omit_sampling: bool) -> dict[str, str]:
        """Return the headers of every request."""
        ...

    def path(self, model: str, *, stream: bool) -> str:
        """Return the path after the base URL."""
        ...

    def build_body(self, model: str, request: Request, *, stream: bool, omit_sampling: bool) -> Json:
        """Build the request body; `omit_sampling`: without sampling parameters.

        RequestError for what the API does not offer.
        """
        ...

    def parse_reply(self, reply: Json) -> Completion:
        """Return the completion in a reply."""
        ...

    def new_stream(self) -> StreamReader:
        """Return a reader for one stream."""
        ...

    def adapt(self, message: str) -> bool:
        """Return whether a body refused with this message is sent in another form from now on."""
        ...

    def build_embedding_request(self, model: str, texts: Sequence[str]) -> tuple[str, Json]:
        """Return (path after the base URL, body) of an embedding request. RequestError where the API has none."""
        ...

    def parse_embeddings(self, reply: Json) -> list[list[float]]:
        """Return one vector per text, in order."""
        ...


@dataclass
class PartialToolCall:
    """A partially received tool call: its arguments are JSON text, or parsed."""

    name: str = ""
    arguments: Any = ""


def render_tool_calls(calls: Sequence[PartialToolCall]) -> str:
    """Render tool calls as text. Arguments that are not valid JSON stay as the model wrote them, and will not parse."""
    out: list[str] = []
    for call in calls:
        arguments = call.arguments or {}
        try:
            parsed = json.loads(arguments) if isinstance(arguments, str) else dict(arguments)
            out.append(render_tool_call(ToolCall(call.name, parsed)))
        except ValueError:
            out.append(f'{CALL_OPEN}{{"name": {json.dumps(call.name)}, "arguments": {arguments}}}{CALL_CLOSE}')
    return "".join(out)


def map_finish_reason(reason: Any, length: Sequence[str], filtered: Sequence[str]) -> FinishReason:
    """Map a provider's finish reason: token limit, content filter, else stop."""
    return "length" if reason in length else "filtered" if reason in filtered else "stop"


def sum_usage(usage: Mapping[str, Any] | None, *names: str) -> int:
    """Return the sum of these usage counts; a missing one counts 0."""
    return sum(int((usage or {}).get(name) or 0) for name in names)


def unwrap_functions(tools: Sequence[Json]) -> list[Json]:
    """Return the functions of tools, given bare or wrapped as OpenAI does."""
    return [tool.get("function", tool) for tool in tools]


def split_system(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """Return (all system messages joined, the other messages), for APIs with a separate system field."""
    return "\n\n".join(m.content for m in messages if m.role == "system"), [m for m in messages if m.role != "system"]


def add_call_ids(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with an id on every tool call, and the call's id and name on every tool result.

    Missing ids are matched in order.
    """
    waiting: list[ToolCall] = []
    names: dict[str, str] = {}
    num_calls, out = 0, []
    for message in messages:
        calls: list[ToolCall] = []
        for call in message.tool_calls:
            num_calls += 1
            calls.append(call if call.id else replace(call, id=f"call_{num_calls}"))
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
