"""The OpenAI chat completions API, also spoken by vLLM, Ollama, LM Studio, OpenRouter, Together and many others.

Reference: platform.openai.com/docs/api-reference/chat. Given text is scored by the older completions API with `echo`,
as vLLM offers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmworks.core.types import Completion, FinishReason, Json, Request, Sampling, messages_to_json
from llmworks.generate.providers.protocol import (
    PartialToolCall,
    TransientError,
    map_finish_reason,
    render_tool_calls,
    sum_usage,
    unwrap_functions,
)


class OpenAI:
    """The chat completions API. Remembers the name a server uses for the completion's token limit."""

    key = "OPENAI_API_KEY"
    omit_sampling = False
    can = frozenset({"tools", "schema", "embed"})

    def __init__(self) -> None:
        self._limit_field = "max_tokens"

    def build_headers(self, key: str, *, omit_sampling: bool) -> dict[str, str]:
        """Return the key as a bearer token."""
        return {"Authorization": f"Bearer {key}"} if key else {}

    def path(self, model: str, *, stream: bool) -> str:
        """Return the path, which is the same for all models."""
        return "/chat/completions"

    def build_body(self, model: str, request: Request, *, stream: bool, omit_sampling: bool) -> Json:
        """Build the request. Messages are stored in this API's format."""
        s = request.sampling
        body: Json = {
            "model": model,
            "messages": messages_to_json(request.messages),
            self._limit_field: s.max_tokens,
            **_sampling_fields(s, omit_sampling),
            "stream": stream,
        }
        if request.tools:
            body["tools"] = [{"type": "function", "function": function} for function in unwrap_functions(request.tools)]
        if request.schema is not None:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "schema": request.schema, "strict": True},
            }
        if stream:
            body["stream_options"] = {"include_usage": True}
        return body

    def parse_reply(self, reply: Json) -> Completion:
        """Return the first choice."""
        choice, usage = reply["choices"][0], reply.get("usage")
        message = choice["message"]
        calls = [
            PartialToolCall(str(call["function"]["name"]), call["function"].get("arguments"))
            for call in message.get("tool_calls") or []
        ]
        refusal = message.get("refusal") if not message.get("content") and not calls else None
        return _build_completion(
            str(refusal or _get_content(message)) + render_tool_calls(calls),
            "content_filter" if refusal else choice.get("finish_reason"),
            usage,
        )

    def new_stream(self) -> OpenAIStream:
        """Return a reader for one stream."""
        return OpenAIStream()

    def adapt(self, message: str) -> bool:
        """Switch to `max_completion_tokens`, the only name newer models accept for the limit."""
        if self._limit_field == "max_tokens" and "max_completion_tokens" in message:
            self._limit_field = "max_completion_tokens"
            return True
        return False

    def build_embedding_request(self, model: str, texts: Sequence[str]) -> tuple[str, Json]:
        """Build a request of the embeddings API."""
        return "/embeddings", {"model": model, "input": list(texts), "encoding_format": "float"}

    def parse_embeddings(self, reply: Json) -> list[list[float]]:
        """Return the vectors in the order of their indices."""
        return [
            [float(x) for x in item["embedding"]] for item in sorted(reply["data"], key=lambda item: int(item["index"]))
        ]


class OpenAIStream:
    """A stream of chunks with a delta; usage comes in a chunk without choices."""

    def __init__(self) -> None:
        self.text = ""
        self.calls: dict[int, PartialToolCall] = {}
        self.reason: Any = None
        self.usage: Any = None

    def read_event(self, event: Json) -> str:
        """Return the delta's content."""
        new = ""
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", []):
            self.reason = choice.get("finish_reason") or self.reason
            delta = choice.get("delta") or {}
            collect_calls(self.calls, delta.get("tool_calls") or [])
            new += str(delta.get("content") or "")
        self.text += new
        return new

    def finish(self) -> tuple[str, Completion]:
        """Return (tool calls, whole completion)."""
        if not self.reason:
            raise TransientError("the stream ended without a finish reason")
        calls = render_tool_calls([call for _, call in sorted(self.calls.items())])
        return calls, _build_completion(self.text + calls, self.reason, self.usage)


def build_completion_body(model: str, prompt: Sequence[int], sampling: Sampling, omit_sampling: bool) -> Json:
    """Build a request of the completions API that continues token ids."""
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": sampling.max_tokens,
        **_sampling_fields(sampling, omit_sampling),
    }


def parse_completion(reply: Json) -> Completion:
    """Return the first choice of the completions API."""
    choice = reply["choices"][0]
    return _build_completion(str(choice["text"]), choice.get("finish_reason"), reply.get("usage"))


def build_score_body(model: str, ids: Sequence[int]) -> Json:
    """Build a request of the completions API for the log-probabilities of the prompt itself.

    One token is generated, since some servers refuse to generate none.
    """
    return {"model": model, "prompt": list(ids), "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1}


def parse_scores(reply: Json, tokens: int) -> list[tuple[float, bool]]:
    """Return for each given token but the first (log-probability in nats, whether it is the most probable).

    ValueError when the server returns fewer.
    """
    logprobs = reply["choices"][0]["logprobs"]
    token_logprobs, best = logprobs["token_logprobs"], logprobs.get("top_logprobs") or []
    if len(token_logprobs) < tokens or any(chance is None for chance in token_logprobs[1:tokens]):
        raise ValueError(f"log-probabilities for {len(token_logprobs)} tokens, expected {tokens}")
    tops = [*best, *[None] * (tokens - len(best))]
    return [
        (float(chance), bool(top) and float(chance) >= max(map(float, top.values())))
        for chance, top in zip(token_logprobs[1:tokens], tops[1:tokens], strict=True)
    ]


def collect_calls(calls: dict[int, PartialToolCall], fragments: Sequence[Json]) -> None:
    """Add a stream's fragments of tool calls, identified by index, to the calls collected so far."""
    for fragment in fragments:
        call = calls.setdefault(int(fragment.get("index", 0)), PartialToolCall())
        function = fragment.get("function") or {}
        call.name += function.get("name") or ""
        call.arguments += function.get("arguments") or ""


def _sampling_fields(s: Sampling, omit_sampling: bool) -> Json:
    body: Json = {} if omit_sampling else {"temperature": s.temperature, "top_p": s.top_p}
    if s.seed is not None:
        body["seed"] = s.seed
    if s.stop:
        body["stop"] = list(s.stop)
    return body


def _get_content(message: Json) -> str:
    content = message.get("content") or ""
    return "".join(part.get("text") or "" for part in content) if isinstance(content, list) else str(content)


def _build_completion(text: str, reason: Any, usage: Any) -> Completion:
    why: FinishReason = map_finish_reason(reason, ["length"], ["content_filter"])
    return Completion(
        text,
        why,
        prompt_tokens=sum_usage(usage, "prompt_tokens"),
        completion_tokens=sum_usage(usage, "completion_tokens"),
    )
