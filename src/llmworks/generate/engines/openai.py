"""The HTTP engine: any server that speaks the OpenAI chat completions API. Knows no model file.

Asks several at once, keeps to the limits of its reference, sends again what failed for a reason that may pass, and keeps an account. A
remote engine tells no ids and scores no given text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from llmworks.errors import AccessError, EngineError, RequestError
from llmworks.generate.account import Account
from llmworks.generate.pacing import Pace, back_off
from llmworks.generate.parallel import Answered, each_in_threads, in_order
from llmworks.generate.remote import DEFAULT_KEY, RemoteOptions, api_key
from llmworks.tokenize.templates import CALL_CLOSE, CALL_OPEN, render_call
from llmworks.types import Completion, Delta, FinishReason, Request, ToolCall, messages_to_json

PASSING = {408, 409, 425, 429}  # and everything from 500 on
CLOSED = {401, 402, 404, 405, 410}  # key, credit, model or address: no other request will do better
LONGEST_PAUSE = 600.0  # a server that asks for more is given up
CHARACTERS_PER_TOKEN = 4  # to guess a prompt's tokens before the server has counted them


class Passing(Exception):
    """A failure that may be gone at the next attempt; `pause` is what the server asked for, in seconds."""

    def __init__(self, why: str, pause: float = 0.0) -> None:
        super().__init__(why)
        self.pause = pause


class OpenAIEngine:
    """Engine over a base URL (ending in /v1) and a model name."""

    def __init__(self, url: str, model: str, options: RemoteOptions | None = None) -> None:
        self.url, self.model, self.name = url.rstrip("/"), model, model
        self.options = options or RemoteOptions()
        self.can = frozenset({"tools", "parallel"})
        self.account = Account(self.options.input_price, self.options.output_price, self.options.budget)
        self.pace = Pace(self.options.requests_per_minute, self.options.tokens_per_minute)
        key = api_key(url, self.options)
        self._limit = "max_tokens"
        self._closed: AccessError | None = None
        self.client = httpx.Client(
            timeout=httpx.Timeout(self.options.timeout, connect=10.0, pool=None), headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=self.options.concurrency, max_keepalive_connections=self.options.concurrency),
        )  # fmt: skip

    def _body(self, request: Request, stream: bool) -> dict[str, Any]:
        if request.ids:
            raise RequestError(f"{self.name} is remote: it takes messages, not token ids")
        s = request.sampling
        body: dict[str, Any] = {
            "model": self.model, "messages": messages_to_json(request.messages), self._limit: s.max_tokens, "temperature": s.temperature, "top_p": s.top_p, "stream": stream,
        }  # fmt: skip
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
        """Answer all requests, some at once, in their order; the first error is raised when all others are answered."""
        return in_order(self.each(requests), len(requests))

    def each(self, requests: Sequence[Request]) -> Iterator[Answered]:
        """Answers and errors as they come; once the server is closed to all requests, the others are not sent."""
        self._closed = None
        return each_in_threads(self._answer, requests, self.options.concurrency, leave=True)

    def _answer(self, request: Request) -> Completion:
        for attempt in range(self.options.retries + 1):
            if self._closed is not None:
                raise self._closed
            try:
                return self._once(request)
            except Passing as error:
                self._again(attempt, error)
        raise AssertionError("the last attempt raises")

    def _again(self, attempt: int, error: Passing) -> None:
        """Wait for the next attempt. EngineError when there is none."""
        if attempt >= self.options.retries or error.pause > LONGEST_PAUSE:
            tries = f", tried {attempt + 1} times" if attempt else ""
            asked = f"; the server asks to wait {error.pause:.0f} s" if error.pause > LONGEST_PAUSE else ""
            raise EngineError(f"{self.url}: {error}{tries}{asked}") from None
        self.account.retry()
        if error.pause:
            self.pace.hold(error.pause)
        else:
            self.pace.sleep(back_off(attempt))

    def _once(self, request: Request) -> Completion:
        body = self._body(request, stream=False)
        entry = self._go(request)
        try:
            reply = self.client.post(f"{self.url}/chat/completions", json=body)
            self._check(reply)
            data = reply.json()
            choice, usage = data["choices"][0], data.get("usage") or {}
            text, finish = _text(choice["message"]), _finish(choice.get("finish_reason"))
            counts = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        except httpx.TransportError as error:
            raise self._lost(error) from None
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise Passing(f"the reply is no chat completion: {' '.join(reply.text.split())[:80]!r}") from None
        self._settle(entry, *counts)
        return Completion(text, finish, prompt_tokens=counts[0], completion_tokens=counts[1])

    def _go(self, request: Request) -> list[float]:
        """Wait for this request's turn. EngineError when the budget is spent."""
        self.account.check()
        guess = sum(len(m.content) for m in request.messages) // CHARACTERS_PER_TOKEN + request.sampling.max_tokens
        return self.pace.go(guess)

    def _settle(self, entry: list[float], prompt_tokens: int, completion_tokens: int) -> None:
        if prompt_tokens or completion_tokens:
            self.pace.settle(entry, prompt_tokens + completion_tokens)
        self.account.add(prompt_tokens, completion_tokens)

    def stream(self, request: Request) -> Iterator[Delta]:
        """Answer one request piece by piece; closing the iterator closes the connection. Sent again only while nothing has come."""
        for attempt in range(self.options.retries + 1):
            said = ""
            try:
                for delta in self._stream_once(request):
                    said += delta.text
                    yield delta
                return
            except Passing as error:
                if said:
                    raise EngineError(f"{self.url}: the stream broke off after {len(said)} characters: {error}") from None
                self._again(attempt, error)

    def _stream_once(self, request: Request) -> Iterator[Delta]:
        text, finish = "", ""
        usage: dict[str, Any] = {}
        calls: dict[int, dict[str, str]] = {}
        body = self._body(request, stream=True)
        entry = self._go(request)
        try:
            with self.client.stream("POST", f"{self.url}/chat/completions", json=body) as reply:
                if reply.status_code >= 400:
                    reply.read()
                self._check(reply)
                for line in reply.iter_lines():
                    event = line.removeprefix("data:").strip()
                    if not line.startswith("data:") or event == "[DONE]":
                        continue
                    data = json.loads(event)
                    if "error" in data:
                        raise EngineError(f"{self.url}: {_error_text(data)}")
                    usage = data.get("usage") or usage
                    for choice in data.get("choices", []):
                        finish = choice.get("finish_reason") or finish
                        delta = choice.get("delta") or {}
                        collect_calls(calls, delta.get("tool_calls") or [])
                        piece = str(delta.get("content") or "")
                        if piece:
                            text += piece
                            yield Delta(piece)
            if not finish:
                raise Passing("it ended without a finish reason")
            written = _text({"tool_calls": [{"function": call} for _, call in sorted(calls.items())]})
            counts = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        except httpx.TransportError as error:
            raise self._lost(error) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Passing(f"the stream is no chat completion ({error!r})") from None
        self._settle(entry, *counts)
        yield Delta(written, Completion(text + written, _finish(finish), prompt_tokens=counts[0], completion_tokens=counts[1]))

    def _lost(self, error: httpx.TransportError) -> Exception:
        """What a broken connection is: final when the server has never answered, else it may pass."""
        if isinstance(error, (httpx.UnsupportedProtocol, httpx.ProxyError)) or (isinstance(error, httpx.ConnectError) and not self.account.requests):
            return EngineError(f"{self.url}: {type(error).__name__}: {error}; is the server running?")
        return Passing(f"{type(error).__name__}: {str(error) or 'no answer'}")

    def _check(self, reply: httpx.Response) -> None:
        """Raise for a status that is no success: Passing where another attempt may help."""
        status = reply.status_code
        if status < 400:
            return
        try:
            message = _error_text(reply.json())
        except ValueError:
            message = reply.text.strip()[:200]
        said = f"{status}: {message}"
        # some forbid a single request for what it says, which shows once others were answered
        if status in CLOSED or "insufficient_quota" in reply.text or (status == 403 and not self.account.requests):
            about_key = f"; is the key in ${self.options.key or DEFAULT_KEY} right?" if status in (401, 403) else ""
            self._closed = AccessError(f"{self.url}: {said}{about_key}")
            raise self._closed
        if status == 400 and self._limit == "max_tokens" and "max_completion_tokens" in message:
            self._limit = "max_completion_tokens"  # newer models know the limit by this name only
            raise Passing(said, pause=0.001)
        if status in PASSING or status >= 500:
            raise Passing(said, pause=_pause(reply.headers))
        kind = RequestError if status in (400, 403, 413, 422) else EngineError
        raise kind(f"{self.url}: {said}")

    def score(self, ids: Sequence[Sequence[int]], begins: Sequence[int] = ()) -> list[list[float]]:
        """Not offered: the API has no way to score given text."""
        raise RequestError(f"{self.name} is remote: it cannot score given text")

    def logits(self, ids: Sequence[int]) -> Any:
        """Not offered: the API gives no logits."""
        raise RequestError(f"{self.name} is remote: it gives no logits")

    def close(self) -> None:
        """Close the connections and wake who waits for its turn."""
        self.pace.close()
        self.client.close()


