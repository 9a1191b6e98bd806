"""Texts that show what a model's layers read: full rows of tokens of a data set, and others apart on which the damage
is measured.

Knows no method.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmworks.core.artifact import Dataset
from llmworks.core.errors import DataError, ModelError, RequestError
from llmworks.data.conversations.training_rows import ids_of, training_rows


def calibration(tokenizer: Any, data: Dataset, texts: int, held: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """(ids of the calibration [texts, length], ids of other rows of the data [held, length]).

    Rows are joined in an order by the seed and cut; each begins as the tokenizer's texts do.

    Errors: DataError for data of too few tokens, which says how many texts there are.
    """
    rows = training_rows(data)
    random.Random(seed).shuffle(rows)
    bos = (
        [tokenizer.bos_token_id]
        if tokenizer.bos_token_id is not None and list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]
        else []
    )
    if not texts + held:
        return (torch.zeros(0, length, dtype=torch.long),) * 2
    joined = _texts(tokenizer, rows, length, bos)
    found: list[list[int]] = []
    for text in joined:
        found.append(text)
        if len(found) == texts + held:
            break
    if len(found) < texts + held:
        raise DataError(
            f"{data.name}: is {len(found)} texts of {length} tokens, {texts} to calibrate by and {held} apart are"
            " wanted; give more data, or set texts, held or length"
        )
    ids = torch.tensor(found).view(len(found), length)
    return ids[held:], ids[:held]


def check_length(length: int, context: int) -> None:
    """Whether a model reads texts of so many tokens. DataError where not."""
    if length > context:
        raise DataError(f"config.length: texts of {length} tokens, the model reads {context} at most")


def _texts(tokenizer: Any, rows: list[Any], length: int, bos: list[int]) -> Iterator[list[int]]:
    """Full texts of the tokens of rows, one row after the other."""
    rest: list[int] = []
    refused = 0
    for row in rows:
        try:
            ids = list(ids_of(tokenizer, row)[0])
        except (RequestError, ModelError, ValueError) as error:
            refused += 1
            if refused == len(rows):
                raise DataError(f"none of {refused} rows can be read by this model: {error}") from None
            continue
        rest += ids[len(bos) :] if bos and ids[:1] == bos else ids
        while len(rest) >= length - len(bos):
            yield bos + rest[: length - len(bos)]
            rest = rest[length - len(bos) :]
