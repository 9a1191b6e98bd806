"""Config fields of `merge.combine_adapters` and `merge.extract`. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Config


class CombineAdaptersConfig(Config):
    """Config of `merge.combine_adapters`."""

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
            "cat: concatenation of the factors, which is exactly the sum of the products, with the sum of all ranks;"
            " linear: weighted sum of the factors, all of one rank (as peft; contains cross terms of one adapter's A"
            " and another's B); svd and others: merge the products B A, then truncate by SVD"
        ),
    )
    weights: dict[str, float] = Field({}, description="weight of each adapter by its name; default 1")
    density: float = Field(
        0.5, gt=0, le=1, description="fraction of each product's weights that is kept, for the methods that drop some"
    )
    normalize: bool = Field(False, description="divide by the sum of weights (ties: of those that agree in sign)")
    svd_rank: int = Field(
        0, ge=0, description="rank of the result, for methods on products; 0: the largest rank of the adapters"
    )


class ExtractConfig(Config):
    """Config of `merge.extract`."""

    max_rank: int = Field(32, gt=0, description="maximum LoRA rank")
    min_energy: float = Field(
        1.0,
        gt=0,
        le=1,
        description=(
            "fraction of each matrix's squared change to keep: the rank is reduced where fewer singular vectors"
            " suffice; 1: always `max_rank`"
        ),
    )
    exclude_modules: list[str] = Field([], description="layers to leave out, by a part of their names")
