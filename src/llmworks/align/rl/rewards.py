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

from llmworks.align.rl.reward_input import RewardFunction, RewardInput
from llmworks.align.rl.user_reward import UserRewardFunction
from llmworks.core.artifact import Model
from llmworks.core.errors import DataError, LlmworksError, TrainingError, UserError
from llmworks.core.types import Engine, Message, Request, Sampling, messages_to_json
from llmworks.data.store.rows import Row
from llmworks.score import SCORES, get_score_function
from llmworks.score.judge import grading_prompt, parse_grade

BUILTIN_REWARDS = ("model", "judge", "length", "overlong")  # besides score functions and files
JUDGE_MAX_TOKENS = 192  # max_tokens of the judge's completion
MAX_REWARD = 1e30  # largest value: sums and squares of more overflow fp32


@dataclass(frozen=True)
class RewardResult:
    """The reward of a completion in total (NaN: a function failed) and by function; `error`: what failed."""

    total: float
    by_function: dict[str, float]
    error: str = ""


def check_names(names: Mapping[str, float]) -> None:
    """Check that the reward functions are known.

    Errors: ValueError.
    """
    if not names:
        raise ValueError("reward_funcs is empty; name a function and its weight, such as {verified: 1}")
    for name, weight in names.items():
        if ":" not in name and name not in SCORES and name not in BUILTIN_REWARDS:
            raise ValueError(
                f"reward_funcs: {name!r} is unknown; use one of {', '.join([*sorted(SCORES), *BUILTIN_REWARDS])}, or"
                " FILE.py:FUNCTION"
            )
        if not weight:
            raise ValueError(f"reward_funcs: {name} has weight 0; remove it")


class RewardFunctions:
    """Named reward functions with weights.

    `reward_model`: the reward model of function `model`; `judge`: opens the engine of function `judge`;
    `max_completion_length`: in tokens, the last `overlong_buffer` of which the function `overlong` penalizes.

    Errors: UserError for a function whose model or file is missing.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        *,
        max_completion_length: int,
        overlong_buffer: int,
        timeout: float,
        reward_model: Model | None = None,
        judge: Callable[[], Engine] | None = None,
        criteria: str = "",
        failed_file: Path | None = None,
        stop_on_error: bool = False,
    ) -> None:
        for name, given, what in (("model", reward_model, "reward_model"), ("judge", judge, "judge")):
            if (name in weights) != (given is not None):
                raise UserError(
                    f"reward_funcs: {name} needs the input `{what}`"
                    if given is None
                    else (
                        f"the input `{what}` is for the reward function `{name}`, which is not in config.reward_funcs"
                    )
                )
        self.weights, self.max_completion_length, self.overlong_buffer, self.failed_file, self.stop_on_error = (
            dict(weights),
            max_completion_length,
            overlong_buffer,
            failed_file,
            stop_on_error,
        )
        self.judge, self.criteria = judge, criteria
        self.engine: Engine | None = None
        self.functions: dict[str, RewardFunction] = {
            name: self._build_function(name, timeout, reward_model) for name in weights
        }

    def _build_function(self, name: str, timeout: float, reward_model: Model | None) -> RewardFunction:
        if ":" in name:
            code = UserRewardFunction(name, timeout)
            return lambda cases: code.compute_rewards(
                [
                    {"prompt": messages_to_json(case.prompt), "completion": case.text, "row": to_json_row(case.row)}
                    for case in cases
                ]
            )
        if name == "model":
            assert reward_model is not None
            from llmworks.align.rl.reward_model import load_reward_function

            return load_reward_function(reward_model)
        if name == "judge":
            return self._judge_completions
        if name == "length":
            return lambda cases: [min(1.0, case.num_tokens / self.max_completion_length) for case in cases]
        if name == "overlong":
            return lambda cases: [
                -min(
                    1.0,
                    max(
                        0.0,
                        (case.num_tokens - (self.max_completion_length - self.overlong_buffer))
                        / max(1, self.overlong_buffer),
                    ),
                )
                for case in cases
            ]
        function = get_score_function(name)

        def each(cases: Sequence[RewardInput]) -> list[float | str]:
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

    def _judge_completions(self, inputs: Sequence[RewardInput]) -> list[float | str]:
        assert self.judge is not None
        self.engine = engine = self.engine or self.judge()  # opened once
        requests = [
            Request(
                (Message("user", grading_prompt(case.prompt, case.text, self.criteria)),),
                sampling=Sampling(max_tokens=JUDGE_MAX_TOKENS),
            )
            for case in inputs
        ]
        found: list[float | str] = ["" for _ in inputs]
        for at, reply in engine.each(requests):
            grade = None if isinstance(reply, LlmworksError) else parse_grade(reply.text)
            found[at] = (
                (str(reply) if isinstance(reply, LlmworksError) else "the judge gave no grade")
                if grade is None
                else grade
            )
        return found

    def check_row(self, row: Row, prompt: tuple[Message, ...]) -> None:
        """Check that a row can be scored at all, before anything is sampled.

        Errors: DataError.
        """
        for name in self.weights:
            if name in SCORES:
                try:
                    get_score_function(name)(prompt, "", row)
                except DataError as error:
                    raise DataError(
                        f"reward_funcs {name}: {error}; give such answers or set other reward_funcs"
                    ) from None

    def compute_rewards(self, inputs: Sequence[RewardInput], *, is_eval: bool = False) -> list[RewardResult]:
        """Return the reward of each case. `is_eval`: the completions are of held-out prompts.

        Errors: TrainingError for a completion without a reward when on_reward_error is raise.
        """
        parts: list[dict[str, float]] = [{} for _ in inputs]
        problems: list[list[str]] = [[] for _ in inputs]
        for name, function in self.functions.items():
            for at, value in enumerate(function(inputs)):
                if isinstance(value, str) or not abs(self.weights[name] * value) <= MAX_REWARD:
                    problems[at].append(f"{name}: {value if isinstance(value, str) else f'gave {value}'}")
                else:
                    parts[at][name] = value
        results = [
            RewardResult(
                math.nan if why else sum(self.weights[name] * value for name, value in part.items()),
                part,
                "; ".join(why),
            )
            for part, why in zip(parts, problems, strict=True)
        ]
        failed = [(case, valued) for case, valued in zip(inputs, results, strict=True) if valued.error]
        if failed and self.failed_file is not None:
            with self.failed_file.open("a", encoding="utf-8") as out:
                out.writelines(
                    json.dumps(
                        {
                            "id": str(case.row.get("id")),
                            "evaluation": is_eval,
                            "reason": valued.error,
                            "completion": case.text,
                        },
                        ensure_ascii=False,
                    )
                    + "\n"
                    for case, valued in failed
                )
        if failed and self.stop_on_error:
            raise TrainingError(f"row {failed[0][0].row.get('id')!r}: {failed[0][1].error}; on_reward_error is stop")
        return results


def to_json_row(row: Row) -> Row:
    """Return a row as JSON-serializable values."""
    return json.loads(json.dumps(row, default=str))  # type: ignore[no-any-return]
