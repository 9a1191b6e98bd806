"""Config fields that `align.reward` and `align.process` share. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field

from llmworks.align.preference.run import OfflineAlignmentConfig
from llmworks.core.artifact import Model


class ScorerConfig(OfflineAlignmentConfig):
    """Training fields of a model with a score head, which does not generate text."""

    default_learning_rates: ClassVar[Mapping[str, float]] = {"lora": 5e-4, "full": 2e-5}

    eval_samples: int = Field(
        512, gt=0, description="held-out pairs per evaluation; accuracy and calibration are of the last evaluation"
    )

    @property
    def artifact_type(self) -> type[Model]:
        """Model: a trained adapter is merged into it."""
        return Model


class RewardConfig(ScorerConfig):
    """Margin and centering of the reward model loss."""

    margin_coefficient: float = Field(
        0.0,
        ge=0,
        description=(
            "target score difference of a pair per unit of its own margin (a field `margin`, or the difference of"
            " its `scores`)"
        ),
    )
    center_rewards_coefficient: float = Field(
        0.0,
        ge=0,
        description=(
            "weight of the squared sum of both scores, which keeps scores around 0; 0.01 is usual (arXiv:2312.09244)"
        ),
    )
