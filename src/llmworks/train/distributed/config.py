"""How a training is spread over processes.

Torch-free, so that recipes are checked without it; `sharding.py` and `pipeline.py` do it.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Config
from llmworks.core.errors import UserError

DATA = "over rows: every process has all weights (DDP), or a share of weights, gradients and moments (FSDP2, ZeRO-3)"


class DataParallel(Config):
    """What processes share that each read their own rows.

    How many there are is said when it is started (`--nproc`, torchrun).
    """

    data_parallel: Literal["ddp", "fsdp"] = Field("ddp", description=DATA)

    @property
    def tensor_parallel_size(self) -> int:
        """Processes that share a matrix."""
        return 1

    @property
    def pipeline_parallel_size(self) -> int:
        """Processes that share the blocks."""
        return 1

    def over(self, processes: int) -> int:
        """How many shares the rows of a step have."""
        return processes


class Parallel(Config):
    """What processes share.

    How many there are is said when it is started (`--nproc`, torchrun); what tensor and pipeline leave divides the rows
    of a step.
    """

    data_parallel: Literal["ddp", "fsdp"] = Field("ddp", description=DATA)
    tensor_parallel_size: int = Field(
        1,
        gt=0,
        description=(
            "processes that share each matrix of attention and feed-forward (Shoeybi et al. 2019, arXiv:1909.08053)"
        ),
    )
    pipeline_parallel_size: int = Field(
        1,
        gt=0,
        description=(
            "processes that have a run of blocks each; the parts of a step go through them in the order 1F1B, so"
            " accumulation must be no less"
        ),
    )

    def over(self, processes: int) -> int:
        """How many shares the rows of a step have.

        Errors: UserError for a number of processes that cannot be divided so.
        """
        each = self.tensor_parallel_size * self.pipeline_parallel_size
        if processes % each:
            raise UserError(
                f"parallel.tensor {self.tensor_parallel_size} times parallel.pipeline {self.pipeline_parallel_size} is {each}, which does not"
                f" divide {processes} process{'es' if processes > 1 else ''}; start it with --nproc {each} or a"
                " multiple"
            )
        if self.tensor_parallel_size > 1 and self.data_parallel == "ddp" and processes > each:
            raise UserError(
                f"{processes} processes with parallel.tensor {self.tensor_parallel_size} also divide the rows; set parallel.data to"
                " shard"
            )
        return processes // each


def share_of(rows: int, shares: int, batch: int) -> int:
    """Rows of a step that one process reads. Errors: UserError for rows that cannot be divided."""
    if rows % shares:
        raise UserError(
            f"a step has {rows} rows (batch times accumulation), which cannot be divided among {shares} processes; make"
            f" it a multiple of {shares}"
        )
    return min(batch, rows // shares)
