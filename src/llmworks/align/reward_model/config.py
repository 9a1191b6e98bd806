"""Config fields that `align.reward` and `align.process` share. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from llmworks.align.preference.run import GivenConfig
from llmworks.core.artifact import Model

if TYPE_CHECKING:
    pass


class ScorerConfig(GivenConfig):
    """What is trained of a model that scores: it writes nothing."""

    rates: ClassVar[Mapping[str, float]] = {"lora": 5e-4, "full": 2e-5}

    eval_samples: int = Field(
        512, gt=0, description="held-out pairs of a look; accuracy and calibration are of the last one"
    )

    @property
    def makes(self) -> type[Model]:
        """A model, also where an adapter was trained: it is folded."""
        return Model


class RewardConfig(ScorerConfig):
    """What is trained, and how far apart answers should score."""

    margin_coefficient: float = Field(
        0.0,
        ge=0,
        description=(
            "how far apart the scores of a pair should be, for each unit of its own margin (a field `margin`, or the"
            " difference of its `scores`)"
        ),
    )
    center_rewards_coefficient: float = Field(
        0.0,
        ge=0,
        description=(
            "weight of the square of both scores' sum, which keeps scores around 0; 0.01 is usual (arXiv:2312.09244)"
        ),
    )
