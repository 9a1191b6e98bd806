"""How training is parallelized over processes.

Torch-free, so that recipes are checked without torch; implemented in `sharding.py` and `pipeline.py`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Config
from llmworks.core.errors import UserError

DATA_DESCRIPTION = (
    "data parallelism. ddp: every process holds all weights; fsdp: weights, gradients and"
    " optimizer states are sharded (FSDP2, ZeRO-3)"
)


class DataParallelConfig(Config):
    """Data parallelism: each process reads its own rows.

    The number of processes is set at launch (`--nproc`, torchrun).
    """

    data_parallel: Literal["ddp", "fsdp"] = Field("ddp", description=DATA_DESCRIPTION)

    @property
    def tensor_parallel_size(self) -> int:
        """Tensor parallel size."""
        return 1

    @property
    def pipeline_parallel_size(self) -> int:
        """Pipeline parallel size."""
        return 1

    def get_data_parallel_size(self, processes: int) -> int:
        """Return the data parallel size."""
        return processes


class ParallelConfig(Config):
    """Data, tensor and pipeline parallelism.

    The number of processes is set at launch (`--nproc`, torchrun); divided by the tensor and pipeline parallel sizes it
    gives the data parallel size.
    """

    data_parallel: Literal["ddp", "fsdp"] = Field("ddp", description=DATA_DESCRIPTION)
    tensor_parallel_size: int = Field(
        1,
        gt=0,
        description=(
            "tensor parallel size: processes that share each attention and MLP matrix (Shoeybi et al. 2019,"
            " arXiv:1909.08053)"
        ),
    )
    pipeline_parallel_size: int = Field(
        1,
        gt=0,
        description=(
            "pipeline parallel size: processes that hold consecutive layers; micro-batches are scheduled 1F1B, so"
            " gradient_accumulation_steps must be at least this"
        ),
    )

    def get_data_parallel_size(self, processes: int) -> int:
        """Return the data parallel size.

        Errors: UserError for a number of processes that is not divisible.
        """
        each = self.tensor_parallel_size * self.pipeline_parallel_size
        if processes % each:
            raise UserError(
                f"parallel.tensor_parallel_size {self.tensor_parallel_size} times"
                f" parallel.pipeline_parallel_size {self.pipeline_parallel_size} is {each}, which does not divide"
                f" {processes}"
                f" process{'es' if processes > 1 else ''}; launch with --nproc {each} or a multiple"
            )
        if self.tensor_parallel_size > 1 and self.data_parallel == "ddp" and processes > each:
            raise UserError(
                f"{processes} processes with parallel.tensor_parallel_size {self.tensor_parallel_size} also divide"
                " the rows; set"
                " parallel.data_parallel to fsdp"
            )
        return processes // each


def get_micro_batch_rows(rows: int, shares: int, batch_size: int) -> int:
    """Return the rows per micro-batch of one process. Errors: UserError for rows that cannot be divided."""
    if rows % shares:
        raise UserError(
            f"a step has {rows} rows (batch_size times gradient_accumulation_steps), which cannot be divided"
            f" among {shares} processes; use a multiple of {shares}"
        )
    return min(batch_size, rows // shares)
