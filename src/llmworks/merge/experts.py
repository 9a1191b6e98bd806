"""Stage `merge.experts`: dense models as experts of one (frankenMoE), by mergekit-moe's YAML, or one model as several
(sparse upcycling).

Experts give their feed-forward layers, the base all else. A router's row is where an expert's prompts are in the base's
states. Komatsuzaki et al. 2022 (arXiv:2212.05055) for upcycling; the gates are mergekit-moe's.
"""

from __future__ import annotations

from llmworks.core.artifact import Model
from llmworks.core.context import Context
from llmworks.merge.moe.config import ExpertsConfig


def experts(config: ExpertsConfig, models: dict[str, Model], ctx: Context) -> Model:
    """Make a mixture of experts of `models`, which the config names by their keys; written tensor by tensor.

    Errors: UserError for a layout that the models do not fit; ModelError for tensors that are missing or of other
    shapes.
    """
    from llmworks.merge.moe.write import run

    return run(config, models, ctx)
