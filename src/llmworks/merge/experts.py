"""Stage `merge.experts`: combine dense models into a mixture of experts (frankenMoE) by mergekit-moe's YAML, or turn
one model into several experts (sparse upcycling).

Experts contribute their feed-forward layers, the base model everything else. An expert's router row is the base model's
hidden state of the expert's prompts. Sparse upcycling: Komatsuzaki et al. 2022 (arXiv:2212.05055); the gate modes are
mergekit-moe's.
"""

from __future__ import annotations

from llmworks.core.artifact import Model
from llmworks.core.context import Context
from llmworks.merge.moe.config import ExpertsConfig


def experts(config: ExpertsConfig, models: dict[str, Model], ctx: Context) -> Model:
    """Make a mixture of experts of `models`, which the config refers to by their keys; written tensor by tensor.

    Errors: UserError for a layout that does not fit the models; ModelError for tensors that are missing or differ in
    shape.
    """
    from llmworks.merge.moe.write import run

    return run(config, models, ctx)
