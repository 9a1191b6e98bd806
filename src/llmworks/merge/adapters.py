"""Stage `merge.adapters`: several LoRA adapters of one model as one: side by side, their factors' mean, or their products merged by a method of `merge` and brought back to a rank."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.artifact import Adapter, Config, Model
from llmworks.context import Context


class AdaptersConfig(Config):
    """How adapters become one."""

    method: Literal["cat", "linear", "svd", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear"] = Field(
        "cat", description="cat: their sum, exactly, with as many ranks as all together; linear: the mean of their factors, of one rank (as peft has it; what one's A does to another's B is in it); svd and others: their products merged, then the largest singular vectors"
    )
    weights: dict[str, float] = Field({}, description="weight of each adapter by its name; 1 where none is given")
    density: float = Field(0.5, gt=0, le=1, description="share of each product's weights that is kept, of the methods that drop some")
    normalize: bool = Field(False, description="divided by the sum of weights (ties: of those that agree)")
    rank: int = Field(0, ge=0, description="rank of the result, of methods on products; 0: the largest of the adapters'")


def adapters(config: AdaptersConfig, adapters: dict[str, Adapter], model: Model, ctx: Context) -> Adapter:
    """Merge `adapters`, by name, of `model`.

    Errors: ArtifactError for adapters of another model; ModelError for those that are no plain LoRA; UserError for names or ranks that do not fit.
    """
    from llmworks.merge.adapter_files import merged

    return merged(config, adapters, model, ctx)
