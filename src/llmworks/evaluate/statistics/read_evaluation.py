"""Read stored evaluations and check that they have the fields that the reader needs, with a one-line error if not."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from llmworks.core.artifact import Report
from llmworks.core.errors import DataError


class _StoredModel(BaseModel):
    """Base model: present fields must have these types; extra fields are allowed."""

    model_config = ConfigDict(extra="allow", strict=True)


class _StoredInterval(_StoredModel):
    value: float
    low: float
    high: float


class _StoredSample(_StoredModel):
    id: str
    question: str = ""
    group: str = ""
    row: str = ""
    prompt_digest: str = ""
    reference: str = ""
    reason: str = ""
    text: str = ""
    finish: str = ""
    chosen: str = ""
    score: float = 0.0
    scores: dict[str, float] = {}
    choices: list[str] = []
    gold: list[int] = []
    logprobs: list[float] = []
    answers: dict[str, list[str]] = {}


class _StoredEvaluation(_StoredModel):
    task: str = ""
    model: str = ""
    metric: str = ""
    shots: int = 0
    percent: bool = True
    better: Literal["higher", "lower"] = "higher"
    protocol: dict[str, Any] = {}
    definition: dict[str, Any] = {}
    intervals: dict[str, _StoredInterval] = {}
    samples: list[_StoredSample] = []


ALL_FIELDS = ("task", "model", "metric", "shots", "percent", "better", "protocol", "definition", "intervals", "samples")


def read_evaluation(report: Report, *needs: str, of_samples: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read the data of an evaluation.

    DataError for a report that is not an evaluation, lacks needed fields (its own or of any sample), or has duplicate
    sample ids.
    """
    data = report.read()
    missing = next((k for k in ("samples", *needs) if k not in data or (k == "samples" and not data[k])), None)
    if missing:
        raise DataError(
            f"{report.name}: is not a task evaluation (`llmworks evaluate`), or has an old format without `{missing}`;"
            " run the evaluation again"
        )
    try:
        _StoredEvaluation.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise DataError(
            f"{report.name}: report.json was edited or is corrupt: {'.'.join(map(str, first['loc']))}: {first['msg']};"
            " run the evaluation again"
        ) from None
    for number, sample in enumerate(data["samples"], 1):
        lacks = next((k for k in of_samples if k not in sample), None)
        if lacks:
            raise DataError(
                f"{report.name}: sample {sample['id']!r} (number {number}) has no `{lacks}`; run the evaluation again"
            )
    twice = [id for id, count in Counter(s["id"] for s in data["samples"]).items() if count > 1]
    if twice:
        raise DataError(f"{report.name}: two samples have the id {twice[0]!r}; run the evaluation again")
    if "metric" in needs and data["metric"] not in data.get("intervals", {data["metric"]: 0}):
        raise DataError(f"{report.name}: has no interval of its metric {data['metric']!r}; run the evaluation again")
    return data
