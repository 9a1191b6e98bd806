"""Stage `data.split`: one side of a seeded k-fold split in which rows of one group stay on one side."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from llmworks.artifact import Config, Dataset
from llmworks.context import Context
from llmworks.data.rows import Row, read_chat, write_chat
from llmworks.errors import DataError


class SplitConfig(Config):
    """Which part of which fold. Two steps with the same fields but `part` give the two sides."""

    part: Literal["train", "test"] = Field(description="which side to keep")
    folds: int = Field(5, ge=2, description="number of folds; one of them is the test side")
    fold: int = Field(0, ge=0, description="index of the test fold")
    seed: int = Field(0, description="seed of the shuffle of groups")

    @model_validator(mode="after")
    def _fold_exists(self) -> Self:
        if self.fold >= self.folds:
            raise ValueError(f"fold is {self.fold}, folds is {self.folds}: fold must be smaller")
        return self


def split(config: SplitConfig, data: Dataset, ctx: Context) -> Dataset:
    """Keep the rows of one side, in their order. Groups, not rows, are dealt to the folds.

    Errors: DataError when a side would be empty.
    """
    rows = read_chat(data)
    held_out = test_groups([row["group"] for row in rows], config)
    kept = [row for row in rows if (row["group"] in held_out) == (config.part == "test")]
    if not kept:
        raise DataError(
            f"{data.name}: the {config.part} side of {config.folds} folds is empty; {len({r['group'] for r in rows})} groups are too few"
        )
    write_chat(ctx.out, kept)
    return Dataset(ctx.out, metrics={"rows": len(kept), "groups": len(_groups(kept))}, about={"schema": "chat", "rows": len(kept)})


def test_groups(groups: Sequence[str], config: SplitConfig) -> set[str]:
    """The groups of the test fold: sorted names, shuffled by the seed, dealt in turn, so fold sizes differ by one at most."""
    names = sorted(set(groups))
    random.Random(config.seed).shuffle(names)
    return set(names[config.fold :: config.folds])


def _groups(rows: Sequence[Row]) -> set[str]:
    return {row["group"] for row in rows}
