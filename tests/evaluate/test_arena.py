"""Ratings against scikit-learn's logistic regression, known strengths and hand-worked Elo; votes in the terminal."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmworks.cli import main
from llmworks.core.artifact import Artifact, Dataset, Report
from llmworks.core.context import Context
from llmworks.core.errors import DataError, UserError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.evaluate.arena import ArenaConfig, arena, read_judge_votes
from llmworks.evaluate.statistics.ratings import (
    SCALE,
    Vote,
    bootstrap_ratings,
    bradley_terry,
    elo,
    percentile_interval,
    relative_length,
)
from llmworks.evaluate.voting import collect_votes, list_matches
from llmworks.runtime.session import load


def simulated(strengths: list[float], count: int, seed: int, taste: float = 0.0) -> list[Vote]:
    """Votes by the model's own law; `taste`: liking for longer answers, in nats. The last model is verbose."""
    rng = np.random.default_rng(seed)
    out = []
    for number in range(count):
        a, b = rng.choice(len(strengths), 2, replace=False)
        sizes = [rng.integers(50, 150) * (4 if m == len(strengths) - 1 else 1) for m in (a, b)]
        style = relative_length(int(sizes[0]), int(sizes[1]))
        p = 1 / (1 + math.exp(-(strengths[a] - strengths[b] + taste * style)))
        out.append(Vote(int(a), int(b), float(rng.random() < p), style, f"q{number}"))
    return out


def test_bradley_terry_is_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    votes = simulated([0.0, 0.5, 1.0, 0.2], 600, 0)
    ratings, weight = bradley_terry(votes, 4, style=True)
    design = np.zeros((600, 5))
    for row, v in enumerate(votes):
        design[row, v.a], design[row, v.b], design[row, 4] = 1, -1, v.style
    fitted = (
        LogisticRegression(fit_intercept=False, C=1e3, tol=1e-10, max_iter=5000)
        .fit(design, [v.won for v in votes])
        .coef_[0]
    )
    assert ratings - ratings.mean() == pytest.approx(SCALE * (fitted[:4] - fitted[:4].mean()), abs=0.05)
    assert weight == pytest.approx(fitted[4], abs=1e-3)


def test_ties_are_half_a_vote_for_each() -> None:
    ties = [Vote(0, 1, 0.5)] * 10
    halves = [Vote(0, 1, 1.0)] * 5 + [Vote(0, 1, 0.0)] * 5
    assert bradley_terry([*ties, Vote(0, 1, 1.0)], 2)[0] == pytest.approx(
        bradley_terry([*halves, Vote(1, 0, 0.0)], 2)[0]
    )


def test_three_of_four_wins_is_190_points() -> None:
    """Odds of 3 to 1: 400 * log10(3) = 190.8."""
    ratings, _ = bradley_terry([Vote(0, 1, 1.0)] * 300 + [Vote(0, 1, 0.0)] * 100, 2)
    assert ratings[0] - ratings[1] == pytest.approx(400 * math.log10(3), abs=0.1)
    assert ratings.mean() == pytest.approx(1000)


def test_one_that_won_all_stays_finite() -> None:
    ratings, _ = bradley_terry([Vote(0, 1, 1.0)] * 20, 2)
    assert np.isfinite(ratings).all()
    assert ratings[0] > ratings[1]


def test_intervals_cover_the_truth() -> None:
    strengths = [0.0, 0.4, 0.8]
    truth = 1000 + SCALE * (np.array(strengths) - np.mean(strengths))
    hits = 0
    for seed in range(120):
        low, high = percentile_interval(
            *bootstrap_ratings(simulated(strengths, 150, seed), 3, seed=seed, resamples=150)
        )
        hits += int(((low <= truth) & (truth <= high)).sum())
    assert 0.92 <= hits / 360 <= 0.98


def test_length_is_taken_out() -> None:
    """All are equally good, but voters like long answers, which the last one writes."""
    votes = simulated([0.0, 0.0, 0.0], 4000, 1, taste=1.5)
    plain, _ = bradley_terry(votes, 3)
    styled, weight = bradley_terry(votes, 3, style=True)
    assert plain[2] - plain[:2].mean() > 100
    assert abs(styled[2] - styled[:2].mean()) < 60
    assert weight == pytest.approx(1.5, abs=0.3)


def test_elo_by_hand() -> None:
    """K 32: equals meet, the winner gets 16; then 1016 loses to 984: expected 0.546, loses 17.47."""
    assert elo([Vote(0, 1, 1.0)], 2, k=32) == [1016, 984]
    second = elo([Vote(0, 1, 1.0), Vote(0, 1, 0.0)], 2, k=32)
    expected = 1 / (1 + 10 ** (-32 / 400))
    assert second == pytest.approx([1016 - 32 * expected, 984 + 32 * expected])


def evaluation(tmp_path: Path, name: str, texts: list[str]) -> Report:
    (tmp_path / name).mkdir()
    samples = [{"id": str(i), "question": f"question {i}", "text": t} for i, t in enumerate(texts)]
    (tmp_path / name / "report.json").write_text(json.dumps({"model": name, "samples": samples}))
    return Report(tmp_path / name, name=name)


