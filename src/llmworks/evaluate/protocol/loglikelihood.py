"""Loglikelihood requests: encoding, rolling windows, and scoring with every result cached as it arrives.

Context and continuation are encoded together and then split, with trailing whitespace of the context moved to the
continuation, as in the lm-evaluation-harness, so that words keep the tokens of running text. Does not know tasks.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmworks.core.errors import DataError, ModelError
from llmworks.core.progress import ProgressBar, write_atomic
from llmworks.core.types import Engine
from llmworks.evaluate.protocol.response_cache import ResponseCache

CHUNK_TOKENS = 8192  # tokens per engine call, shared prefixes counted once; the most that an interruption loses
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class LoglikelihoodRequest:
    """Token ids, scored from index `target_start`; `truncated_tokens`: tokens cut from the left to fit the context."""

    ids: tuple[int, ...]
    target_start: int
    truncated_tokens: int = 0

    @property
    def key(self) -> str:
        """Cache key."""
        return hashlib.sha256(f"{self.target_start}:{','.join(map(str, self.ids))}".encode()).hexdigest()[:24]


@dataclass(frozen=True)
class LoglikelihoodResult:
    """Summed log-probability in nats of the scored tokens, their number, whether greedy decoding produces them, and the
    seconds taken.
    """

    key: str
    logprob: float
    tokens: int
    greedy: bool
    seconds: float


def build_request(
    encode: Encode, context: str, continuation: str, max_length: int, start_token: int | None
) -> LoglikelihoodRequest:
    """Encode a context and its continuation; an empty context becomes the BOS (or EOS) token `start_token`.

    Requests longer than `max_length`, the engine's context length, are truncated from the left.

    Errors: DataError for a continuation without tokens, or longer than that.
    """
    if not context:
        if start_token is None:
            raise DataError("the context is empty, and the tokenizer has neither a BOS nor an EOS token")
        ids = list(encode(continuation))
        ids = ids if ids and ids[0] == start_token else [start_token, *ids]
        return _truncate(ids, 1, max_length, continuation)
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, before = encode(context + continuation), encode(context)
    return _truncate(list(whole), len(before), max_length, continuation)


def _truncate(ids: list[int], begin: int, max_length: int, continuation: str) -> LoglikelihoodRequest:
    if not 0 < begin < len(ids):
        raise DataError(f"the continuation {continuation[:60]!r} adds no tokens to its context, so it cannot be scored")
    cut = max(0, len(ids) - max_length - 1)
    if begin <= cut:
        raise DataError(
            f"the continuation {continuation[:60]!r} has {len(ids) - begin} tokens, more than the engine's context"
            f" length {max_length}"
        )
    return LoglikelihoodRequest(tuple(ids[cut:]), begin - cut, cut)


def rolling_windows(ids: Sequence[int], start_token: int, window: int, stride: int = 0) -> list[LoglikelihoodRequest]:
    """Split a whole document into rolling windows of at most `window` context tokens, every token scored once.

    The first window starts with the BOS token. Each later one scores `stride` tokens (0: `window`), the last one the
    rest, with as much left context as fits: the lm-evaluation-harness's rolling windows.
    """
    out = [LoglikelihoodRequest((start_token, *ids[:window]), 1)] if ids else []
    done = min(window, len(ids))
    while done < len(ids):
        end = min(done + (stride or window), len(ids))
        start = max(0, end - window - 1)
        out.append(LoglikelihoodRequest(tuple(ids[start:end]), done - start))
        done = end
    return out


def score_requests(
    requests: Sequence[LoglikelihoodRequest],
    engine: Engine,
    file: Path,
    bar: ProgressBar,
    cache: ResponseCache | None = None,
) -> dict[str, LoglikelihoodResult]:
    """Score all requests; return the results by key.

    Results in the file or the cache are reused; new ones are appended to the file, chunk by chunk.
    """
    results = read_results(file)
    cached = cache.get(given.key for given in requests) if cache else {}
    results = {**{key: LoglikelihoodResult(**value) for key, value in cached.items()}, **results}
    todo = {given.key: given for given in requests if given.key not in results}
    bar.resume(bar.done + sum(given.key in results for given in requests))
    order = sorted(todo.values(), key=lambda given: given.ids)  # neighbors share the longest prefixes
    with file.open("a", encoding="utf-8") as stream:
        for chunk in _chunk_requests(order):
            began = time.monotonic()
            scores = engine.score([given.ids for given in chunk], [given.target_start for given in chunk])
            seconds = (time.monotonic() - began) / len(chunk)
            if any(math.isnan(chance) for scored in scores for chance in scored.logprobs):
                raise ModelError(f"{engine.name} returns NaN as a token's log-probability; its weights are broken")
            for given, scored in zip(chunk, scores, strict=True):
                found = LoglikelihoodResult(
                    given.key, sum(scored.logprobs), len(scored.logprobs), scored.greedy, seconds
                )
                results[given.key] = found
                stream.write(json.dumps(asdict(found)) + "\n")
            stream.flush()
            bar.advance(len(chunk))
    if cache:
        cache.add({given.key: asdict(results[given.key]) for given in requests if given.key not in cached})
    return {given.key: results[given.key] for given in requests}


def _chunk_requests(order: Sequence[LoglikelihoodRequest]) -> list[list[LoglikelihoodRequest]]:
    """Group neighbors into chunks of up to CHUNK_TOKENS tokens, shared prefixes counted once."""
    out: list[list[LoglikelihoodRequest]] = []
    tokens = CHUNK_TOKENS
    before: tuple[int, ...] = ()
    for given in order:
        same = 0
        while same < min(len(before), len(given.ids)) and before[same] == given.ids[same]:
            same += 1
        if not out or tokens + len(given.ids) - same > CHUNK_TOKENS:
            out.append([])
            tokens, same = 0, 0
        out[-1].append(given)
        tokens += len(given.ids) - same
        before = given.ids
    return out


def read_results(file: Path) -> dict[str, LoglikelihoodResult]:
    """Read the results of an interrupted run; a truncated last line is also dropped from the file."""
    if not file.exists():
        return {}
    good: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            good.append(json.loads(line))
        except ValueError:
            break
    write_atomic(file, "".join(json.dumps(item) + "\n" for item in good))
    return {item["key"]: LoglikelihoodResult(**item) for item in good}


def get_encoder(tokenizer: Any) -> Encode:
    """Return an encoder of running text: with the BOS token where the tokenizer adds one, never a second."""
    bos = tokenizer.bos_token

    def encode(text: str) -> Sequence[int]:
        ids: Sequence[int] = tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]
        eos = tokenizer.eos_token_id
        return (
            ids[:-1] if ids and ids[-1] == eos and eos is not None and not text.endswith(tokenizer.eos_token) else ids
        )

    return encode


def get_start_token(tokenizer: Any) -> int | None:
    """Return the token that starts a document: BOS, else EOS."""
    token: int | None = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return token
