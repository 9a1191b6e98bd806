"""The reference of an alignment: the initial policy, including an adapter that training continues.

Its log-probabilities are computed once and cached, or at every step. No second model is in memory for it: with an
adapter the reference is the model with the adapter switched off, or with the adapter's initial weights.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmworks.align.preference.batch import Branches
from llmworks.align.preference.examples import Answered
from llmworks.align.preference.logprobs import logprobs
from llmworks.core.errors import TrainingError
from llmworks.core.progress import Progress
from llmworks.model.lora.lora import layers

Join = Callable[[Sequence[Answered]], Branches]


class Start:
    """A snapshot of an adapter. Within `again` the network computes what it did when the snapshot was taken."""

    def __init__(self, network: nn.Module) -> None:
        self.layers = [layer for _, layer in layers(network)]
        self.off = not any(bool(layer.b.any()) for layer in self.layers)  # a new adapter has zero effect
        self.kept = (
            []
            if self.off
            else [[p.detach().clone() for p in layer.parameters() if p.requires_grad] for layer in self.layers]
        )

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Restore the initial adapter in this context, without gradients."""
        own = [[p.data for p in layer.parameters() if p.requires_grad] for layer in self.layers]
        try:
            for number, layer in enumerate(self.layers):
                layer.off = self.off
                if not self.off:
                    for p, value in zip(
                        (p for p in layer.parameters() if p.requires_grad), self.kept[number], strict=True
                    ):
                        p.data = value
            with torch.no_grad():
                yield
        finally:
            for layer, values in zip(self.layers, own, strict=True):
                layer.off = False
                for p, value in zip((p for p in layer.parameters() if p.requires_grad), values, strict=True):
                    p.data = value


def sums(network: Any, batch: Branches) -> Tensor:
    """Return the summed log-probabilities of a batch's completions in nats [completions], without gradients.

    Tokens are weighted by the batch's `weights`.
    """
    training = network.training
    network.train(False)
    with torch.no_grad():
        found, *_ = logprobs(network, batch)
    network.train(training)
    return batch.summed(found * batch.given["weights"] if "weights" in batch.given else found)


def cached(
    network: Any,
    examples: Sequence[Answered],
    file: Path,
    join: Join,
    *,
    size: int,
    progress: Progress,
    what: str = "reference",
) -> dict[str, list[float]]:
    """Return the log-probabilities of each example's completions by its id.

    Those in the file are not recomputed; the others are appended to it.
    """
    known: dict[str, list[float]] = {}
    if file.exists():
        with contextlib.suppress(ValueError):  # a truncated last line
            for line in file.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                known[row["id"]] = row["sums"]
        file.write_text(
            "".join(json.dumps({"id": id, "sums": values}) + "\n" for id, values in known.items()), encoding="utf-8"
        )
    todo = sorted((e for e in examples if e.id not in known), key=lambda e: len(e.ids))
    if not todo:
        return known
    with progress.bar(what, len(todo), "rows") as bar, file.open("a", encoding="utf-8") as out:
        for start in range(0, len(todo), size):
            some = todo[start : start + size]
            found, at = sums(network, join(some)).tolist(), 0
            if not all(value == value for value in found):
                raise TrainingError(
                    f"rows {', '.join(e.id for e in some[:4])}: the reference's log-probabilities are not finite;"
                    " check the model, or these rows"
                )
            for example in some:
                known[example.id] = found[at : at + len(example.answers)]
                at += len(example.answers)
                out.write(json.dumps({"id": example.id, "sums": known[example.id]}) + "\n")
            out.flush()
            bar.advance(len(some))
    return known
