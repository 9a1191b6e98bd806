"""Collate prompts and completions into batches.

A prompt is computed once and its completions branch from it (prefix sharing); for models that do not support this,
every completion is a padded row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmworks.align.preference.examples import PromptCompletions
from llmworks.train.finetune.examples import format_row_ids


@dataclass(frozen=True)
class CompletionBatch:
    """A batch of completions. `ids`: input ids [rows, length].

    For the n label tokens: `positions_before`, index in the flattened hidden states that predicts the token;
    `target_ids`, its id; `owner`, the index of its completion.

    `last_positions` [completions]: index of each completion's last token. `positions`, `segments`, `branches` [1,
    length]: of the single row in which prompts branch; None for padded rows. `prompt_targets`: indices and ids of the
    prompts' own tokens, where they are requested. `tokens`: input tokens without padding; `labels`: divisor of the
    step's loss, here examples; `extras`: additional values of a method.
    """

    ids: Tensor
    positions_before: Tensor
    target_ids: Tensor
    owner: Tensor
    last_positions: Tensor
    num_completions: int
    labels: int
    tokens: int
    where: str = ""
    positions: Tensor | None = None
    segments: Tensor | None = None
    branches: Tensor | None = None
    prompt_targets: tuple[Tensor, Tensor] | None = None
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def token_counts(self) -> Tensor:
        """Label tokens of each completion [completions]."""
        return torch.bincount(self.owner, minlength=self.num_completions)

    def sum_by_completion(self, values: Tensor) -> Tensor:
        """Sum per-token values [n] over each completion [completions]."""
        return values.new_zeros(self.num_completions).index_add(0, self.owner, values)


def collate_shared_prompts(
    examples: Sequence[PromptCompletions], device: torch.device | str = "cpu", *, include_prompts: bool = False
) -> CompletionBatch:
    """Collate examples into one row: each is a segment of a prompt and its completions, which do not attend to each
    other.

    `include_prompts`: the prompts' own tokens are predicted, too.
    """
    ids: list[int] = []
    positions: list[int] = []
    segments: list[int] = []
    branches: list[int] = []
    at: list[int] = []
    target_ids: list[int] = []
    owner: list[int] = []
    lasts: list[int] = []
    prompt_targets: list[tuple[int, int]] = []
    answers = 0
    for number, example in enumerate(examples):
        length, start = len(example.prompt), len(ids)
        ids += example.prompt
        positions += range(length)
        branches += [0] * length
        prompt_targets += [(start + i, example.prompt[i + 1]) for i in range(length - 1)]
        for branch, answer in enumerate(example.completions, 1):
            begin = len(ids)
            for i, (token, is_label) in enumerate(zip(answer.ids, answer.mask, strict=True)):
                if is_label:
                    at.append(begin + i - 1 if i else start + length - 1)
                    target_ids.append(token)
                    owner.append(answers)
            ids += answer.ids
            lasts.append(len(ids) - 1)
            positions += range(length, length + len(answer.ids))
            branches += [branch] * len(answer.ids)
            answers += 1
        segments += [number] * (len(ids) - start)
    row, places, segment_row, parts = (
        torch.tensor([values], device=device) for values in (ids, positions, segments, branches)
    )
    return CompletionBatch(
        row,
        _tensor(at, device),
        _tensor(target_ids, device),
        _tensor(owner, device),
        _tensor(lasts, device),
        answers,
        len(examples),
        len(ids),
        format_row_ids(examples),
        places,
        segment_row,
        parts,
        _pair(prompt_targets, device) if include_prompts else None,
    )


def collate_padded(
    examples: Sequence[PromptCompletions], device: torch.device | str = "cpu", *, include_prompts: bool = False
) -> CompletionBatch:
    """Collate each completion with its prompt into a right-padded row.

    `include_prompts`: the prompts' own tokens are predicted, too.
    """
    rows = [
        ((*example.prompt, *answer.ids), (*(0 for _ in example.prompt), *answer.mask))
        for example in examples
        for answer in example.completions
    ]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long, device=device)
    at, target_ids, owner = [], [], []
    for number, (tokens, mask) in enumerate(rows):
        ids[number, : len(tokens)] = torch.tensor(tokens, device=device)
        for i, is_label in enumerate(mask):
            if is_label and i:
                at.append(number * width + i - 1)
                target_ids.append(tokens[i])
                owner.append(number)
    lasts = [number * width + len(tokens) - 1 for number, (tokens, _) in enumerate(rows)]
    firsts = [sum(len(e.completions) for e in examples[:i]) for i in range(len(examples))]
    prompt_targets = [
        (first * width + i, example.prompt[i + 1])
        for first, example in zip(firsts, examples, strict=True)
        for i in range(len(example.prompt) - 1)
    ]
    return CompletionBatch(
        ids,
        _tensor(at, device),
        _tensor(target_ids, device),
        _tensor(owner, device),
        _tensor(lasts, device),
        len(rows),
        len(examples),
        sum(len(tokens) for tokens, _ in rows),
        format_row_ids(examples),
        prompt_targets=_pair(prompt_targets, device) if include_prompts else None,
    )


def _tensor(values: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)


def _pair(values: Sequence[tuple[int, int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    return _tensor([a for a, _ in values], device), _tensor([b for _, b in values], device)
