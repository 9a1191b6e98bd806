"""Config fields of `merge.transplant`. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Config


class TransplantConfig(Config):
    """What new tokens begin as, and what is looked at."""

    approximation_method: Literal["subword", "mean", "zero"] = Field(
        "subword",
        description=(
            "rows of tokens that the model has not: the mean of their pieces' rows, the mean of all rows, or zeros"
        ),
    )
    eval_samples: int = Field(64, gt=0, description="rows of `data` on which the model is measured before and after")
    max_shard_size: int = Field(4_000_000_000, ge=1_000_000, description="bytes of a file at most")