def test_votes_in_the_terminal(tmp_path: Path) -> None:
    reports = [
        evaluation(tmp_path, "x", ["good", "same", "good\x1b[31m"]),
        evaluation(tmp_path, "y", ["bad", "same", "bad"]),
    ]
    file, screen = tmp_path / "votes.jsonl", io.StringIO()
    assert collect_votes(reports, file, "ann", 0, io.StringIO("what\na\nb\n"), screen) == 2
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {r["sample"] for r in rows} == {"0", "2"}  # equal answers are not asked
    assert [r["vote"] for r in rows] == ["A", "B"]
    shown = screen.getvalue()
    assert "\x1b" not in shown  # answers do not command the terminal
    assert "x" not in shown.replace("x1b", "").replace("next", "").replace(
        "(a tie)", ""
    )  # nobody is named, ever: styles would be known after one vote
    with pytest.raises(UserError, match="ann has already voted on all pairs"):
        collect_votes(reports, file, "ann", 0, io.StringIO(), screen)
    assert collect_votes(reports, file, "ben", 0, io.StringIO("s\nq\n"), screen) == 0
    assert collect_votes(reports, file, "ben", 0, io.StringIO(""), screen) == 0
    file.write_text(file.read_text() + "no JSON")
    with pytest.raises(UserError, match="is not a votes file"):
        collect_votes(reports, file, "ann", 0, io.StringIO(), screen)


def test_sides_are_drawn() -> None:
    answers = {m: {str(i): {"question": str(i), "text": f"{m}{i}"} for i in range(200)} for m in ("x", "y")}
    made = list_matches(answers, set(), 0)
    assert len({i for i, _, _ in made}) == 200
    assert 70 < sum(a == "x" for _, a, _ in made) < 130


def run(
    tmp_path: Path, rows: list[dict[str, Any]], judged: list[Report] | None = None, **config: Any
) -> tuple[Report, dict[str, Any]]:
    (tmp_path / "votes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "out").mkdir(exist_ok=True)
    page = ReportBuilder()

    def never(artifact: Artifact) -> Any:
        raise AssertionError

    data = load(str(tmp_path / "votes.jsonl"))
    assert isinstance(data, Dataset)
    made = arena(
        ArenaConfig(bootstrap_iters=60, **config),
        Context(tmp_path / "out", tmp_path, 0, Progress(quiet=True), page, never),
        [data],
        judged,
    )
    page.write(tmp_path / "out")
    return made, page.data


def votes(count: int, a: str, b: str, share: float) -> list[dict[str, Any]]:
    return [
        {
            "question": f"q{i}",
            "a": a,
            "b": b,
            "vote": "A" if i < share * count else "B",
            "voter": "ann",
            "lengths": [10, 20],
        }
        for i in range(count)
    ]


def test_the_stage_joins_people_and_judges(tmp_path: Path) -> None:
    (tmp_path / "j").mkdir()
    pairs = [
        {"id": str(i), "question": f"q{i}", "lengths": [10, 20], "verdicts": {"judge": "A" if i < 30 else "B"}}
        for i in range(40)
    ]
    (tmp_path / "j" / "report.json").write_text(json.dumps({"models": ["x", "y"], "pairs": pairs}))
    judged = [Report(tmp_path / "j", name="j")]
    made, data = run(tmp_path, [*votes(40, "x", "y", 0.7), *votes(40, "y", "z", 0.6)], judged)
    assert list(data["ratings"]) == ["x", "y", "z"]
    assert made.metrics["votes"] == 120
    assert made.metrics["agreement"] == pytest.approx(38 / 40)
    assert run(tmp_path, votes(40, "x", "y", 0.7), judged, voters="people")[0].metrics["votes"] == 40
    assert run(tmp_path, votes(40, "x", "y", 0.7), judged, voters="judges")[0].metrics["votes"] == 40


def test_a_leader_by_chance_is_not_told_apart(tmp_path: Path) -> None:
    for share, beside in ((0.55, 1), (0.9, 0)):
        made, _ = run(tmp_path, votes(40, "x", "y", share))
        assert made.metrics["not_significant"] == beside
        assert ("not significantly different from y" in (tmp_path / "out" / "report.md").read_text()) == bool(beside)


def test_a_judgement_that_was_changed_by_hand(tmp_path: Path) -> None:
    good = {"question": "q", "lengths": [1, 2], "verdicts": {"judge": "A"}}
    (tmp_path / "j").mkdir()
    for pair in ({**good, "lengths": 3}, {**good, "verdicts": ["A"]}, {**good, "verdicts": {"judge": "left"}}, "pair"):
        (tmp_path / "j" / "report.json").write_text(json.dumps({"models": ["x", "y"], "pairs": [good, pair]}))
        with pytest.raises(DataError, match="edited or is corrupt"):
            read_judge_votes(Report(tmp_path / "j", name="j"))


WRONG = {
    "too few": (votes(9, "x", "y", 0.5), "9 votes on 2 models are too few"),
    "islands": ([*votes(10, "x", "y", 0.5), *votes(10, "u", "v", 0.5)], "no vote connects u, v with x, y"),
    "no vote": ([{"question": "q", "a": "x", "b": "y"}], "row 1: has no `vote`"),
    "another word": ([{"question": "q", "a": "x", "b": "y", "vote": "left"}], "the vote 'left' must be A, B or C"),
    "itself": ([{"question": "q", "a": "x", "b": "x", "vote": "A"}], "'x' is compared with itself"),
}


@pytest.mark.parametrize("what", WRONG)
def test_votes_that_cannot_be_counted(what: str, tmp_path: Path) -> None:
    rows, message = WRONG[what]
    with pytest.raises(DataError, match=message):
        run(tmp_path, rows)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(r) + "\n" for r in votes(20, "x", "y", 0.7)))
    assert main(["evaluate", "arena", "--votes", str(tmp_path / "v.jsonl"), "--quiet"]) == 0
    assert "votes 20" in capsys.readouterr().out
    assert main(["arena", str(tmp_path / "v.jsonl"), "--votes", str(tmp_path / "w.jsonl")]) == 2
    assert "expected an evaluation" in capsys.readouterr().err
