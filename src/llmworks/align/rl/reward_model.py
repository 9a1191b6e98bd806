"""Score completions with a reward model: whole ones at their last token, or by their steps.

Uses the reward model's own tokenizer and chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from llmworks.align.preference.batch import collate_shared_prompts
from llmworks.align.preference.examples import tokenize_completions
from llmworks.core.artifact import Model
from llmworks.core.types import Message
from llmworks.model.io.reward_head import RewardModel
from llmworks.tokenize.chat.templates import encode_text, render_prompt
from llmworks.tokenize.load import load_tokenizer

if TYPE_CHECKING:
    from llmworks.align.rl.reward_input import RewardFunction, RewardInput

BATCH_SIZE = 16  # completions per batch


def load_reward_function(model: Model) -> RewardFunction:
    """Return a function from cases to scores of a reward model.

    A reward model of whole completions gives its score; a process reward model the lowest probability of a step to be
    correct.

    Errors: ModelError for a model without a score head.
    """
    scorer, tokenizer = RewardModel(model.path), load_tokenizer(model.path)

    def values(cases: Sequence[RewardInput]) -> list[float | str]:
        found: list[float | str] = []
        for at in range(0, len(cases), BATCH_SIZE):
            found += (_score_completions if scorer.kind == "whole" else _score_steps)(
                scorer, tokenizer, cases[at : at + BATCH_SIZE]
            )
        return found

    return values


def _score_completions(scorer: RewardModel, tokenizer: object, inputs: Sequence[RewardInput]) -> list[float | str]:
    made = [
        tokenize_completions(
            tokenizer,
            str(number),
            case.prompt,
            {"only": (Message("assistant", case.text),)},
            (),
            max_length=scorer.context,
        )
        for number, case in enumerate(inputs)
    ]
    good = [one for one in made if not isinstance(one, str)]
    scores: list[float] = []
    if good:
        batch = collate_shared_prompts(good)
        assert batch.positions is not None
        assert batch.segments is not None
        scores = scorer.compute_rewards(batch.ids, batch.positions, batch.segments, batch.last_positions).tolist()
    rest = iter(scores)
    return [one if isinstance(one, str) else next(rest) for one in made]


def _score_steps(scorer: RewardModel, tokenizer: object, inputs: Sequence[RewardInput]) -> list[float | str]:
    found: list[float | str] = []
    for case in inputs:
        ids = list(render_prompt(tokenizer, case.prompt))
        ends = []
        for step in (line for line in case.text.splitlines() if line.strip()):
            ids += encode_text(tokenizer, step.strip() + "\n")
            ends.append(len(ids) - 1)
        if not ends or len(ids) > scorer.context:
            found.append(
                "has no steps"
                if not ends
                else f"{len(ids)} tokens, longer than the reward model's context ({scorer.context})"
            )
            continue
        row = torch.tensor([ids])
        found.append(
            float(
                scorer.compute_rewards(row, torch.arange(len(ids))[None], torch.zeros_like(row), torch.tensor(ends))
                .sigmoid()
                .min()
            )
        )
    return found
