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
from llmworks.generate.providers.openai import (
    OpenAI,
    build_completion_body,
    build_score_body,
    parse_completion,
    parse_scores,
)
from llmworks.generate.providers.protocol import ProviderApi, TransientError
from llmworks.generate.remote.endpoint import Api, RemoteOptions, get_api, get_api_key
from llmworks.generate.remote.parallel import IndexedResult, collect_in_order, generate_in_threads
from llmworks.generate.remote.rate_limit import RateLimiter, compute_backoff
from llmworks.generate.remote.usage import UsageMeter

PROVIDERS: dict[Api, Callable[[], ProviderApi]] = {
    "openai": OpenAI,
    "anthropic": Anthropic,
    "google": Google,
    "cohere": Cohere,
}
RETRYABLE_STATUS = {408, 409, 425, 429}  # and all 5xx
FATAL_STATUS = {
    401,
    402,
    404,
    405,
    410,
    498,
}  # key, credit, model or URL: fails for every request; 498: Cohere's invalid token
FATAL_MARKERS = (
    "insufficient_quota",
    "API_KEY_INVALID",
    "credit balance is too low",
)  # the same, under a less specific status
SAMPLING_FIELDS = re.compile(r"temperature|top_p|top_k|topP|topK")
MAX_PAUSE = 600.0  # seconds; no retry if the server asks for more
CHARACTERS_PER_TOKEN = 4  # estimate of a prompt's tokens before the server counts them
EMBEDDING_BATCH = 64  # texts per embedding request
MALFORMED_ERRORS = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)
T = TypeVar("T")


