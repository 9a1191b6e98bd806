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

from llmworks.align.preference.batch import CompletionBatch
from llmworks.align.preference.examples import CompletionTokens, PromptCompletions
from llmworks.align.preference.logprobs import compute_logprobs
from llmworks.align.preference.objective import MethodContext
from llmworks.align.preference.reference import AdapterSnapshot
from llmworks.align.rl.reward_input import RewardInput
from llmworks.align.rl.rewards import RewardFunctions, RewardResult
from llmworks.align.rl.rollout import PER_TOKEN_FIELDS, Rollout, RolloutPrompt, SampledCompletion
from llmworks.core.errors import TrainingError
from llmworks.core.types import Completion, Request, Sampling
from llmworks.generate.engines.torch import TorchEngine
from llmworks.train.finetune.examples import plan_epoch
from llmworks.train.finetune.trainable import open_trainable_model


@dataclass(frozen=True)
class RolloutOptions:
    """Options of sampling and reuse of rollouts.

    `num_prompts`: prompts per rollout; `batch_size`: prompts per micro-batch; `num_minibatches`: optimizer steps per
    pass; `num_iterations`: passes over each rollout; `dynamic_sampling_rounds`: rounds in which prompts whose
    completions all have the same reward are replaced; `use_reference`: whether log-probabilities of the reference are
    needed.
    """

    num_generations: int
    temperature: float
    max_completion_length: int
    num_prompts: int
    batch_size: int
    num_minibatches: int
    num_iterations: int
    use_reference: bool
    dynamic_sampling_rounds: int = 0


