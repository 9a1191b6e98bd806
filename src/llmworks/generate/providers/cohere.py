"""The Cohere chat API, version 2. Reference: docs.cohere.com/reference/chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmworks.core.types import Completion, Json, Request, messages_to_json
from llmworks.generate.providers.protocol import (
    PartialToolCall,
    TransientError,
    add_call_ids,
    map_finish_reason,
    render_tool_calls,
    sum_usage,
    unwrap_functions,
)

RETRYABLE_REASONS = ("ERROR", "TIMEOUT")


class Cohere:
    """Messages are OpenAI's; sampling parameters have other names."""

    key = "CO_API_KEY"
    omit_sampling = False
    can = frozenset({"tools", "schema", "embed"})

    def build_headers(self, key: str, *, omit_sampling: bool) -> dict[str, str]:
        """Return the key as a bearer token."""
        return {"Authorization": f"Bearer {key}"} if key else {}

    def path(self, model: str, *, stream: bool) -> str:
        """Return the path, which is the same for all models."""
        return "/chat"

    def build_body(self, model: str, request: Request, *, stream: bool, omit_sampling: bool) -> Json:
        """Build the request with temperature, `p` and `k`; `k` 0 is off there too.

        The API defaults p to 0.75 and caps it at 0.99, which is sent for 1.
        """
        s = request.sampling
        messages = [
            {k: v for k, v in m.items() if k != "name" and (k != "content" or v or not m.get("tool_calls"))}
            for m in messages_to_json(add_call_ids(request.messages))
        ]
        body: Json = {"model": model, "messages": messages, "max_tokens": s.max_tokens, "stream": stream}
        if not omit_sampling:
            body |= {
                "temperature": s.temperature,
                "k": s.top_k,
                **({"p": min(0.99, max(0.01, s.top_p))} if s.temperature else {}),
            }
        if s.seed is not None:
            body["seed"] = s.seed
        if s.stop:
            body["stop_sequences"] = list(s.stop)
        if request.tools:
            body["tools"] = [{"type": "function", "function": function} for function in unwrap_functions(request.tools)]
        if request.schema is not None:
            body["response_format"] = {"type": "json_object", "schema": request.schema}
        return body

    def parse_reply(self, reply: Json) -> Completion:
        """Return the message's text blocks, then the tool calls."""
        message, reason = reply["message"], reply["finish_reason"]
        if reason in RETRYABLE_REASONS:
            raise TransientError(f"the completion ended with the reason {reason}")
        text = "".join(
            str(block["text"]) for block in message.get("content") or [] if block.get("type", "text") == "text"
        )
        calls = [
            PartialToolCall(str(call["function"]["name"]), call["function"].get("arguments"))
            for call in message.get("tool_calls") or []
        ]
        return _build_completion(text + render_tool_calls(calls), reason, reply.get("usage"))

    def new_stream(self) -> CohereStream:
        """Return a reader for one stream."""
        return CohereStream()

    def adapt(self, message: str) -> bool:
        """Return False: this API has no alternative form."""
        return False

    def build_embedding_request(self, model: str, texts: Sequence[str]) -> tuple[str, Json]:
        """Build a request of the embed API; input type clustering, since no text is a search query."""
        return "/embed", {
            "model": model,
            "texts": list(texts),
            "input_type": "clustering",
            "embedding_types": ["float"],
            "truncate": "NONE",
        }

    def parse_embeddings(self, reply: Json) -> list[list[float]]:
        """Return the float32 vectors."""
        return [[float(x) for x in vector] for vector in reply["embeddings"]["float"]]


class CohereStream:
    """A stream of content-delta, tool-call-start, tool-call-delta, message-end; other events are ignored."""

    def __init__(self) -> None:
        self.text = ""
        self.calls: dict[int, PartialToolCall] = {}
        self.reason: Any = None
        self.usage: Any = None

    def read_event(self, event: Json) -> str:
        """Return the text of a content-delta, without thinking."""
        kind = event["type"]
        if kind == "content-delta":
            new = str(event["delta"]["message"]["content"].get("text") or "")
            self.text += new
            return new
        if kind == "tool-call-start":
            function = event["delta"]["message"]["tool_calls"]["function"]
            self.calls[int(event["index"])] = PartialToolCall(str(function["name"]), function.get("arguments") or "")
        elif kind == "tool-call-delta":
            self.calls[int(event["index"])].arguments += event["delta"]["message"]["tool_calls"]["function"][
                "arguments"
            ]
        elif kind == "message-end":
            self.reason, self.usage = event["delta"]["finish_reason"], event["delta"].get("usage")
            if self.reason in RETRYABLE_REASONS:
                raise TransientError(
                    str(event["delta"].get("error") or f"the stream ended with the reason {self.reason}")
                )
        return ""

    def finish(self) -> tuple[str, Completion]:
        """Return (tool calls, whole completion)."""
        if not self.reason:
            raise TransientError("the stream ended without message-end")
        calls = render_tool_calls([call for _, call in sorted(self.calls.items())])
        return calls, _build_completion(self.text + calls, self.reason, self.usage)


def _build_completion(text: str, reason: Any, usage: Any) -> Completion:
    tokens = (usage or {}).get("tokens")
    return Completion(
        text,
        map_finish_reason(reason, ["MAX_TOKENS"], ["ERROR_TOXIC"]),
        prompt_tokens=sum_usage(tokens, "input_tokens"),
        completion_tokens=sum_usage(tokens, "output_tokens"),
    )
