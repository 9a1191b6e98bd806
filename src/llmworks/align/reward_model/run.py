"""Train and save a decoder with a score head: on preference pairs, or on the steps of completions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmworks.align.losses.reward import bradley_terry, right_steps
from llmworks.align.preference.batch import Branches
from llmworks.align.preference.examples import Answered
from llmworks.align.preference.logprobs import states
from llmworks.align.preference.objective import Given, Told
from llmworks.core.artifact import Model
from llmworks.core.errors import ModelError
from llmworks.model.io.decoder_files import load_decoder
from llmworks.model.io.reward_head import Kind, new_head, save_scorer
from llmworks.model.lora.fold import fold_into
from llmworks.model.nn.decoder import DecoderForCausalLM
from llmworks.train.finetune.method import Way
from llmworks.train.finetune.trainable import Tuned


class Ranking:
    """Bradley-Terry reward model: scores of both completions of a pair, each at its last token.

    `margin`: weight of the pairs' own margins; `seen`: scores of the last evaluation.
    """

    def __init__(self, given: Given, *, margin: float, center: float) -> None:
        self.given, self.margin, self.center, self.told = given, margin, center, Told()
        self.seen: list[tuple[float, float]] = []
        self.head = put_head(given, "whole")

    def way(self) -> Way:
        """Return the training method for the training loop."""
        return Way(
            self.loss,
            self.join,
            self.look,
            said,
            self.told.means,
            again=lambda: bool(self.given.config.metric_for_best_model) or not self.seen,
        )

    def join(self, some: Sequence[Answered], _: Sequence[Answered]) -> Branches:
        """Collate some pairs."""
        return replace(
            self.given.join(some),
            given={"margin": torch.tensor([pair.margin for pair in some], device=self.given.device)},
        )

    def scores(self, network: Any, batch: Branches) -> tuple[Tensor, Tensor]:
        """Return the scores of the chosen and the rejected completions, each [pairs]."""
        both = self.head(states(network, batch)[batch.lasts])[:, 0].float().view(-1, 2)
        return both[:, 0], both[:, 1]

    def loss(self, network: Any, batch: Branches) -> Tensor:
        """Compute the loss as a sum over the pairs of a batch."""
        chosen, rejected = self.scores(network, batch)
        self.told.add(chosen=chosen, rejected=rejected, margin=chosen - rejected, ranked=(chosen > rejected).float())
        return bradley_terry(chosen, rejected, self.margin * batch.given["margin"], center=self.center).sum()

    def look(self, network: Any, unseen: Sequence[Answered]) -> dict[str, float]:
        """Evaluate held-out pairs: mean loss, accuracy and mean score margin."""
        training = network.training
        network.train(False)
        found, self.seen, size = Told(), [], 2 * self.given.config.batch_size
        with torch.no_grad():
            for at in range(0, len(unseen), size):
                some = unseen[at : at + size]
                batch = self.join(some, some)
                chosen, rejected = self.scores(network, batch)
                found.add(
                    eval_loss=bradley_terry(chosen, rejected, self.margin * batch.given["margin"], center=self.center),
                    accuracy=(chosen > rejected).float(),
                    eval_margin=chosen - rejected,
                )
                self.seen += list(zip(chosen.tolist(), rejected.tolist(), strict=True))
        network.train(training)
        return found.means()


class Steps:
    """Process reward model: scores of the steps of completions, each at its last token.

    A score is the logit of the step being correct. `seen`: probabilities and labels of the last evaluation.
    """

    def __init__(self, given: Given, labels: Mapping[str, Sequence[bool]]) -> None:
        self.given, self.labels, self.told = given, labels, Told()
        self.seen: list[tuple[float, bool]] = []
        self.head = put_head(given, "steps")

    def way(self) -> Way:
        """Return the training method for the training loop."""
        return Way(
            self.loss,
            self.join,
            self.look,
            said,
            self.told.means,
            again=lambda: bool(self.given.config.metric_for_best_model) or not self.seen,
        )

    def join(self, some: Sequence[Answered], step: Sequence[Answered]) -> Branches:
        """Collate some completions.

        The loss is a mean over all step labels of a training step, though micro-batches are divided by completions.
        """
        labels = torch.tensor([label for one in some for label in self.labels[one.id]], device=self.given.device)
        return replace(
            self.given.join(some),
            given={"right": labels, "share": len(step) / sum(len(self.labels[one.id]) for one in step)},
        )

    def scores(self, network: Any, batch: Branches) -> Tensor:
        """Return the scores of the steps of all completions [steps], each at its last token."""
        scored: Tensor = self.head(states(network, batch)[batch.at + 1])[:, 0].float()
        return scored

    def loss(self, network: Any, batch: Branches) -> Tensor:
        """Compute the loss as a sum over steps, scaled so that its mean over completions is the mean over labels."""
        scores, right = self.scores(network, batch), batch.given["right"]
        self.told.add(
            chosen=scores[right].sigmoid(), rejected=scores[~right].sigmoid(), ranked=((scores > 0) == right).float()
        )
        total: Tensor = right_steps(scores, right).sum() * batch.given["share"]
        return total

    def look(self, network: Any, unseen: Sequence[Answered]) -> dict[str, float]:
        """Evaluate held-out steps: mean loss, accuracy, and the gap of mean probability between correct and wrong
        steps.
        """
        training = network.training
        network.train(False)
        found, self.seen, size = Told(), [], self.given.config.batch_size
        with torch.no_grad():
            for at in range(0, len(unseen), size):
                some = unseen[at : at + size]
                batch = self.join(some, some)
                scores, right = self.scores(network, batch), batch.given["right"]
                found.add(eval_loss=right_steps(scores, right), accuracy=((scores > 0) == right).float())
                self.seen += list(zip(scores.sigmoid().tolist(), right.tolist(), strict=True))
        network.train(training)
        sure = {kind: [score for score, right in self.seen if right is kind] for kind in (True, False)}
        apart = (
            sum(sure[True]) / len(sure[True]) - sum(sure[False]) / len(sure[False])
            if sure[True] and sure[False]
            else 0.0
        )
        return {**found.means(), "eval_margin": apart}


def put_head(given: Given, kind: Kind) -> nn.Linear:
    """Add a score head to the network, trained with the rest.

    Errors: ModelError for a network that is not one of our decoders.
    """
    network = given.tuned.network
    if not isinstance(network, DecoderForCausalLM) or not given.tuned.free:
        raise ModelError("a reward model needs a decoder of a known architecture: Llama, Mistral, Qwen or Gemma")
    torch.manual_seed(given.ctx.seed)
    head = new_head(network.shape.hidden_size, kind).to(given.device)
    network.score = head
    return head


def saver(model: Model, out: Path, scratch: Path, kind: Kind, *, pad: int) -> Callable[[Tuned], None]:
    """Return a function that saves the result as one model, with an adapter merged into the weights."""

    def save(tuned: Tuned) -> None:
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
            fold_into(weights.get, folder)
        save_scorer(network, head, model.path, out, kind, pad=pad)

    return save


def said(found: Mapping[str, float]) -> str:
    """Format evaluation metrics as a log message."""
    return (
        f"held-out: loss {found['eval_loss']:.4f}, accuracy {found['accuracy']:.1%}, margin {found['eval_margin']:+.3f}"
    )
