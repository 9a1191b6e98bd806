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
from llmworks.merge.execute.copies import is_copy, iter_copied_blocks
from llmworks.merge.plan.layout import CheckpointLayout
from llmworks.merge.plan.plan import MergePlan, TensorJob
from llmworks.merge.vocabulary.vocabulary import MergedVocabulary
from llmworks.model.io.safetensors_io import ShardSpec, ShardWriter, TensorSpec, build_index, split_shards

if TYPE_CHECKING:
    from torch import Tensor

    from llmworks.merge.execute.blocks import BlockComputer


class MergeStream:
    """One merge. `extra_tensors`: tensors that come from no model, by name; `notes`: what methods counted."""

    def __init__(
        self,
        plan: MergePlan,
        models: Mapping[str, CheckpointLayout],
        vocabulary: MergedVocabulary | None,
        seed: int,
        extra_tensors: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.plan, self.models, self.vocabulary, self.seed, self.extra_tensors = (
            plan,
            models,
            vocabulary,
            seed,
            extra_tensors or {},
        )
        self.notes: dict[str, int] = {}

    @cached_property
    def computer(self) -> BlockComputer:
        """Return the object that computes tensors; imports torch."""
        from llmworks.merge.execute.blocks import BlockComputer

        return BlockComputer(self.plan.method, self.models, self.vocabulary, self.seed, self.extra_tensors, self.notes)

    def is_copied(self, job: TensorJob) -> bool:
        """Return whether a tensor is copied from one model unchanged."""
        return (
            job.name not in self.extra_tensors
            and self.plan.method.copies_by_default
            and not (self.vocabulary is not None and job.has_token_rows)
            and is_copy(job, self.models)
        )

    @property
    def needs_compute(self) -> bool:
        """Return whether any tensor is not copied."""
        return not all(self.is_copied(job) for job in self.plan.jobs)

    def plan_shards(self, max_bytes: int) -> list[ShardSpec]:
        """Return the files of the result."""
        return split_shards([TensorSpec(job.name, job.out_dtype, job.shape) for job in self.plan.jobs], max_bytes)

    def write(
        self, shards: Sequence[ShardSpec], folder: Path, threads: int, on_bytes_written: Callable[[int], None]
    ) -> dict[str, FileEntry]:
        """Write the files that are not in `folder` yet, and the index if there are several. Return digests and sizes by
        name.

        `on_bytes_written` is called with the number of bytes written.
        """
        jobs = {job.name: job for job in self.plan.jobs}
        entries = self._load_progress(folder)
        with ThreadPoolExecutor(threads) as pool:
            for shard in shards:
                if shard.file in entries and (folder / shard.file).exists():
                    on_bytes_written(shard.num_bytes)
                    continue
                with ShardWriter(folder, shard) as writer:
                    for data in run_in_order(
                        pool, self.iter_blocks([jobs[slot.name] for slot in shard.tensors], pool), threads
                    ):
                        writer.write(data)
                        on_bytes_written(len(data))
                assert writer.entry is not None
                entries[shard.file] = writer.entry
                self._save_progress(folder, entries)
        if len(shards) > 1:
            (folder / "model.safetensors.index.json").write_text(json.dumps(build_index(shards), indent=2) + "\n")
        return entries

    def _save_progress(self, folder: Path, entries: Mapping[str, FileEntry]) -> None:
        """Record which files are complete, and the counts so far."""
        new = folder / "done.new"
        new.write_text(
            json.dumps({"files": {name: entry.model_dump() for name, entry in entries.items()}, "notes": self.notes})
        )
        new.replace(folder / "done.json")

    def _load_progress(self, folder: Path) -> dict[str, FileEntry]:
        """Return the files recorded by an interrupted run; nothing if the record cannot be read."""
        try:
            progress = json.loads((folder / "done.json").read_text())
            entries = {name: FileEntry(**entry) for name, entry in progress["files"].items()}
            self.notes.update({str(name): int(count) for name, count in progress["notes"].items()})
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return {}
        return entries

    def iter_blocks(self, jobs: Sequence[TensorJob], pool: ThreadPoolExecutor) -> Iterator[Callable[[], memoryview]]:
        """Yield functions that produce the result's bytes, block after block."""
        for job in jobs:
            yield from (
                iter_copied_blocks(job, self.models) if self.is_copied(job) else self.computer.iter_blocks(job, pool)
            )


def run_in_order(pool: ThreadPoolExecutor, tasks: Iterator[Callable[[], Any]], threads: int) -> Iterator[Any]:
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
