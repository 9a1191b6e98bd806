"""Work in parts: the same bytes for every number of workers, lost workers and killed runs lose nothing that was
done.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.command_line import call

from llmworks.cli import main
from llmworks.core.artifact import Dataset
from llmworks.core.context import Context
from llmworks.core.documents import DocumentWriter, read_documents
from llmworks.core.errors import DataError, UserError, WorkerLost
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.core.types import Document
from llmworks.core.workers import WorkerPool
from llmworks.data.store.parts import Span, plan_spans, process_parts


def context(folder: Path, pool: WorkerPool) -> Context:
    for name in ("out", "scratch"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return Context(
        folder / "out",
        folder / "scratch",
        0,
        Progress(quiet=True),
        ReportBuilder(),
        lambda artifact: pytest.fail("no engine"),
        pool,
    )


def fixed(mark: Path, deadly: int, times: int, part: int, folder: Path) -> dict[str, Any]:
    """A part of work; the part `deadly` kills its own process the first `times` times."""
    tries = mark / f"tries-{part}"
    count = int(tries.read_text()) if tries.exists() else 0
    tries.write_text(str(count + 1))
    if part == deadly and count < times:
        os.kill(os.getpid(), signal.SIGKILL)
    if part < 0:
        raise DataError(f"part {part} is broken")
    with DocumentWriter(folder) as writer, DocumentWriter(folder / "dropped", reasons=True) as dropped:
        writer.add(Document(str(part), "x" * part, "s"))
        if part % 2:
            dropped.add(Document(f"{part}d", "y", "s"), "odd")
    return {"counts": {"documents": 1, "odd": part % 2}}


@pytest.mark.parametrize("workers", [1, 3])
def test_parts_are_done_once_and_in_order(tmp_path: Path, workers: int) -> None:
    ctx = context(tmp_path, WorkerPool(workers))
    done = process_parts(ctx, "label", partial(fixed, tmp_path, -1, 0), range(1, 8))
    assert done.sum_counters("counts") == {"documents": 7, "odd": 4}
    done.gather(ctx.out)
    assert [d.id for d in read_documents(Dataset(ctx.out))] == [str(i) for i in range(1, 8)]
    assert sorted(p.name for p in (ctx.out / "dropped").iterdir()) == [f"part-0000{i}.parquet" for i in range(4)]
    process_parts(ctx, "label", partial(fixed, tmp_path, -1, 0), range(1, 8))
    assert {p.read_text() for p in tmp_path.glob("tries-*")} == {"1"}


def test_a_worker_killed_once_is_replaced(tmp_path: Path) -> None:
    ctx = context(tmp_path, WorkerPool(2))
    done = process_parts(ctx, "label", partial(fixed, tmp_path, 3, 1), range(1, 8))
    assert done.sum_counters("counts")["documents"] == 7
    assert (tmp_path / "tries-3").read_text() == "2"


def test_a_worker_killed_again_ends_the_run_and_keeps_the_rest(tmp_path: Path) -> None:
    ctx = context(tmp_path, WorkerPool(2))
    with pytest.raises(WorkerLost, match="killed, twice"):
        process_parts(ctx, "label", partial(fixed, tmp_path, 7, 2), range(1, 8))
    process_parts(ctx, "label", partial(fixed, tmp_path, 7, 2), range(1, 8))
    tries = [int((tmp_path / f"tries-{i}").read_text()) for i in range(1, 8)]
    assert tries[6] == 3
    assert min(tries) == 1
    assert sum(tries) <= 7 + 2 * 2  # each death costs the part itself and the one in the other worker's hands


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_of_a_part_come_out_as_they_are(tmp_path: Path, workers: int) -> None:
    with pytest.raises(DataError, match="part -1 is broken"):
        process_parts(context(tmp_path, WorkerPool(workers)), "label", partial(fixed, tmp_path, 0, 0), [1, -1, 2])


def test_spans_cover_every_row_once(tmp_path: Path) -> None:
    every = [Document(str(i), f"text {i} " * 100, "s", {"n": i}) for i in range(500)]
    with DocumentWriter(tmp_path, group_bytes=10_000, shard_bytes=100_000) as writer:
        for document in every:
            writer.add(document)
    parts = plan_spans(Dataset(tmp_path), part_bytes=30_000)
    assert len(parts) > 5
    assert [d for part in parts for d in part.documents()] == every
    assert [p.row for p in parts] == [sum(q.rows for q in parts[:i]) for i in range(len(parts))]
    assert all(isinstance(p, Span) for p in parts)


def test_a_table_is_written_as_documents_are(tmp_path: Path) -> None:
    every = [Document(str(i), f"text {i} " * 50, "s", {"n": i} if i % 2 else {}) for i in range(300)]
    for name, size in (("a", 10_000), ("b", 1 << 20)):
        with DocumentWriter(tmp_path / name, group_bytes=size) as writer:
            for document in every:
                writer.add(document)
    with DocumentWriter(tmp_path / "c", group_bytes=1 << 20) as writer:
        for span in plan_spans(Dataset(tmp_path / "a")):
            for table in span.tables():
                writer.add_table(table)
    assert list(read_documents(Dataset(tmp_path / "c"))) == every
    assert (tmp_path / "c/part-00000.parquet").read_bytes() == (tmp_path / "b/part-00000.parquet").read_bytes()
    assert writer.characters == sum(len(d.text) for d in every)


def make_files(root: Path, count: int) -> None:
    root.mkdir()
    for i in range(count):
        (root / f"{i:04d}.txt").write_text(f"Document number {i}. " * (i % 7 + 1))
    (root / "broken.pdf").write_text("no pdf")


def test_the_number_of_workers_changes_no_byte(tmp_path: Path) -> None:
    make_files(tmp_path / "raw", 700)
    digests = set()
    for workers in ("1", "2", "3"):
        out = tmp_path / f"out{workers}"
        words = [
            "data",
            "read",
            "--data",
            str(tmp_path / "raw"),
            "--out",
            str(out),
            "--workspace",
            str(tmp_path / f"ws{workers}"),
            "--quiet",
        ]
        assert main([*words, "--workers", workers]) == 0
        manifest = json.loads((out / "manifest.json").read_text())
        digests.add((manifest["digest"], manifest["metrics"]["documents"]))
    assert len(digests) == 1
    assert digests.pop()[1] == 700


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    make_files(tmp_path / "raw", 3000)
    command = [
        sys.executable,
        "-m",
        "llmworks.cli",
        "data",
        "read",
        "--data",
        str(tmp_path / "raw"),
        "--workers",
        "2",
        "--out",
        str(tmp_path / "out"),
        "--workspace",
        str(tmp_path / "ws"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("ws/scratch/*/read-*/*/summary.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    time.sleep(1)  # workers end with their parent
    kept = list(tmp_path.glob("ws/scratch/*/read-*/*/summary.json"))
    assert 0 < len(kept) < 12
    assert not (tmp_path / "out").exists()
    again = call(*command[3:])
    assert again.returncode == 0
    assert f"resuming, {len(kept)} of 12 parts are already done" in again.stderr
    whole = [*command[3:-1], str(tmp_path / "ws2")]
    whole[whole.index(str(tmp_path / "out"))] = str(tmp_path / "out2")
    assert call(*whole).returncode == 0
    first, second = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("out", "out2"))
    assert first["files"] == second["files"]


def test_pool_refuses_what_makes_no_sense() -> None:
    with pytest.raises(UserError, match="1 or more"):
        WorkerPool(0)
    with pytest.raises(UserError, match="--engine ray"):
        WorkerPool(2, address="ray://x")
