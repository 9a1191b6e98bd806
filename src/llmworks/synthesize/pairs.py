"""Stage `synthesize.pairs`: preference pairs from a model's own completions, or from rated answers.

Several completions per prompt are scored by a verifier or a judge; a good and a bad one make a pair. The pairs are
on-policy when the model is the one to be aligned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError, UserError
from llmworks.core.types import Json, Message, messages_to_json
from llmworks.data.store.rows import Row
from llmworks.score import get_score_function, judge
from llmworks.synthesize.builder import Decoding, GeneratedText, GenerationPrompt, SyntheticDatasetBuilder, read_prompts


class PairsConfig(Config):
    """Source of completions and scores, and selection of pairs."""

    scorer: Literal["verifier", "judge", "ratings"] = Field(
        "verifier",
        description=(
            "verifier: scores by the row's `answer`; judge: grades of a model, needs the input `judge`; ratings:"
            " the row's own rated answers"
        ),
    )
    score_function: str = Field("verified", description="score function of the verifier")
    num_generations: int = Field(4, ge=2, le=64, description="completions sampled per prompt")
    min_margin: float = Field(0.5, gt=0, le=1, description="smallest score difference (0 to 1) of a pair")
    pairing: Literal["widest", "all"] = Field(
        "widest", description="widest: the best and the worst completion of a prompt; all: every pair with the margin"
    )
    max_length_ratio: float = Field(
        0.0,
        ge=0,
        description="largest length ratio of chosen to rejected, against length bias; 0: no limit",
    )
    ratings_field: str = Field(
        "ratings",
        description=(
            "scorer ratings: the field with a list of {text, rating}, or with the ratings of the answers in `answers`"
        ),
    )
    criteria: str = Field("", description="grading criteria for the judge, in words")
    limit: int | None = Field(None, gt=0, description="use only the first rows")
    decoding: Decoding = Field(Decoding(temperature=1.0), description="sampling parameters of completions")
    judge_decoding: Decoding = Field(
        Decoding(temperature=0.0, max_tokens=256), description="sampling parameters of the judge"
    )


class ScoredCompletion(NamedTuple):
    """A completion with its score from 0 to 1, the reason, and its prompt."""

    text: str
    score: float
    reason: str
    prompt: GenerationPrompt | None


def pairs(
    config: PairsConfig,
    data: Dataset,
    ctx: Context,
    model: Model | Adapter | None = None,
    judge: Model | Adapter | None = None,
) -> Dataset:
    """Create preference pairs for the prompts of conversations (their turns before the last answer).

    `model` samples completions (not with scorer ratings), `judge` grades them.

    Errors: UserError without the model or judge that `scorer` needs; DataError for rows that cannot be verified or
    have no ratings, or when no pair has the margin.
    """
    _check_inputs(config, judge, model)
    prompts = read_prompts(data, config.limit)
    with SyntheticDatasetBuilder(ctx, model, config.decoding, "synthesize.pairs") as builder:
        if config.scorer == "ratings":
            scored = {row["id"]: read_ratings(row, config.ratings_field) for row, _ in prompts}
        else:
            if config.scorer == "verifier":
                for row, turns in prompts:
                    get_score_function(config.score_function)(
                        turns, "", row
                    )  # fail on a row that cannot be scored before any request
            completions = _sample_completions(config, builder, prompts)
            scored = (
                _score_by_verifier(config, prompts, completions)
                if judge is None
                else _score_by_judge(config, builder, judge, prompts, completions)
            )
        for row, turns in prompts:
            selected = select_pairs(config, scored[row["id"]])
            if not selected:
                best = max((s.score for s in scored[row["id"]]), default=None)
                problem = (
                    "fewer than two different completions"
                    if len(scored[row["id"]]) < 2
                    else f"no margin (best score {best:.2g})"
                )
                builder.reject(row["id"], problem, "\n\n".join(s.text for s in scored[row["id"]]))
            _keep_pairs(selected, config, scored, row, builder, turns)
        longer = sum(len(r["chosen"][0]["content"]) > len(r["rejected"][0]["content"]) for r in builder.rows)
        share = longer / len(builder.rows) if builder.rows else 0.0
        return builder.finish(
            [data],
            summary=(
                f"{len(builder.rows):,} pairs from {len(prompts):,} prompts; the chosen completion is longer in"
                f" {share:.0%}."
            ),
            metrics={"chosen_longer": round(share, 4)},
            note=f"by {config.scorer}",
        )


def _check_inputs(config: PairsConfig, judge: Model | Adapter | None, model: Model | Adapter | None) -> None:
    """Check that the inputs match `scorer`.

    Errors: UserError.
    """
    if (config.scorer == "judge") != (judge is not None):
        raise UserError(
            "scorer judge needs the input `judge`"
            if judge is None
            else f"the input `judge` is for scorer judge; the scorer is {config.scorer}"
        )
    if (config.scorer == "ratings") == (model is not None):
        raise UserError(
            f"scorer {config.scorer} needs the input `model`"
            if model is None
            else "scorer ratings pairs the rows' own answers; remove the input `model`"
        )


def _keep_pairs(
    selected: list[tuple[ScoredCompletion, ScoredCompletion]],
    config: PairsConfig,
    scored: dict[Any, list[ScoredCompletion]],
    row: dict[str, Any],
    builder: SyntheticDatasetBuilder,
    turns: tuple[Message, ...],
) -> None:
    """Keep the selected pairs of a prompt."""
    for number, (good, bad) in enumerate(selected, 1):
        origin: Json = {
            "by": config.scorer,
            "scores": [round(good.score, 4), round(bad.score, 4)],
            "why": bad.reason,
            "answers": len(scored[row["id"]]),
        }
        id = row["id"] if config.pairing == "widest" else f"{row['id']}~{number}"
        sides: Json = {
            name: messages_to_json([Message("assistant", s.text)]) for name, s in (("chosen", good), ("rejected", bad))
        }
        builder.rows.append(
            builder.build_row(
                id,
                [s.prompt for s in (good, bad) if s.prompt],
                group=row["group"],
                answer=row["answer"],
                source=row,
                prompt=messages_to_json(turns),
                **sides,
                **origin,
            )
        )


def _sample_completions(
    config: PairsConfig, builder: SyntheticDatasetBuilder, dataset_prompts: Sequence[tuple[Row, tuple[Message, ...]]]
) -> dict[str, list[tuple[GenerationPrompt, GeneratedText]]]:
    """Return the usable, distinct completions of each prompt."""
    prompts = [GenerationPrompt(turns, turn) for _, turns in dataset_prompts for turn in range(config.num_generations)]
    answers = iter(zip(prompts, builder.generate("answers", prompts), strict=True))
    found: dict[str, list[tuple[GenerationPrompt, GeneratedText]]] = {}
    for row, _ in dataset_prompts:
        different: dict[str, tuple[GenerationPrompt, GeneratedText]] = {}
        for prompt, answer in (next(answers) for _ in range(config.num_generations)):
            if answer.problem:
                builder.reject(row["id"], answer.problem, answer.text)
            else:
                different.setdefault(answer.text, (prompt, answer))
        found[row["id"]] = list(different.values())
    return found


def _score_by_verifier(
    config: PairsConfig,
    prompts: Sequence[tuple[Row, tuple[Message, ...]]],
    completions: dict[str, list[tuple[GenerationPrompt, GeneratedText]]],
) -> dict[str, list[ScoredCompletion]]:
    verify = get_score_function(config.score_function)
    found = {}
    for row, turns in prompts:
        scores = [(prompt, answer.text, verify(turns, answer.text, row)) for prompt, answer in completions[row["id"]]]
        found[row["id"]] = [ScoredCompletion(text, score.value, score.reason, prompt) for prompt, text, score in scores]
    return found


def _score_by_judge(
    config: PairsConfig,
    builder: SyntheticDatasetBuilder,
    judge_model: Model | Adapter,
    prompts: Sequence[tuple[Row, tuple[Message, ...]]],
    completions: dict[str, list[tuple[GenerationPrompt, GeneratedText]]],
) -> dict[str, list[ScoredCompletion]]:
    todo = [
        (row["id"], prompt, answer.text, judge.grading_prompt(turns, answer.text, config.criteria))
        for row, turns in prompts
        for prompt, answer in completions[row["id"]]
    ]
    found: dict[str, list[ScoredCompletion]] = {row["id"]: [] for row, _ in prompts}
    with SyntheticDatasetBuilder(
        builder.ctx, judge_model, config.judge_decoding, "synthesize.pairs", file="judged.jsonl"
    ) as judge_builder:
        for (id, prompt, text, _), verdict in zip(
            todo, judge_builder.generate("judge", [ask for *_, ask in todo]), strict=True
        ):
            grade = None if verdict.problem else judge.parse_grade(verdict.text)
            if grade is None:
                builder.reject(id, verdict.problem or "the judge gave no grade", verdict.text)
            else:
                found[id].append(ScoredCompletion(text, grade, verdict.text, prompt))
        builder.add_usage(judge_builder)
    return found


def read_ratings(row: Row, field: str) -> list[ScoredCompletion]:
    """Return a row's own answers with their ratings, min-max scaled to 0 to 1.

    Errors: DataError when it has none.
    """
    fields = row["extra"].get("fields", {})
    ratings = fields.get(field)
    answers = fields.get("answers")
    if isinstance(ratings, list) and isinstance(answers, list) and len(ratings) == len(answers):
        ratings = [{"text": text, "rating": rating} for text, rating in zip(answers, ratings, strict=True)]
    good = isinstance(ratings, list) and all(
        isinstance(g, dict) and isinstance(g.get("text"), str) and isinstance(g.get("rating"), (int, float))
        for g in ratings
    )
    if not good or not isinstance(ratings, list) or not ratings:
        raise DataError(
            f'row {row["id"]!r}: `{field}` must be a list of {{"text": ..., "rating": number}}, or one number for'
            " each of `answers`"
        )
    least, most = min(g["rating"] for g in ratings), max(g["rating"] for g in ratings)
    return [
        ScoredCompletion(
            g["text"],
            (g["rating"] - least) / (most - least) if most > least else 1.0,
            f"rated {g['rating']:g} of {least:g} to {most:g}",
            None,
        )
        for g in ratings
    ]


def select_pairs(
    config: PairsConfig, scored: Sequence[ScoredCompletion]
) -> list[tuple[ScoredCompletion, ScoredCompletion]]:
    """Select (chosen, rejected) pairs of one prompt; empty when none has the margin, or all are too long."""
    candidates = [
        (good, bad)
        for good in scored
        for bad in scored
        if good.score - bad.score >= config.min_margin - 1e-9
        and good.text != bad.text
        and (not config.max_length_ratio or len(good.text) <= config.max_length_ratio * max(1, len(bad.text)))
    ]
    # ties: prefer pairs of similar length
    candidates.sort(key=lambda p: (p[1].score - p[0].score, abs(len(p[0].text) - len(p[1].text)), p[0].text, p[1].text))
    return candidates if config.pairing == "all" else candidates[:1]
