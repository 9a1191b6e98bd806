"""The Gemini API, v1beta. Reference: ai.google.dev/api/generate-content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmworks.core.errors import RequestError
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

FILTERED = (
    "SAFETY",
    "RECITATION",
    "BLOCKLIST",
    "PROHIBITED_CONTENT",
    "SPII",
    "LANGUAGE",
    "IMAGE_SAFETY",
    "IMAGE_PROHIBITED_CONTENT",
    "IMAGE_RECITATION",
    "MODEL_ARMOR",
)
FINISH_REASONS = (
    "STOP",
    "MAX_TOKENS",
    "MALFORMED_FUNCTION_CALL",
    "UNEXPECTED_TOOL_CALL",
    "TOO_MANY_TOOL_CALLS",
    *FILTERED,
)
OUTPUT = ("candidatesTokenCount", "thoughtsTokenCount")


class Google:
    """The Gemini API. Thinking that a model returns is not part of its completion, but is billed."""

    key = "GEMINI_API_KEY"
    omit_sampling = False
    can = frozenset({"tools", "schema", "embed"})

    def build_headers(self, key: str, *, omit_sampling: bool) -> dict[str, str]:
        """Return the key header; the key must not be in the URL."""
        return {"x-goog-api-key": key} if key else {}

    def path(self, model: str, *, stream: bool) -> str:
        """Return the path, which contains the model."""
        return f"/models/{model}:" + ("streamGenerateContent?alt=sse" if stream else "generateContent")

    def build_body(self, model: str, request: Request, *, stream: bool, omit_sampling: bool) -> Json:
        """Build the request: the system prompt as its own field, turns as parts of the user and the model."""
        s = request.sampling
        system, turns = split_system(request.messages)
        if not turns:
            raise RequestError("the request has only a system message; this API needs a user message")
        config: Json = {"maxOutputTokens": s.max_tokens}
        if not omit_sampling:
            config |= {"temperature": s.temperature, "topP": s.top_p, **({"topK": s.top_k} if s.top_k else {})}
        if s.seed is not None:
            config["seed"] = s.seed
        if s.stop:
            config["stopSequences"] = list(s.stop)
        if request.schema is not None:
            config |= {"responseMimeType": "application/json", "responseJsonSchema": request.schema}
        body: Json = {
            "contents": _merge_turns([_convert_turn(m) for m in add_call_ids(turns)]),
            "generationConfig": config,
        }
        if system:
            body["systemInstruction"] = {"parts": [{"text": system}]}
        if request.tools:
            body["tools"] = [{"functionDeclarations": [_declare_function(f) for f in unwrap_functions(request.tools)]}]
        return body

    def parse_reply(self, reply: Json) -> Completion:
        """Return the first candidate; a blocked prompt gives a filtered completion."""
        stream = GoogleStream()
        stream.read_event(reply)
        return stream.finish()[1]

    def new_stream(self) -> GoogleStream:
        """Return a reader for one stream."""
        return GoogleStream()

    def adapt(self, message: str) -> bool:
        """Return False: this API has no alternative form."""
        return False

    def build_embedding_request(self, model: str, texts: Sequence[str]) -> tuple[str, Json]:
        """Build one batch request for all texts."""
        return f"/models/{model}:batchEmbedContents", {
            "requests": [{"model": f"models/{model}", "content": {"parts": [{"text": text}]}} for text in texts]
        }

    def parse_embeddings(self, reply: Json) -> list[list[float]]:
        """Return the values of each embedding."""
        return [[float(x) for x in item["values"]] for item in reply["embeddings"]]


class GoogleStream:
    """A stream whose events are whole replies, each with the new parts only."""

    def __init__(self) -> None:
        self.text = ""
        self.calls: list[PartialToolCall] = []
        self.reason: Any = None
        self.usage: Any = None

    def read_event(self, event: Json) -> str:
        """Return the text of the new parts, without thinking."""
        self.usage = event.get("usageMetadata") or self.usage
        blocked = (event.get("promptFeedback") or {}).get("blockReason")
        if blocked:
            self.reason = "SAFETY"
            return ""
        new = ""
        for candidate in (event.get("candidates") or [])[:1]:
            for part in (candidate.get("content") or {}).get("parts") or []:
                if "functionCall" in part:
                    self.calls.append(
                        PartialToolCall(str(part["functionCall"]["name"]), part["functionCall"].get("args"))
                    )
                elif not part.get("thought"):
                    new += part.get("text") or ""
            self.reason = candidate.get("finishReason") or self.reason
        self.text += new
        return new

    def finish(self) -> tuple[str, Completion]:
        """Return (tool calls, whole completion)."""
        if self.reason not in FINISH_REASONS:
            raise TransientError(
                f"the stream ended with the reason {self.reason}"
                if self.reason
                else "the stream ended without a finish reason"
            )
        calls = render_tool_calls(self.calls)
        why = map_finish_reason(self.reason, ["MAX_TOKENS"], FILTERED)
        return calls, Completion(
            self.text + calls,
            why,
            prompt_tokens=sum_usage(self.usage, "promptTokenCount"),
            completion_tokens=sum_usage(self.usage, *OUTPUT),
        )


def _declare_function(function: Json) -> Json:
    return {
        "name": function["name"],
        **({"description": function["description"]} if function.get("description") else {}),
        **({"parametersJsonSchema": function["parameters"]} if function.get("parameters") else {}),
    }


def _convert_turn(message: Message) -> Json:
    if message.role == "tool":
        return {
            "role": "user",
            "parts": [{"functionResponse": {"name": message.name, "response": {"result": message.content}}}],
        }
    parts: list[Json] = [{"text": message.content}] if message.content else []
    parts += [{"functionCall": {"name": c.name, "args": c.arguments}} for c in message.tool_calls]
    return {"role": "model" if message.role == "assistant" else "user", "parts": parts}


def _merge_turns(turns: list[Json]) -> list[Json]:
    """Merge consecutive turns of one role: results of parallel calls must arrive in one turn."""
    out: list[Json] = []
    for turn in turns:
        if out and out[-1]["role"] == turn["role"]:
            out[-1]["parts"] += turn["parts"]
        elif turn["parts"]:
            out.append(turn)
    return out