class RolloutSampler:
    """Samples completions with the engine on the trained network, and scores them."""

    def __init__(
        self,
        context: MethodContext,
        prompts: Sequence[RolloutPrompt],
        rewards: RewardFunctions,
        options: RolloutOptions,
    ) -> None:
        self.context, self.prompts, self.rewards, self.options = context, prompts, rewards, options
        self.network = context.tuned.network
        self.initial_adapter = (
            AdapterSnapshot(self.network) if options.use_reference and context.tuned.lora is not None else None
        )
        self.ref_network: Any = None
        if (
            options.use_reference and self.initial_adapter is None
        ):  # full fine-tuning changes all weights: a separate reference model is needed
            self.ref_network = (
                open_trainable_model(context.tuned.source).network.to(context.device).requires_grad_(False)
            )
        self.sampling_seconds = self.scoring_seconds = 0.0  # seconds of the last sampling and scoring
        self.record_hook: Callable[[Rollout], None] | None = None  # hook that records more of a rollout

    def sample_completions(
        self,
        prompts: Sequence[RolloutPrompt],
        num_generations: int,
        temperature: float,
        make_seed: Callable[[int, int], int],
    ) -> list[list[tuple[Completion, RewardInput]]]:
        """Sample completions of each prompt."""
        material = self.context.material
        engine = TorchEngine(self.network, material.tokenizer, material.stop_ids, "policy")
        requests = [
            Request(
                ids=one.ids,
                sampling=Sampling(
                    max_tokens=self.options.max_completion_length,
                    temperature=temperature,
                    seed=make_seed(number, turn) if temperature else None,
                ),
            )
            for number, one in enumerate(prompts)
            for turn in range(num_generations)
        ]
        training = self.network.training
        self.network.train(False)
        done = iter(engine.generate(requests))
        self.network.train(training)
        found = []
        for one in prompts:
            group = []
            for _ in range(num_generations):
                completion = next(done)
                ids = len(completion.ids) + (completion.ended is not None)
                group.append(
                    (completion, RewardInput(one.row, one.prompt, completion.text, ids, completion.finish == "length"))
                )
            found.append(group)
        return found

    def score_completions(
        self, groups: Sequence[Sequence[tuple[Completion, RewardInput]]], *, is_eval: bool = False
    ) -> list[list[RewardResult]]:
        """Return the rewards of completions. `is_eval`: they are of held-out prompts.

        Errors: TrainingError when no completion has a reward.
        """
        flat = self.rewards.compute_rewards([case for group in groups for _, case in group], is_eval=is_eval)
        if flat and all(one.error for one in flat):
            raise TrainingError(
                f"none of {len(flat)} completions{' of held-out prompts' if is_eval else ''} has a reward; the first:"
                f" {flat[0].error}"
            )
        each = iter(flat)
        return [[next(each) for _ in group] for group in groups]

    def make_rollout(self, number: int, prompts: Sequence[int], *, with_old_logprobs: bool) -> Rollout:
        """Sample and score completions, and record log-probabilities.

        Log-probabilities are those of the trainer before any update (`with_old_logprobs`) and of the reference.
        """
        with self.context.autocast():
            return self._make_rollout(number, prompts, with_old_logprobs=with_old_logprobs)

    def _make_rollout(self, number: int, prompts: Sequence[int], *, with_old_logprobs: bool) -> Rollout:
        rollout = self._sample_and_score(number, 0, prompts)
        figures = self._compute_metrics(
            rollout
        )  # of the first samples only: replacements are selected, so their statistics are biased
        used_prompts = set(prompts)
        for turn in range(self.options.dynamic_sampling_rounds):
            no_signal = [at for at, row in enumerate(rollout.rewards) if is_zero_variance(row)]
            others = sorted(set(range(len(self.prompts))) - used_prompts)
            chosen = random.Random(_seed(self.context.ctx.seed, number, turn, -1)).sample(
                others, min(len(no_signal), len(others))
            )
            used_prompts |= set(chosen)
            more = self._sample_and_score(number, turn + 1, chosen) if chosen else Rollout([], [])
            for at, prompt, group in zip(no_signal, more.prompts, more.completions, strict=False):
                rollout.prompts[at], rollout.completions[at] = prompt, group
        rollout.metrics = figures | {
            "sampling_seconds": round(self.sampling_seconds, 3),
            "scoring_seconds": round(self.scoring_seconds, 3),
        }
        if with_old_logprobs:
            self._record_logprobs(rollout, "old", self.options.temperature)
            rollout.metrics |= self._logprob_gap(rollout)
        if self.record_hook is not None:
            self.record_hook(rollout)
        if self.initial_adapter is not None:
            with self.initial_adapter.restore():
                self._record_logprobs(rollout, "reference", self.options.temperature)
        if self.ref_network is not None:
            self._record_logprobs(rollout, "reference", self.options.temperature, self.ref_network)
        return rollout

    def _sample_and_score(self, number: int, turn: int, prompts: Sequence[int]) -> Rollout:
        began = time.monotonic()
        groups = self.sample_completions(
            [self.prompts[i] for i in prompts],
            self.options.num_generations,
            self.options.temperature,
            lambda at, answer: _seed(self.context.ctx.seed, number, turn, at, answer),
        )
        drawn_by = time.monotonic()
        values = self.score_completions(groups)
        self.sampling_seconds, self.scoring_seconds = drawn_by - began, time.monotonic() - drawn_by
        return Rollout(
            list(prompts),
            [
                [
                    make_sampled_completion(completion, case, valued)
                    for (completion, case), valued in zip(group, rewards, strict=True)
                ]
                for group, rewards in zip(groups, values, strict=True)
            ],
        )

    def to_examples(self, rollout: Rollout) -> list[PromptCompletions]:
        """Return the prompts with their completions as training examples."""
        return [
            PromptCompletions(
                f"{prompt}",
                self.prompts[prompt].ids,
                tuple(CompletionTokens(tuple(one.ids), (1,) * len(one.ids)) for one in group),
            )
            for prompt, group in zip(rollout.prompts, rollout.completions, strict=True)
        ]

    def _record_logprobs(self, rollout: Rollout, name: str, temperature: float, network: Any = None) -> None:
        """Record the log-probabilities of all tokens under a network, by default the policy."""
        network = network if network is not None else self.network
        training = network.training
        network.train(False)
        examples = self.to_examples(rollout)
        with torch.no_grad():
            for at in range(0, len(examples), self.options.batch_size):
                some = examples[at : at + self.options.batch_size]
                found = iter(compute_logprobs(network, self.context.collate(some), temperature)[0].tolist())
                for group in rollout.completions[at : at + self.options.batch_size]:
                    for one in group:
                        setattr(one, name, [next(found) for _ in one.ids])
        network.train(training)

    def _compute_metrics(self, rollout: Rollout) -> dict[str, float]:
        rewards, flat = rollout.rewards, [one for group in rollout.completions for one in group]
        known = rewards[~rewards.isnan()]
        groups = rewards if self.options.num_generations > 1 else rewards.flatten()[None]
        metrics = {
            "reward": float(known.mean()) if len(known) else 0.0,
            "reward_std": float(known.std(correction=0)) if len(known) else 0.0,
            "frac_reward_zero_std": sum(map(is_zero_variance, groups)) / len(groups),
            "completions/mean_length": sum(len(one.ids) for one in flat) / len(flat),
            "completions/clipped_ratio": sum(one.truncated for one in flat) / len(flat),
            "repeated": sum(repeated_ngram_share(one.ids) for one in flat) / len(flat),
            "failed": float(rewards.isnan().float().mean()),
        }
        names = sorted({name for one in flat for name in one.rewards_by_function})
        return metrics | {
            f"rewards/{name}/mean": (
                sum(one.rewards_by_function.get(name, 0.0) for one in flat)
                / max(1, sum(name in one.rewards_by_function for one in flat))
            )
            for name in names
            if len(names) > 1
        }

    def _logprob_gap(self, rollout: Rollout) -> dict[str, float]:
        """Return the gap between the log-probabilities of engine and trainer, at temperature 1 only."""
        if self.options.temperature != 1.0:
            return {}
        gaps = [
            abs(a - b)
            for group in rollout.completions
            for one in group
            for a, b in zip(one.engine, one.old, strict=False)
        ]
        return {"engine_gap": sum(gaps) / max(1, len(gaps)), "engine_gap_max": max(gaps, default=0.0)}


