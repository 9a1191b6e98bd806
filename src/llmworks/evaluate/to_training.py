"""Stage `evaluate.to_training`: turn the rows that a model failed on into conversations for further training.

Only evaluations of the `dev` half of a dataset are accepted, so that the `test` half, on which the model is
measured, never gets into the training data. Does not load a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmworks.core.artifact import Config, Dataset, Report
from llmworks.core.context import Context
from llmworks.core.errors import DataError
from llmworks.core.types import Message, messages_to_json
from llmworks.data.card import finish_rows
from llmworks.data.store.rows import Row
from llmworks.evaluate.protocol.questions import build_questions, filter_rows, read_rows, select_half
from llmworks.evaluate.protocol.task import Task
from llmworks.evaluate.statistics.read_evaluation import read_evaluation

if TYPE_CHECKING:
    from llmworks.evaluate.protocol.questions import Question


class ToTrainingConfig(Config):
    """Which rows become training data."""

    pass_threshold: float = Field(1.0, gt=0, le=1, description="a sample with a score below this has failed")
    replay_ratio: float = Field(
        0.0,
        ge=0,
        le=1,
        description=("share of the passed rows to add as replay, against forgetting"),
    )


def to_training(config: ToTrainingConfig, evaluation: Report, data: Dataset, ctx: Context) -> Dataset:
    """Build conversations of the failed rows: the prompt and the reference answer.

    `data`: the dataset that was evaluated.

    Errors: DataError for an evaluation that is not of the dev half, for other rows, or where no row has a
    reference answer as text.
    """
    found = read_evaluation(evaluation, "protocol", "definition", "task", "model", of_samples=("score",))
    side = found.get("protocol", {}).get("side")
    if side != "dev":
        raise DataError(
            f"{evaluation.name}: evaluates {'the test half' if side == 'test' else 'all rows'}; training rows are taken"
            " from an evaluation with split_half: dev, and the model is then measured with split_half: test"
        )
    task = Task.model_validate(found["definition"])
    rows = {
        row["id"]: row
        for row in select_half(filter_rows(task, read_rows(task, data, task.split), data.name), "dev", task)
    }
    samples = {s["id"]: s for s in found["samples"]}
    unknown = next((i for i in samples if i not in rows), None)
    if unknown is not None:
        raise DataError(
            f"{data.name}: row {unknown!r} of the evaluation is not in its dev half; give the dataset that was"
            " evaluated"
        )
    failed = [i for i, s in samples.items() if s["score"] < config.pass_threshold]
    good = [i for i, s in samples.items() if s["score"] >= config.pass_threshold]
    taken = [*failed, *good[: round(config.replay_ratio * len(good))]]
    asked = build_questions(
        task.model_copy(update={"shots": task.shots.model_copy(update={"count": 0})}),
        [rows[i] for i in taken],
        [],
        same_pool=False,
    )
    made, dropped = _build_conversations(asked, samples, found)
    if not made:
        raise DataError(
            f"{evaluation.name}: no training data:"
            f" {'no row failed' if not taken else 'none of the failed rows has a reference answer as text'}"
        )
    return finish_rows(
        ctx,
        "evaluate.to_training",
        [data],
        made,
        dropped=dropped,
        metrics={"failed": len(failed), "num_correct": len(made) - len(failed) + sum(dropped.values())},
        note=f"failures of {found['model']} on {found['task']}, dev half",
    )


def _build_conversations(
    questions: list[Question], samples: dict[Any, Any], evaluation_data: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return a row for each question with a reference answer as text, and the reasons why others were dropped."""
    rows: list[Row] = []
    dropped: dict[str, int] = {}
    for question in questions:
        answer = question.references[0] if question.references else _get_text_answer(question.row.get("answer"))
        if not answer.strip():
            dropped["no right answer as text"] = dropped.get("no right answer as text", 0) + 1
            continue
        turns = question.turns[0] if question.turns else (Message("user", question.plain[0]),)
        score = samples[question.id]["score"]
        rows.append(
            {
                "id": question.id,
                "group": question.group or question.id,
                "messages": messages_to_json((*turns, Message("assistant", answer))),
                "tools": [],
                "answer": question.row.get("answer"),
                "extra": {"fields": {"failed_on": evaluation_data["task"], "score": score}},
            }
        )
    return rows, dropped


def _get_text_answer(answer: Any) -> str:
    """Return the SQL query of a structured answer; other fields only say how an answer is checked."""
    return str(answer.get("sql", "")) if isinstance(answer, Mapping) else ""
