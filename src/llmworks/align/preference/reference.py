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

from llmworks.align.preference.batch import CompletionBatch
from llmworks.align.preference.examples import PromptCompletions
from llmworks.align.preference.logprobs import compute_logprobs
from llmworks.core.errors import TrainingError
from llmworks.core.progress import Progress
from llmworks.model.lora.lora import iter_lora_layers

Collate = Callable[[Sequence[PromptCompletions]], CompletionBatch]


class AdapterSnapshot:
    """A snapshot of an adapter. Within `again` the network computes what it did when the snapshot was taken."""

    def __init__(self, network: nn.Module) -> None:
        self.layers = [layer for _, layer in iter_lora_layers(network)]
        self.is_zero = not any(bool(layer.b.any()) for layer in self.layers)  # a new adapter has zero effect
        self.saved_weights = (
            []
            if self.is_zero
            else [[p.detach().clone() for p in layer.parameters() if p.requires_grad] for layer in self.layers]
        )

    @contextlib.contextmanager
    def restore(self) -> Iterator[None]:
        """Restore the initial adapter in this context, without gradients."""
        own = [[p.data for p in layer.parameters() if p.requires_grad] for layer in self.layers]
        try:
            for number, layer in enumerate(self.layers):
                layer.disabled = self.is_zero
                if not self.is_zero:
                    for p, value in zip(
                        (p for p in layer.parameters() if p.requires_grad), self.saved_weights[number], strict=True
                    ):
                        p.data = value
            with torch.no_grad():
                yield
        finally:
            for layer, values in zip(self.layers, own, strict=True):
                layer.disabled = False
                for p, value in zip((p for p in layer.parameters() if p.requires_grad), values, strict=True):
                    p.data = value


def sum_logprobs(network: Any, batch: CompletionBatch) -> Tensor:
    """Return the summed log-probabilities of a batch's completions in nats [completions], without gradients.

    Tokens are weighted by the batch's `weights`.
    """
    training = network.training
    network.train(False)
    with torch.no_grad():
        found, *_ = compute_logprobs(network, batch)
    network.train(training)
    return batch.sum_by_completion(found * batch.extras["weights"] if "weights" in batch.extras else found)


def cache_logprobs(
    network: Any,
    examples: Sequence[PromptCompletions],
    file: Path,
    collate: Collate,
    *,
    batch_size: int,
    progress: Progress,
    label: str = "reference",
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
    with progress.bar(label, len(todo), "rows") as bar, file.open("a", encoding="utf-8") as out:
        for start in range(0, len(todo), batch_size):
            some = todo[start : start + batch_size]
            found, at = sum_logprobs(network, collate(some)).tolist(), 0
            if not all(value == value for value in found):
                raise TrainingError(
                    f"rows {', '.join(e.id for e in some[:4])}: the reference's log-probabilities are not finite;"
                    " check the model, or these rows"
                )
            for example in some:
                known[example.id] = found[at : at + len(example.completions)]
                at += len(example.completions)
                out.write(json.dumps({"id": example.id, "sums": known[example.id]}) + "\n")
            out.flush()
            bar.advance(len(some))
    return known
