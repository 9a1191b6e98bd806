"""Test runs of one training on a small model and few rows, and the checks that every training has to pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmworks.core.artifact import Dataset
from llmworks.core.context import Context
from llmworks.core.errors import LlmworksError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder

Train = Callable[[Any, Dataset, Context], object]  # config, data, context


class SelftestBench:
    """Named runs of a training function in a folder, with their metrics and weights."""

    def __init__(self, folder: Path, config: Any, data: Dataset, train: Train) -> None:
        self.folder, self.config, self.data, self.train = folder, config, data, train
        self.runs: dict[str, Path] = {}

    def run(
        self,
        name: str,
        config: Any,
        *,
        data: Dataset | None = None,
        seed: int = 0,
        stop: int | None = None,
        resume: bool = False,
    ) -> list[dict[str, Any]]:
        """Run the training and return the metrics of its steps. `stop`: interrupt it before this step's metrics are
        saved.
        """
        out, scratch = self.folder / f"{name}-out", self.folder / f"{name}-scratch"
        for place in (out, scratch):
            place.mkdir(exist_ok=resume or place is out)

        def listener(row: dict[str, Any]) -> None:
            if stop is not None and row.get("step") == stop:
                raise KeyboardInterrupt

        progress = Progress(scratch / "metrics.jsonl", quiet=True, listener=listener)
        with contextlib.suppress(KeyboardInterrupt) if stop is not None else contextlib.nullcontext():
            self.train(config, data or self.data, Context(out, scratch, seed, progress, ReportBuilder(), _no_engine))
        self.runs[name] = out
        return [row for row in progress.read_metrics() if "loss" in row]

    @functools.cached_property
    def baseline(self) -> list[dict[str, Any]]:
        """The baseline run that others are compared with."""
        return self.run("usual", self.config)

    def read_weights(self, name: str) -> bytes:
        """Return the saved weights of a run."""
        return next(iter(sorted(self.runs[name].glob("*model.safetensors")))).read_bytes()


def _no_engine(artifact: Any) -> Any:
    raise LlmworksError("the self-test has no engine")


def check_accumulation(bench: SelftestBench, field: str, tolerance: float) -> tuple[bool, str]:
    """Check that losses and gradients of a step do not depend on its division into micro-batches.

    `field`: name of the batch size field.
    """
    rows, accumulation = getattr(bench.config, field), bench.config.gradient_accumulation_steps
    if rows * accumulation == 1:
        return True, "a step has one row"
    batch, parts = (rows * accumulation, 1) if accumulation > 1 else (1, rows * accumulation)
    other = bench.run("parts", bench.config.model_copy(update={field: batch, "gradient_accumulation_steps": parts}))
    pairs = [
        (one[key], two[key])
        for one, two in zip(bench.baseline[:2], other[:2], strict=True)
        for key in ("loss", "grad_norm")
    ]
    off = max(abs(a - b) / max(abs(a), 1e-9) for a, b in pairs)
    divided = f"{accumulation} micro-batches of {rows} rows and {parts} of {batch}"
    return off <= tolerance, f"{divided}: losses and gradient norms of two steps differ by {off:.1e}"


def check_seed(bench: SelftestBench) -> tuple[bool, str]:
    """Check that the same seed gives the same weights, and another seed gives others."""
    assert bench.baseline
    bench.run("again", bench.config)
    bench.run("other", bench.config, seed=1)
    if bench.read_weights("usual") != bench.read_weights("again"):
        return False, "the same seed gave different weights"
    if bench.read_weights("usual") == bench.read_weights("other"):
        return False, "another seed gave the same weights"
    return True, "same weights with the same seed, different ones with another seed"


def check_resume(bench: SelftestBench) -> tuple[bool, str]:
    """Check that an interrupted and resumed run gives the weights and losses of the uninterrupted run."""
    at = max(1, len(bench.baseline) - 2)
    bench.run("resumed", bench.config, stop=at)
    rows = bench.run("resumed", bench.config, resume=True)
    same = bench.read_weights("usual") == bench.read_weights("resumed")
    same = same and [r["loss"] for r in rows] == [r["loss"] for r in bench.baseline]
    outcome = "identical weights and losses" if same else "not identical to the uninterrupted run"
    return (
        same,
        f"interrupted in step {at + 1} of {len(bench.baseline)} and resumed from the checkpoint before: {outcome}",
    )
