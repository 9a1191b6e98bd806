"""The HTTP engine: any server that speaks the OpenAI chat completions API. Knows no model file.

The key comes from `$OPENAI_API_KEY`. A remote engine tells no ids and scores no given text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from llmworks.errors import EngineError, RequestError
from llmworks.types import Completion, Delta, FinishReason, Request, messages_to_json

CONCURRENCY = 4


class OpenAIEngine:
    """Engine over a base URL (ending in /v1) and a model name."""

    def __init__(self, url: str, model: str, *, timeout: float = 600.0) -> None:
        self.url, self.model, self.name = url.rstrip("/"), model, model
        self.can = frozenset({"tools"})
        key = os.environ.get("OPENAI_API_KEY", "")
        self.client = httpx.Client(timeout=httpx.Timeout(timeout, connect=10.0), headers={"Authorization": f"Bearer {key}"} if key else {})

    def _body(self, request: Request, stream: bool) -> dict[str, Any]:
        if request.ids:
            raise RequestError(f"{self.name} is remote: it takes messages, not token ids")
        s = request.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "messages": messages_to_json(request.messages),
            "max_tokens": s.max_tokens,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "stream": stream,
        }
        if s.seed is not None:
            body["seed"] = s.seed
        if s.stop:
            body["stop"] = list(s.stop)
        if request.tools:
            body["tools"] = [tool if "function" in tool else {"type": "function", "function": tool} for tool in request.tools]
        if stream:
            body["stream_options"] = {"include_usage": True}
        return body

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Answer all requests, a few at a time, in their order."""
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            return list(pool.map(self._answer, requests))

    def _answer(self, request: Request) -> Completion:
        try:
            reply = self.client.post(f"{self.url}/chat/completions", json=self._body(request, stream=False))
            self._check(reply)
            data = reply.json()
            choice, usage = data["choices"][0], data.get("usage") or {}
            text = _text(choice["message"])
        except httpx.HTTPError as error:
            raise EngineError(f"{self.url}: {type(error).__name__}: {error}; is the server running?") from None
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise EngineError(f"{self.url}: the reply is no chat completion ({error!r})") from None
        return Completion(
            text,
            _finish(choice.get("finish_reason")),
            prompt_tokens=usage.get("prompt_tokens", 0),
            completion_tokens=usage.get("completion_tokens", 0),
        )

    def stream(self, request: Request) -> Iterator[Delta]:
        """Answer one request piece by piece; closing the iterator closes the connection."""
        text, finish = "", "stop"
        usage: dict[str, int] = {}
        calls: dict[int, dict[str, str]] = {}
        try:
            with self.client.stream("POST", f"{self.url}/chat/completions", json=self._body(request, stream=True)) as reply:
                if reply.status_code >= 400:
                    reply.read()
                self._check(reply)
                for line in reply.iter_lines():
                    event = line.removeprefix("data:").strip()
                    if not line.startswith("data:") or event == "[DONE]":
                        continue
                    data = json.loads(event)
                    if "error" in data:
                        raise EngineError(f"{self.url}: {str(data['error'])[:200]}")
                    usage = data.get("usage") or usage
                    for choice in data.get("choices", []):
                        finish = choice.get("finish_reason") or finish
                        delta = choice.get("delta") or {}
                        collect_calls(calls, delta.get("tool_calls") or [])
                        piece = str(delta.get("content") or "")
                        if piece:
                            text += piece
                            yield Delta(piece)
            written = _text({"tool_calls": [{"function": call} for _, call in sorted(calls.items())]})
        except httpx.HTTPError as error:
            raise EngineError(f"{self.url}: {type(error).__name__}: {error}; is the server running?") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineError(f"{self.url}: the stream is no chat completion ({error!r})") from None
        counts = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        yield Delta(written, Completion(text + written, _finish(finish), prompt_tokens=counts[0], completion_tokens=counts[1]))

    def _check(self, reply: httpx.Response) -> None:
        if reply.status_code < 400:
            return
        try:
            message = reply.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = reply.text[:200]
        kind = RequestError if reply.status_code in (400, 404, 422) else EngineError
        raise kind(f"{self.url}: {reply.status_code}: {message}")

    def score(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Not offered: the API has no way to score given text."""
        raise RequestError(f"{self.name} is remote: it cannot score given text")

    def logits(self, ids: Sequence[int]) -> Any:
        """Not offered: the API gives no logits."""
        raise RequestError(f"{self.name} is remote: it gives no logits")

    def close(self) -> None:
        """Close the connections."""
        self.client.close()


def collect_calls(calls: dict[int, dict[str, str]], fragments: Sequence[dict[str, Any]]) -> None:
    """Add a stream's fragments of tool calls, told apart by index, to what came before."""
    for fragment in fragments:
        call = calls.setdefault(int(fragment.get("index", 0)), {"name": "", "arguments": ""})
        for key, piece in (fragment.get("function") or {}).items():
            if key in call:
                call[key] += piece or ""


def _text(message: dict[str, Any]) -> str:
    """Content, with tool calls written as text, so that every engine answers in one form."""
    from llmworks.tokenize.templates import render_call
    from llmworks.types import ToolCall

    calls = message.get("tool_calls") or []
    written = "".join(render_call(ToolCall(c["function"]["name"], json.loads(c["function"]["arguments"] or "{}"))) for c in calls)
    return str(message.get("content") or "") + written


def _finish(reason: str | None) -> FinishReason:
    return "length" if reason == "length" else "stop"
