"""The tensors of a merge that are copied from one model unchanged, checked for NaN and infinite values.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from llmworks.core.errors import ModelError
from llmworks.merge.plan.layout import CheckpointLayout
from llmworks.merge.plan.plan import BLOCK, TensorJob
from llmworks.model.io.safetensors_io import DTYPE_BYTES

EXPONENTS: dict[str, tuple[Any, int]] = {
    "BF16": (np.uint16, 0x7F80),
    "F16": (np.uint16, 0x7C00),
    "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000),
    "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F),
    # exponent bits, all set in NaN and infinite values (IEEE 754); F8_E4M3: all bits but the sign, set in NaN
    # (Micikevicius et al. 2022)
}


def is_copy(job: TensorJob, models: Mapping[str, CheckpointLayout]) -> bool:
    """Return whether a tensor has one source of the same dtype and no parameters."""
    if len(job.sources) != 1 or any(
        value is not None for value in (*job.tensor_parameters.values(), *job.input_parameters[0].values())
    ):
        return False
    model, tensor = job.sources[0]
    return models[model].places[tensor].dtype == job.dtype == job.out_dtype


def iter_copied_blocks(job: TensorJob, models: Mapping[str, CheckpointLayout]) -> Iterator[Callable[[], memoryview]]:
    """Yield functions that read a tensor's bytes, block after block."""
    (model, tensor), shards = job.sources[0], models[job.sources[0][0]].shards
    count = shards.locations[tensor].num_elements

    def piece(first: int) -> memoryview:
        octets: Any = np.empty(min(BLOCK, count - first) * DTYPE_BYTES[job.dtype], np.uint8)
        shards.read(tensor, first, memoryview(octets))
        if not is_finite(octets, job.dtype):
            raise ModelError(format_nonfinite_message(model, tensor))
        return memoryview(octets)

    for first in range(0, count, BLOCK):
        yield lambda first=first: piece(first)  # type: ignore[misc]


def is_finite(octets: Any, dtype: str) -> bool:
    """Return whether the values hold neither NaN nor infinite values."""
    if dtype not in EXPONENTS or not len(octets):
        return True
    kind, exponent = EXPONENTS[dtype]
    return int((octets.view(kind) & kind(exponent)).max()) < exponent


def format_nonfinite_message(model: str, tensor: str) -> str:
    """Return the error message for a tensor with NaN or infinite values."""
    return f"{model}: {tensor} holds NaN or infinite values"
