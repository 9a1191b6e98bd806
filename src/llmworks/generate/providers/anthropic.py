"""The Anthropic Messages API.

Reference: docs.claude.com/en/api/messages, and the provider's own client for its version of October 2026.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmworks.core.errors import EngineError, RequestError
from llmworks.core.types import Completion, Json, Message, Request
from llmworks.generate.providers.protocol import (
    PartialToolCall,
    TransientError,
    add_call_ids,
    map_finish_reason,
    render_tool_calls,
    split_system,
    sum_usage,
    unwrap_functions,
)

VERSION, VERSION_WITH_SAMPLING = "2026-10-21", "2023-06-01"
INPUT = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
RETRYABLE_ERRORS = {
    "overloaded_error",
    "rate_limit_error",
    "api_error",
    "timeout_error",
}  # error types within a stream that are retried


class Anthropic:
    """The Messages API. It takes no seed; newer models take no temperature, top_p or top_k either.

    Completions of newer models cannot be reproduced. Older models accept sampling parameters.
    """

    key = "ANTHROPIC_API_KEY"
    omit_sampling = True
    can = frozenset({"tools", "schema"})

    def build_headers(self, key: str, *, omit_sampling: bool) -> dict[str, str]:
        """Return the key header and the API version: the newest one that accepts what is sent."""
        return {
            "anthropic-version": VERSION if omit_sampling else VERSION_WITH_SAMPLING,
            **({"x-api-key": key} if key else {}),
        }

    def path(self, model: str, *, stream: bool) -> str:
        """Return the path, which is the same for all models."""
        return "/messages"

    def build_body(self, model: str, request: Request, *, stream: bool, omit_sampling: bool) -> Json:
        """Build the request: the system prompt as its own field, turns as content blocks.

        Newer models accept only one of temperature and top_p: top_p is sent where it is not 1.
        """
        s = request.sampling
        system, turns = split_system(request.messages)
        if not turns:
            raise RequestError("the request has only a system message; this API needs a user message")
        body: Json = {
            "model": model,
            "max_tokens": s.max_tokens,
            "messages": _merge_turns([_convert_turn(m) for m in add_call_ids(turns)]),
            "stream": stream,
        }
        if system:
            body["system"] = system
        if not omit_sampling:
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
                for f in unwrap_functions(request.tools)
            ]
        if request.schema is not None:
            body["output_config"] = {"format": {"type": "json_schema", "schema": request.schema}}
        return body

    def parse_reply(self, reply: Json) -> Completion:
        """Return all text blocks, then the tool calls."""
        blocks = reply["content"]
        text = "".join(str(b["text"]) for b in blocks if b["type"] == "text")
        calls = [PartialToolCall(str(b["name"]), b["input"]) for b in blocks if b["type"] == "tool_use"]
        return _build_completion(text + render_tool_calls(calls), reply["stop_reason"], reply.get("usage") or {})

    def new_stream(self) -> AnthropicStream:
        """Return a reader for one stream."""
        return AnthropicStream()

    def adapt(self, message: str) -> bool:
        """Return False: this API has no alternative form."""
        return False

    def build_embedding_request(self, model: str, texts: Sequence[str]) -> tuple[str, Json]:
        """Raise RequestError: not offered."""
        raise RequestError("this API has no embeddings")

    def parse_embeddings(self, reply: Json) -> list[list[float]]:
        """Raise RequestError: not offered."""
        raise RequestError("this API has no embeddings")


class AnthropicStream:
    """A stream of message_start, blocks with deltas, message_delta with the stop reason, message_stop.

    Unknown events are ignored, as the API asks.
    """

    def __init__(self) -> None:
        self.text = ""
        self.calls: dict[int, PartialToolCall] = {}
        self.reason: Any = None
        self.usage: Json = {}
        self.complete = False

    def read_event(self, event: Json) -> str:
        """Return the text of a text_delta."""
        kind = event["type"]
        if kind == "error":
            error = event["error"]
            message = f"{error.get('type')}: {error.get('message')}"
            raise TransientError(message) if error.get("type") in RETRYABLE_ERRORS else EngineError(message)
        if kind == "message_start":
            self.usage |= event["message"].get("usage") or {}
        elif kind == "content_block_start" and event["content_block"]["type"] == "tool_use":
            self.calls[int(event["index"])] = PartialToolCall(str(event["content_block"]["name"]))
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
            self.complete = True
        return ""

    def finish(self) -> tuple[str, Completion]:
        """Return (tool calls, whole completion)."""
        if not self.complete:
            raise TransientError("the stream ended without message_stop")
        calls = render_tool_calls([call for _, call in sorted(self.calls.items())])
        return calls, _build_completion(self.text + calls, self.reason, self.usage)


def _convert_turn(message: Message) -> Json:
    if message.role == "tool":
        return {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": message.tool_call_id, "content": message.content}],
        }
    blocks: list[Json] = [{"type": "text", "text": message.content}] if message.content else []
    blocks += [{"type": "tool_use", "id": c.id, "name": c.name, "input": c.arguments} for c in message.tool_calls]
    return {"role": message.role, "content": blocks}


def _merge_turns(turns: list[Json]) -> list[Json]:
    """Merge consecutive turns of one role: results of parallel calls must arrive in one turn."""
    out: list[Json] = []
    for turn in turns:
        if out and out[-1]["role"] == turn["role"]:
            out[-1]["content"] += turn["content"]
        elif turn["content"]:
            out.append(turn)
    return out


def _build_completion(text: str, reason: Any, usage: Json) -> Completion:
    why = map_finish_reason(reason, ["max_tokens", "model_context_window_exceeded"], ["refusal"])
    return Completion(
        text, why, prompt_tokens=sum_usage(usage, *INPUT), completion_tokens=sum_usage(usage, "output_tokens")
    )
