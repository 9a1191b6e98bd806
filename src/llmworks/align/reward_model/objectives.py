"""Train and save a decoder with a score head: on preference pairs, or on the steps of completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmworks.align.losses.reward import bradley_terry, step_loss
from llmworks.align.preference.batch import CompletionBatch
from llmworks.align.preference.examples import PromptCompletions
from llmworks.align.preference.logprobs import hidden_states
from llmworks.align.preference.objective import MethodContext, MetricMeans
from llmworks.core.artifact import Model
from llmworks.core.errors import ModelError
from llmworks.model.io.decoder_files import load_decoder
from llmworks.model.io.reward_head import RewardKind, create_reward_head, save_reward_model
from llmworks.model.lora.merge_adapter import merge_adapter_into
from llmworks.model.nn.decoder import DecoderForCausalLM
from llmworks.train.finetune.method import TrainMethod
from llmworks.train.finetune.trainable import TrainableModel


class PairRewardObjective:
    """Bradley-Terry reward model: scores of both completions of a pair, each at its last token.

    `margin`: weight of the pairs' own margins; `eval_scores`: scores of the last evaluation.
    """

    def __init__(self, context: MethodContext, *, margin: float, center: float) -> None:
        self.context, self.margin, self.center, self.metrics = context, margin, center, MetricMeans()
        self.eval_scores: list[tuple[float, float]] = []
        self.head = add_score_head(context, "whole")

    def build_method(self) -> TrainMethod:
        """Return the training method for the training loop."""
        return TrainMethod(
            self.loss,
            self.collate,
            self.evaluate,
            format_metrics,
            self.metrics.pop_means,
            needs_final_evaluation=lambda: bool(self.context.config.metric_for_best_model) or not self.eval_scores,
        )

    def collate(self, pairs: Sequence[PromptCompletions], _: Sequence[PromptCompletions]) -> CompletionBatch:
        """Collate some pairs."""
        return replace(
            self.context.collate(pairs),
            extras={"margin": torch.tensor([pair.margin for pair in pairs], device=self.context.device)},
        )

    def compute_scores(self, network: Any, batch: CompletionBatch) -> tuple[Tensor, Tensor]:
        """Return the scores of the chosen and the rejected completions, each [pairs]."""
        both = self.head(hidden_states(network, batch)[batch.last_positions])[:, 0].float().view(-1, 2)
        return both[:, 0], both[:, 1]

    def loss(self, network: Any, batch: CompletionBatch) -> Tensor:
        """Compute the loss as a sum over the pairs of a batch."""
        chosen, rejected = self.compute_scores(network, batch)
        self.metrics.add_rewards(chosen, rejected)
        return bradley_terry(chosen, rejected, self.margin * batch.extras["margin"], center=self.center).sum()

    def evaluate(self, network: Any, eval_examples: Sequence[PromptCompletions]) -> dict[str, float]:
        """Evaluate held-out pairs: mean loss, accuracy and mean score margin."""
        training = network.training
        network.train(False)
        means, self.eval_scores, size = MetricMeans(), [], 2 * self.context.config.batch_size
        with torch.no_grad():
            for at in range(0, len(eval_examples), size):
                some = eval_examples[at : at + size]
                batch = self.collate(some, some)
                chosen, rejected = self.compute_scores(network, batch)
                means.add(
                    eval_loss=bradley_terry(chosen, rejected, self.margin * batch.extras["margin"], center=self.center),
                    accuracy=(chosen > rejected).float(),
                    eval_margin=chosen - rejected,
                )
                self.eval_scores += list(zip(chosen.tolist(), rejected.tolist(), strict=True))
        network.train(training)
        return means.pop_means()


class ProcessRewardObjective:
    """Process reward model: scores of the steps of completions, each at its last token.

    A score is the logit of the step being correct. `eval_scores`: probabilities and labels of the last evaluation.
    """

    def __init__(self, context: MethodContext, labels: Mapping[str, Sequence[bool]]) -> None:
        self.context, self.labels, self.metrics = context, labels, MetricMeans()
        self.eval_scores: list[tuple[float, bool]] = []
        self.head = add_score_head(context, "steps")

    def build_method(self) -> TrainMethod:
        """Return the training method for the training loop."""
        return TrainMethod(
            self.loss,
            self.collate,
            self.evaluate,
            format_metrics,
            self.metrics.pop_means,
            needs_final_evaluation=lambda: bool(self.context.config.metric_for_best_model) or not self.eval_scores,
        )

    def collate(self, examples: Sequence[PromptCompletions], step: Sequence[PromptCompletions]) -> CompletionBatch:
        """Collate some completions.

        The loss is a mean over all step labels of a training step, though micro-batches are divided by completions.
        """
        labels = torch.tensor([label for one in examples for label in self.labels[one.id]], device=self.context.device)
        return replace(
            self.context.collate(examples),
            extras={"right": labels, "share": len(step) / sum(len(self.labels[one.id]) for one in step)},
        )

    def compute_scores(self, network: Any, batch: CompletionBatch) -> Tensor:
        """Return the scores of the steps of all completions [steps], each at its last token."""
        scored: Tensor = self.head(hidden_states(network, batch)[batch.positions_before + 1])[:, 0].float()
        return scored

    def loss(self, network: Any, batch: CompletionBatch) -> Tensor:
        """Compute the loss as a sum over steps, scaled so that its mean over completions is the mean over labels."""
        scores, right = self.compute_scores(network, batch), batch.extras["right"]
        probabilities, correct = scores.sigmoid(), ((scores > 0) == right).float()
        self.metrics.add(
            **{
                "rewards/chosen": probabilities[right],
                "rewards/rejected": probabilities[~right],
                "rewards/accuracies": correct,
            }
        )
        total: Tensor = step_loss(scores, right).sum() * batch.extras["share"]
        return total

    def evaluate(self, network: Any, eval_examples: Sequence[PromptCompletions]) -> dict[str, float]:
        """Evaluate held-out steps: mean loss, accuracy, and the gap of mean probability between correct and wrong
        steps.
        """
        training = network.training
        network.train(False)
        means, self.eval_scores, size = MetricMeans(), [], self.context.config.batch_size
        with torch.no_grad():
            for at in range(0, len(eval_examples), size):
                some = eval_examples[at : at + size]
                batch = self.collate(some, some)
                scores, right = self.compute_scores(network, batch), batch.extras["right"]
                means.add(eval_loss=step_loss(scores, right), accuracy=((scores > 0) == right).float())
                self.eval_scores += list(zip(scores.sigmoid().tolist(), right.tolist(), strict=True))
        network.train(training)
        probabilities = {kind: [score for score, right in self.eval_scores if right is kind] for kind in (True, False)}
        margin = (
            sum(probabilities[True]) / len(probabilities[True]) - sum(probabilities[False]) / len(probabilities[False])
            if probabilities[True] and probabilities[False]
            else 0.0
        )
        return {**means.pop_means(), "eval_margin": margin}


def add_score_head(context: MethodContext, kind: RewardKind) -> nn.Linear:
    """Add a score head to the network, trained with the rest.

    Errors: ModelError for a network that is not one of our decoders.
    """
    network = context.tuned.network
    if not isinstance(network, DecoderForCausalLM) or not context.tuned.padding_free:
        raise ModelError("a reward model needs a decoder of a known architecture: Llama, Mistral, Qwen or Gemma")
    torch.manual_seed(context.ctx.seed)
    head = create_reward_head(network.shape.hidden_size, kind).to(context.device)
    network.score = head
    return head


def make_saver(
    model: Model, out: Path, scratch: Path, kind: RewardKind, *, pad_token_id: int
) -> Callable[[TrainableModel], None]:
    """Return a function that saves the result as one model, with an adapter merged into the weights."""

    def save(tuned: TrainableModel) -> None:
        network: Any = tuned.network
        head: Any = network.score
        if tuned.lora is not None:
            folder = scratch / "adapter"
            folder.mkdir(exist_ok=True)
            tuned.save(folder, model.ref or model.name)
            network = load_decoder(model.path)
            weights = {
                tuned.rename(name): module.weight
                for name, module in network.named_modules()
                if isinstance(module, nn.Linear)
            }
            merge_adapter_into(weights.get, folder)
        save_reward_model(network, head, model.path, out, kind, pad=pad_token_id)

    return save


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Format evaluation metrics as a log message."""
    return (
        f"held-out: loss {metrics['eval_loss']:.4f}, accuracy {metrics['accuracy']:.1%}, margin"
        f" {metrics['eval_margin']:+.3f}"
    )
