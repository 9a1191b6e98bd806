"""Config fields of `merge.transplant`. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Config


class TransplantConfig(Config):
    """Config of `merge.transplant`."""

    approximation_method: Literal["subword", "mean", "zero"] = Field(
        "subword",
        description=(
            "initialization of new tokens' embedding rows: mean of the rows of the old tokenizer's pieces, mean of"
            " all rows, or zeros"
        ),
    )
    eval_samples: int = Field(64, gt=0, description="rows of `data` on which the model is evaluated before and after")
    max_shard_size: int = Field(4_000_000_000, ge=1_000_000, description="maximum bytes of a file")
