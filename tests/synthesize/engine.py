"""An engine that answers as a function says, counts what it was asked, and breaks when told to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmworks.core.artifact import Artifact, Dataset, Manifest, Model
from llmworks.core.context import Context
from llmworks.core.documents import DocumentWriter
from llmworks.core.errors import EngineError, LlmworksError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.core.types import Completion, Delta, Document, Request
from llmworks.data.store.rows import write_chat


class Scripted:
    """`answer(text of the last turn, how often it was asked before)` gives the text, a completion, or an error."""

    name = "scripted"
    can = frozenset[str]()

    def __init__(
        self, answer: Callable[[str, int], str | Completion | LlmworksError], break_after: int = 10**9
    ) -> None:
        self.answer, self.break_after = answer, break_after
        self.asked: list[Request] = []

    def each(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion | LlmworksError]]:
        for place, request in reversed(list(enumerate(requests))):  # in no particular order
            if len(self.asked) >= self.break_after:
                yield place, EngineError("gone")
                continue
            text = request.messages[-1].content
            said = self.answer(text, sum(r.messages[-1].content == text for r in self.asked))
            self.asked.append(request)
            yield (
                place,
                Completion(said, "stop", prompt_tokens=10, completion_tokens=5) if isinstance(said, str) else said,
            )

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        raise NotImplementedError

    def stream(self, request: Request) -> Iterator[Delta]:
        raise NotImplementedError

    def score(self, ids: Sequence[Sequence[int]]) -> list[list[float]]:
        raise NotImplementedError

    def logits(self, ids: Sequence[int]) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        pass


def foreign(ref: str = "http://127.0.0.1:1/v1#m", name: str = "m") -> Model:
    """A model that only has a name."""
    manifest = Manifest(
        kind="model",
        digest="0" * 64,
        key="",
        stage="",
        revision=0,
        derivation="declared",
        config={},
        parents=[],
        files={},
    )
    return Model(Path(), manifest=manifest, name=name, ref=ref)


def context(folder: Path, *engines: Scripted) -> Context:
    """A context that opens the engines in turn, by the models' names where they have one."""
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    by_name = {engine.name: engine for engine in engines}

    def open_engine(artifact: Artifact) -> Scripted:
        return by_name.get(artifact.name, engines[0])

    return Context(folder / "out", folder / "scratch", 0, Progress(quiet=True), ReportBuilder(), open_engine)


def chats(folder: Path, *rows: dict[str, Any]) -> Dataset:
    """A set of conversations: `asks` and `says` of each row, or its messages."""
    full = []
    for i, row in enumerate(rows):
        turns = row.get("messages") or [
            {"role": "user", "content": row["asks"]},
            *([{"role": "assistant", "content": row["says"]}] if row.get("says") else []),
        ]
        full.append(
            {
                "id": f"r{i}",
                "group": f"g{i}",
                "messages": turns,
                "tools": row.get("tools", []),
                "answer": row.get("answer"),
                "extra": {"fields": row.get("fields", {})},
            }
        )
    write_chat(folder, full)
    return Dataset(folder, name="chats")


def documents(folder: Path, *texts: str) -> Dataset:
    with DocumentWriter(folder) as writer:
        for i, text in enumerate(texts):
            writer.add(Document(f"d{i}", text, "s"))
    return Dataset(folder, name="texts")


def rejected(folder: Path) -> list[tuple[str, str]]:
    """(origin, reason) of what was set aside."""
    file = folder / "out" / "rejected.jsonl"
    return (
        [(r["from"], r["reason"]) for r in map(json.loads, file.read_text().split("\n")[:-1])] if file.exists() else []
    )
