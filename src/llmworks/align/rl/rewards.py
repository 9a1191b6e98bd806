"""Reward functions: named functions, each with a weight, summed.

Score functions of `score/`, functions of the user's own file (in the sandbox), a reward model, a judge, or the length.
A completion that a function fails on has no reward (NaN) and is recorded with the reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmworks.align.rl.cases import Case, Values
from llmworks.align.rl.user_reward import UserCode
from llmworks.core.artifact import Model
from llmworks.core.errors import DataError, LlmworksError, TrainingError, UserError
from llmworks.core.types import Engine, Message, Request, Sampling, messages_to_json
from llmworks.data.store.rows import Row
from llmworks.score import SCORES, score_function
from llmworks.score.judge import grading, read_grade

NAMES = ("model", "judge", "length", "overlong")  # besides score functions and files
GRADE = 192  # max_tokens of the judge's completion
MOST = 1e30  # largest value: sums and squares of more overflow fp32


@dataclass(frozen=True)
class Valued:
    """The reward of a completion in total (NaN: a function failed) and by function; `why`: what failed."""

    total: float
    parts: dict[str, float]
    why: str = ""


def check_names(names: Mapping[str, float]) -> None:
    """Check that the reward functions are known.

    Errors: ValueError.
    """
    if not names:
        raise ValueError("reward_funcs is empty; name a function and its weight, such as {verified: 1}")
    for name, weight in names.items():
        if ":" not in name and name not in SCORES and name not in NAMES:
            raise ValueError(
                f"reward_funcs: {name!r} is unknown; use one of {', '.join([*sorted(SCORES), *NAMES])}, or"
                " FILE.py:FUNCTION"
            )
        if not weight:
            raise ValueError(f"reward_funcs: {name} has weight 0; remove it")


class Rewards:
    """Named reward functions with weights.

    `reward`: the reward model of function `model`; `judge`: opens the engine of function `judge`; `most`: longest
    completion in tokens, the last `soft` of which the function `overlong` penalizes.

    Errors: UserError for a function whose model or file is missing.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        most: int,
        soft: int,
        seconds: float,
        reward: Model | None = None,
        judge: Callable[[], Engine] | None = None,
        criteria: str = "",
        aside: Path | None = None,
        stop: bool = False,
    ) -> None:
        for name, given, what in (("model", reward, "reward_model"), ("judge", judge, "judge")):
            if (name in weights) != (given is not None):
                raise UserError(
                    f"reward_funcs: {name} needs the input `{what}`"
                    if given is None
                    else (
                        f"the input `{what}` is for the reward function `{name}`, which is not in config.reward_funcs"
                    )
                )
        self.weights, self.most, self.soft, self.aside, self.stop = dict(weights), most, soft, aside, stop
        self.judge, self.criteria = judge, criteria
        self.engine: Engine | None = None
        self.functions: dict[str, Values] = {name: self._function(name, seconds, reward) for name in weights}

    def _function(self, name: str, seconds: float, reward: Model | None) -> Values:
        if ":" in name:
            code = UserCode(name, seconds)
            return lambda cases: code.values(
                [
                    {"prompt": messages_to_json(case.prompt), "completion": case.text, "row": plain(case.row)}
                    for case in cases
                ]
            )
        if name == "model":
            assert reward is not None
            from llmworks.align.rl.reward_model import scores_of

            return scores_of(reward)
        if name == "judge":
            return self._judged
        if name == "length":
            return lambda cases: [min(1.0, case.tokens / self.most) for case in cases]
        if name == "overlong":
            return lambda cases: [
                -min(1.0, max(0.0, (case.tokens - (self.most - self.soft)) / max(1, self.soft))) for case in cases
            ]
        function = score_function(name)

        def each(cases: Sequence[Case]) -> list[float | str]:
            found: list[float | str] = []
            for case in cases:
                try:
                    found.append(function(case.prompt, case.text, case.row).value)
                except DataError:
                    raise
                except (LlmworksError, ValueError, ArithmeticError, RecursionError) as error:
                    found.append(f"{type(error).__name__}: {error}"[:200])
            return found

        return each

    def _judged(self, cases: Sequence[Case]) -> list[float | str]:
        assert self.judge is not None
        self.engine = engine = self.engine or self.judge()  # opened once
        requests = [
            Request(
                (Message("user", grading(case.prompt, case.text, self.criteria)),), sampling=Sampling(max_tokens=GRADE)
            )
            for case in cases
        ]
        found: list[float | str] = ["" for _ in cases]
        for at, reply in engine.each(requests):
            grade = None if isinstance(reply, LlmworksError) else read_grade(reply.text)
            found[at] = (
                (str(reply) if isinstance(reply, LlmworksError) else "the judge gave no grade")
                if grade is None
                else grade
            )
        return found

    def check(self, row: Row, prompt: tuple[Message, ...]) -> None:
        """Check that a row can be scored at all, before anything is sampled.

        Errors: DataError.
        """
        for name in self.weights:
            if name in SCORES:
                score_function(name)(prompt, "", row)

    def of(self, cases: Sequence[Case], *, held: bool = False) -> list[Valued]:
        """Return the reward of each case. `held`: the completions are of held-out prompts.

        Errors: TrainingError for a completion without a reward when on_reward_error is stop.
        """
        parts: list[dict[str, float]] = [{} for _ in cases]
        problems: list[list[str]] = [[] for _ in cases]
        for name, function in self.functions.items():
            for at, value in enumerate(function(cases)):
                if isinstance(value, str) or not abs(self.weights[name] * value) <= MOST:
                    problems[at].append(f"{name}: {value if isinstance(value, str) else f'gave {value}'}")
                else:
                    parts[at][name] = value
        made = [
            Valued(
                math.nan if why else sum(self.weights[name] * value for name, value in part.items()),
                part,
                "; ".join(why),
            )
            for part, why in zip(parts, problems, strict=True)
        ]
        failed = [(case, valued) for case, valued in zip(cases, made, strict=True) if valued.why]
        if failed and self.aside is not None:
            with self.aside.open("a", encoding="utf-8") as out:
                out.writelines(
                    json.dumps(
                        {
                            "id": str(case.row.get("id")),
                            "evaluation": held,
                            "reason": valued.why,
                            "completion": case.text,
                        },
                        ensure_ascii=False,
                    )
                    + "\n"
                    for case, valued in failed
                )
        if failed and self.stop:
            raise TrainingError(f"row {failed[0][0].row.get('id')!r}: {failed[0][1].why}; on_reward_error is stop")
        return made


def plain(row: Row) -> Row:
    """Return a row as JSON-serializable values."""
    return json.loads(json.dumps(row, default=str))  # type: ignore[no-any-return]
