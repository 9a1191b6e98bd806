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
from llmworks.merge.execute.copies import format_nonfinite_message, is_finite
from llmworks.merge.execute.tensor_group import BlockFunction, TensorGroup
from llmworks.merge.plan.catalogue import MergeMethod
from llmworks.merge.plan.layout import CheckpointLayout
from llmworks.merge.plan.plan import BLOCK, TensorJob
from llmworks.merge.vocabulary.vocabulary import MergedVocabulary
from llmworks.model.io.safetensors_io import FLOAT_DTYPES, TORCH_DTYPES


class BlockComputer:
    """Computes a merge's tensors block by block. `extra_tensors`: tensors that come from no model, by name; `notes`:
    what methods count.
    """

    def __init__(
        self,
        method: MergeMethod,
        models: Mapping[str, CheckpointLayout],
        vocabulary: MergedVocabulary | None,
        seed: int,
        extra_tensors: Mapping[str, Tensor],
        notes: dict[str, int],
    ) -> None:
        self.method, self.models, self.vocabulary, self.seed, self.extra_tensors, self.notes = (
            method,
            models,
            vocabulary,
            seed,
            extra_tensors,
            notes,
        )

    def iter_blocks(self, job: TensorJob, pool: ThreadPoolExecutor) -> Iterator[Callable[[], memoryview]]:
        """Yield functions that compute a result tensor's bytes, block after block."""
        if job.name in self.extra_tensors:
            tensor = self.extra_tensors[job.name].to(getattr(torch, TORCH_DTYPES[job.out_dtype])).contiguous()
            yield lambda: as_bytes(tensor)
            return
        group = self.make_group(job)
        if not group.numel:
            return
        method: Future[BlockFunction] | BlockFunction = (
            pool.submit(self.method.load_function(), group) if job.dtype in FLOAT_DTYPES else make_equality_check(job)
        )
        size = max(1, group.numel) if self.method.needs_whole_tensors and job.dtype in FLOAT_DTYPES else BLOCK
        for number, start in enumerate(range(0, max(1, group.numel), size)):
            yield lambda number=number, start=start: self.compute_block(
                job, group, method, number, start, min(size, group.numel - start)
            )  # type: ignore[misc]

    def compute_block(
        self,
        job: TensorJob,
        group: TensorGroup,
        method: Future[BlockFunction] | BlockFunction,
        number: int,
        start: int,
        count: int,
    ) -> memoryview:
        """Return the bytes of one block. ModelError for NaN or infinite values."""
        function = method.result() if isinstance(method, Future) else method
        blocks = group.read(start, count)
        made = function(blocks, number)
        wanted = getattr(torch, TORCH_DTYPES[job.out_dtype])
        made = made.to(getattr(torch, TORCH_DTYPES[job.dtype])).to(wanted) if made.dtype != wanted else made
        octets = as_bytes(made.contiguous()) if made.numel() else memoryview(b"")
        if not is_finite(np.frombuffer(octets, np.uint8), job.out_dtype):
            raise self.get_nonfinite_error(job, blocks)
        for name, more in group.notes.items():
            self.notes[name] = self.notes.get(name, 0) + more
        group.notes.clear()
        return octets

    def get_nonfinite_error(self, job: TensorJob, blocks: Sequence[Tensor]) -> UserError:
        """Return the error for NaN or infinite values: from a model's tensor, or from the merge itself."""
        for (model, tensor), block in zip(job.sources, blocks, strict=True):
            if not torch.isfinite(block).all():
                return ModelError(format_nonfinite_message(model, tensor))
        return UserError(
            f"{job.name}: the merge produces NaN or infinite values, or values that {TORCH_DTYPES[job.out_dtype]}"
            " cannot"
            " represent; check its weights, or set out_dtype: float32"
        )

    def make_group(self, job: TensorJob) -> TensorGroup:
        """Return a job's tensor as a method sees it."""
        dtype = getattr(torch, TORCH_DTYPES[job.dtype])

        def read(first: int, count: int) -> list[Tensor]:
            return [self.read_input(model, tensor, first, count, job).to(dtype) for model, tensor in job.sources]

        return TensorGroup(
            job.name, job.shape, dtype, job.base, job.tensor_parameters, job.input_parameters, read, self.seed
        )

    def read_input(self, model: str, tensor: str, first: int, count: int, job: TensorJob) -> Tensor:
        """Read flat values of a tensor; token rows in the order of the result's vocabulary."""
        if self.vocabulary is None or not job.has_token_rows:
            return self.read_values(model, tensor, first, count)
        width = int(np.prod(job.shape[1:], dtype=np.int64))
        low, high = first // width, -(-(first + count) // width)
        rows = torch.cat(
            [
                self.read_token_rows(model, tensor, low, min(high, self.vocabulary.tokens), width, job),
                *(
                    [self.get_mean_row(model, tensor, width, job).expand(high - max(low, self.vocabulary.tokens), -1)]
                    if high > self.vocabulary.tokens
                    else []
                ),
            ]
        )
        return rows.reshape(-1)[first - low * width : first - low * width + count]

    def read_values(self, model: str, tensor: str, first: int, count: int) -> Tensor:
        """Read flat values of a tensor as stored in the file."""
        shards = self.models[model].shards
        made = torch.empty(count, dtype=getattr(torch, TORCH_DTYPES[shards.locations[tensor].dtype]))
        if count:
            shards.read(tensor, first, as_bytes(made))
        return made

    def read_token_rows(self, model: str, tensor: str, low: int, high: int, width: int, job: TensorJob) -> Tensor:
        """Return token rows [rows, hidden size]: the model's own, or their substitutes."""
        assert self.vocabulary is not None
        take = self.vocabulary.source_rows[model][low : max(low, high)]
        made = torch.zeros(len(take), width, dtype=getattr(torch, TORCH_DTYPES[job.dtype]))
        at = 0
        while at < len(take):
            end = at + 1
            while end < len(take) and take[at] >= 0 and take[end] == take[end - 1] + 1:
                end += 1
            if take[at] >= 0:
                made[at:end] = self.read_values(model, tensor, int(take[at]) * width, (end - at) * width).view(
                    -1, width
                )
            else:
                donors = [
                    (name, own, row)
                    for name, row in self.vocabulary.substitutes.get(low + at, ())
                    for other, own in job.sources
                    if other == name
                ]
                for name, own, row in donors:
                    made[at] += self.read_values(name, own, row * width, width)
                if len(donors) > 1:
                    made[at] /= len(donors)
            at = end
        return made

    def get_mean_row(self, model: str, tensor: str, width: int, job: TensorJob) -> Tensor:
        """Return the mean of a model's rows [1, hidden size], for rows without a token (Hewitt 2021)."""
        assert self.vocabulary is not None
        total, each = torch.zeros(width, dtype=torch.float64), max(1, BLOCK // width)
        for low in range(0, self.vocabulary.tokens, each):
            total += (
                self.read_token_rows(model, tensor, low, min(low + each, self.vocabulary.tokens), width, job)
                .double()
                .sum(0)
            )
        return (total / self.vocabulary.tokens).to(getattr(torch, TORCH_DTYPES[job.dtype]))[None]


def as_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's memory as bytes."""
    octets: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(octets)


def make_equality_check(job: TensorJob) -> BlockFunction:
    """Return a method for integer tensors: they must be equal in all models."""

    def piece(blocks: Sequence[Tensor], _: int) -> Tensor:
        if not all(torch.equal(blocks[0], block) for block in blocks[1:]):
            raise ModelError(
                f"{job.name}: holds {TORCH_DTYPES[job.dtype]} values that differ between the models; integers cannot"
                " be merged"
            )
        return blocks[0]

    return piece
