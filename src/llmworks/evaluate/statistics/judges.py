"""Judge statistics: agreement with each other and with people; position, length and self-preference bias."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmworks.core.artifact import Model, Report
from llmworks.evaluate.statistics import agreement
from llmworks.evaluate.statistics.bootstrap import mean_interval


@dataclass
class JudgeVerdicts:
    """One judge's verdicts: by sample, a grade (0 to 1, or a reward) or A, B or C; `unparsable`: number of
    responses without a verdict.
    """

    name: str
    verdicts: dict[str, Any] = field(default_factory=dict)
    orders: dict[str, tuple[str, str]] = field(default_factory=dict)
    responses: dict[str, str] = field(default_factory=dict)
    unparsable: int = 0
    unbounded: bool = False


def describe_biases(
    judge_verdicts: Sequence[JudgeVerdicts],
    judges: Mapping[str, Model],
    samples: Mapping[str, Any],
    others: Mapping[str, Any],
    answers: Report,
    against: Report | None,
    page: Any,
) -> None:
    """Add position, length and self-preference bias by judge."""
    rows = []
    for one in judge_verdicts:
        ids = list(one.verdicts)
        longer, decided = agreement.length_bias(
            [one.verdicts[i] for i in ids], [(len(samples[i]["text"]), len(others[i]["text"])) for i in ids]
        )
        place = agreement.position_bias(*zip(*one.orders.values(), strict=True)) if one.orders else {}
        digest = judges[one.name].digest
        own_letter = (
            "A"
            if digest == answers.about.get("model")
            else "B"
            if against and digest == against.about.get("model")
            else ""
        )
        rest = [o for o in judge_verdicts if o is not one]
        own = ""
        if own_letter:
            share = _win_rate(one.verdicts.values(), own_letter)
            outside = [v for o in rest for i, v in o.verdicts.items() if i in one.verdicts]
            own = f"{share:.0%} for its own answers" + (
                f"; other judges {_win_rate(outside, own_letter):.0%}"
                if outside
                else "; no other judge to compare with"
            )
        position_rates = {
            k: f"{place[k]:.0%}" if place else "–" for k in ("consistent", "prefers_first", "prefers_second")
        }
        rows.append(
            (
                one.name,
                position_rates["consistent"],
                position_rates["prefers_first"],
                position_rates["prefers_second"],
                f"{longer:.0%} of {decided}" if decided else "–",
                own or "–",
            )
        )
    page.add_table(
        "Judge biases",
        ("judge", "consistent in both orders", "prefers first", "prefers second", "longer wins", "self-preference"),
        rows,
        "Pairs are shown in both orders; a verdict that changes with the order counts as a tie. Longer wins: share of"
        " decided pairs of unequal length won by the longer answer.",
    )


def _win_rate(verdicts: Any, letter: str) -> float:
    values = [1.0 if v == letter else 0.5 if v == "C" else 0.0 for v in verdicts]
    return sum(values) / len(values) if values else float("nan")


def _compute_kappa(one: Sequence[Any], other: Sequence[Any]) -> float:
    return (
        agreement.weighted_kappa(one, other)
        if all(isinstance(v, float) for v in (*one, *other))
        else agreement.kappa(one, other)
    )


def describe_agreement(judge_verdicts: Sequence[JudgeVerdicts], page: Any) -> None:
    """Add the pairwise agreement of judges."""
    rows = []
    for place, one in enumerate(judge_verdicts):
        for other in judge_verdicts[place + 1 :]:
            ids = [i for i in one.verdicts if i in other.verdicts]
            if ids and one.unbounded == other.unbounded:
                a, b = [one.verdicts[i] for i in ids], [other.verdicts[i] for i in ids]
                rows.append(
                    (
                        one.name,
                        other.name,
                        len(ids),
                        f"{sum(x == y for x, y in zip(a, b, strict=True)) / len(ids):.0%}",
                        _format_kappa(_compute_kappa(a, b)),
                    )
                )
    if rows:
        page.add_table("Inter-judge agreement", ("judge", "judge", "samples", "same verdict", "kappa"), rows)


def describe_human_agreement(
    judge_verdicts: Sequence[JudgeVerdicts],
    jury: Mapping[str, Any],
    human_labels: Mapping[str, Any],
    page: Any,
    *,
    pairs: bool,
) -> dict[str, Any]:
    """Add the agreement with human labels, by judge and of the jury."""
    rows: list[tuple[Any, ...]] = []
    out: dict[str, Any] = {}
    sides: list[tuple[str, Mapping[str, Any]]] = [
        ("the jury", jury),
        *((one.name, one.verdicts) for one in judge_verdicts if pairs or not one.unbounded),
    ]
    for name, verdicts in sides:
        ids = [i for i in human_labels if i in verdicts]
        if not ids:
            continue
        a, b = [verdicts[i] for i in ids], [human_labels[i] for i in ids]
        same = mean_interval([float(x == y) if pairs else 1 - abs(x - y) for x, y in zip(a, b, strict=True)])
        value = _compute_kappa(a, b)
        rows.append((name, len(ids), f"{same.value:.1%}", f"{same.low:.1%} to {same.high:.1%}", _format_kappa(value)))
        if name == "the jury" and not math.isnan(value):
            out = {"kappa": value, "num_labeled": len(ids)}
    page.add_table(
        "Agreement with human labels",
        ("judge", "labeled samples", "same verdict" if pairs else "1 - distance of grades", "95% interval", "kappa"),
        rows or [("none of the labeled samples has a verdict", "", "", "", "")],
    )
    return out


def _format_kappa(value: float) -> str:
    return "– (all labels are the same)" if math.isnan(value) else f"{value:.2f}"
