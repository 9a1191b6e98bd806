"""Tasks are declarative: a YAML file defines prompts, request type, answer extraction and metrics.

One definition runs on every engine. Does not load models.

`question`, `choices`, `answer` and `group` are Jinja templates over a row, or the name of one of its fields.
lm-evaluation-harness files are read as well (`harness.py`).
"""

from __future__ import annotations

from typing import Any, Literal

import regex as expressions
from pydantic import Field, field_validator, model_validator

from llmworks.core.artifact import Config

Kind = Literal["choice", "likelihood", "perplexity", "generate"]
FilterFunction = Literal["regex", "strip", "lower", "upper", "first_line", "final_answer", "code"]


class FewShotConfig(Config):
    """Few-shot examples before a question."""

    count: int = Field(0, ge=0, le=100, description="number of few-shot examples")
    choose: Literal["same", "first", "each"] = Field(
        "same",
        description=(
            "`same`: sampled once, for all questions; `first`: the first rows; `each`: sampled for every question, as"
            " the lm-evaluation-harness does"
        ),
    )
    seed: int = Field(1234, description="sampling seed")
    draw_extra: bool | None = Field(
        None,
        description=(
            "`each`: draw one example more, and leave out the question itself, as the lm-evaluation-harness does;"
            " default: where the examples are drawn from the questions. A question is never its own example"
        ),
    )
    same_group: bool = Field(False, description="only rows of the question's group")
    rows: list[dict[str, Any]] = Field([], description="the examples themselves, where no dataset has them")


class FilterStep(Config):
    """One filter step from the generated text to the answer."""

    how: FilterFunction = Field(
        description=(
            "`regex`: a match of `pattern`; `strip` whitespace; `lower`, `upper` case; `first_line`; `final_answer`:"
            " after `Answer:`, `####` or boxed; `code`: the last fenced block"
        )
    )
    pattern: str = Field("", description="regular expression; the first group that matched is the answer")
    pick: int = Field(0, description="index of the match: 0 the first, -1 the last (lm-eval's group_select)")
    fallback: str = Field("[invalid]", description="the answer where nothing matched")


class MetricSpec(Config):
    """A metric and its options."""

    name: str = Field(description="name of a metric or of a score function")
    ignore_case: bool = Field(False, description="for exact_match")
    ignore_punctuation: bool = Field(False, description="for exact_match")
    ignore: list[str] = Field(
        [], description="for exact_match: regular expressions whose matches are removed from answer and reference"
    )
    k: int = Field(1, ge=1, description="for pass_at: number of samples k")
    of: str = Field("", description="for pass_at: score function that decides which samples pass")