class RemoteEngine:
    """Engine over a base URL (ending in the API's version) and a model name."""

    def __init__(self, url: str, model: str, options: RemoteOptions | None = None) -> None:
        self.url, self.model, self.name = url.rstrip("/"), model, model
        self.options = options or RemoteOptions()
        self.api = get_api(url, self.options)
        self.provider = PROVIDERS[self.api]()
        self.can = self.provider.can | {"parallel"}
        self.omit_sampling = self.options.sampling == "default" or (
            not self.options.sampling and self.provider.omit_sampling
        )
        if self.options.tokenizer:
            self._open_tokenizer(Path(self.options.tokenizer))
        self.usage = UsageMeter(self.options.input_price, self.options.output_price, self.options.budget)
        self.rate_limiter = RateLimiter(self.options.requests_per_minute, self.options.tokens_per_minute)
        self._access_error: AccessError | None = None
        self._key = get_api_key(url, self.options, self.provider.key)
        if not self._key.isascii():
            raise UserError(
                f"{self.url}: the key in ${self.options.key or self.provider.key} contains non-ASCII characters, which"
                " are not valid in a header; set it again"
            )
        self.client = httpx.Client(
            timeout=httpx.Timeout(self.options.timeout, connect=10.0, pool=None),
            headers=self.provider.build_headers(self._key, omit_sampling=self.omit_sampling),
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

    def _build_body(self, request: Request, stream: bool) -> tuple[str, Json]:
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
            return "/completions", build_completion_body(self.model, request.ids, request.sampling, self.omit_sampling)
        return self.provider.path(self.model, stream=stream), self.provider.build_body(
            self.model, request, stream=stream, omit_sampling=self.omit_sampling
        )

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Return the completions of all requests in order, several computed in parallel.

        The first error is raised once all others have finished.
        """
        return collect_in_order(self.each(requests), len(requests))

    def each(self, requests: Sequence[Request]) -> Iterator[IndexedResult]:
        """Yield completions and errors as they finish; after a fatal access error no further request is sent."""
        self._access_error = None
        return generate_in_threads(self._complete, requests, self.options.concurrency, abandon_running=True)

    def _complete(self, request: Request) -> Completion:
        read = parse_completion if request.ids else self.provider.parse_reply
        estimated_tokens = (
            sum(len(m.content) for m in request.messages) // CHARACTERS_PER_TOKEN
            + len(request.ids)
            + request.sampling.max_tokens
        )
        return self._request_with_retries(
            lambda: self._build_body(request, stream=False),
            read,
            estimated_tokens,
            lambda done: (done.prompt_tokens, done.completion_tokens),
        )

    def _request_with_retries(
        self,
        body: Callable[[], tuple[str, Json]],
        read: Callable[[Any], T],
        estimated_tokens: int,
        counts: Callable[[T], tuple[int, int]],
    ) -> T:
        """Send one request, with retries.

        `body` is rebuilt for each attempt: the API's form may have been adapted.
        """
        for attempt in range(self.options.retries + 1):
            if self._access_error is not None:
                raise self._access_error
            try:
                path, content = body()
                entry = self._acquire(estimated_tokens)
                done = self._post_once(path, content, read)
                self._settle(entry, *counts(done))
                return done
            except TransientError as error:
                self._wait_for_retry(attempt, error)
        raise AssertionError("the last attempt raises")

    def _wait_for_retry(self, attempt: int, error: TransientError) -> None:
        """Wait before the next attempt. EngineError when there is none."""
        if attempt >= self.options.retries or error.pause > MAX_PAUSE:
            tries = f", after {attempt + 1} attempts" if attempt else ""
            pause_note = f"; the server asks to wait {error.pause:.0f} s" if error.pause > MAX_PAUSE else ""
            raise EngineError(f"{self.url}: {error}{tries}{pause_note}") from None
        self.usage.count_retry()
        if error.pause:
            self.rate_limiter.pause(error.pause)
        else:
            self.rate_limiter.sleep(compute_backoff(attempt))

    def _post_once(self, path: str, body: Json, read: Callable[[Any], T]) -> T:
        try:
            reply = self.client.post(f"{self.url}{path}", json=body)
            self._check_status(reply)
            return read(reply.json())
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise self._classify_connection_error(error) from None
        except MALFORMED_ERRORS:
            raise TransientError(f"malformed reply: {self._redact(' '.join(reply.text.split()))[:80]!r}") from None

    def _acquire(self, estimated_tokens: int) -> list[float]:
        """Wait for the rate limit. EngineError when the budget is spent."""
        self.usage.check_budget()
        return self.rate_limiter.acquire(estimated_tokens)

    def _settle(self, entry: list[float], prompt_tokens: int, completion_tokens: int) -> None:
        if prompt_tokens or completion_tokens:
            self.rate_limiter.correct_usage(entry, prompt_tokens + completion_tokens)
        self.usage.add(prompt_tokens, completion_tokens)

    def stream(self, request: Request) -> Iterator[Delta]:
        """Stream one completion; closing the iterator closes the connection.

        Retried only while no text has arrived.
        """
        for attempt in range(self.options.retries + 1):
            received = ""
            try:
                for delta in self._stream_once(request):
                    received += delta.text
                    yield delta
                return
            except TransientError as error:
                if received:
                    raise EngineError(
                        f"{self.url}: the stream was interrupted after {len(received)} characters: {error}"
                    ) from None
                self._wait_for_retry(attempt, error)

    def _stream_once(self, request: Request) -> Iterator[Delta]:
        path, body = self._build_body(request, stream=True)
        stream = self.provider.new_stream()
        entry = self._acquire(
            sum(len(m.content) for m in request.messages) // CHARACTERS_PER_TOKEN + request.sampling.max_tokens
        )
        try:
            with self.client.stream("POST", f"{self.url}{path}", json=body) as reply:
                if reply.status_code >= 400:
                    reply.read()
                self._check_status(reply)
                for line in reply.iter_lines():
                    event = line.removeprefix("data:").strip()
                    if not line.startswith("data:") or event == "[DONE]":
                        continue
                    data = json.loads(event)
                    if "error" in data and "type" not in data:
                        raise EngineError(f"{self.url}: {self._redact(_get_error_text(data))}")
                    piece = stream.read_event(data)
                    if piece:
                        yield Delta(piece)
            rest, done = stream.finish()
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise self._classify_connection_error(error) from None
        except MALFORMED_ERRORS as error:
            raise TransientError(f"malformed stream ({error!r})") from None
        self._settle(entry, done.prompt_tokens, done.completion_tokens)
        yield Delta(rest, done)

    def _classify_connection_error(self, error: httpx.RequestError) -> Exception:
        """Classify a broken connection: fatal when the server has never answered, else transient."""
        if isinstance(error, (httpx.UnsupportedProtocol, httpx.ProxyError)) or (
            isinstance(error, httpx.ConnectError) and not self.usage.requests
        ):
            return EngineError(f"{self.url}: {type(error).__name__}: {error}; is the server running?")
        return TransientError(f"{type(error).__name__}: {str(error) or 'no response'}")

    def _redact(self, message: str) -> str:
        """Remove the key from a server's message; some servers repeat it."""
        return message.replace(self._key, "(the key)") if self._key else message

    def _check_status(self, reply: httpx.Response) -> None:
        """Raise for an error status: Passing where a retry may help."""
        status = reply.status_code
        if status < 400:
            return
        try:
            message = _get_error_text(reply.json())
        except ValueError:
            message = reply.text.strip()[:200]
        message = self._redact(message)
        description = f"{status}: {message}"
        # some servers return 403 for the content of a single request: then others have succeeded before
        if (
            status in FATAL_STATUS
            or any(word in reply.text for word in FATAL_MARKERS)
            or (status == 403 and not self.usage.requests)
        ):
            about_key = (
                f"; check the key in ${self.options.key or self.provider.key}"
                if status in (401, 403, 498) or "API_KEY_INVALID" in reply.text
                else ""
            )
            self._access_error = AccessError(f"{self.url}: {description}{about_key}")
            raise self._access_error
        if status == 400 and self.provider.adapt(message):
            raise TransientError(description, pause=0.001)
        if status in RETRYABLE_STATUS or status >= 500:
            raise TransientError(description, pause=_get_pause(reply))
        hint = ""
        if status in (400, 422) and not self.omit_sampling and SAMPLING_FIELDS.search(message):
            hint = "; for a model that takes no sampling parameters append ?sampling=default to its name"
        kind = RequestError if status in (400, 403, 413, 422) else EngineError
        raise kind(f"{self.url}: {description}{hint}")

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
        self._access_error = None
        todo = [Request(ids=tuple(sequence)) for sequence in ids]
        places = {id(request): i for i, request in enumerate(todo)}
        found: dict[int, Scored] = {}

        def score_one(request: Request) -> Completion:
            place = places[id(request)]
            tokens = len(request.ids)
            scores = self._request_with_retries(
                lambda: ("/completions", build_score_body(self.model, request.ids)),
                partial(parse_scores, tokens=tokens),
                tokens,
                lambda _: (tokens, 1),
            )
            scored_tokens = scores[begins[place] - 1 :]
            found[place] = Scored(tuple(chance for chance, _ in scored_tokens), all(best for _, best in scored_tokens))
            return Completion("", "stop")

        collect_in_order(
            generate_in_threads(score_one, todo, self.options.concurrency, abandon_running=True), len(todo)
        )
        return [found[i] for i in range(len(todo))]

    def logits(self, ids: Sequence[int]) -> Any:
        """Raise RequestError: no API returns them."""
        raise RequestError(f"{self.name} is remote and returns no logits")

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Return embeddings, requested in batches. RequestError where the API has none."""
        if "embed" not in self.can:
            raise RequestError(f"{self.name}: {self.api}'s API has no embeddings")
        self._access_error = None
        out: list[list[float]] = []
        for start in range(0, len(texts), EMBEDDING_BATCH):
            part = list(texts[start : start + EMBEDDING_BATCH])
            out += self._request_with_retries(
                partial(self.provider.build_embedding_request, self.model, part),
                partial(self._parse_embeddings, count=len(part)),
                sum(map(len, part)) // CHARACTERS_PER_TOKEN,
                lambda _: (0, 0),
            )
        return out

    def _parse_embeddings(self, reply: Any, count: int) -> list[list[float]]:
        vectors = self.provider.parse_embeddings(reply)
        if len(vectors) != count:
            raise ValueError(f"{len(vectors)} embeddings for {count} texts")
        return vectors

    def close(self) -> None:
        """Close the connections and wake waiting threads."""
        self.rate_limiter.close()
        self.client.close()


def _get_error_text(data: Any) -> str:
    """Return the message of an error object; servers put it in several places."""
    error = data.get("error", data.get("detail", data.get("message", data))) if isinstance(data, dict) else data
    if isinstance(error, dict):
        error = error.get("message", error)
    return " ".join(str(error).split())[:300]


def _get_pause(reply: httpx.Response) -> float:
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
