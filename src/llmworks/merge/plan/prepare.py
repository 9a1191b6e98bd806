"""Prepare a merge before any weight is read: the result's vocabulary, and the plan. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from llmworks.core.errors import ModelError
from llmworks.merge.plan.computation import require_same_computation
from llmworks.merge.plan.config import MergeConfig, TokenizerRule
from llmworks.merge.plan.layout import CheckpointLayout
from llmworks.merge.plan.plan import MergePlan, check_models, plan_merge
from llmworks.merge.vocabulary.vocabulary import MergedVocabulary, merge_vocabularies, require_same_tokens


def prepare_merge(
    config: MergeConfig, layouts: Mapping[str, CheckpointLayout]
) -> tuple[str, MergedVocabulary | None, MergePlan]:
    """Return (the model that provides the config and all files but the weights, the vocabulary if it changes, the
    plan).
    """
    check_models(config, layouts)
    donor = config.base_model or config.model_names()[0]
    kinds = {name: layout.architecture for name, layout in layouts.items()}
    if len(set(kinds.values())) > 1:
        raise ModelError(
            "models of different architectures cannot be merged:"
            f" {', '.join(f'{name} is a {kind}' for name, kind in kinds.items())}"
        )
    rule = config.tokenizer or (TokenizerRule(source=config.tokenizer_source) if config.tokenizer_source else None)
    sliced = config.slices is not None or config.modules is not None
    ignored = config.ignore_config_differences
    if rule is None:
        require_same_tokens(layouts)
        plan = plan_merge(config, layouts)
        require_same_computation(donor, layouts, ignored=ignored, sliced=sliced)
        return donor, None, plan
    order = [donor, *(name for name in layouts if name != donor)]
    vocabulary = merge_vocabularies(rule, donor, order, layouts)
    plan = plan_merge(config, layouts, vocabulary.rows)
    require_same_computation(donor, layouts, ignored=ignored, sliced=sliced)
    return donor, vocabulary, plan