class Task(Config):
    """One task, as defined in its YAML file."""

    name: str = Field(description="the task's name")
    what: str = Field("", description="one line: what the score measures")
    kind: Kind = Field(
        "generate",
        description=(
            "request type. `choice`: the most probable option (multiple_choice); `likelihood`: whether greedy decoding"
            " produces the answer (loglikelihood); `perplexity`: of whole documents (loglikelihood_rolling);"
            " `generate`: generate, then compare (generate_until)"
        ),
    )
    rows: Literal["raw", "chat"] = Field(
        "raw",
        description=(
            "`raw`: JSON objects with any fields; `chat`: conversations of the stage data.chat, whose last turn is the"
            " reference unless `question` is set"
        ),
    )
    data: str = Field("", description="reference of the default dataset")
    format: str = Field(
        "", description="for `rows: chat`: format with which data.chat reads `data`; default: detect it for each row"
    )
    split: str = Field("", description="read only files of this split, such as test-00000-of-00001.parquet")
    only: str = Field(
        "",
        description="row filter, a template: rows for which it renders to nothing, False or 0 are skipped and counted",
    )
    examples: str = Field(
        "",
        description=("reference of the few-shot dataset; default: `data`, without the row itself"),
    )
    examples_split: str = Field("", description="split of the few-shot dataset")
    description: str = Field("", description="template of the instruction at the start of the prompt")
    question: str = Field(
        "", description="template of the question (lm-eval's doc_to_text); for `perplexity` the document"
    )
    contexts: str | list[str] = Field(
        "", description="for `choice` where the options differ in the context, not the continuation: template of a list"
    )
    choices: str | list[str] = Field(
        "", description="for `choice`: the options, or the template of a list (lm-eval's doc_to_choice)"
    )
    answer: str | int | dict[str, Any] = Field(
        "",
        description=(
            "template of the right answer (lm-eval's doc_to_target): text, index or text of a choice, or a list of"
            " them; or the fields that a score function reads"
        ),
    )
    example_answer: str = Field("", description="template of the answer shown in few-shot examples; default: `answer`")
    prefix: str = Field("", description="template of the prefilled start of the answer (lm-eval's gen_prefix)")
    before_answer: str = Field(
        " ", description="between question and answer in plain prompts (lm-eval's target_delimiter)"
    )
    delimit_answer: bool = Field(
        True, description="put `before_answer` before a scored option too, not only in few-shot examples"
    )
    refuse_numeric_question: bool = Field(
        False,
        description=(
            "for `choice`: refuse a row whose question is a number; in the lm-evaluation-harness it is an index"
            " (multiple inputs), which is written as `contexts` here"
        ),
    )
    between: str = Field("\n\n", description="between few-shot examples in plain prompts (lm-eval's fewshot_delimiter)")
    shots: FewShotConfig = Field(FewShotConfig(), description="few-shot examples")
    prompt: Literal["plain", "chat"] = Field(
        "chat", description="`plain`: text that the model continues; `chat`: turns in the model's chat template"
    )
    max_tokens: int = Field(256, gt=0, description="maximum new tokens of a completion")
    stop: list[str] = Field([], description="stop strings")
    temperature: float = Field(0.0, ge=0, description="sampling temperature; 0 = greedy decoding")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling, where temperature is above 0")
    samples: int = Field(1, gt=0, le=1000, description="completions per question; more than one requires a temperature")
    extract: dict[str, list[FilterStep]] = Field(
        {"": []},
        description="answer extraction: named filters, each a list of steps; every metric is reported for each filter",
    )
    metrics: list[MetricSpec] = Field(description="metrics to report; the first is the score")
    group: str = Field(
        "", description="template of the cluster that a row belongs to: confidence intervals resample whole groups"
    )
    window: int = Field(2048, gt=1, description="for `perplexity`: maximum context tokens")
    stride: int = Field(
        0,
        ge=0,
        description="for `perplexity`: tokens scored in each window after the first; 0 = all, windows do not overlap",
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
            raise ValueError("extract is empty: name at least one filter, or leave it out")
        for pattern in (
            *(s.pattern for steps in self.extract.values() for s in steps),
            *(p for m in self.metrics for p in m.ignore),
        ):
            try:
                expressions.compile(pattern)
            except expressions.error as error:
                raise ValueError(f"{pattern!r} is not a valid regular expression ({error})") from None
        if self.kind == "choice" and not self.choices and not self.contexts:
            raise ValueError("a task of kind choice needs `choices` (doc_to_choice), or `contexts`")
        if self.rows == "raw" and self.kind in ("generate", "perplexity") and not self.question:
            raise ValueError(f"a task of kind {self.kind} over raw rows needs `question`")
        if self.rows == "chat" and not self.question and (self.kind != "generate" or self.prompt == "plain"):
            raise ValueError(
                "conversations without `question` need kind generate and prompt chat; for anything else set `question`,"
                " a template over their fields"
            )
        if self.samples > 1 and not self.temperature:
            raise ValueError(f"samples is {self.samples}, but temperature is 0: all completions would be the same")
        if self.stride and self.stride > self.window:
            raise ValueError(f"stride {self.stride} is above window {self.window}: tokens would be skipped")
        if max((m.k for m in self.metrics), default=1) > self.samples:
            raise ValueError(
                f"pass_at k={max(m.k for m in self.metrics)} needs samples >= k, but samples is {self.samples}"
            )
        return self