def _error_text(data: Any) -> str:
    """What an error object says; servers put it in several places."""
    error = data.get("error", data.get("detail", data.get("message", data))) if isinstance(data, dict) else data
    if isinstance(error, dict):
        error = error.get("message", error)
    return " ".join(str(error).split())[:300]


def _pause(headers: httpx.Headers) -> float:
    """Seconds that a server asks to wait: `retry-after-ms`, `retry-after` in seconds or as a date. 0 when it says nothing that can be read."""
    from datetime import UTC, datetime

    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after", "0")
        try:
            return max(0.0, float(value))
        except ValueError:
            return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def collect_calls(calls: dict[int, dict[str, str]], fragments: Sequence[dict[str, Any]]) -> None:
    """Add a stream's fragments of tool calls, told apart by index, to what came before."""
    for fragment in fragments:
        call = calls.setdefault(int(fragment.get("index", 0)), {"name": "", "arguments": ""})
        for key, piece in (fragment.get("function") or {}).items():
            if key in call:
                call[key] += piece or ""


def _text(message: dict[str, Any]) -> str:
    """Content, with tool calls written as text, so that every engine answers in one form."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    return str(content) + "".join(_call(call["function"]) for call in message.get("tool_calls") or [])


def _call(function: dict[str, Any]) -> str:
    """A tool call as text; one whose arguments are not JSON is kept as the model wrote it, and will not parse."""
    written = function.get("arguments") or "{}"
    try:
        arguments = json.loads(written) if isinstance(written, str) else written
    except ValueError:
        return f'{CALL_OPEN}{{"name": {json.dumps(str(function["name"]))}, "arguments": {written}}}{CALL_CLOSE}'
    return render_call(ToolCall(str(function["name"]), arguments))


def _finish(reason: str | None) -> FinishReason:
    return "length" if reason == "length" else "filtered" if reason == "content_filter" else "stop"
