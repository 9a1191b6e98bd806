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
from llmworks.core.progress import Bar, write_whole
from llmworks.core.types import Engine
from llmworks.evaluate.protocol.response_cache import Memory

CHUNK_TOKENS = 8192  # tokens per engine call, shared prefixes counted once; the most that an interruption loses
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class Given:
    """Token ids, scored from index `target_start`; `truncated_tokens`: tokens cut from the left to fit the context."""

    ids: tuple[int, ...]
    begin: int
    cut: int = 0

    @property
    def key(self) -> str:
        """Cache key."""
        return hashlib.sha256(f"{self.begin}:{','.join(map(str, self.ids))}".encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Found:
    """Summed log-probability in nats of the scored tokens, their number, whether greedy decoding produces them, and the
    seconds taken.
    """

    key: str
    logprob: float
    tokens: int
    greedy: bool
    seconds: float


def pair(encode: Encode, context: str, continuation: str, longest: int, beginning: int | None) -> Given:
    """Encode a context and its continuation; an empty context becomes the BOS (or EOS) token `start_token`.

    Requests longer than `max_length`, the engine's context length, are truncated from the left.

    Errors: DataError for a continuation without tokens, or longer than that.
    """
    if not context:
        if beginning is None:
            raise DataError("the context is empty, and the tokenizer has neither a BOS nor an EOS token")
        ids = list(encode(continuation))
        ids = ids if ids and ids[0] == beginning else [beginning, *ids]
        return _cut(ids, 1, longest, continuation)
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, before = encode(context + continuation), encode(context)
    return _cut(list(whole), len(before), longest, continuation)


def _cut(ids: list[int], begin: int, longest: int, continuation: str) -> Given:
    if not 0 < begin < len(ids):
        raise DataError(f"the continuation {continuation[:60]!r} adds no tokens to its context, so it cannot be scored")
    cut = max(0, len(ids) - longest - 1)
    if begin <= cut:
        raise DataError(
            f"the continuation {continuation[:60]!r} has {len(ids) - begin} tokens, more than the engine's context"
            f" length {longest}"
        )
    return Given(tuple(ids[cut:]), begin - cut, cut)


def windows(ids: Sequence[int], beginning: int, window: int, stride: int = 0) -> list[Given]:
    """Split a whole document into rolling windows of at most `window` context tokens, every token scored once.

    The first window starts with the BOS token. Each later one scores `stride` tokens (0: `window`), the last one the
    rest, with as much left context as fits: the lm-evaluation-harness's rolling windows.
    """
    out = [Given((beginning, *ids[:window]), 1)] if ids else []
    done = min(window, len(ids))
    while done < len(ids):
        end = min(done + (stride or window), len(ids))
        start = max(0, end - window - 1)
        out.append(Given(tuple(ids[start:end]), done - start))
        done = end
    return out


def ask(
    wanted: Sequence[Given], engine: Engine, file: Path, bar: Bar, memory: Memory | None = None
) -> dict[str, Found]:
    """Score all requests; return the results by key.

    Results in the file or the cache are reused; new ones are appended to the file, chunk by chunk.
    """
    known = read_found(file)
    remembered = memory.recall(given.key for given in wanted) if memory else {}
    known = {**{key: Found(**value) for key, value in remembered.items()}, **known}
    todo = {given.key: given for given in wanted if given.key not in known}
    bar.resume(bar.done + sum(given.key in known for given in wanted))
    order = sorted(todo.values(), key=lambda given: given.ids)  # neighbors share the longest prefixes
    with file.open("a", encoding="utf-8") as stream:
        for chunk in _chunks(order):
            began = time.monotonic()
            scores = engine.score([given.ids for given in chunk], [given.begin for given in chunk])
            seconds = (time.monotonic() - began) / len(chunk)
            if any(math.isnan(chance) for scored in scores for chance in scored.logprobs):
                raise ModelError(f"{engine.name} returns NaN as a token's log-probability; its weights are broken")
            for given, scored in zip(chunk, scores, strict=True):
                found = Found(given.key, sum(scored.logprobs), len(scored.logprobs), scored.greedy, seconds)
                known[given.key] = found
                stream.write(json.dumps(asdict(found)) + "\n")
            stream.flush()
            bar.advance(len(chunk))
    if memory:
        memory.add({given.key: asdict(known[given.key]) for given in wanted if given.key not in remembered})
    return {given.key: known[given.key] for given in wanted}


def _chunks(order: Sequence[Given]) -> list[list[Given]]:
    """Group neighbors into chunks of up to CHUNK_TOKENS tokens, shared prefixes counted once."""
    out: list[list[Given]] = []
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


def read_found(file: Path) -> dict[str, Found]:
    """Read the results of an interrupted run; a truncated last line is also dropped from the file."""
    if not file.exists():
        return {}
    good: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            good.append(json.loads(line))
        except ValueError:
            break
    write_whole(file, "".join(json.dumps(item) + "\n" for item in good))
    return {item["key"]: Found(**item) for item in good}


def texts_of(tokenizer: Any) -> Encode:
    """Return an encoder of running text: with the BOS token where the tokenizer adds one, never a second."""
    bos = tokenizer.bos_token

    def encode(text: str) -> Sequence[int]:
        ids: Sequence[int] = tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]
        eos = tokenizer.eos_token_id
        return (
            ids[:-1] if ids and ids[-1] == eos and eos is not None and not text.endswith(tokenizer.eos_token) else ids
        )

    return encode


def beginning_of(tokenizer: Any) -> int | None:
    """Return the token that starts a document: BOS, else EOS."""
    token: int | None = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return token
