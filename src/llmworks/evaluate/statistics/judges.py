"""Judge statistics: agreement with each other and with people; position, length and self-preference bias."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmworks.core.artifact import Model, Report
from llmworks.evaluate.statistics import agreement
from llmworks.evaluate.statistics.bootstrap import mean_interval

if TYPE_CHECKING:
    pass


@dataclass
class Judged:
    """One judge's verdicts: by sample, a grade (0 to 1, or a reward) or A, B or C; `unparsable`: number of
    responses without a verdict.
    """

    name: str
    verdicts: dict[str, Any] = field(default_factory=dict)
    orders: dict[str, tuple[str, str]] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)
    unread: int = 0
    unbounded: bool = False


def _biases(
    found: Sequence[Judged],
    judges: Mapping[str, Model],
    samples: Mapping[str, Any],
    others: Mapping[str, Any],
    answers: Report,
    against: Report | None,
    page: Any,
) -> None:
    """Add position, length and self-preference bias by judge."""
    rows = []
    for one in found:
        ids = list(one.verdicts)
        longer, decided = agreement.length(
            [one.verdicts[i] for i in ids], [(len(samples[i]["text"]), len(others[i]["text"])) for i in ids]
        )
        place = agreement.position(*zip(*one.orders.values(), strict=True)) if one.orders else {}
        digest = judges[one.name].digest
        kin = (
            "A"
            if digest == answers.about.get("model")
            else "B"
            if against and digest == against.about.get("model")
            else ""
        )
        rest = [o for o in found if o is not one]
        own = ""
        if kin:
            share = _share(one.verdicts.values(), kin)
            outside = [v for o in rest for i, v in o.verdicts.items() if i in one.verdicts]
            own = f"{share:.0%} for its own answers" + (
                f"; other judges {_share(outside, kin):.0%}" if outside else "; no other judge to compare with"
            )
        told = {k: f"{place[k]:.0%}" if place else "–" for k in ("consistent", "prefers_first", "prefers_second")}
        rows.append(
            (
                one.name,
                told["consistent"],
                told["prefers_first"],
                told["prefers_second"],
                f"{longer:.0%} of {decided}" if decided else "–",
                own or "–",
            )
        )
    page.table(
        "Judge biases",
        ("judge", "consistent in both orders", "prefers first", "prefers second", "longer wins", "self-preference"),
        rows,
        "Pairs are shown in both orders; a verdict that changes with the order counts as a tie. Longer wins: share of"
        " decided pairs of unequal length won by the longer answer.",
    )


def _share(verdicts: Any, letter: str) -> float:
    values = [1.0 if v == letter else 0.5 if v == "C" else 0.0 for v in verdicts]
    return sum(values) / len(values) if values else float("nan")


def _kappa(one: Sequence[Any], other: Sequence[Any]) -> float:
    return (
        agreement.weighted_kappa(one, other)
        if all(isinstance(v, float) for v in (*one, *other))
        else agreement.kappa(one, other)
    )


def _among(found: Sequence[Judged], page: Any) -> None:
    """Add the pairwise agreement of judges."""
    rows = []
    for place, one in enumerate(found):
        for other in found[place + 1 :]:
            ids = [i for i in one.verdicts if i in other.verdicts]
            if ids and one.unbounded == other.unbounded:
                a, b = [one.verdicts[i] for i in ids], [other.verdicts[i] for i in ids]
                rows.append(
                    (
                        one.name,
                        other.name,
                        len(ids),
                        f"{sum(x == y for x, y in zip(a, b, strict=True)) / len(ids):.0%}",
                        _told(_kappa(a, b)),
                    )
                )
    if rows:
        page.table("Inter-judge agreement", ("judge", "judge", "samples", "same verdict", "kappa"), rows)


def _with_people(
    found: Sequence[Judged], jury: Mapping[str, Any], people: Mapping[str, Any], page: Any, *, pairs: bool
) -> dict[str, Any]:
    """Add the agreement with human labels, by judge and of the jury."""
    rows: list[tuple[Any, ...]] = []
    out: dict[str, Any] = {}
    sides: list[tuple[str, Mapping[str, Any]]] = [
        ("the jury", jury),
        *((one.name, one.verdicts) for one in found if pairs or not one.unbounded),
    ]
    for name, verdicts in sides:
        ids = [i for i in people if i in verdicts]
        if not ids:
            continue
        a, b = [verdicts[i] for i in ids], [people[i] for i in ids]
        same = mean_interval([float(x == y) if pairs else 1 - abs(x - y) for x, y in zip(a, b, strict=True)])
        value = _kappa(a, b)
        rows.append((name, len(ids), f"{same.value:.1%}", f"{same.low:.1%} to {same.high:.1%}", _told(value)))
        if name == "the jury" and not math.isnan(value):
            out = {"kappa": value, "labelled": len(ids)}
    page.table(
        "Agreement with human labels",
        ("judge", "labeled samples", "same verdict" if pairs else "1 - distance of grades", "95% interval", "kappa"),
        rows or [("none of the labeled samples has a verdict", "", "", "", "")],
    )
    return out


def _told(value: float) -> str:
    return "– (all labels are the same)" if math.isnan(value) else f"{value:.2f}"
