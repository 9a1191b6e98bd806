"""How a decoder with a head learns to score: pairs of answers, or steps of one; and how it is saved.

Knows no configuration of a stage beside what it is told.
"""

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
    """Scores of both answers of pairs, each read at its last token.

    `margin`: by how much more than 0 the chosen one should be ahead, times the margin of its pair; `seen`: scores of
    the last look.
    """

    def __init__(self, given: Given, *, margin: float, center: float) -> None:
        self.given, self.margin, self.center, self.told = given, margin, center, Told()
        self.seen: list[tuple[float, float]] = []
        self.head = put_head(given, "whole")

    def way(self) -> Way:
        """As the run has it."""
        return Way(
            self.loss,
            self.join,
            self.look,
            said,
            self.told.means,
            again=lambda: bool(self.given.config.metric_for_best_model) or not self.seen,
        )

    def join(self, some: Sequence[Answered], _: Sequence[Answered]) -> Branches:
        """Some pairs as a batch."""
        return replace(
            self.given.join(some),
            given={"margin": torch.tensor([pair.margin for pair in some], device=self.given.device)},
        )

    def scores(self, network: Any, batch: Branches) -> tuple[Tensor, Tensor]:
        """Of the chosen and the rejected answers, each [pairs]."""
        both = self.head(states(network, batch)[batch.lasts])[:, 0].float().view(-1, 2)
        return both[:, 0], both[:, 1]

    def loss(self, network: Any, batch: Branches) -> Tensor:
        """Summed over the pairs of a batch."""
        chosen, rejected = self.scores(network, batch)
        self.told.add(chosen=chosen, rejected=rejected, margin=chosen - rejected, ranked=(chosen > rejected).float())
        return bradley_terry(chosen, rejected, self.margin * batch.given["margin"], center=self.center).sum()

    def look(self, network: Any, unseen: Sequence[Answered]) -> dict[str, float]:
        """Held-out pairs: their mean loss, the share that is ranked right, and the mean margin."""
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
    """Scores of the steps of answers, each read at its last token: how sure the model is that it is right.

    `seen`: scores and labels of the last look.
    """

    def __init__(self, given: Given, labels: Mapping[str, Sequence[bool]]) -> None:
        self.given, self.labels, self.told = given, labels, Told()
        self.seen: list[tuple[float, bool]] = []
        self.head = put_head(given, "steps")

    def way(self) -> Way:
        """As the run has it."""
        return Way(
            self.loss,
            self.join,
            self.look,
            said,
            self.told.means,
            again=lambda: bool(self.given.config.metric_for_best_model) or not self.seen,
        )

    def join(self, some: Sequence[Answered], step: Sequence[Answered]) -> Branches:
        """Some answers as a batch.

        A step's loss is a mean over all of its labels, though its parts are divided by answers.
        """
        labels = torch.tensor([label for one in some for label in self.labels[one.id]], device=self.given.device)
        return replace(
            self.given.join(some),
            given={"right": labels, "share": len(step) / sum(len(self.labels[one.id]) for one in step)},
        )

    def scores(self, network: Any, batch: Branches) -> Tensor:
        """Of the steps of all answers [steps]: at the token that each ends with."""
        scored: Tensor = self.head(states(network, batch)[batch.at + 1])[:, 0].float()
        return scored

    def loss(self, network: Any, batch: Branches) -> Tensor:
        """Summed over the steps of a batch, so that the mean over the answers of a step is that over its labels."""
        scores, right = self.scores(network, batch), batch.given["right"]
        self.told.add(
            chosen=scores[right].sigmoid(), rejected=scores[~right].sigmoid(), ranked=((scores > 0) == right).float()
        )
        total: Tensor = right_steps(scores, right).sum() * batch.given["share"]
        return total

    def look(self, network: Any, unseen: Sequence[Answered]) -> dict[str, float]:
        """Held-out steps: their mean loss, the share that is told right from wrong, and how much surer the model is of
        right ones.
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
    """A new head on the network, trained with the rest. ModelError for one that is no decoder of ours."""
    network = given.tuned.network
    if not isinstance(network, DecoderForCausalLM) or not given.tuned.free:
        raise ModelError(
            "a model that scores is made of a decoder of a known architecture: Llama, Mistral, Qwen or Gemma"
        )
    torch.manual_seed(given.ctx.seed)
    head = new_head(network.shape.hidden_size, kind).to(given.device)
    network.score = head
    return head


def saver(model: Model, out: Path, scratch: Path, kind: Kind, *, pad: int) -> Callable[[Tuned], None]:
    """Writes what was trained as one model: an adapter is folded into the weights."""

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
    """A look in words."""
    return (
        f"held out: loss {found['eval_loss']:.4f}, {found['accuracy']:.1%} right, apart by {found['eval_margin']:+.3f}"
    )
