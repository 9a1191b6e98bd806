"""Score completions with a reward model: whole ones at their last token, or by their steps.

Uses the reward model's own tokenizer and chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from llmworks.align.preference.batch import branched
from llmworks.align.preference.examples import answered
from llmworks.core.artifact import Model
from llmworks.core.types import Message
from llmworks.model.io.reward_head import Scorer
from llmworks.tokenize.chat.templates import encode, render_prompt
from llmworks.tokenize.load import load_tokenizer

if TYPE_CHECKING:
    from llmworks.align.rl.cases import Case, Values

ROWS = 16  # completions per batch


def scores_of(model: Model) -> Values:
    """Return a function from cases to scores of a reward model.

    A reward model of whole completions gives its score; a process reward model the lowest probability of a step to be
    correct.

    Errors: ModelError for a model without a score head.
    """
    scorer, tokenizer = Scorer(model.path), load_tokenizer(model.path)

    def values(cases: Sequence[Case]) -> list[float | str]:
        found: list[float | str] = []
        for at in range(0, len(cases), ROWS):
            found += (_whole if scorer.kind == "whole" else _steps)(scorer, tokenizer, cases[at : at + ROWS])
        return found

    return values


def _whole(scorer: Scorer, tokenizer: object, cases: Sequence[Case]) -> list[float | str]:
    made = [
        answered(
            tokenizer, str(number), case.prompt, {"only": (Message("assistant", case.text),)}, (), most=scorer.context
        )
        for number, case in enumerate(cases)
    ]
    good = [one for one in made if not isinstance(one, str)]
    scores: list[float] = []
    if good:
        batch = branched(good)
        assert batch.positions is not None
        assert batch.segments is not None
        scores = scorer.scores(batch.ids, batch.positions, batch.segments, batch.lasts).tolist()
    rest = iter(scores)
    return [one if isinstance(one, str) else next(rest) for one in made]


def _steps(scorer: Scorer, tokenizer: object, cases: Sequence[Case]) -> list[float | str]:
    found: list[float | str] = []
    for case in cases:
        ids = list(render_prompt(tokenizer, case.prompt))
        ends = []
        for step in (line for line in case.text.splitlines() if line.strip()):
            ids += encode(tokenizer, step.strip() + "\n")
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
                scorer.scores(row, torch.arange(len(ids))[None], torch.zeros_like(row), torch.tensor(ends))
                .sigmoid()
                .min()
            )
        )
    return found
