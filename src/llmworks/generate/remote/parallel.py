"""Run requests in threads over one engine, and restore their order."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from llmworks.core.errors import LlmworksError
from llmworks.core.types import Completion, Request

IndexedResult = tuple[int, Completion | LlmworksError]


def generate_in_threads(
    generate: Callable[[Request], Completion],
    requests: Sequence[Request],
    threads: int,
    *,
    abandon_running: bool = False,
) -> Iterator[IndexedResult]:
    """Yield (index, completion or the error of that request) as they finish.

    Closing the iterator, or an interrupt, starts no further request. Running requests are then waited for, unless
    `abandon_running`: a server that hangs must not block the end of the program.
    """
    todo: queue.SimpleQueue[tuple[int, Request]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Completion | BaseException]] = queue.SimpleQueue()
    over = threading.Event()
    for item in enumerate(requests):
        todo.put(item)

    def work() -> None:
        while not over.is_set():
            try:
                place, request = todo.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((place, generate(request)))
            except BaseException as error:
                done.put((place, error))

    workers = [threading.Thread(target=work, daemon=True) for _ in range(max(1, min(threads, len(requests))))]
    for worker in workers:
        worker.start()
    try:
        for _ in requests:
            place, found = _wait_for_item(done)
            if isinstance(found, BaseException) and not isinstance(found, LlmworksError):
                raise found
            yield place, found
    finally:
        over.set()
        for worker in workers if not abandon_running else ():
            worker.join()


def _wait_for_item(done: queue.SimpleQueue[Any]) -> Any:
    """Return the next item. Polls: a signal that arrives just before a blocking wait would be handled only after it."""
    while True:
        try:
            return done.get(timeout=1.0)
        except queue.Empty:
            continue


def collect_in_order(answers: Iterable[IndexedResult], count: int) -> list[Completion]:
    """Return all completions in the order of their requests; raise the first error."""
    found = dict(answers)
    done: list[Completion] = []
    for i in range(count):
        answer = found[i]
        if isinstance(answer, LlmworksError):
            raise answer
        done.append(answer)
    return done
