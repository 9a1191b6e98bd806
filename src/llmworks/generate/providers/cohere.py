"""The Cohere chat API, version 2. Reference: docs.cohere.com/reference/chat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmworks.core.types import Completion, Json, Request, messages_to_json
from llmworks.generate.providers.protocol import Call, Passing, count, finish, functions, named, written

AGAIN = ("ERROR", "TIMEOUT")


class Cohere:
    """Messages are OpenAI's; how to sample is named otherwise."""

    key = "CO_API_KEY"
    plain = False
    can = frozenset({"tools", "schema", "embed"})

    def headers(self, key: str, *, plain: bool) -> dict[str, str]:
        """The key as a bearer token."""
        return {"Authorization": f"Bearer {key}"} if key else {}

    def address(self, model: str, *, stream: bool) -> str:
        """The same for all models."""
        return "/chat"

    def body(self, model: str, request: Request, *, stream: bool, plain: bool) -> Json:
        """Temperature, `p` and `k`; `k` 0 is off there too.

        The API defaults p to 0.75 and bounds it to 0.99, which is sent for 1.
        """
        s = request.sampling
        messages = [
            {k: v for k, v in m.items() if k != "name" and (k != "content" or v or not m.get("tool_calls"))}
            for m in messages_to_json(named(request.messages))
        ]
        body: Json = {"model": model, "messages": messages, "max_tokens": s.max_tokens, "stream": stream}
        if not plain:
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
            body["tools"] = [{"type": "function", "function": function} for function in functions(request.tools)]
        if request.schema is not None:
            body["response_format"] = {"type": "json_object", "schema": request.schema}
        return body

    def read(self, reply: Json) -> Completion:
        """The text blocks of the message, then the calls."""
        message, reason = reply["message"], reply["finish_reason"]
        if reason in AGAIN:
            raise Passing(f"it ended with the reason {reason}")
        text = "".join(
            str(block["text"]) for block in message.get("content") or [] if block.get("type", "text") == "text"
        )
        calls = [
            Call(str(call["function"]["name"]), call["function"].get("arguments"))
            for call in message.get("tool_calls") or []
        ]
        return _completion(text + written(calls), reason, reply.get("usage"))

    def stream(self) -> CohereStream:
        """A reader of one stream."""
        return CohereStream()

    def adapt(self, message: str) -> bool:
        """Nothing to adapt."""
        return False

    def embedding(self, model: str, texts: Sequence[str]) -> tuple[str, Json]:
        """The embed API; texts are compared with one another here, none is a query."""
        return "/embed", {
            "model": model,
            "texts": list(texts),
            "input_type": "clustering",
            "embedding_types": ["float"],
            "truncate": "NONE",
        }

    def vectors(self, reply: Json) -> list[list[float]]:
        """The vectors of 32-bit numbers."""
        return [[float(x) for x in vector] for vector in reply["embeddings"]["float"]]


class CohereStream:
    """content-delta, tool-call-start, tool-call-delta, message-end; others are passed over."""

    def __init__(self) -> None:
        self.text = ""
        self.calls: dict[int, Call] = {}
        self.reason: Any = None
        self.usage: Any = None

    def take(self, event: Json) -> str:
        """The text of a content-delta, thoughts left out."""
        kind = event["type"]
        if kind == "content-delta":
            new = str(event["delta"]["message"]["content"].get("text") or "")
            self.text += new
            return new
        if kind == "tool-call-start":
            function = event["delta"]["message"]["tool_calls"]["function"]
            self.calls[int(event["index"])] = Call(str(function["name"]), function.get("arguments") or "")
        elif kind == "tool-call-delta":
            self.calls[int(event["index"])].arguments += event["delta"]["message"]["tool_calls"]["function"][
                "arguments"
            ]
        elif kind == "message-end":
            self.reason, self.usage = event["delta"]["finish_reason"], event["delta"].get("usage")
            if self.reason in AGAIN:
                raise Passing(str(event["delta"].get("error") or f"it ended with the reason {self.reason}"))
        return ""

    def end(self) -> tuple[str, Completion]:
        """The calls, and all."""
        if not self.reason:
            raise Passing("it ended without message-end")
        calls = written([call for _, call in sorted(self.calls.items())])
        return calls, _completion(self.text + calls, self.reason, self.usage)


def _completion(text: str, reason: Any, usage: Any) -> Completion:
    tokens = (usage or {}).get("tokens")
    return Completion(
        text,
        finish(reason, ["MAX_TOKENS"], ["ERROR_TOXIC"]),
        prompt_tokens=count(tokens, "input_tokens"),
        completion_tokens=count(tokens, "output_tokens"),
    )
