"""Losses of online methods: rollouts become advantages and a policy loss, with the metrics of each step.

Does not define formulas (see `losses`) or run the engine (see `sampling`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from llmworks.align.losses.dpo import dpo
from llmworks.align.losses.pair_logprobs import PairLogprobs
from llmworks.align.losses.policy import (
    LossAggregation,
    LossType,
    PolicyLoss,
    kl_divergence,
    log_importance_ratios,
    policy_loss,
    token_weights,
)
from llmworks.align.preference.batch import CompletionBatch
from llmworks.align.preference.logprobs import compute_logprobs, disable_dropout
from llmworks.align.preference.objective import MethodContext, MetricMeans
from llmworks.align.rl.rollout import Rollout, RolloutPrompt
from llmworks.align.rl.sampling import RolloutSampler, RolloutSteps, collate_rollout
from llmworks.core.progress import write_atomic
from llmworks.train.finetune.method import TrainMethod

NUM_SAMPLES, MAX_SAMPLE_CHARACTERS = 2, 600  # samples of a rollout kept for the report, and characters of each


@dataclass(frozen=True)
class PolicyLossOptions:
    """Options of the policy loss in `losses/policy.py`.

    `kl_coef`: weight of the KL penalty; `use_bias_correction_kl`: weight the KL estimate by the importance ratio;
    `train_on_truncated`: truncated completions are trained on, too.
    """

    loss_type: LossType = "clip"
    aggregation: LossAggregation = "seq-mean-token-mean"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    summed: bool = False
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float = 0.0
    kl_coef: float = 0.0
    use_bias_correction_kl: bool = False
    train_on_truncated: bool = True


class RolloutObjective:
    """Training on completions sampled from the policy during training.

    `compute_advantages`: function from a rollout to advantages [prompts, completions]; `needs_old_logprobs`: whether
    the loss needs the log-probabilities at sampling time.
    """

    def __init__(
        self,
        context: MethodContext,
        sampler: RolloutSampler,
        loss_options: PolicyLossOptions,
        compute_advantages: Callable[[Rollout], Tensor],
        *,
        needs_old_logprobs: bool = False,
    ) -> None:
        disable_dropout(context.tuned.network)
        self.context, self.sampler, self.loss_options, self.compute_advantages, self.needs_old_logprobs, self.means = (
            context,
            sampler,
            loss_options,
            compute_advantages,
            needs_old_logprobs,
            MetricMeans(),
        )
        self.eval_rewards: list[float] = []  # rewards of the held-out prompts at the last evaluation
        self.eval_completions: list[str] = []
        self.metrics: dict[str, float] = {}
        options = sampler.options
        self.is_on_policy = (
            options.num_minibatches * options.num_iterations == 1
        )  # fully on-policy: the trained policy is the sampling policy
        self.num_no_signal = 0

    def build_method(self) -> TrainMethod:
        """Return the training method for the training loop."""
        self.initial_eval_rewards = self._initial_rewards()
        scratch = self.context.ctx.scratch
        steps = RolloutSteps(
            self.sampler,
            scratch / "rollouts",
            epochs=self.context.config.num_train_epochs,
            seed=self.context.ctx.seed,
            collate=self.collate,
            on_rollout=self.process_rollout,
            with_old_logprobs=not self.is_on_policy or self.needs_old_logprobs,
        )
        return TrainMethod(
            self.loss,
            lambda some, _: some,
            self.evaluate,
            format_metrics,
            self.get_metrics,
            steps,
            lambda: bool(self.context.config.metric_for_best_model) or not self.eval_rewards,
            self.clean_up,
        )

    def clean_up(self) -> None:
        """Do nothing; subclasses clean up here."""

    def process_rollout(self, number: int, rollout: Rollout) -> None:
        """Compute the advantages of a rollout's tokens and record its metrics and samples."""
        values = self.compute_advantages(rollout)
        for row, group in zip(values.tolist(), rollout.completions, strict=True):
            for advantage, one in zip(row, group, strict=True):
                one.advantages = [advantage] * len(one.ids)
        self.record_rollout(number, rollout)

    def record_rollout(self, number: int, rollout: Rollout) -> None:
        """Record the metrics and samples of a rollout; warn when it has no learning signal."""
        self.metrics = rollout.metrics
        self.num_no_signal = self.num_no_signal + 1 if rollout.metrics["frac_reward_zero_std"] == 1.0 else 0
        if self.num_no_signal in (3, 30):
            self.context.ctx.progress.log(
                f"warning: in {self.num_no_signal} rollouts all completions"
                f" {'of each prompt ' if self.sampler.options.num_generations > 1 else ''}had the same reward, so"
                " there is"
                " no learning signal; use easier or harder prompts, sample more completions, or raise temperature"
            )
        file = self.context.ctx.scratch / "samples.json"
        samples = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if str(number) not in samples:
            samples[str(number)] = [
                {
                    "prompt": self.sampler.prompts[prompt].prompt[-1].content[-MAX_SAMPLE_CHARACTERS:],
                    "answer": group[0].text[:MAX_SAMPLE_CHARACTERS],
                    "reward": group[0].reward,
                    "truncated": group[0].truncated,
                }
                for prompt, group in list(zip(rollout.prompts, rollout.completions, strict=True))[:NUM_SAMPLES]
            ]
            write_atomic(file, json.dumps(samples))

    def collate(self, rollout: Rollout, indices: Sequence[int], step: Sequence[int]) -> CompletionBatch:
        """Collate the completions of some prompts into a micro-batch of a step."""
        batch = collate_rollout(self.context, self.sampler, rollout, indices)
        of_step = [one for i in step for one in rollout.completions[i]]
        num_tokens = sum(len(one.ids) for one in of_step if self.loss_options.train_on_truncated or not one.truncated)
        return replace(batch, extras=batch.extras | {"answers": len(of_step), "tokens": num_tokens})

    def get_metrics(self) -> dict[str, float]:
        """Return the metrics of a step: of its rollout and of the loss."""
        return {**self.metrics, **self.means.pop_means()}

    def loss(self, network: Any, batch: CompletionBatch) -> Tensor:
        """Compute the loss as a sum over the completions of a step."""
        token_logprobs, entropy, _ = compute_logprobs(network, batch, self.sampler.options.temperature)
        total, policy_loss_terms, old_logprobs = self._policy_loss(batch, token_logprobs)
        objective = self.loss_options
        if objective.kl_coef and "reference" in batch.extras:
            kl = kl_divergence(token_logprobs, batch.extras["reference"])
            self.means.add(kl=kl)
            if objective.use_bias_correction_kl:
                kl = (
                    kl
                    * log_importance_ratios(
                        token_logprobs, old_logprobs, batch.owner, batch.token_counts, "token"
                    ).exp()
                )
            total = total + objective.kl_coef * kl
        self.means.add(
            entropy=entropy,
            clip_ratio=policy_loss_terms.clipped.float(),
            ratio=(token_logprobs.detach() - old_logprobs).exp(),
        )
        if self.is_on_policy and self.sampler.options.temperature == 1.0:
            gap = (token_logprobs.detach() - batch.extras["engine"]).abs()
            self.means.add(engine_gap=gap[~gap.isnan()])
        return (total * self._token_weights(batch)).sum()

    def _policy_loss(self, batch: CompletionBatch, token_logprobs: Tensor) -> tuple[Tensor, PolicyLoss, Tensor]:
        """Return (loss of each token, policy loss with clipping, log-probabilities at sampling time)."""
        old_logprobs = (
            token_logprobs.detach() if self.is_on_policy or "old" not in batch.extras else batch.extras["old"]
        )
        o = self.loss_options
        log = log_importance_ratios(
            token_logprobs, old_logprobs, batch.owner, batch.token_counts, o.importance_sampling_level, summed=o.summed
        )
        policy_loss_terms = policy_loss(
            token_logprobs,
            log,
            batch.extras["advantages"],
            batch.owner,
            batch.token_counts,
            loss_type=o.loss_type,
            epsilon_low=o.epsilon_low,
            epsilon_high=o.epsilon_high,
            delta=o.delta,
        )
        return policy_loss_terms.loss, policy_loss_terms, old_logprobs

    def _token_weights(self, batch: CompletionBatch) -> Tensor:
        """Return the loss weight of each token.

        0 for completions without a reward and, where they are masked, for truncated completions.
        """
        known = ~batch.extras["reward"].isnan() & (~batch.extras["truncated"] | self.loss_options.train_on_truncated)
        counted: Tensor = (
            token_weights(
                batch.owner,
                batch.token_counts,
                self.loss_options.aggregation,
                num_completions=batch.extras["answers"],
                num_tokens=batch.extras["tokens"],
                max_completion_length=self.sampler.options.max_completion_length,
            )
            * known[batch.owner]
        )
        return counted

    def _complete_greedily(self, prompts: Sequence[RolloutPrompt]) -> tuple[list[float], list[str]]:
        """Return rewards and texts of greedy completions of held-out prompts."""
        groups = self.sampler.sample_completions(prompts, 1, 0.0, lambda *_: 0)
        return [valued[0].total for valued in self.sampler.score_completions(groups, is_eval=True)], [
            group[0][0].text for group in groups
        ]

    def _initial_rewards(self) -> list[float]:
        """Return the rewards of held-out prompts before the first step."""
        file = self.context.ctx.scratch / "began.json"
        if not file.exists():
            write_atomic(
                file,
                json.dumps(
                    self._complete_greedily(self.context.material.eval_examples)[0]
                    if self.context.material.eval_examples
                    else []
                ),
            )
        found: list[float] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def evaluate(self, network: Any, eval_prompts: Sequence[RolloutPrompt]) -> dict[str, float]:
        """Evaluate greedy completions of held-out prompts: the mean reward (`accuracy`) and its negative as a loss."""
        self.eval_rewards, self.eval_completions = self._complete_greedily(eval_prompts)
        known = [value for value in self.eval_rewards if value == value]
        mean = sum(known) / max(1, len(known))
        return {"eval_loss": -mean, "accuracy": mean}


