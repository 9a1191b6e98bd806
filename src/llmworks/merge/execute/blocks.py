"""The tensors of a merge that are computed: read inputs as stored or mapped to another vocabulary, apply the method,
return bytes.

Does not know the methods or the files of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llmworks.core.errors import ModelError, UserError
from llmworks.merge.execute.copies import broken, finite
from llmworks.merge.execute.tensor_group import Group, Piece
from llmworks.merge.plan.catalogue import Method
from llmworks.merge.plan.layout import Layout
from llmworks.merge.plan.plan import BLOCK, Job
from llmworks.merge.vocabulary.vocabulary import Vocabulary
from llmworks.model.io.safetensors_io import FLOATS, TORCH


class Blocks:
    """Computes a merge's tensors block by block. `extra_tensors`: tensors that come from no model, by name; `notes`:
    what methods count.
    """

    def __init__(
        self,
        method: Method,
        models: Mapping[str, Layout],
        vocabulary: Vocabulary | None,
        seed: int,
        given: Mapping[str, Tensor],
        notes: dict[str, int],
    ) -> None:
        self.method, self.models, self.vocabulary, self.seed, self.given, self.notes = (
            method,
            models,
            vocabulary,
            seed,
            given,
            notes,
        )

    def pieces(self, job: Job, pool: ThreadPoolExecutor) -> Iterator[Callable[[], memoryview]]:
        """Yield functions that compute a result tensor's bytes, block after block."""
        if job.name in self.given:
            tensor = self.given[job.name].to(getattr(torch, TORCH[job.out_dtype])).contiguous()
            yield lambda: bytes_of(tensor)
            return
        group = self.group(job)
        if not group.count:
            return
        method: Future[Piece] | Piece = (
            pool.submit(self.method.function(), group) if job.dtype in FLOATS else alike(job)
        )
        size = max(1, group.count) if self.method.whole and job.dtype in FLOATS else BLOCK
        for number, start in enumerate(range(0, max(1, group.count), size)):
            yield lambda number=number, start=start: self.piece(
                job, group, method, number, start, min(size, group.count - start)
            )  # type: ignore[misc]

    def piece(
        self, job: Job, group: Group, method: Future[Piece] | Piece, number: int, start: int, count: int
    ) -> memoryview:
        """Return the bytes of one block. ModelError for NaN or infinite values."""
        function = method.result() if isinstance(method, Future) else method
        blocks = group.read(start, count)
        made = function(blocks, number)
        wanted = getattr(torch, TORCH[job.out_dtype])
        made = made.to(getattr(torch, TORCH[job.dtype])).to(wanted) if made.dtype != wanted else made
        octets = bytes_of(made.contiguous()) if made.numel() else memoryview(b"")
        if not finite(np.frombuffer(octets, np.uint8), job.out_dtype):
            raise self.blame(job, blocks)
        for name, more in group.notes.items():
            self.notes[name] = self.notes.get(name, 0) + more
        group.notes.clear()
        return octets

    def blame(self, job: Job, blocks: Sequence[Tensor]) -> UserError:
        """Return the error for NaN or infinite values: from a model's tensor, or from the merge itself."""
        for (model, tensor), block in zip(job.sources, blocks, strict=True):
            if not torch.isfinite(block).all():
                return ModelError(broken(model, tensor))
        return UserError(
            f"{job.name}: the merge produces NaN or infinite values, or values that {TORCH[job.out_dtype]} cannot"
            " represent; check its weights, or set out_dtype: float32"
        )

    def group(self, job: Job) -> Group:
        """Return a job's tensor as a method sees it."""
        dtype = getattr(torch, TORCH[job.dtype])

        def read(first: int, count: int) -> list[Tensor]:
            return [self.read(model, tensor, first, count, job).to(dtype) for model, tensor in job.sources]

        return Group(job.name, job.shape, dtype, job.base, job.shared, job.each, read, self.seed)

    def read(self, model: str, tensor: str, first: int, count: int, job: Job) -> Tensor:
        """Read flat values of a tensor; token rows in the order of the result's vocabulary."""
        if self.vocabulary is None or not job.tokens:
            return self.numbers(model, tensor, first, count)
        width = int(np.prod(job.shape[1:], dtype=np.int64))
        low, high = first // width, -(-(first + count) // width)
        rows = torch.cat(
            [
                self.rows(model, tensor, low, min(high, self.vocabulary.tokens), width, job),
                *(
                    [self.mean(model, tensor, width, job).expand(high - max(low, self.vocabulary.tokens), -1)]
                    if high > self.vocabulary.tokens
                    else []
                ),
            ]
        )
        return rows.reshape(-1)[first - low * width : first - low * width + count]

    def numbers(self, model: str, tensor: str, first: int, count: int) -> Tensor:
        """Read flat values of a tensor as stored in the file."""
        shards = self.models[model].shards
        made = torch.empty(count, dtype=getattr(torch, TORCH[shards.places[tensor].dtype]))
        if count:
            shards.read(tensor, first, bytes_of(made))
        return made

    def rows(self, model: str, tensor: str, low: int, high: int, width: int, job: Job) -> Tensor:
        """Return token rows [rows, hidden size]: the model's own, or their substitutes."""
        assert self.vocabulary is not None
        take = self.vocabulary.take[model][low : max(low, high)]
        made = torch.zeros(len(take), width, dtype=getattr(torch, TORCH[job.dtype]))
        at = 0
        while at < len(take):
            end = at + 1
            while end < len(take) and take[at] >= 0 and take[end] == take[end - 1] + 1:
                end += 1
            if take[at] >= 0:
                made[at:end] = self.numbers(model, tensor, int(take[at]) * width, (end - at) * width).view(-1, width)
            else:
                donors = [
                    (name, own, row)
                    for name, row in self.vocabulary.spare.get(low + at, ())
                    for other, own in job.sources
                    if other == name
                ]
                for name, own, row in donors:
                    made[at] += self.numbers(name, own, row * width, width)
                if len(donors) > 1:
                    made[at] /= len(donors)
            at = end
        return made

    def mean(self, model: str, tensor: str, width: int, job: Job) -> Tensor:
        """Return the mean of a model's rows [1, hidden size], for rows without a token (Hewitt 2021)."""
        assert self.vocabulary is not None
        total, each = torch.zeros(width, dtype=torch.float64), max(1, BLOCK // width)
        for low in range(0, self.vocabulary.tokens, each):
            total += self.rows(model, tensor, low, min(low + each, self.vocabulary.tokens), width, job).double().sum(0)
        return (total / self.vocabulary.tokens).to(getattr(torch, TORCH[job.dtype]))[None]


def bytes_of(tensor: Tensor) -> memoryview:
    """Return a tensor's memory as bytes."""
    octets: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(octets)


def alike(job: Job) -> Piece:
    """Return a method for integer tensors: they must be equal in all models."""

    def piece(blocks: Sequence[Tensor], _: int) -> Tensor:
        if not all(torch.equal(blocks[0], block) for block in blocks[1:]):
            raise ModelError(
                f"{job.name}: holds {TORCH[job.dtype]} values that differ between the models; integers cannot be merged"
            )
        return blocks[0]

    return piece
