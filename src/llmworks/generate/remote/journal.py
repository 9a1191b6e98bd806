"""A journal of completions: written to a file as they arrive, so that an interrupted run repeats no paid request."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llmworks.core.errors import LlmworksError, RequestError
from llmworks.core.progress import ProgressBar, write_atomic
from llmworks.core.types import Engine, Request, messages_to_json

CHUNK = 64  # requests per engine call


@dataclass(frozen=True)
class JournalRecord:
    """One completion: text, finish reason, token counts, and the seconds since the previous one."""

    id: str
    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float


class Journal:
    """The completions in one file, and an engine that is opened only when one is missing."""

    def __init__(self, file: Path, open_engine: Callable[[], Engine]) -> None:
        self._file, self._open = file, open_engine
        self._engine: Engine | None = None
        self.records = read_records(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._engine is not None:
            self._engine.close()

    def generate(self, requests: Mapping[str, Request], bar: ProgressBar) -> dict[str, JournalRecord | RequestError]:
        """Return the completion of every request by its id here; a request that cannot be answered gives its error.

        Errors: the first other error, raised after the running requests are recorded.
        """
        todo = [id for id in requests if id not in self.records]
        todo.sort(
            key=lambda id: sum(len(m.content) for m in requests[id].messages)
        )  # similar lengths together: less padding
        bar.resume(bar.done + len(requests) - len(todo))
        rejected: dict[str, RequestError] = {}
        if todo:
            self._engine = self._engine or self._open()
            with self._file.open("a", encoding="utf-8") as stream:
                for start in range(0, len(todo), CHUNK):
                    failed: LlmworksError | None = None
                    for id, answer in self._generate_chunk(
                        self._engine, {id: requests[id] for id in todo[start : start + CHUNK]}
                    ):
                        if isinstance(answer, JournalRecord):
                            self.records[id] = answer
                            stream.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
                            stream.flush()  # paid completions survive a crash
                        elif isinstance(answer, RequestError):
                            rejected[id] = answer
                        else:
                            failed = failed or answer
                            continue
                        bar.advance()
                    if failed is not None:
                        raise failed
        return {id: rejected.get(id) or self.records[id] for id in requests}

    @staticmethod
    def _generate_chunk(engine: Engine, requests: Mapping[str, Request]) -> Any:
        ids, began = list(requests), time.monotonic()
        for place, answer in engine.each(list(requests.values())):
            if isinstance(answer, LlmworksError):
                yield ids[place], answer
                continue
            began, spent = time.monotonic(), time.monotonic() - began
            yield (
                ids[place],
                JournalRecord(
                    ids[place],
                    answer.text.encode("utf-8", "replace").decode(),
                    answer.finish,
                    answer.prompt_tokens,
                    answer.completion_tokens,
                    spent,
                ),
            )


def compute_request_id(request: Request, repetition: int = 0) -> str:
    """Return the hash that identifies a request; `repetition` distinguishes repeated ones."""
    content = [
        messages_to_json(request.messages),
        list(request.ids),
        list(request.tools),
        asdict(request.sampling),
        repetition,
        *([request.schema] if request.schema is not None else []),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def read_records(file: Path) -> dict[str, JournalRecord]:
    """Read the completions of an interrupted run; a truncated last line is also removed from the file."""
    if not file.exists():
        return {}
    good: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8", errors="replace").split(
        "\n"
    ):  # not splitlines: completions contain other separators
        try:
            good.append(json.loads(line))
        except ValueError:
            break
    write_atomic(file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in good))
    return {record["id"]: JournalRecord(**record) for record in good}
