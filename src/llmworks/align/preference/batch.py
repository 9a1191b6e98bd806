"""Prompts and their answers as one batch: a prompt is read once and each answer goes on from it, or, for models that
cannot, every answer is a padded row of its own.

Knows no method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmworks.align.preference.examples import Answered
from llmworks.train.finetune.examples import where


@dataclass(frozen=True)
class Branches:
    """`ids` [rows, length] as they are read.

    Of each token that is weighed, n in all: `at`, the place in the flattened states that predicts it; `wanted`, its id;
    `owner`, the number of its answer.

    `lasts` [answers]: the place of each answer's last token. `positions`, `segments`, `branches` [1, length]: of the
    one row in which prompts branch; None where answers are padded rows. `spoken` [prompt tokens, 2]: places and ids of
    prompts' own tokens, where they are asked for. `tokens`: that are read, padding left out; `labels`: what a step's
    loss is divided by, here examples; `given`: what a method puts beside it.
    """

    ids: Tensor
    at: Tensor
    wanted: Tensor
    owner: Tensor
    lasts: Tensor
    answers: int
    labels: int
    tokens: int
    where: str = ""
    positions: Tensor | None = None
    segments: Tensor | None = None
    branches: Tensor | None = None
    spoken: tuple[Tensor, Tensor] | None = None
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> Tensor:
        """Weighed tokens of each answer [answers]."""
        return torch.bincount(self.owner, minlength=self.answers)

    def summed(self, values: Tensor) -> Tensor:
        """Values of tokens [n], added up of each answer [answers]."""
        return values.new_zeros(self.answers).index_add(0, self.owner, values)


def branched(examples: Sequence[Answered], device: torch.device | str = "cpu", *, prompts: bool = False) -> Branches:
    """One row: each example a segment, its prompt and then its answers, none of which sees another.

    `prompts`: their own tokens are asked for, too.
    """
    ids: list[int] = []
    positions: list[int] = []
    segments: list[int] = []
    branches: list[int] = []
    at: list[int] = []
    wanted: list[int] = []
    owner: list[int] = []
    lasts: list[int] = []
    spoken: list[tuple[int, int]] = []
    answers = 0
    for number, example in enumerate(examples):
        length, start = len(example.prompt), len(ids)
        ids += example.prompt
        positions += range(length)
        branches += [0] * length
        spoken += [(start + i, example.prompt[i + 1]) for i in range(length - 1)]
        for branch, answer in enumerate(example.answers, 1):
            begin = len(ids)
            for i, (token, weighed) in enumerate(zip(answer.ids, answer.mask, strict=True)):
                if weighed:
                    at.append(begin + i - 1 if i else start + length - 1)
                    wanted.append(token)
                    owner.append(answers)
            ids += answer.ids
            lasts.append(len(ids) - 1)
            positions += range(length, length + len(answer.ids))
            branches += [branch] * len(answer.ids)
            answers += 1
        segments += [number] * (len(ids) - start)
    row, places, texts, parts = (
        torch.tensor([values], device=device) for values in (ids, positions, segments, branches)
    )
    return Branches(
        row,
        _tensor(at, device),
        _tensor(wanted, device),
        _tensor(owner, device),
        _tensor(lasts, device),
        answers,
        len(examples),
        len(ids),
        where(examples),
        places,
        texts,
        parts,
        _pair(spoken, device) if prompts else None,
    )


def padded(examples: Sequence[Answered], device: torch.device | str = "cpu", *, prompts: bool = False) -> Branches:
    """Each answer behind its prompt in a row of its own, padded on the right, where nothing is asked for."""
    rows = [
        ((*example.prompt, *answer.ids), (*(0 for _ in example.prompt), *answer.mask))
        for example in examples
        for answer in example.answers
    ]
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long, device=device)
    at, wanted, owner = [], [], []
    for number, (tokens, mask) in enumerate(rows):
        ids[number, : len(tokens)] = torch.tensor(tokens, device=device)
        for i, weighed in enumerate(mask):
            if weighed and i:
                at.append(number * width + i - 1)
                wanted.append(tokens[i])
                owner.append(number)
    lasts = [number * width + len(tokens) - 1 for number, (tokens, _) in enumerate(rows)]
    firsts = [sum(len(e.answers) for e in examples[:i]) for i in range(len(examples))]
    spoken = [
        (first * width + i, example.prompt[i + 1])
        for first, example in zip(firsts, examples, strict=True)
        for i in range(len(example.prompt) - 1)
    ]
    return Branches(
        ids,
        _tensor(at, device),
        _tensor(wanted, device),
        _tensor(owner, device),
        _tensor(lasts, device),
        len(rows),
        len(examples),
        sum(len(tokens) for tokens, _ in rows),
        where(examples),
        spoken=_pair(spoken, device) if prompts else None,
    )


def _tensor(values: Sequence[int], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.long, device=device)


def _pair(values: Sequence[tuple[int, int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    return _tensor([a for a, _ in values], device), _tensor([b for _, b in values], device)