class OnlineDpoObjective(RolloutObjective):
    """Online DPO: the best and the worst completion of a prompt are a pair."""

    def __init__(
        self, context: MethodContext, sampler: RolloutSampler, *, loss_type: str, beta: float, train_on_truncated: bool
    ) -> None:
        super().__init__(
            context,
            sampler,
            PolicyLossOptions(train_on_truncated=train_on_truncated),
            lambda made: torch.zeros(len(made.completions), sampler.options.num_generations),
        )
        self.loss_type, self.beta = loss_type, beta

    def loss(self, network: Any, batch: CompletionBatch) -> Tensor:
        """Compute the loss summed over pairs, times the completions per prompt.

        Prompts whose completions all have the same reward give no pair.
        """
        token_logprobs, entropy, _ = compute_logprobs(network, batch, self.sampler.options.temperature)
        each = self.sampler.options.num_generations
        summed, reference = (
            batch.sum_by_completion(x).view(-1, each) for x in (token_logprobs, batch.extras["reference"])
        )
        counts, rewards = (
            batch.token_counts.view(-1, each),
            batch.extras["reward"]
            .masked_fill(batch.extras["truncated"] & (not self.loss_options.train_on_truncated), torch.nan)
            .view(-1, each),
        )
        best, worst = (
            rewards.nan_to_num(-torch.inf).argmax(1, keepdim=True),
            rewards.nan_to_num(torch.inf).argmin(1, keepdim=True),
        )
        reward_gap = (rewards.gather(1, best) - rewards.gather(1, worst))[:, 0]
        has_gap = reward_gap > 1e-9  # false where a reward is NaN

        def of(x: Tensor, which: Tensor) -> Tensor:
            return x.gather(1, which)[has_gap, 0]

        pairs = PairLogprobs(
            of(summed, best),
            of(summed, worst),
            of(counts, best),
            of(counts, worst),
            of(reference, best),
            of(reference, worst),
        )
        pair_loss = dpo(pairs, self.loss_type, beta=self.beta)
        self.means.add(
            entropy=entropy,
            kl=token_logprobs.detach() - batch.extras["reference"],
        )
        self.means.add_rewards(pair_loss.chosen_rewards, pair_loss.rejected_rewards)
        return pair_loss.loss.sum() * each + 0.0 * token_logprobs.sum()


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Format evaluation metrics as a log message."""
    return f"held-out prompts: mean reward {metrics['accuracy']:.4f}"