def make_sampled_completion(completion: Completion, case: RewardInput, result: RewardResult) -> SampledCompletion:
    """Build a sampled completion with its end token, if it ended, and its reward."""
    ids = [*completion.ids, *([completion.ended] if completion.ended is not None else [])]
    return SampledCompletion(
        ids, completion.text, case.truncated, result.total, result.by_function, list(completion.logprobs)
    )


def is_zero_variance(rewards: Tensor) -> bool:
    """Return whether all completions of a prompt have the same reward (no learning signal)."""
    known = rewards[~rewards.isnan()]
    return len(known) < 2 or float(known.max() - known.min()) < 1e-9


def repeated_ngram_share(ids: Sequence[int], ngram: int = 4) -> float:
    """Return the share of 4-grams of a completion that occurred in it before."""
    ngrams = [tuple(ids[at : at + ngram]) for at in range(len(ids) - ngram + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def _seed(*parts: int) -> int:
    return hash(parts) & 0x7FFFFFFF  # hash of ints: the same in every process


class RolloutSteps(Sequence[list[Callable[[], Any]]]):
    """The steps of a training on rollouts, which are sampled when their first step is requested.

    `on_rollout`: called with each rollout, new or loaded; `collate`: collates some of its prompts into a batch.
    """

    def __init__(
        self,
        sampler: RolloutSampler,
        folder: Path,
        *,
        epochs: float,
        seed: int,
        collate: Callable[[Rollout, Sequence[int], Sequence[int]], CompletionBatch],
        on_rollout: Callable[[int, Rollout], None],
        with_old_logprobs: bool,
    ) -> None:
        self.sampler, self.folder, self.collate, self.on_rollout, self.with_old_logprobs = (
            sampler,
            folder,
            collate,
            on_rollout,
            with_old_logprobs,
        )
        folder.mkdir(exist_ok=True)
        options, count = sampler.options, len(sampler.prompts)
        num_rollouts = max(1, round(epochs * count / options.num_prompts))
        order: list[int] = []
        epoch = 0
        while len(order) < num_rollouts * options.num_prompts:
            order += [
                i
                for part in plan_epoch([0] * count, options.num_prompts, seed * 1000 + epoch, by_length=False)
                for i in part
            ]
            epoch += 1
        self.prompts_by_rollout = [
            order[at * options.num_prompts : (at + 1) * options.num_prompts] for at in range(num_rollouts)
        ]
        self.current: tuple[int, Rollout] | None = None

    def __len__(self) -> int:
        return len(self.prompts_by_rollout) * self.sampler.options.num_minibatches * self.sampler.options.num_iterations

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
        habit = self.sampler.options
        number, inner = divmod(step, habit.num_minibatches * habit.num_iterations)
        made = self.get_rollout(number)
        some = list(self._prompt_indices(number, inner, len(made.prompts)))
        return [
            functools.partial(self.collate, made, some[at : at + habit.batch_size], some)
            for at in range(0, len(some), habit.batch_size)
        ]

    def _prompt_indices(self, number: int, inner: int, count: int) -> Iterator[int]:
        """Yield the prompts of a rollout that a step uses; they are shuffled for each pass."""
        options = self.sampler.options
        turn, at = divmod(inner, options.num_minibatches)
        order = plan_epoch([0] * count, 1, number * 100 + turn, by_length=False)
        flat = [i for part in order for i in part]
        yield from flat[at * count // options.num_minibatches : (at + 1) * count // options.num_minibatches]

    def get_rollout(self, number: int) -> Rollout:
        """Return the rollout of this number: in memory, from its file, or sampled now."""
        if self.current is not None and self.current[0] == number:
            return self.current[1]
        file = self.folder / f"{number:05}.json"
        if file.exists():
            rollout = Rollout.load(file)
        else:
            rollout = self.sampler.make_rollout(
                number, self.prompts_by_rollout[number], with_old_logprobs=self.with_old_logprobs
            )
            rollout.save(file)
            (self.folder / f"{number - 2:05}.json").unlink(missing_ok=True)
        self.current = (number, rollout)
        self.on_rollout(number, rollout)
        return rollout


def collate_rollout(
    context: MethodContext, sampler: RolloutSampler, rollout: Rollout, indices: Sequence[int]
) -> CompletionBatch:
    """Collate some prompts of a rollout with their per-token values; `labels` is the number of completions."""
    examples = sampler.to_examples(rollout)
    batch = context.collate([examples[i] for i in indices])
    chosen = [one for i in indices for one in rollout.completions[i]]
    extras: dict[str, Any] = {
        name: torch.tensor([value for one in chosen for value in getattr(one, name)], device=context.device)
        for name in PER_TOKEN_FIELDS
        if getattr(chosen[0], name)
    }
    extras["engine"] = torch.tensor(
        [value for one in chosen for value in (*one.engine, *(math.nan for _ in one.ids[len(one.engine) :]))],
        device=context.device,
    )
    extras |= {
        "truncated": torch.tensor([one.truncated for one in chosen], device=context.device),
        "reward": torch.tensor([one.reward for one in chosen], device=context.device),
    }
    return replace(batch, labels=len(chosen), extras=extras)
