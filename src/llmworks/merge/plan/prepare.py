"""Prepare a merge before any weight is read: the result's vocabulary, and the plan. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from llmworks.core.errors import ModelError
from llmworks.merge.plan.config import MergeConfig, TokenizerRule
from llmworks.merge.plan.layout import Layout
from llmworks.merge.plan.plan import Plan, check, plan_of
from llmworks.merge.vocabulary.vocabulary import Vocabulary, same_tokens, vocabulary_of


def prepared(config: MergeConfig, layouts: Mapping[str, Layout]) -> tuple[str, Vocabulary | None, Plan]:
    """Return (the model that provides the config and all files but the weights, the vocabulary if it changes, the
    plan).
    """
    check(config, layouts)
    donor = config.base_model or config.named()[0]
    kinds = {name: layout.kind for name, layout in layouts.items()}
    if len(set(kinds.values())) > 1:
        raise ModelError(
            "models of different architectures cannot be merged:"
            f" {', '.join(f'{name} is a {kind}' for name, kind in kinds.items())}"
        )
    rule = config.tokenizer or (TokenizerRule(source=config.tokenizer_source) if config.tokenizer_source else None)
    if rule is None:
        same_tokens(layouts)
        return donor, None, plan_of(config, layouts)
    order = [donor, *(name for name in layouts if name != donor)]
    vocabulary = vocabulary_of(rule, donor, order, layouts)
    return donor, vocabulary, plan_of(config, layouts, vocabulary.rows)
