"""The remote engine: a model behind an HTTP API of any supported provider.

Sends several requests in parallel, keeps to rate limits, retries transient failures, and counts tokens and cost.
Returns no token ids. Scores given text only where the server supports it and its tokenizer is available. Does not read
model files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx

from llmworks.core.errors import AccessError, EngineError, RequestError, UserError
from llmworks.core.types import Completion, Delta, Json, Request, Scored
from llmworks.generate.decode.grammar import check_schema
from llmworks.generate.decode.scoring import check_score
from llmworks.generate.providers.anthropic import Anthropic
from llmworks.generate.providers.cohere import Cohere
from llmworks.generate.providers.google import Google
from llmworks.generate.providers.openai import OpenAI, completion_body, read_completion, read_scores, score_body
from llmworks.generate.providers.protocol import Passing, Wire
from llmworks.generate.remote.endpoint import Api, RemoteOptions, api_key, api_of
from llmworks.generate.remote.parallel import Answered, each_in_threads, in_order
from llmworks.generate.remote.rate_limit import Pace, back_off
from llmworks.generate.remote.usage import Account

WIRES: dict[Api, Callable[[], Wire]] = {"openai": OpenAI, "anthropic": Anthropic, "google": Google, "cohere": Cohere}
PASSING = {408, 409, 425, 429}  # and all 5xx
CLOSED = {
    401,
    402,
    404,
    405,
    410,
    498,
}  # key, credit, model or URL: fails for every request; 498: Cohere's invalid token
CLOSED_WORDS = (
    "insufficient_quota",
    "API_KEY_INVALID",
    "credit balance is too low",
)  # the same, under a less specific status
SAMPLING_WORDS = re.compile(r"temperature|top_p|top_k|topP|topK")
LONGEST_PAUSE = 600.0  # seconds; no retry if the server asks for more
CHARACTERS_PER_TOKEN = 4  # estimate of a prompt's tokens before the server counts them
TEXTS = 64  # texts per embedding request
UNREADABLE = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)
T = TypeVar("T")


class RemoteEngine:
    """Engine over a base URL (ending in the API's version) and a model name."""

    def __init__(self, url: str, model: str, options: RemoteOptions | None = None) -> None:
        self.url, self.model, self.name = url.rstrip("/"), model, model
        self.options = options or RemoteOptions()
        self.api = api_of(url, self.options)
        self.wire = WIRES[self.api]()
        self.can = self.wire.can | {"parallel"}
        self.plain = self.options.sampling == "default" or (not self.options.sampling and self.wire.plain)
        if self.options.tokenizer:
            self._open_tokenizer(Path(self.options.tokenizer))
        self.account = Account(self.options.input_price, self.options.output_price, self.options.budget)
        self.pace = Pace(self.options.requests_per_minute, self.options.tokens_per_minute)
        self._closed: AccessError | None = None
        self._key = api_key(url, self.options, self.wire.key)
        if not self._key.isascii():
            raise UserError(
                f"{self.url}: the key in ${self.options.key or self.wire.key} contains non-ASCII characters, which"
                " are not valid in a header; set it again"
            )
        self.client = httpx.Client(
            timeout=httpx.Timeout(self.options.timeout, connect=10.0, pool=None),
            headers=self.wire.headers(self._key, plain=self.plain),
            limits=httpx.Limits(
                max_connections=self.options.concurrency, max_keepalive_connections=self.options.concurrency
            ),
        )

    def _open_tokenizer(self, path: Path) -> None:
        from llmworks.tokenize.load import load_tokenizer

        if self.api != "openai":
            raise UserError(
                f"{self.url}: option 'tokenizer' needs an OpenAI-compatible server; {self.api}'s API cannot score"
                " given text"
            )
        self.tokenizer = load_tokenizer(path)
        self.can |= {"score", "ids"}

    def _body(self, request: Request, stream: bool) -> tuple[str, Json]:
        """Return (path, body) of a request. RequestError for what this API does not offer."""
        if not request.ids and not request.messages:
            raise RequestError("the request is empty: it has neither messages nor token ids")
        if request.schema is not None:
            check_schema(request.schema)
        if request.ids:
            if "ids" not in self.can or stream:
                raise RequestError(
                    f"{self.name} is remote and takes messages, not token ids; with the option `tokenizer` it"
                    " takes ids, except for streaming"
                )
            return "/completions", completion_body(self.model, request.ids, request.sampling, self.plain)
        return self.wire.address(self.model, stream=stream), self.wire.body(
            self.model, request, stream=stream, plain=self.plain
        )

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Return the completions of all requests in order, several computed in parallel.

        The first error is raised once all others have finished.
        """
        return in_order(self.each(requests), len(requests))

    def each(self, requests: Sequence[Request]) -> Iterator[Answered]:
        """Yield completions and errors as they finish; after a fatal access error no further request is sent."""
        self._closed = None
        return each_in_threads(self._answer, requests, self.options.concurrency, leave=True)

    def _answer(self, request: Request) -> Completion:
        read = read_completion if request.ids else self.wire.read
        guess = (
            sum(len(m.content) for m in request.messages) // CHARACTERS_PER_TOKEN
            + len(request.ids)
            + request.sampling.max_tokens
        )
        return self._ask(
            lambda: self._body(request, stream=False),
            read,
            guess,
            lambda done: (done.prompt_tokens, done.completion_tokens),
        )

    def _ask(
        self,
        body: Callable[[], tuple[str, Json]],
        read: Callable[[Any], T],
        guess: int,
        counts: Callable[[T], tuple[int, int]],
    ) -> T:
        """Send one request, with retries.

        `body` is rebuilt for each attempt: the API's form may have been adapted.
        """
        for attempt in range(self.options.retries + 1):
            if self._closed is not None:
                raise self._closed
            try:
                path, content = body()
                entry = self._go(guess)
                done = self._once(path, content, read)
                self._settle(entry, *counts(done))
                return done
            except Passing as error:
                self._again(attempt, error)
        raise AssertionError("the last attempt raises")

    def _again(self, attempt: int, error: Passing) -> None:
        """Wait before the next attempt. EngineError when there is none."""
        if attempt >= self.options.retries or error.pause > LONGEST_PAUSE:
            tries = f", after {attempt + 1} attempts" if attempt else ""
            asked = f"; the server asks to wait {error.pause:.0f} s" if error.pause > LONGEST_PAUSE else ""
            raise EngineError(f"{self.url}: {error}{tries}{asked}") from None
        self.account.retry()
        if error.pause:
            self.pace.hold(error.pause)
        else:
            self.pace.sleep(back_off(attempt))

    def _once(self, path: str, body: Json, read: Callable[[Any], T]) -> T:
        try:
            reply = self.client.post(f"{self.url}{path}", json=body)
            self._check(reply)
            return read(reply.json())
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise self._lost(error) from None
        except UNREADABLE:
            raise Passing(f"malformed reply: {self._redacted(' '.join(reply.text.split()))[:80]!r}") from None

    def _go(self, guess: int) -> list[float]:
        """Wait for the rate limit. EngineError when the budget is spent."""
        self.account.check()
        return self.pace.go(guess)

    def _settle(self, entry: list[float], prompt_tokens: int, completion_tokens: int) -> None:
        if prompt_tokens or completion_tokens:
            self.pace.settle(entry, prompt_tokens + completion_tokens)
        self.account.add(prompt_tokens, completion_tokens)

    def stream(self, request: Request) -> Iterator[Delta]:
        """Stream one completion; closing the iterator closes the connection.

        Retried only while no text has arrived.
        """
        for attempt in range(self.options.retries + 1):
            said = ""
            try:
                for delta in self._stream_once(request):
                    said += delta.text
                    yield delta
                return
            except Passing as error:
                if said:
                    raise EngineError(
                        f"{self.url}: the stream was interrupted after {len(said)} characters: {error}"
                    ) from None
                self._again(attempt, error)

    def _stream_once(self, request: Request) -> Iterator[Delta]:
        path, body = self._body(request, stream=True)
        stream = self.wire.stream()
        entry = self._go(
            sum(len(m.content) for m in request.messages) // CHARACTERS_PER_TOKEN + request.sampling.max_tokens
        )
        try:
            with self.client.stream("POST", f"{self.url}{path}", json=body) as reply:
                if reply.status_code >= 400:
                    reply.read()
                self._check(reply)
                for line in reply.iter_lines():
                    event = line.removeprefix("data:").strip()
                    if not line.startswith("data:") or event == "[DONE]":
                        continue
                    data = json.loads(event)
                    if "error" in data and "type" not in data:
                        raise EngineError(f"{self.url}: {self._redacted(_error_text(data))}")
                    piece = stream.take(data)
                    if piece:
                        yield Delta(piece)
            rest, done = stream.end()
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise self._lost(error) from None
        except UNREADABLE as error:
            raise Passing(f"malformed stream ({error!r})") from None
        self._settle(entry, done.prompt_tokens, done.completion_tokens)
        yield Delta(rest, done)

    def _lost(self, error: httpx.RequestError) -> Exception:
        """Classify a broken connection: fatal when the server has never answered, else transient."""
        if isinstance(error, (httpx.UnsupportedProtocol, httpx.ProxyError)) or (
            isinstance(error, httpx.ConnectError) and not self.account.requests
        ):
            return EngineError(f"{self.url}: {type(error).__name__}: {error}; is the server running?")
        return Passing(f"{type(error).__name__}: {str(error) or 'no response'}")

    def _redacted(self, said: str) -> str:
        """Remove the key from a server's message; some servers repeat it."""
        return said.replace(self._key, "(the key)") if self._key else said

    def _check(self, reply: httpx.Response) -> None:
        """Raise for an error status: Passing where a retry may help."""
        status = reply.status_code
        if status < 400:
            return
        try:
            message = _error_text(reply.json())
        except ValueError:
            message = reply.text.strip()[:200]
        message = self._redacted(message)
        said = f"{status}: {message}"
        # some servers return 403 for the content of a single request: then others have succeeded before
        if (
            status in CLOSED
            or any(word in reply.text for word in CLOSED_WORDS)
            or (status == 403 and not self.account.requests)
        ):
            about_key = (
                f"; check the key in ${self.options.key or self.wire.key}"
                if status in (401, 403, 498) or "API_KEY_INVALID" in reply.text
                else ""
            )
            self._closed = AccessError(f"{self.url}: {said}{about_key}")
            raise self._closed
        if status == 400 and self.wire.adapt(message):
            raise Passing(said, pause=0.001)
        if status in PASSING or status >= 500:
            raise Passing(said, pause=_pause(reply))
        hint = ""
        if status in (400, 422) and not self.plain and SAMPLING_WORDS.search(message):
            hint = "; for a model that takes no sampling parameters append ?sampling=default to its name"
        kind = RequestError if status in (400, 403, 413, 422) else EngineError
        raise kind(f"{self.url}: {said}{hint}")

    def score(self, ids: Sequence[Sequence[int]], begins: Sequence[int] = ()) -> list[Scored]:
        """Compute the log-probabilities of tokens from each begin on (default: all after the first).

        RequestError where the server does not offer it.
        """
        if "score" not in self.can:
            raise RequestError(
                f"{self.name} is remote and cannot score given text; this needs a server with OpenAI's completions"
                " API and `echo`, and the option `tokenizer`"
            )
        begins = begins or [1] * len(ids)
        check_score(ids, begins, 1 << 30, self.name)
        self._closed = None
        todo = [Request(ids=tuple(sequence)) for sequence in ids]
        places = {id(request): i for i, request in enumerate(todo)}
        found: dict[int, Scored] = {}

        def answer(request: Request) -> Completion:
            place = places[id(request)]
            tokens = len(request.ids)
            told = self._ask(
                lambda: ("/completions", score_body(self.model, request.ids)),
                partial(read_scores, tokens=tokens),
                tokens,
                lambda _: (tokens, 1),
            )
            kept = told[begins[place] - 1 :]
            found[place] = Scored(tuple(chance for chance, _ in kept), all(best for _, best in kept))
            return Completion("", "stop")

        in_order(each_in_threads(answer, todo, self.options.concurrency, leave=True), len(todo))
        return [found[i] for i in range(len(todo))]

    def logits(self, ids: Sequence[int]) -> Any:
        """Raise RequestError: no API returns them."""
        raise RequestError(f"{self.name} is remote and returns no logits")

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Return embeddings, requested in batches. RequestError where the API has none."""
        if "embed" not in self.can:
            raise RequestError(f"{self.name}: {self.api}'s API has no embeddings")
        self._closed = None
        out: list[list[float]] = []
        for start in range(0, len(texts), TEXTS):
            part = list(texts[start : start + TEXTS])
            out += self._ask(
                partial(self.wire.embedding, self.model, part),
                partial(self._vectors, count=len(part)),
                sum(map(len, part)) // CHARACTERS_PER_TOKEN,
                lambda _: (0, 0),
            )
        return out

    def _vectors(self, reply: Any, count: int) -> list[list[float]]:
        vectors = self.wire.vectors(reply)
        if len(vectors) != count:
            raise ValueError(f"{len(vectors)} embeddings for {count} texts")
        return vectors

    def close(self) -> None:
        """Close the connections and wake waiting threads."""
        self.pace.close()
        self.client.close()


def _error_text(data: Any) -> str:
    """Return the message of an error object; servers put it in several places."""
    error = data.get("error", data.get("detail", data.get("message", data))) if isinstance(data, dict) else data
    if isinstance(error, dict):
        error = error.get("message", error)
    return " ".join(str(error).split())[:300]


def _pause(reply: httpx.Response) -> float:
    """Return the seconds a server asks to wait; 0 when it gives no readable value.

    Read from `retry-after-ms`, `retry-after` in seconds or as a date, or Google's `retryDelay`.
    """
    from datetime import UTC, datetime

    headers = reply.headers
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        if "retry-after" not in headers:
            found = re.search(r'"retryDelay":\s*"([\d.]+)s"', reply.text)
            return float(found[1]) if found else 0.0
        value = headers["retry-after"]
        try:
            return max(0.0, float(value))
        except ValueError:
            return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
