"""Config fields of `merge.combine_adapters` and `merge.extract`. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Config


class CombineAdaptersConfig(Config):
    """How adapters become one."""

    combination_type: Literal[
        "cat",
        "linear",
        "svd",
        "ties",
        "dare_linear",
        "dare_ties",
        "breadcrumbs",
        "breadcrumbs_ties",
        "della",
        "della_linear",
    ] = Field(
        "cat",
        description=(
            "cat: their sum, exactly, with as many ranks as all together; linear: the mean of their factors, of one"
            " rank (as peft has it; what one's A does to another's B is in it); svd and others: their products merged,"
            " then the largest singular vectors"
        ),
    )
    weights: dict[str, float] = Field({}, description="weight of each adapter by its name; 1 where none is given")
    density: float = Field(
        0.5, gt=0, le=1, description="share of each product's weights that is kept, of the methods that drop some"
    )
    normalize: bool = Field(False, description="divided by the sum of weights (ties: of those that agree)")
    svd_rank: int = Field(
        0, ge=0, description="rank of the result, of methods on products; 0: the largest of the adapters'"
    )


class ExtractConfig(Config):
    """How much of the difference."""

    max_rank: int = Field(32, gt=0, description="rank of the adapter at most")
    min_energy: float = Field(
        1.0,
        gt=0,
        le=1,
        description=(
            "share of each matrix's change (sum of squares) that is enough: fewer ranks where it is kept by fewer"
        ),
    )
    exclude_modules: list[str] = Field([], description="layers that are left out, by a part of their names")
