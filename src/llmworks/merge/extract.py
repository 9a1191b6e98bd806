"""Stage `merge.extract`: what a tuned model differs by from its base, as a LoRA adapter: the largest singular vectors of each matrix's change, and what they miss."""

from __future__ import annotations

from pydantic import Field

from llmworks.artifact import Adapter, Config, Model
from llmworks.context import Context


class ExtractConfig(Config):
    """How much of the difference."""

    rank: int = Field(32, gt=0, description="rank of the adapter at most")
    kept: float = Field(1.0, gt=0, le=1, description="share of each matrix's change (sum of squares) that is enough: fewer ranks where it is kept by fewer")
    skip: list[str] = Field([], description="layers that are left out, by a part of their names")


def extract(config: ExtractConfig, model: Model, base: Model, ctx: Context) -> Adapter:
    """A peft adapter that makes `base` into nearly `model`; both are read matrix by matrix.

    Errors: ModelError for models of different shapes, or that do not differ in any matrix.
    """
    from llmworks.merge.adapter_files import extracted

    return extracted(config, model, base, ctx)
