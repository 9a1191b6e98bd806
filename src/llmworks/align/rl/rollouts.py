"""Sample rollouts from the policy during training: completions, rewards, and log-probabilities of policy and
reference.

Each rollout is saved to a file, so that an interrupted run resumes.

Token ids are used as sampled. A truncated completion has no end token to train on; a finished one includes it. Old
log-probabilities are computed by the trainer at the sampling temperature.
"""

from __future__ import annotations

import functools
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from llmworks.align.preference.batch import Branches
from llmworks.align.preference.examples import Answer, Answered
from llmworks.align.preference.logprobs import logprobs
from llmworks.align.preference.objective import Given
from llmworks.align.preference.reference import Start
from llmworks.align.rl.cases import Case
from llmworks.align.rl.experience import TOKENS, Asked, Drawn, Rollout
from llmworks.align.rl.rewards import Rewards, Valued
from llmworks.core.errors import TrainingError
from llmworks.core.types import Completion, Request, Sampling
from llmworks.generate.engines.torch import TorchEngine
from llmworks.train.finetune.examples import plan_epoch
from llmworks.train.finetune.trainable import open_tuned


@dataclass(frozen=True)
class Habit:
    """Options of sampling and reuse of rollouts.

    `each`: prompts per rollout; `size`: prompts per micro-batch; `updates`: optimizer steps per pass; `passes`: passes
    over each rollout; `fresh`: rounds of dynamic sampling, in which prompts whose completions all have the same reward
    are replaced; `compared`: whether log-probabilities of the reference are needed.
    """

    answers: int
    temperature: float
    longest: int
    each: int
    size: int
    updates: int
    passes: int
    compared: bool
    fresh: int = 0


