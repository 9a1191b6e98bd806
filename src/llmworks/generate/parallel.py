"""Answers as they come: several threads over one engine, and the batch put in order again. Knows no engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from llmworks.errors import LlmworksError
from llmworks.types import Completion, Request

Answered = tuple[int, Completion | LlmworksError]


def each_in_threads(answer: Callable[[Request], Completion], requests: Sequence[Request], threads: int) -> Iterator[Answered]:
    """(place, answer or the error of that request) as they are ready. Closing the iterator starts no further request."""
    with ThreadPoolExecutor(max(1, min(threads, len(requests)))) as pool:
        waiting = {pool.submit(answer, request): i for i, request in enumerate(requests)}
        try:
            for future in as_completed(waiting):
                error = future.exception()
                if error is not None and not isinstance(error, LlmworksError):
                    raise error
                yield waiting[future], error or future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def in_order(answers: Iterable[Answered], count: int) -> list[Completion]:
    """All answers in the order of their requests; the error of the first that failed is raised."""
    found = dict(answers)
    done: list[Completion] = []
    for i in range(count):
        answer = found[i]
        if isinstance(answer, LlmworksError):
            raise answer
        done.append(answer)
    return done
