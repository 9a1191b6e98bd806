"""Tasks are data: a YAML file says what is asked, how, and how the answer is scored.

One definition runs on every engine. Knows no model.

`question`, `choices`, `answer` and `group` are Jinja templates over a row, or the name of one of its fields. Files of
the lm-evaluation-harness are read as well (`harness.py`).
"""

from __future__ import annotations

from typing import Any, Literal

import regex as expressions
from pydantic import Field, field_validator, model_validator

from llmworks.core.artifact import Config

Kind = Literal["choice", "likelihood", "perplexity", "generate"]
Steps = Literal["regex", "strip", "lower", "upper", "first_line", "final_answer", "code"]


class Shots(Config):
    """Worked examples in front of a question."""

    count: int = Field(0, ge=0, le=100, description="how many")
    choose: Literal["same", "first", "each"] = Field(
        "same",
        description=(
            "`same`: drawn once, for all questions; `first`: the first rows; `each`: drawn for every question, as the"
            " lm-evaluation-harness does"
        ),
    )
    seed: int = Field(1234, description="of the draw")
    same_group: bool = Field(False, description="only rows of the group of the row that is asked")
    rows: list[dict[str, Any]] = Field([], description="the examples themselves, where no data set has them")


class Step(Config):
    """One step on the way from what a model says to its answer."""

    how: Steps = Field(
        description=(
            "`regex`: a match of `pattern`; `strip` white space; `lower`, `upper` case; `first_line`; `final_answer`:"
            " after `Answer:`, `####` or boxed; `code`: the last fenced block"
        )
    )
    pattern: str = Field("", description="regular expression; its first group that matched counts")
    pick: int = Field(0, description="which match: 0 the first, -1 the last")
    fallback: str = Field("[invalid]", description="the answer where nothing matched")


class Measure(Config):
    """A metric, and what it does not look at."""

    name: str = Field(description="name of a metric or of a score function")
    ignore_case: bool = Field(False, description="of exact_match")
    ignore_punctuation: bool = Field(False, description="of exact_match")
    ignore: list[str] = Field(
        [], description="regular expressions whose matches are removed from answer and reference before exact_match"
    )
    k: int = Field(1, ge=1, description="of pass_at: how many tries")
    of: str = Field("", description="of pass_at: the score function that says which try is right")


class Task(Config):
    """One task, as its YAML file has it."""

    name: str = Field(description="the task's name")
    what: str = Field("", description="one line: what is measured")
    kind: Kind = Field(
        "generate",
        description=(
            "`choice`: the most probable of given answers; `likelihood`: is the answer what greedy decoding writes;"
            " `perplexity`: of whole texts; `generate`: write, then compare"
        ),
    )
    rows: Literal["raw", "chat"] = Field(
        "raw",
        description=(
            "`raw`: JSON objects of any fields; `chat`: conversations of the stage data.chat, whose last turn is the"
            " reference where `question` says nothing else"
        ),
    )
    data: str = Field("", description="reference of the data set, where a run gives none")
    format: str = Field(
        "", description="of `rows: chat`: how the stage data.chat reads `data`; default: each row's shape is recognised"
    )
    split: str = Field("", description="read only files named after it, as in test-00000-of-00001.parquet")
    only: str = Field("", description="template: rows for which it gives nothing, False or 0 are left out, and counted")
    examples: str = Field(
        "",
        description=(
            "reference of the data set that worked examples come from; default: `data`, without the row that is asked"
        ),
    )
    examples_split: str = Field("", description="the same for examples")
    description: str = Field("", description="template of what stands in front of everything, once")
    question: str = Field("", description="template of what is asked; of `perplexity` the text")
    contexts: str | list[str] = Field(
        "", description="of `choice` where the options differ before the answer, not in it: template of a list"
    )
    choices: str | list[str] = Field("", description="of `choice`: the options, or the template of a list")
    answer: str | int | dict[str, Any] = Field(
        "",
        description=(
            "template of the right answer: text, number or text of a choice, a list of them; or the fields that a score"
            " function wants"
        ),
    )
    example_answer: str = Field(
        "", description="template of the answer that worked examples show, where it is not `answer`"
    )
    prefix: str = Field("", description="template of the beginning of the answer, given to the model")
    before_answer: str = Field(" ", description="between question and answer, in plain prompts")
    between: str = Field("\n\n", description="between worked examples, in plain prompts")
    shots: Shots = Field(Shots(), description="worked examples")
    prompt: Literal["plain", "chat"] = Field(
        "chat", description="`plain`: text that the model goes on with; `chat`: turns in the model's own template"
    )
    max_tokens: int = Field(256, gt=0, description="longest answer, in tokens")
    stop: list[str] = Field([], description="strings that end an answer")
    temperature: float = Field(0.0, ge=0, description="0 is greedy")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus, where the temperature is above 0")
    samples: int = Field(1, gt=0, le=1000, description="answers to each question; more than one need a temperature")
    extract: dict[str, list[Step]] = Field(
        {"": []}, description="from text to answer: named ways, each a list of steps; every metric is reported for each"
    )
    metrics: list[Measure] = Field(description="what is reported; the first is the score")
    group: str = Field(
        "", description="template of what rows belong together by: intervals treat each group as one draw"
    )
    window: int = Field(2048, gt=1, description="of `perplexity`: tokens of context at most")
    stride: int = Field(
        0,
        ge=0,
        description="of `perplexity`: tokens scored in each window after the first; 0: all, windows do not overlap",
    )

    @field_validator("metrics", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return (
            [{"name": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
        )

    @field_validator("extract", mode="before")
    @classmethod
    def _steps(cls, value: Any) -> Any:
        value = {"": value} if isinstance(value, list) else value
        if not isinstance(value, dict) or not all(isinstance(steps, list) for steps in value.values()):
            return value
        return {
            name: [{"how": step} if isinstance(step, str) else step for step in steps] for name, steps in value.items()
        }

    @model_validator(mode="after")
    def _fits(self) -> Task:
        if not self.metrics:
            raise ValueError("metrics is empty: name at least one")
        if self.kind in ("choice", "likelihood") and self.answer == "":
            raise ValueError(f"a task of kind {self.kind} needs `answer`")
        if not self.extract:
            raise ValueError("extract is empty: name at least one way, or leave it out")
        for pattern in (
            *(s.pattern for steps in self.extract.values() for s in steps),
            *(p for m in self.metrics for p in m.ignore),
        ):
            try:
                expressions.compile(pattern)
            except expressions.error as error:
                raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
        if self.kind == "choice" and not self.choices and not self.contexts:
            raise ValueError("a task of kind choice needs `choices`, or `contexts`")
        if self.rows == "raw" and self.kind in ("generate", "perplexity") and not self.question:
            raise ValueError(f"a task of kind {self.kind} over raw rows needs `question`")
        if self.rows == "chat" and not self.question and (self.kind != "generate" or self.prompt == "plain"):
            raise ValueError(
                "conversations are asked with kind generate and prompt chat; anything else needs `question`, a template"
                " over their fields"
            )
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"samples is {self.samples}, but temperature is 0: all answers would be the same")
        if self.stride and self.stride > self.window:
            raise ValueError(f"stride {self.stride} is above window {self.window}: tokens would be left out")
        if max((m.k for m in self.metrics), default=1) > self.samples:
            raise ValueError(
                f"pass_at k={max(m.k for m in self.metrics)} needs as many samples, there are {self.samples}"
            )
        return self