class Drawing:
    """Samples completions with the engine on the trained network, and scores them."""

    def __init__(self, given: Given, asked: Sequence[Asked], rewards: Rewards, habit: Habit) -> None:
        self.given, self.asked, self.rewards, self.habit = given, asked, rewards, habit
        self.network = given.tuned.network
        self.start = Start(self.network) if habit.compared and given.tuned.lora is not None else None
        self.other: Any = None
        if (
            habit.compared and self.start is None
        ):  # full fine-tuning changes all weights: a separate reference model is needed
            self.other = open_tuned(given.tuned.source).network.to(given.device).requires_grad_(False)
        self.drawing = self.valuing = 0.0  # seconds of the last sampling and scoring
        self.noting: Callable[[Rollout], None] | None = None  # hook that records more of a rollout

    def answers(
        self, prompts: Sequence[Asked], answers: int, temperature: float, seeds: Callable[[int, int], int]
    ) -> list[list[tuple[Completion, Case]]]:
        """Sample completions of each prompt."""
        material = self.given.material
        engine = TorchEngine(self.network, material.tokenizer, material.stops, "policy")
        requests = [
            Request(
                ids=one.ids,
                sampling=Sampling(
                    max_tokens=self.habit.longest,
                    temperature=temperature,
                    seed=seeds(number, turn) if temperature else None,
                ),
            )
            for number, one in enumerate(prompts)
            for turn in range(answers)
        ]
        training = self.network.training
        self.network.train(False)
        done = iter(engine.generate(requests))
        self.network.train(training)
        found = []
        for one in prompts:
            group = []
            for _ in range(answers):
                completion = next(done)
                ids = len(completion.ids) + (completion.ended is not None)
                group.append(
                    (completion, Case(one.row, one.prompt, completion.text, ids, completion.finish == "length"))
                )
            found.append(group)
        return found

    def valued(self, groups: Sequence[Sequence[tuple[Completion, Case]]], *, held: bool = False) -> list[list[Valued]]:
        """Return the rewards of completions. `held`: they are of held-out prompts.

        Errors: TrainingError when no completion has a reward.
        """
        flat = self.rewards.of([case for group in groups for _, case in group], held=held)
        if flat and all(one.why for one in flat):
            raise TrainingError(
                f"none of {len(flat)} completions{' of held-out prompts' if held else ''} has a reward; the first:"
                f" {flat[0].why}"
            )
        each = iter(flat)
        return [[next(each) for _ in group] for group in groups]

    def rollout(self, number: int, prompts: Sequence[int], *, old: bool) -> Rollout:
        """Sample and score completions, and record log-probabilities.

        Those of the trainer (`old`: before any update) and of the reference.
        """
        with self.given.cast():
            return self._rollout(number, prompts, old=old)

    def _rollout(self, number: int, prompts: Sequence[int], *, old: bool) -> Rollout:
        made = self._drawn(number, 0, prompts)
        figures = self._figures(
            made
        )  # of the first samples only: replacements are selected, so their statistics are biased
        asked = set(prompts)
        for turn in range(self.habit.fresh):
            dull = [at for at, row in enumerate(made.rewards) if alike(row)]
            others = sorted(set(range(len(self.asked))) - asked)
            chosen = random.Random(_seed(self.given.ctx.seed, number, turn, -1)).sample(
                others, min(len(dull), len(others))
            )
            asked |= set(chosen)
            more = self._drawn(number, turn + 1, chosen) if chosen else Rollout([], [])
            for at, prompt, group in zip(dull, more.prompts, more.drawn, strict=False):
                made.prompts[at], made.drawn[at] = prompt, group
        made.figures = figures | {"drawing": round(self.drawing, 3), "valuing": round(self.valuing, 3)}
        if old:
            self._note(made, "old", self.habit.temperature)
            made.figures |= self._bias(made)
        if self.noting is not None:
            self.noting(made)
        if self.start is not None:
            with self.start.again():
                self._note(made, "reference", self.habit.temperature)
        if self.other is not None:
            self._note(made, "reference", self.habit.temperature, self.other)
        return made

    def _drawn(self, number: int, turn: int, prompts: Sequence[int]) -> Rollout:
        began = time.monotonic()
        groups = self.answers(
            [self.asked[i] for i in prompts],
            self.habit.answers,
            self.habit.temperature,
            lambda at, answer: _seed(self.given.ctx.seed, number, turn, at, answer),
        )
        drawn_by = time.monotonic()
        values = self.valued(groups)
        self.drawing, self.valuing = drawn_by - began, time.monotonic() - drawn_by
        return Rollout(
            list(prompts),
            [
                [drawn(completion, case, valued) for (completion, case), valued in zip(group, worth, strict=True)]
                for group, worth in zip(groups, values, strict=True)
            ],
        )

    def examples(self, made: Rollout) -> list[Answered]:
        """Return the prompts with their completions as training examples."""
        return [
            Answered(
                f"{prompt}", self.asked[prompt].ids, tuple(Answer(tuple(one.ids), (1,) * len(one.ids)) for one in group)
            )
            for prompt, group in zip(made.prompts, made.drawn, strict=True)
        ]

    def _note(self, made: Rollout, name: str, temperature: float, network: Any = None) -> None:
        """Record the log-probabilities of all tokens under a network, by default the policy."""
        network = network if network is not None else self.network
        training = network.training
        network.train(False)
        examples = self.examples(made)
        with torch.no_grad():
            for at in range(0, len(examples), self.habit.size):
                some = examples[at : at + self.habit.size]
                found = iter(logprobs(network, self.given.join(some), temperature)[0].tolist())
                for group in made.drawn[at : at + self.habit.size]:
                    for one in group:
                        setattr(one, name, [next(found) for _ in one.ids])
        network.train(training)

    def _figures(self, made: Rollout) -> dict[str, float]:
        rewards, flat = made.rewards, [one for group in made.drawn for one in group]
        known = rewards[~rewards.isnan()]
        found = {
            "reward": float(known.mean()) if len(known) else 0.0,
            "reward_deviation": float(known.std(correction=0)) if len(known) else 0.0,
            "alike": (
                sum(map(alike, rewards)) / len(rewards) if self.habit.answers > 1 else float(alike(rewards.flatten()))
            ),
            "length": sum(len(one.ids) for one in flat) / len(flat),
            "cut": sum(one.cut for one in flat) / len(flat),
            "repeated": sum(repetition(one.ids) for one in flat) / len(flat),
            "failed": float(rewards.isnan().float().mean()),
        }
        names = sorted({name for one in flat for name in one.parts})
        return found | {
            f"reward_{name}": (
                sum(one.parts.get(name, 0.0) for one in flat) / max(1, sum(name in one.parts for one in flat))
            )
            for name in names
            if len(names) > 1
        }

    def _bias(self, made: Rollout) -> dict[str, float]:
        """Return the gap between the log-probabilities of engine and trainer, at temperature 1 only."""
        if self.habit.temperature != 1.0:
            return {}
        gaps = [abs(a - b) for group in made.drawn for one in group for a, b in zip(one.engine, one.old, strict=False)]
        return {"engine_gap": sum(gaps) / max(1, len(gaps)), "engine_gap_most": max(gaps, default=0.0)}


def drawn(completion: Completion, case: Case, valued: Valued) -> Drawn:
    """Build a sampled completion with its end token, if it ended, and its reward."""
    ids = [*completion.ids, *([completion.ended] if completion.ended is not None else [])]
    return Drawn(ids, completion.text, case.cut, valued.total, valued.parts, list(completion.logprobs))


