"""Losses of pairs and single completions: collation, policy and reference log-probabilities, loss function, metrics.

Means over tokens and KL estimates are computed over the whole step, whatever its micro-batches. Formulas are in
`losses`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmworks.align.losses.kto import kl_estimate, kto
from llmworks.align.losses.pair_logprobs import PairLogprobs, PairLoss
from llmworks.align.preference.batch import CompletionBatch
from llmworks.align.preference.examples import PromptCompletions
from llmworks.align.preference.logprobs import collate, compute_logprobs, disable_dropout
from llmworks.align.preference.reference import AdapterSnapshot, cache_logprobs, sum_logprobs
from llmworks.core.artifact import Model
from llmworks.core.context import Context
from llmworks.train.distributed.sharding import autocast, resolve_precision
from llmworks.train.finetune.config import FinetuneConfig
from llmworks.train.finetune.method import TrainingData, TrainMethod
from llmworks.train.finetune.trainable import TrainableModel, open_trainable_model

MISMATCHED = "#other"  # id suffix of a prompt with another example's completion


@dataclass(frozen=True)
class MethodContext:
    """What a method is built from once the policy is loaded."""

    config: FinetuneConfig
    tuned: TrainableModel
    material: TrainingData
    ctx: Context
    device: torch.device
    ref_model: Model | None = None

    def autocast(self) -> Any:
        """Return the autocast context of the policy."""
        return autocast(self.device, resolve_precision(self.config.precision, self.device, sharded=False))

    def collate(self, examples: Sequence[PromptCompletions], *, include_prompts: bool = False) -> CompletionBatch:
        """Collate examples into a batch of the policy."""
        return collate(
            examples, supports_segments=self.tuned.padding_free, device=self.device, include_prompts=include_prompts
        )

    def compute_ref_logprobs(
        self, examples: Sequence[PromptCompletions], collate: Callable[[Sequence[PromptCompletions]], CompletionBatch]
    ) -> dict[str, list[float]]:
        """Return the reference's log-probabilities of the examples' completions.

        The reference is the initial policy, or another model, which is loaded for this and freed.
        """
        network, label = self.tuned.network, "reference"
        if self.ref_model is not None:
            ref_tuned = open_trainable_model(self.ref_model.path)
            network, label = (
                ref_tuned.network.to(self.device).requires_grad_(False),
                (f"log-probabilities of {self.ref_model.name}"),
            )
        return cache_logprobs(
            network,
            examples,
            self.ctx.scratch / "reference.jsonl",
            collate,
            batch_size=2 * self.config.batch_size,
            progress=self.ctx.progress,
            label=label,
        )


class MetricMeans:
    """Metrics of a step, accumulated over its micro-batches as means."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, **values: Tensor) -> None:
        """Add the values of a micro-batch."""
        for name, value in values.items():
            self.totals[name] += float(value.detach().float().sum())
            self.counts[name] += value.numel()

    def add_rewards(self, chosen: Tensor, rejected: Tensor) -> None:
        """Add the rewards of pairs [pairs], under the names of TRL."""
        self.add(
            **{
                "rewards/chosen": chosen,
                "rewards/rejected": rejected,
                "rewards/margins": chosen - rejected,
                "rewards/accuracies": (chosen > rejected).float(),
            }
        )

    def pop_means(self) -> dict[str, float]:
        """Return the means and reset."""
        found = {name: self.totals[name] / self.counts[name] for name in self.totals if self.counts[name]}
        self.totals.clear()
        self.counts.clear()
        return found


