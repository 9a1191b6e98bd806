"""Calibration data: full sequences of tokens of a data set, and held-out sequences for evaluation.

Does not know methods.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmworks.core.artifact import Dataset
from llmworks.core.errors import DataError, ModelError, RequestError
from llmworks.data.conversations.training_rows import read_training_rows, tokenize_row


def load_samples(
    tokenizer: Any, data: Dataset, num_calibration_samples: int, eval_samples: int, length: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return (ids of calibration sequences [samples, length], ids of held-out sequences [eval_samples, length]).

    Rows are shuffled by the seed, packed and cut; each sequence begins with the BOS token if the tokenizer adds it.

    Errors: DataError for data with too few tokens, with the number of available sequences.
    """
    rows = read_training_rows(data)
    random.Random(seed).shuffle(rows)
    bos = (
        [tokenizer.bos_token_id]
        if tokenizer.bos_token_id is not None and list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]
        else []
    )
    if not num_calibration_samples + eval_samples:
        return (torch.zeros(0, length, dtype=torch.long),) * 2
    joined = _pack_rows(tokenizer, rows, length, bos)
    found: list[list[int]] = []
    for text in joined:
        found.append(text)
        if len(found) == num_calibration_samples + eval_samples:
            break
    if len(found) < num_calibration_samples + eval_samples:
        raise DataError(
            f"{data.name}: has only {len(found)} sequences of {length} tokens, but {num_calibration_samples} for"
            f" calibration and {eval_samples}"
            " held-out ones are required; give more data, or set num_calibration_samples, eval_samples or"
            " max_seq_length"
        )
    ids = torch.tensor(found).view(len(found), length)
    return ids[eval_samples:], ids[:eval_samples]


def check_length(length: int, context: int) -> None:
    """Check that a model supports a sequence length. DataError otherwise."""
    if length > context:
        raise DataError(
            f"config.max_seq_length: sequences of {length} tokens exceed the model's context length of {context}"
        )


def _pack_rows(tokenizer: Any, rows: list[Any], length: int, bos: list[int]) -> Iterator[list[int]]:
    """Yield full sequences of packed rows."""
    rest: list[int] = []
    refused = 0
    for row in rows:
        try:
            ids = list(tokenize_row(tokenizer, row)[0])
        except (RequestError, ModelError, ValueError) as error:
            refused += 1
            if refused == len(rows):
                raise DataError(f"none of {refused} rows can be tokenized for this model: {error}") from None
            continue
        rest += ids[len(bos) :] if bos and ids[:1] == bos else ids
        while len(rest) >= length - len(bos):
            yield bos + rest[: length - len(bos)]
            rest = rest[length - len(bos) :]
