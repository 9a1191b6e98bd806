"""The search space of a sweep: a YAML file of fields and their value ranges."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from llmworks.core.artifact import Config
from llmworks.core.errors import UserError
from llmworks.core.text.yaml import load_yaml

Value = int | float | str | bool | None


class FieldSpace(Config):
    """Search space of one field: choices, or a numeric range."""

    choices: list[Any] = Field([], description="values to choose from (categorical)")
    low: float | None = Field(None, description="lower bound")
    high: float | None = Field(None, description="upper bound")
    log: bool = Field(False, description="sample on a logarithmic scale, for example for learning rates")
    whole: bool = Field(False, description="integers only")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if bool(self.choices) == (self.low is not None or self.high is not None):
            raise ValueError("give either choices, or low and high")
        if not self.choices and (self.low is None or self.high is None or self.low >= self.high):
            raise ValueError("low must be less than high")
        if self.log and (self.low or 0) <= 0:
            raise ValueError("log needs a low above zero")
        return self


class SweepConfig(Config):
    """A sweep: the metric to optimize and the fields to search."""

    metric: str = Field(
        pattern=r"^[^.]+\..+$", description="STEP.METRIC of the recipe to optimize, for example tuned-score.score"
    )
    direction: Literal["maximize", "minimize"] = Field("maximize", description="direction of the optimization")
    fields: dict[str, FieldSpace] = Field(
        min_length=1, description="map of STEP.FIELD, as in --set, to its search space"
    )
    trials: int = Field(20, gt=0, description="total number of trials")
    random: int = Field(
        8,
        gt=0,
        description="random startup trials before TPE (Bergstra et al. 2011)",
    )
    seed: int = Field(0, ge=0, description="seed of the sampler")

    @property
    def step_name(self) -> str:
        """The step whose metric is optimized."""
        return self.metric.partition(".")[0]

    @property
    def metric_name(self) -> str:
        """The metric's name."""
        return self.metric.partition(".")[2]


def load_search(path: Path) -> SweepConfig:
    """Read a search file. UserError in one line for an invalid one."""
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not YAML ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a mapping with metric and fields")
    try:
        return SweepConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{path}: {'.'.join(map(str, first['loc'])) or 'search'}: {first['msg'].removeprefix('Value error, ')}"
        ) from None


def format_overrides(values: Mapping[str, Any]) -> list[str]:
    """Format values as `--set` arguments."""
    return [f"{field}={json.dumps(value)}" for field, value in values.items()]
