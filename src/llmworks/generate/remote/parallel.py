"""Answers as they come: several threads over one engine, and the batch put in order again. Knows no engine."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from llmworks.core.errors import LlmworksError
from llmworks.core.types import Completion, Request

Answered = tuple[int, Completion | LlmworksError]


def each_in_threads(
    answer: Callable[[Request], Completion], requests: Sequence[Request], threads: int, *, leave: bool = False
) -> Iterator[Answered]:
    """(place, answer or the error of that request) as they are ready.

    Closing the iterator, or an interrupt, starts no further request.

    Requests that are under way then are waited for, unless `leave`: a server that hangs must not hold up the end of the
    program.
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
                done.put((place, answer(request)))
            except BaseException as error:
                done.put((place, error))

    workers = [threading.Thread(target=work, daemon=True) for _ in range(max(1, min(threads, len(requests))))]
    for worker in workers:
        worker.start()
    try:
        for _ in requests:
            place, found = _wait(done)
            if isinstance(found, BaseException) and not isinstance(found, LlmworksError):
                raise found
            yield place, found
    finally:
        over.set()
        for worker in workers if not leave else ():
            worker.join()


def _wait(done: queue.SimpleQueue[Any]) -> Any:
    """The next item. Waits in short turns: a signal that comes just before a wait begins is seen only after it."""
    while True:
        try:
            return done.get(timeout=1.0)
        except queue.Empty:
            continue


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