class PairObjective:
    """Losses of preference pairs.

    `loss_function`: the method's loss; `nll_weight`: weight of an NLL loss on chosen completions, in nats per token,
    with `train_on_prompts` on their prompts too; `ld_alpha`: weight of tokens beyond the shorter completion of a pair;
    `use_reference`: whether there is a reference; `live_reference`: whether it is computed at every step.
    """

    def __init__(
        self,
        context: MethodContext,
        loss_function: Callable[[PairLogprobs], PairLoss],
        *,
        use_reference: bool,
        live_reference: bool = False,
        nll_weight: float = 0.0,
        train_on_prompts: bool = False,
        ld_alpha: float = 1.0,
    ) -> None:
        disable_dropout(context.tuned.network)
        self.context, self.loss_function, self.nll_weight, self.train_on_prompts, self.ld_alpha, self.metrics = (
            context,
            loss_function,
            nll_weight,
            train_on_prompts,
            ld_alpha,
            MetricMeans(),
        )
        self.initial_adapter = AdapterSnapshot(context.tuned.network) if live_reference else None
        self.ref_logprobs: dict[str, list[float]] = {}
        if use_reference and not live_reference:
            self.ref_logprobs = context.compute_ref_logprobs(
                [*context.material.examples, *context.material.eval_examples],
                lambda some: self.collate(some, some, without_reference=True),
            )

    def build_method(self) -> TrainMethod:
        """Return the training method for the training loop."""
        return TrainMethod(self.loss, self.collate, self.evaluate, format_metrics, self.metrics.pop_means)

    def collate(
        self, pairs: Sequence[PromptCompletions], step: Sequence[PromptCompletions], *, without_reference: bool = False
    ) -> CompletionBatch:
        """Collate some pairs of a step. `without_reference`: without the reference's log-probabilities."""
        batch = self.context.collate(pairs, include_prompts=self.train_on_prompts and not without_reference)
        more: dict[str, Any] = {}
        if self.nll_weight:  # a mean over all tokens of the step, though micro-batches are divided by pairs
            more["share"] = len(step) / sum(
                pair.completions[0].num_label_tokens + (max(0, len(pair.prompt) - 1) if self.train_on_prompts else 0)
                for pair in step
            )
        if self.ld_alpha != 1.0:
            counts = batch.token_counts.view(-1, 2).amin(-1)[batch.owner // 2]
            firsts = torch.cat([batch.owner.new_zeros(1), batch.token_counts.cumsum(0)[:-1]])[batch.owner]
            more["weights"] = torch.where(
                torch.arange(len(batch.owner), device=batch.owner.device) - firsts < counts, 1.0, self.ld_alpha
            )
        if self.ref_logprobs and not without_reference:
            more["reference"] = torch.tensor([self.ref_logprobs[pair.id] for pair in pairs], device=self.context.device)
        return replace(batch, extras=more)

    def compute_logprobs(self, network: Any, batch: CompletionBatch) -> tuple[PairLogprobs, Tensor, Tensor, Tensor]:
        """Return (log-probabilities of the pairs, of their tokens, token entropies, log-probabilities of prompt
        tokens).
        """
        found, entropy, spoken = compute_logprobs(network, batch)
        reference = batch.extras.get("reference")
        if self.initial_adapter is not None:
            with self.initial_adapter.restore():
                reference = sum_logprobs(network, batch).view(-1, 2)
        summed = batch.sum_by_completion(found * batch.extras["weights"] if "weights" in batch.extras else found).view(
            -1, 2
        )
        counts = batch.token_counts.view(-1, 2)
        return (
            PairLogprobs(
                summed[:, 0],
                summed[:, 1],
                counts[:, 0],
                counts[:, 1],
                *((reference[:, 0], reference[:, 1]) if reference is not None else ()),
            ),
            found,
            entropy,
            spoken,
        )

    def loss(self, network: Any, batch: CompletionBatch) -> Tensor:
        """Compute the loss as a sum over the pairs of a batch."""
        sides, found, entropy, spoken = self.compute_logprobs(network, batch)
        pair_loss = self.loss_function(sides)
        total = pair_loss.loss.sum()
        if self.nll_weight:
            total = total + self._nll_loss(batch, found, spoken)
        self._add_metrics(pair_loss, entropy)
        return total

    def _nll_loss(self, batch: CompletionBatch, token_logprobs: Tensor, prompt_logprobs: Tensor) -> Tensor:
        """Return the NLL loss on chosen completions: a mean over the tokens of the step, times its pairs."""
        nll_loss: Tensor = (
            self.nll_weight
            * batch.extras["share"]
            * (-token_logprobs[batch.owner % 2 == 0].sum() - prompt_logprobs.sum())
        )
        return nll_loss

    def _add_metrics(self, pair_loss: PairLoss, entropy: Tensor) -> None:
        self.metrics.add_rewards(pair_loss.chosen_rewards, pair_loss.rejected_rewards)
        self.metrics.add(entropy=entropy)

    def evaluate(self, network: Any, eval_examples: Sequence[PromptCompletions]) -> dict[str, float]:
        """Evaluate held-out pairs: mean loss (with the NLL term), reward accuracy and mean reward margin."""
        training = network.training
        network.train(False)
        means, size, nll_loss = MetricMeans(), 2 * self.context.config.batch_size, 0.0
        with torch.no_grad():
            for at in range(0, len(eval_examples), size):
                some = eval_examples[at : at + size]
                batch = self.collate(some, eval_examples)
                sides, each, _, spoken = self.compute_logprobs(network, batch)
                pair_loss = self.loss_function(sides)
                if self.nll_weight:  # the share is over all pairs
                    nll_loss += float(self._nll_loss(batch, each, spoken))
                means.add(
                    eval_loss=pair_loss.loss,
                    accuracy=(pair_loss.chosen_rewards > pair_loss.rejected_rewards).float(),
                    eval_margin=pair_loss.chosen_rewards - pair_loss.rejected_rewards,
                )
        network.train(training)
        metrics = means.pop_means()
        return metrics | {
            "eval_loss": metrics["eval_loss"] + nll_loss / max(1, len(eval_examples)),
            "eval_rows": len(eval_examples),
        }


class KtoObjective:
    """The loss of single completions (KTO).

    Its KL estimate uses mismatched completions of the whole step's prompts.
    """

    def __init__(
        self,
        context: MethodContext,
        *,
        beta: float,
        desirable_weight: float,
        undesirable_weight: float,
        use_kl: bool,
        live_reference: bool = False,
    ) -> None:
        disable_dropout(context.tuned.network)
        self.context, self.metrics, self.use_kl = context, MetricMeans(), use_kl
        self.loss_options = {
            "beta": beta,
            "desirable_weight": desirable_weight,
            "undesirable_weight": undesirable_weight,
        }
        self.initial_adapter = AdapterSnapshot(context.tuned.network) if live_reference else None
        self.mismatched = (
            {
                example.id: example
                for some in (context.material.examples, context.material.eval_examples)
                for example in mismatch_completions(some, context.config.max_length)
            }
            if use_kl
            else {}
        )
        self.ref_logprobs: dict[str, list[float]] = {}
        if not live_reference:
            self.ref_logprobs = context.compute_ref_logprobs(
                [*context.material.examples, *context.material.eval_examples, *self.mismatched.values()],
                context.collate,
            )
        self.kl = torch.zeros((), device=context.device)

    def build_method(self) -> TrainMethod:
        """Return the training method for the training loop."""
        return TrainMethod(self.loss, self.collate, self.evaluate, format_metrics, self.metrics.pop_means)

    def collate(self, examples: Sequence[PromptCompletions], step: Sequence[PromptCompletions]) -> CompletionBatch:
        """Collate some examples of a step; its first micro-batch also has the examples for the KL estimate."""
        first = bool(self.use_kl) and examples[0] is step[0]
        mismatched = (
            [self.mismatched[example.id + MISMATCHED] for example in step if example.id + MISMATCHED in self.mismatched]
            if first
            else []
        )
        return replace(
            self.context.collate(examples),
            extras={
                "good": torch.tensor([example.desirable for example in examples], device=self.context.device),
                "ids": [e.id for e in examples],
                "first": first,
                "others": mismatched,
            },
        )

    def compute_log_ratios(self, network: Any, batch: CompletionBatch, ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return (log-ratio of policy to reference of each completion, token entropies)."""
        found, entropy, _ = compute_logprobs(network, batch)
        if self.initial_adapter is not None:
            with self.initial_adapter.restore():
                reference = sum_logprobs(network, batch)
        else:
            reference = torch.tensor([self.ref_logprobs[id][0] for id in ids], device=self.context.device)
        return batch.sum_by_completion(found) - reference, entropy

    def estimate_kl(self, network: Any, mismatched: Sequence[PromptCompletions]) -> Tensor:
        """Return the KL estimate on these examples."""
        size, log_ratios = self.context.config.batch_size, []
        with torch.no_grad():
            for at in range(0, len(mismatched), size):
                some = mismatched[at : at + size]
                log_ratios.append(self.compute_log_ratios(network, self.context.collate(some), [e.id for e in some])[0])
        return kl_estimate(torch.cat(log_ratios)) if log_ratios else torch.zeros((), device=self.context.device)

    def loss(self, network: Any, batch: CompletionBatch) -> Tensor:
        """Compute the loss as a sum over the completions of a batch."""
        if batch.extras["first"]:
            self.kl = self.estimate_kl(network, batch.extras["others"])
        ratios, entropy = self.compute_log_ratios(network, batch, batch.extras["ids"])
        good, rewards = batch.extras["good"], self.loss_options["beta"] * ratios.detach()
        sides = {"rewards/chosen": rewards[good], "rewards/rejected": rewards[~good]}
        self.metrics.add(**sides, entropy=entropy, kl=self.kl)
        return kto(ratios, good, self.kl, **self.loss_options).sum()

    def evaluate(self, network: Any, eval_examples: Sequence[PromptCompletions]) -> dict[str, float]:
        """Evaluate held-out completions: mean loss, and the AUC of rewards of desirable over undesirable ones."""
        training = network.training
        network.train(False)
        size = self.context.config.batch_size
        kl = (
            self.estimate_kl(
                network,
                [self.mismatched[e.id + MISMATCHED] for e in eval_examples if e.id + MISMATCHED in self.mismatched],
            )
            if self.use_kl
            else torch.zeros((), device=self.context.device)
        )
        found, good = [], []
        with torch.no_grad():
            for at in range(0, len(eval_examples), size):
                some = eval_examples[at : at + size]
                found.append(self.compute_log_ratios(network, self.context.collate(some), [e.id for e in some])[0])
                good += [e.desirable for e in some]
        network.train(training)
        ratios, desirable = torch.cat(found), torch.tensor(good, device=self.context.device)
        reward_gaps = ratios[desirable][:, None] - ratios[~desirable][None]
        metrics = {"eval_loss": float(kto(ratios, desirable, kl, **self.loss_options).mean())}
        if reward_gaps.numel():  # else there is one label only, and nothing to rank
            metrics |= {
                "accuracy": float(((reward_gaps > 0).float() + 0.5 * (reward_gaps == 0).float()).mean()),
                "eval_margin": float(self.loss_options["beta"] * reward_gaps.mean()),
            }
        return metrics


def mismatch_completions(examples: Sequence[PromptCompletions], max_length: int) -> list[PromptCompletions]:
    """Return each example's prompt with the completion of the nearest earlier example that has another prompt.

    Together they have at most `max_length` tokens. Used for the KL estimate of KTO.
    """
    mismatched = []
    longest = min(
        max_length, max((len(example.ids) for example in examples), default=0)
    )  # which is known to fit the model
    for at, example in enumerate(examples):
        others = (examples[at - back] for back in range(1, len(examples)))
        other = next(
            (
                e
                for e in others
                if e.prompt != example.prompt and len(example.prompt) + len(e.completions[0].ids) <= longest
            ),
            None,
        )
        if other is not None:
            mismatched.append(replace(example, id=example.id + MISMATCHED, completions=other.completions))
    return mismatched


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Format evaluation metrics as a log message."""
    return f"held-out completions: loss {metrics['eval_loss']:.4f}" + (
        f", reward accuracy {metrics['accuracy']:.1%}, margin {metrics['eval_margin']:+.3f}"
        if "accuracy" in metrics
        else ", all with one label"
    )
