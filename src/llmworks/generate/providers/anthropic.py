"""The Anthropic Messages API.

Reference: docs.claude.com/en/api/messages, and the provider's own client for its version of October 2026.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmworks.core.errors import EngineError, RequestError
from llmworks.core.types import Completion, Json, Message, Request
from llmworks.generate.providers.protocol import Call, Passing, count, finish, functions, named, without_system, written

VERSION, VERSION_WITH_SAMPLING = "2026-10-21", "2023-06-01"
INPUT = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
PASSES = {"overloaded_error", "rate_limit_error", "api_error", "timeout_error"}  # kinds of an error within a stream


class Anthropic:
    """It takes no seed, and since its newest models no temperature, top_p and top_k: answers cannot be repeated.

    Older models may be asked to.
    """

    key = "ANTHROPIC_API_KEY"
    plain = True
    can = frozenset({"tools", "schema"})

    def headers(self, key: str, *, plain: bool) -> dict[str, str]:
        """The key, and the version of the API: the newest that knows what is sent."""
        return {"anthropic-version": VERSION if plain else VERSION_WITH_SAMPLING, **({"x-api-key": key} if key else {})}

    def address(self, model: str, *, stream: bool) -> str:
        """The same for all models."""
        return "/messages"

    def body(self, model: str, request: Request, *, stream: bool, plain: bool) -> Json:
        """System apart, turns as blocks.

        Only one of temperature and top_p may be given to newer models: top_p is sent where it is not 1.
        """
        s = request.sampling
        system, turns = without_system(request.messages)
        if not turns:
            raise RequestError("the request has no message but the system's; this API wants a user's")
        body: Json = {
            "model": model,
            "max_tokens": s.max_tokens,
            "messages": _merged([_turn(m) for m in named(turns)]),
            "stream": stream,
        }
        if system:
            body["system"] = system
        if not plain:
            body |= {
                "temperature": s.temperature,
                **({"top_p": s.top_p} if s.top_p < 1 else {}),
                **({"top_k": s.top_k} if s.top_k else {}),
            }
        if s.stop:
            body["stop_sequences"] = list(s.stop)
        if request.tools:
            body["tools"] = [
                {
                    "name": f["name"],
                    **({"description": f["description"]} if f.get("description") else {}),
                    "input_schema": f.get("parameters") or {"type": "object", "properties": {}},
                }
                for f in functions(request.tools)
            ]
        if request.schema is not None:
            body["output_config"] = {"format": {"type": "json_schema", "schema": request.schema}}
        return body

    def read(self, reply: Json) -> Completion:
        """All text blocks, then the calls."""
        blocks = reply["content"]
        text = "".join(str(b["text"]) for b in blocks if b["type"] == "text")
        calls = [Call(str(b["name"]), b["input"]) for b in blocks if b["type"] == "tool_use"]
        return _completion(text + written(calls), reply["stop_reason"], reply.get("usage") or {})

    def stream(self) -> AnthropicStream:
        """A reader of one stream."""
        return AnthropicStream()

    def adapt(self, message: str) -> bool:
        """Nothing to adapt."""
        return False

    def embedding(self, model: str, texts: Sequence[str]) -> tuple[str, Json]:
        """Not offered."""
        raise RequestError("this API has no embeddings")

    def vectors(self, reply: Json) -> list[list[float]]:
        """Not offered."""
        raise RequestError("this API has no embeddings")


class AnthropicStream:
    """message_start, blocks with deltas, message_delta with the reason, message_stop.

    Unknown events are passed over, as the API asks.
    """

    def __init__(self) -> None:
        self.text = ""
        self.calls: dict[int, Call] = {}
        self.reason: Any = None
        self.usage: Json = {}
        self.whole = False

    def take(self, event: Json) -> str:
        """The text of a text_delta."""
        kind = event["type"]
        if kind == "error":
            error = event["error"]
            said = f"{error.get('type')}: {error.get('message')}"
            raise Passing(said) if error.get("type") in PASSES else EngineError(said)
        if kind == "message_start":
            self.usage |= event["message"].get("usage") or {}
        elif kind == "content_block_start" and event["content_block"]["type"] == "tool_use":
            self.calls[int(event["index"])] = Call(str(event["content_block"]["name"]))
        elif kind == "content_block_delta":
            delta = event["delta"]
            if delta["type"] == "input_json_delta":
                self.calls[int(event["index"])].arguments += delta["partial_json"]
            elif delta["type"] == "text_delta":
                self.text += delta["text"]
                return str(delta["text"])
        elif kind == "message_delta":
            self.reason = event["delta"].get("stop_reason") or self.reason
            self.usage |= {k: v for k, v in (event.get("usage") or {}).items() if v is not None}
        elif kind == "message_stop":
            self.whole = True
        return ""

    def end(self) -> tuple[str, Completion]:
        """The calls, and all."""
        if not self.whole:
            raise Passing("it ended without message_stop")
        calls = written([call for _, call in sorted(self.calls.items())])
        return calls, _completion(self.text + calls, self.reason, self.usage)


def _turn(message: Message) -> Json:
    if message.role == "tool":
        return {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": message.tool_call_id, "content": message.content}],
        }
    blocks: list[Json] = [{"type": "text", "text": message.content}] if message.content else []
    blocks += [{"type": "tool_use", "id": c.id, "name": c.name, "input": c.arguments} for c in message.tool_calls]
    return {"role": message.role, "content": blocks}


def _merged(turns: list[Json]) -> list[Json]:
    """Turns of one role that follow one another as one: results of several calls must come together."""
    out: list[Json] = []
    for turn in turns:
        if out and out[-1]["role"] == turn["role"]:
            out[-1]["content"] += turn["content"]
        elif turn["content"]:
            out.append(turn)
    return out


def _completion(text: str, reason: Any, usage: Json) -> Completion:
    why = finish(reason, ["max_tokens", "model_context_window_exceeded"], ["refusal"])
    return Completion(text, why, prompt_tokens=count(usage, *INPUT), completion_tokens=count(usage, "output_tokens"))