def alike(rewards: Tensor) -> bool:
    """Return whether all completions of a prompt have the same reward (no learning signal)."""
    known = rewards[~rewards.isnan()]
    return len(known) < 2 or float(known.max() - known.min()) < 1e-9


def repetition(ids: Sequence[int], size: int = 4) -> float:
    """Return the share of 4-grams of a completion that occurred in it before."""
    runs = [tuple(ids[at : at + size]) for at in range(len(ids) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _seed(*parts: int) -> int:
    return hash(parts) & 0x7FFFFFFF  # hash of ints: the same in every process


class Rollouts(Sequence[list[Callable[[], Any]]]):
    """The steps of a training on rollouts, which are sampled when their first step is requested.

    `heard`: called with each rollout, new or loaded; `join`: collates some of its prompts into a batch.
    """

    def __init__(
        self,
        drawing: Drawing,
        folder: Path,
        *,
        epochs: float,
        seed: int,
        join: Callable[[Rollout, Sequence[int], Sequence[int]], Branches],
        heard: Callable[[int, Rollout], None],
        old: bool,
    ) -> None:
        self.drawing, self.folder, self.join, self.heard, self.old = drawing, folder, join, heard, old
        folder.mkdir(exist_ok=True)
        habit, count = drawing.habit, len(drawing.asked)
        wanted = max(1, round(epochs * count / habit.each))
        order: list[int] = []
        epoch = 0
        while len(order) < wanted * habit.each:
            order += [
                i for part in plan_epoch([0] * count, habit.each, seed * 1000 + epoch, by_length=False) for i in part
            ]
            epoch += 1
        self.rollouts = [order[at * habit.each : (at + 1) * habit.each] for at in range(wanted)]
        self.now: tuple[int, Rollout] | None = None

    def __len__(self) -> int:
        return len(self.rollouts) * self.drawing.habit.updates * self.drawing.habit.passes

    @overload
    def __getitem__(self, step: int) -> list[Callable[[], Any]]: ...
    @overload
    def __getitem__(self, step: slice) -> Sequence[list[Callable[[], Any]]]: ...
    def __getitem__(self, step: int | slice) -> Any:
        """Return the micro-batch factories of a step.

        The first step of a rollout samples it, unless an interrupted run already did.
        """
        if isinstance(step, slice):
            return [self[i] for i in range(*step.indices(len(self)))]
        if not 0 <= step < len(self):
            raise IndexError(step)
        habit = self.drawing.habit
        number, inner = divmod(step, habit.updates * habit.passes)
        made = self.rollout(number)
        some = list(self._numbers(number, inner, len(made.prompts)))
        return [
            functools.partial(self.join, made, some[at : at + habit.size], some)
            for at in range(0, len(some), habit.size)
        ]

    def _numbers(self, number: int, inner: int, count: int) -> Iterator[int]:
        """Yield the prompts of a rollout that a step uses; they are shuffled for each pass."""
        habit = self.drawing.habit
        turn, at = divmod(inner, habit.updates)
        order = plan_epoch([0] * count, 1, number * 100 + turn, by_length=False)
        flat = [i for part in order for i in part]
        yield from flat[at * count // habit.updates : (at + 1) * count // habit.updates]

    def rollout(self, number: int) -> Rollout:
        """Return the rollout of this number: in memory, from its file, or sampled now."""
        if self.now is not None and self.now[0] == number:
            return self.now[1]
        file = self.folder / f"{number:05}.json"
        if file.exists():
            made = Rollout.load(file)
        else:
            made = self.drawing.rollout(number, self.rollouts[number], old=self.old)
            made.save(file)
            (self.folder / f"{number - 2:05}.json").unlink(missing_ok=True)
        self.now = (number, made)
        self.heard(number, made)
        return made


def joined(given: Given, drawing: Drawing, made: Rollout, some: Sequence[int]) -> Branches:
    """Collate some prompts of a rollout with their per-token values; `labels` is the number of completions."""
    examples = drawing.examples(made)
    batch = given.join([examples[i] for i in some])
    chosen = [one for i in some for one in made.drawn[i]]
    more: dict[str, Any] = {
        name: torch.tensor([value for one in chosen for value in getattr(one, name)], device=given.device)
        for name in TOKENS
        if getattr(chosen[0], name)
    }
    more["engine"] = torch.tensor(
        [value for one in chosen for value in (*one.engine, *(math.nan for _ in one.ids[len(one.engine) :]))],
        device=given.device,
    )
    more |= {
        "cut": torch.tensor([one.cut for one in chosen], device=given.device),
        "reward": torch.tensor([one.reward for one in chosen], device=given.device),
    }
    return replace(batch, labels=len(chosen), given=more)
