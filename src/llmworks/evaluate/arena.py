"""Stage `evaluate.arena`: rank models by pairwise votes of people (`llmworks arena`) and of LLM judges
(`evaluate.judge`).

Does not load a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from llmworks.core.artifact import Config, Dataset, Report
from llmworks.core.context import Context
from llmworks.core.errors import DataError
from llmworks.data.store.jsonl import RejectedRows
from llmworks.data.store.raw_rows import read_raw_rows
from llmworks.evaluate.statistics.ratings import (
    Vote,
    bootstrap_ratings,
    bradley_terry,
    elo,
    percentile_interval,
    relative_length,
)

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder

VOTE_SCORES = {"A": 1.0, "B": 0.0, "C": 0.5}


class ArenaConfig(Config):
    """Votes to count and bootstrap settings."""

    voters: Literal["all", "people", "judges"] = Field(
        "all", description="whose votes are rated; human-judge agreement is reported where both voted on a pair"
    )
    bootstrap_iters: int = Field(500, ge=50, description="number of bootstrap resamples for the intervals")
    seed: int = Field(0, description="bootstrap seed")


@dataclass(frozen=True)
class Ballot:
    """One pairwise vote, with model names."""

    question: str
    a: str
    b: str
    vote: str
    voter: str
    person: bool
    lengths: tuple[int, int]


def arena(
    config: ArenaConfig, ctx: Context, votes: list[Dataset] | None = None, judge_reports: list[Report] | None = None
) -> Report:
    """Fit Bradley-Terry ratings with 95% intervals, with and without length control; also Elo and pairwise win rates.

    `votes`: files written by `llmworks arena`, or rows of {question, a, b, vote, voter}. Either input may be left out.
    Errors: DataError for malformed votes, or too few.
    """
    ballots, counted, names = _count_ballots(votes, judge_reports, config)
    rated = [
        Vote(names.index(b.a), names.index(b.b), VOTE_SCORES[b.vote], relative_length(*b.lengths), b.question)
        for b in counted
    ]
    plain, _ = bradley_terry(rated, len(names))
    resampled, questions = bootstrap_ratings(rated, len(names), seed=config.seed, resamples=config.bootstrap_iters)
    low, high = percentile_interval(resampled, questions)
    styled, weight = bradley_terry(rated, len(names), style=True)
    order = sorted(range(len(names)), key=lambda i: -plain[i])
    tallies = _count_votes(counted)
    online = elo(rated, len(names))
    page = ctx.report
    best = names[order[0]]
    page.title = "Arena"
    not_distinguishable = [
        names[i] for i in order[1:] if percentile_interval(resampled[:, order[0]] - resampled[:, i], questions)[0] <= 0
    ]
    significance_note = (
        f"; not significantly different from {', '.join(not_distinguishable)}" if not_distinguishable else ""
    )
    page.subtitle = (
        f"{len(counted)} votes on {len(names)} models; {best} leads with {plain[order[0]]:.0f} (95% interval"
        f" {low[order[0]]:.0f} to {high[order[0]]:.0f}){significance_note}."
    )
    _describe_ratings(names, order, page, weight, styled, plain, low, high, online, tallies)
    _describe_wins(page, order, counted, names, plain, low, high)
    metrics: dict[str, Any] = {
        "votes": len(counted),
        "models": len(names),
        "best": best,
        "not_significant": len(not_distinguishable),
        "style": weight,
    }
    agreement = _compute_agreement(ballots)
    if agreement:
        metrics["agreement"] = agreement[0]
        page.add_text("Human-judge agreement", f"{agreement[0]:.0%} on the {agreement[1]} pairs that both voted on.")
    page.data = {
        "ratings": {
            names[i]: {
                "rating": float(plain[i]),
                "low": float(low[i]),
                "high": float(high[i]),
                "at_equal_length": float(styled[i]),
                "elo": online[i],
            }
            for i in order
        },
        "metrics": metrics,
    }
    return Report(ctx.out, metrics=metrics)


def _count_ballots(
    votes: list[Dataset] | None, judged: list[Report] | None, config: ArenaConfig
) -> tuple[list[Ballot], list[Ballot], list[str]]:
    """Return all ballots, the counted ones and their model names. DataError where they cannot be rated together."""
    ballots = [b for data in votes or [] for b in read_votes(data)] + [
        b for report in judged or [] for b in read_judge_votes(report)
    ]
    counted = [b for b in ballots if config.voters == "all" or b.person == (config.voters == "people")]
    names = sorted({name for b in counted for name in (b.a, b.b)})
    if len(names) < 2 or len(counted) < 10:
        raise DataError(
            f"{len(counted)} votes on {len(names)} models are too few for ratings; at least 10 on 2 are needed"
        )
    disconnected = _find_disconnected(counted, names)
    if disconnected:
        raise DataError(
            f"no vote connects {', '.join(disconnected[0][:3])} with {', '.join(disconnected[1][:3])}, so their"
            " ratings cannot be"
            " compared; collect votes between the two groups"
        )
    return ballots, counted, names


def _describe_ratings(
    names: list[str],
    order: list[int],
    page: ReportBuilder,
    weight: float,
    styled: Any,
    plain: Any,
    low: Any,
    high: Any,
    online: list[float],
    tallies: Counter[str],
) -> None:
    """Add the table of ratings."""
    rank_styled = sorted(range(len(names)), key=lambda i: -styled[i])
    rows = [
        (
            place,
            names[i],
            f"{plain[i]:.0f}",
            f"{low[i]:.0f} to {high[i]:.0f}",
            f"{styled[i]:.0f}",
            rank_styled.index(i) + 1,
            f"{online[i]:.0f}",
            tallies[names[i]],
        )
        for place, i in enumerate(order, 1)
    ]
    page.add_table(
        "Ratings",
        ("", "model", "Bradley-Terry", "95% interval", "length-controlled", "length-controlled rank", "Elo", "votes"),
        rows,
        f"A difference of 100 is a win rate of 64%. Length-controlled: the effect of answer length ({weight:+.2f} nats"
        " for an answer many times as long) is removed. Elo depends on the order of votes.",
    )


def _describe_wins(
    page: ReportBuilder, order: list[int], counted: list[Ballot], names: list[str], plain: Any, low: Any, high: Any
) -> None:
    """Add the rating intervals, the pairwise win rates and the voters."""
    page.add_intervals(
        "Bradley-Terry ratings", [(names[i], float(plain[i]), float(low[i]), float(high[i])) for i in order], x="rating"
    )
    page.add_table(
        "Win rates",
        ("model", *(names[i] for i in order)),
        [(names[i], *(_format_win_rate(counted, names[i], names[j]) if i != j else "" for j in order)) for i in order],
        "Win rate of the row's model against the column's; a tie counts half.",
    )
    voters = Counter(b.voter for b in counted)
    page.add_table("Voters", ("voter", "votes"), voters.most_common(40))


def read_votes(data: Dataset) -> list[Ballot]:
    """Read votes of people. DataError for a malformed row."""
    rejected = RejectedRows()
    out: list[Ballot] = []
    for file, number, row in read_raw_rows(data.path, rejected):
        where = f"{data.name}: {file} row {number}"
        missing = next(
            (k for k in ("question", "a", "b", "vote") if not isinstance(row.get(k), str) or not row[k]), None
        )
        if missing:
            raise DataError(f"{where}: has no `{missing}`; a vote is {{question, a, b, vote: A, B or C, voter}}")
        if row["vote"] not in VOTE_SCORES or row["a"] == row["b"]:
            raise DataError(
                f"{where}: the vote {row['vote']!r} must be A, B or C (a tie)"
                if row["vote"] not in VOTE_SCORES
                else f"{where}: {row['a']!r} is compared with itself"
            )
        lengths = row.get("lengths")
        has_lengths = isinstance(lengths, list) and len(lengths) == 2 and all(isinstance(n, int) for n in lengths)
        out.append(
            Ballot(
                row["question"],
                row["a"],
                row["b"],
                row["vote"],
                str(row.get("voter") or "someone"),
                True,
                (lengths[0], lengths[1]) if has_lengths and isinstance(lengths, list) else (0, 0),
            )
        )
    if rejected.rows:
        raise DataError(
            f"{data.name}: {len(rejected.rows)} votes cannot be read, the first: {rejected.rows[0]['reason']}"
        )
    return out


def read_judge_votes(report: Report) -> list[Ballot]:
    """Read the votes of a pairwise `evaluate.judge` report. DataError for any other report."""
    data = report.read()
    if not data.get("pairs"):
        raise DataError(
            f"{report.name}: is not a pairwise judgment of two evaluations (`llmworks evaluate judge` with --baseline)"
        )
    a, b = data.get("models") or ("", "")
    if a == b:
        raise DataError(f"{report.name}: both evaluations are of a model named {a!r}; give the models different names")
    try:
        found = [
            Ballot(str(p["question"]), str(a), str(b), vote, judge, False, (int(p["lengths"][0]), int(p["lengths"][1])))
            for p in data["pairs"]
            for judge, vote in p["verdicts"].items()
        ]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        found = []
    if not found or any(ballot.vote not in VOTE_SCORES for ballot in found):
        raise DataError(f"{report.name}: report.json was edited or is corrupt; run `evaluate.judge` again")
    return found


def _find_disconnected(ballots: Sequence[Ballot], names: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """Return two groups of models with no vote between them; None where all are connected."""
    reached, todo = {names[0]}, [names[0]]
    while todo:
        here = todo.pop()
        for b in ballots:
            other = b.b if b.a == here else b.a if b.b == here else None
            if other is not None and other not in reached:
                reached.add(other)
                todo.append(other)
    return None if len(reached) == len(names) else (sorted(reached), sorted(set(names) - reached))


def _count_votes(ballots: Sequence[Ballot]) -> Counter[str]:
    return Counter(name for b in ballots for name in (b.a, b.b))


def _format_win_rate(ballots: Sequence[Ballot], name: str, other: str) -> str:
    won = [
        VOTE_SCORES[b.vote] if b.a == name else 1 - VOTE_SCORES[b.vote] for b in ballots if {b.a, b.b} == {name, other}
    ]
    return f"{sum(won) / len(won):.0%} of {len(won)}" if won else "–"


def _compute_agreement(ballots: Sequence[Ballot]) -> tuple[float, int] | None:
    """Return (share of pairs on which people and judges prefer the same side, number of pairs both voted on)."""
    sides: dict[tuple[str, str, str], dict[bool, list[float]]] = {}
    for b in ballots:
        first, second = sorted((b.a, b.b))
        won = VOTE_SCORES[b.vote] if b.a == first else 1 - VOTE_SCORES[b.vote]
        sides.setdefault((b.question, first, second), {}).setdefault(b.person, []).append(won - 0.5)
    both = [v for v in sides.values() if len(v) == 2]
    if not both:
        return None
    sign = [[(sum(v[k]) > 0) - (sum(v[k]) < 0) for k in (True, False)] for v in both]
    return sum(x == y for x, y in sign) / len(sign), len(sign)
