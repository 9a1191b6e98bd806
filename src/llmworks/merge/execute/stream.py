"""Run a merge tensor by tensor and block by block; complete files survive an interruption.

Memory holds a few blocks, or, for methods that need a whole tensor, that tensor.

Does not know the methods and imports no torch: tensors that are only copied need none. Worker threads compute blocks,
one core each; the main thread writes them in order and hashes what it writes.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmworks.core.artifact import FileEntry
from llmworks.merge.execute.copies import copies, is_copy
from llmworks.merge.plan.layout import Layout
from llmworks.merge.plan.plan import Job, Plan
from llmworks.merge.vocabulary.vocabulary import Vocabulary
from llmworks.model.io.safetensors_io import Shard, ShardWriter, Slot, divided, index_of

if TYPE_CHECKING:
    from torch import Tensor

    from llmworks.merge.execute.blocks import Blocks


class Stream:
    """One merge. `extra_tensors`: tensors that come from no model, by name; `notes`: what methods counted."""

    def __init__(
        self,
        plan: Plan,
        models: Mapping[str, Layout],
        vocabulary: Vocabulary | None,
        seed: int,
        given: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.plan, self.models, self.vocabulary, self.seed, self.given = plan, models, vocabulary, seed, given or {}
        self.notes: dict[str, int] = {}

    @cached_property
    def blocks(self) -> Blocks:
        """Return the object that computes tensors; imports torch."""
        from llmworks.merge.execute.blocks import Blocks

        return Blocks(self.plan.method, self.models, self.vocabulary, self.seed, self.given, self.notes)

    def copied(self, job: Job) -> bool:
        """Return whether a tensor is copied from one model unchanged."""
        return (
            job.name not in self.given
            and self.plan.method.plain
            and not (self.vocabulary is not None and job.tokens)
            and is_copy(job, self.models)
        )

    @property
    def computes(self) -> bool:
        """Return whether any tensor is not copied."""
        return not all(self.copied(job) for job in self.plan.jobs)

    def shards(self, most: int) -> list[Shard]:
        """Return the files of the result."""
        return divided([Slot(job.name, job.out_dtype, job.shape) for job in self.plan.jobs], most)

    def write(
        self, shards: Sequence[Shard], folder: Path, threads: int, told: Callable[[int], None]
    ) -> dict[str, FileEntry]:
        """Write the files that are not in `folder` yet, and the index if there are several. Return digests and sizes by
        name.

        `on_bytes_written` is called with the number of bytes written.
        """
        jobs = {job.name: job for job in self.plan.jobs}
        entries = self._found(folder)
        with ThreadPoolExecutor(threads) as pool:
            for shard in shards:
                if shard.file in entries and (folder / shard.file).exists():
                    told(shard.size)
                    continue
                with ShardWriter(folder, shard) as writer:
                    for data in ordered(pool, self.pieces([jobs[slot.name] for slot in shard.slots], pool), threads):
                        writer.write(data)
                        told(len(data))
                assert writer.entry is not None
                entries[shard.file] = writer.entry
                self._note(folder, entries)
        if len(shards) > 1:
            (folder / "model.safetensors.index.json").write_text(json.dumps(index_of(shards), indent=2) + "\n")
        return entries

    def _note(self, folder: Path, entries: Mapping[str, FileEntry]) -> None:
        """Record which files are complete, and the counts so far."""
        new = folder / "done.new"
        new.write_text(
            json.dumps({"files": {name: entry.model_dump() for name, entry in entries.items()}, "notes": self.notes})
        )
        new.replace(folder / "done.json")

    def _found(self, folder: Path) -> dict[str, FileEntry]:
        """Return the files recorded by an interrupted run; nothing if the record cannot be read."""
        try:
            said = json.loads((folder / "done.json").read_text())
            entries = {name: FileEntry(**entry) for name, entry in said["files"].items()}
            self.notes.update({str(name): int(count) for name, count in said["notes"].items()})
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}
        return entries

    def pieces(self, jobs: Sequence[Job], pool: ThreadPoolExecutor) -> Iterator[Callable[[], memoryview]]:
        """Yield functions that produce the result's bytes, block after block."""
        for job in jobs:
            yield from copies(job, self.models) if self.copied(job) else self.blocks.pieces(job, pool)


def ordered(pool: ThreadPoolExecutor, tasks: Iterator[Callable[[], Any]], threads: int) -> Iterator[Any]:
    """Yield results in the order of tasks; at most two more tasks than threads are in flight."""
    waiting: deque[Future[Any]] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(task))
            if len(waiting) > threads + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
