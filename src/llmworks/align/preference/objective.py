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

from llmworks.align.losses.kto import distance, kto
from llmworks.align.losses.sides import Judged, Sides
from llmworks.align.preference.batch import Branches
from llmworks.align.preference.examples import Answered
from llmworks.align.preference.logprobs import batch_of, logprobs, still
from llmworks.align.preference.reference import Start, cached, sums
from llmworks.core.artifact import Model
from llmworks.core.context import Context
from llmworks.train.distributed.sharding import cast, resolved
from llmworks.train.finetune.config import TuneConfig
from llmworks.train.finetune.method import Material, Way
from llmworks.train.finetune.trainable import Tuned, open_tuned

OTHER = "#other"  # id suffix of a prompt with another example's completion


@dataclass(frozen=True)
class Given:
    """What a method is built from once the policy is loaded."""

    config: TuneConfig
    tuned: Tuned
    material: Material
    ctx: Context
    device: torch.device
    reference: Model | None = None

    def cast(self) -> Any:
        """Return the autocast context of the policy."""
        return cast(self.device, resolved(self.config.precision, self.device, spread=False))

    def join(self, some: Sequence[Answered], *, prompts: bool = False) -> Branches:
        """Collate examples into a batch of the policy."""
        return batch_of(some, free=self.tuned.free, device=self.device, prompts=prompts)

    def references(
        self, examples: Sequence[Answered], join: Callable[[Sequence[Answered]], Branches]
    ) -> dict[str, list[float]]:
        """Return the reference's log-probabilities of the examples' completions.

        The reference is the initial policy, or another model, which is loaded for this and freed.
        """
        network, what = self.tuned.network, "reference"
        if self.reference is not None:
            other = open_tuned(self.reference.path)
            network, what = (
                other.network.to(self.device).requires_grad_(False),
                (f"log-probabilities of {self.reference.name}"),
            )
        return cached(
            network,
            examples,
            self.ctx.scratch / "reference.jsonl",
            join,
            size=2 * self.config.batch_size,
            progress=self.ctx.progress,
            what=what,
        )


class Told:
    """Metrics of a step, accumulated over its micro-batches as means."""

    def __init__(self) -> None:
        self.totals: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, **values: Tensor) -> None:
        """Add the values of a micro-batch."""
        for name, value in values.items():
            self.totals[name] += float(value.detach().float().sum())
            self.counts[name] += value.numel()

    def means(self) -> dict[str, float]:
        """Return the means and reset."""
        found = {name: self.totals[name] / self.counts[name] for name in self.totals if self.counts[name]}
        self.totals.clear()
        self.counts.clear()
        return found


class Pairs:
    """Losses of preference pairs.

    `judge`: the method's loss function; `learn`: weight of an NLL loss on chosen completions, in nats per token, with
    `prompts` on their prompts too; `tail`: weight of tokens beyond the shorter completion of a pair; `compared`:
    whether there is a reference; `live`: whether it is computed at every step.
    """

    def __init__(
        self,
        given: Given,
        judge: Callable[[Sides], Judged],
        *,
        compared: bool,
        live: bool = False,
        learn: float = 0.0,
        prompts: bool = False,
        tail: float = 1.0,
    ) -> None:
        still(given.tuned.network)
        self.given, self.judge, self.learn, self.prompts, self.tail, self.told = (
            given,
            judge,
            learn,
            prompts,
            tail,
            Told(),
        )
        self.start = Start(given.tuned.network) if live else None
        self.known: dict[str, list[float]] = {}
        if compared and not live:
            self.known = given.references(
                [*given.material.examples, *given.material.unseen], lambda some: self.join(some, some, bare=True)
            )

    def way(self) -> Way:
        """Return the training method for the training loop."""
        return Way(self.loss, self.join, self.look, said, self.told.means)

    def join(self, some: Sequence[Answered], step: Sequence[Answered], *, bare: bool = False) -> Branches:
        """Collate some pairs of a step. `bare`: without the reference's log-probabilities."""
        batch = self.given.join(some, prompts=self.prompts and not bare)
        more: dict[str, Any] = {}
        if self.learn:  # a mean over all tokens of the step, though micro-batches are divided by pairs
            more["share"] = len(step) / sum(
                pair.answers[0].tokens + (max(0, len(pair.prompt) - 1) if self.prompts else 0) for pair in step
            )
        if self.tail != 1.0:
            counts = batch.counts.view(-1, 2).amin(-1)[batch.owner // 2]
            firsts = torch.cat([batch.owner.new_zeros(1), batch.counts.cumsum(0)[:-1]])[batch.owner]
            more["weights"] = torch.where(
                torch.arange(len(batch.owner), device=batch.owner.device) - firsts < counts, 1.0, self.tail
            )
        if self.known and not bare:
            more["reference"] = torch.tensor([self.known[pair.id] for pair in some], device=self.given.device)
        return replace(batch, given=more)

    def sides(self, network: Any, batch: Branches) -> tuple[Sides, Tensor, Tensor, Tensor]:
        """Return (log-probabilities of the pairs, of their tokens, token entropies, log-probabilities of prompt
        tokens).
        """
        found, entropy, spoken = logprobs(network, batch)
        reference = batch.given.get("reference")
        if self.start is not None:
            with self.start.again():
                reference = sums(network, batch).view(-1, 2)
        summed = batch.summed(found * batch.given["weights"] if "weights" in batch.given else found).view(-1, 2)
        counts = batch.counts.view(-1, 2)
        return (
            Sides(
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

    def loss(self, network: Any, batch: Branches) -> Tensor:
        """Compute the loss as a sum over the pairs of a batch."""
        sides, found, entropy, spoken = self.sides(network, batch)
        judged = self.judge(sides)
        total = judged.loss.sum()
        if self.learn:
            total = total + self._learned(batch, found, spoken)
        self._tell(judged, entropy)
        return total

    def _learned(self, batch: Branches, found: Tensor, spoken: Tensor) -> Tensor:
        """Return the NLL loss on chosen completions: a mean over the tokens of the step, times its pairs."""
        learned: Tensor = self.learn * batch.given["share"] * (-found[batch.owner % 2 == 0].sum() - spoken.sum())
        return learned

    def _tell(self, judged: Judged, entropy: Tensor) -> None:
        self.told.add(
            chosen=judged.chosen,
            rejected=judged.rejected,
            margin=judged.chosen - judged.rejected,
            ranked=(judged.chosen > judged.rejected).float(),
            entropy=entropy,
        )

    def look(self, network: Any, unseen: Sequence[Answered]) -> dict[str, float]:
        """Evaluate held-out pairs: mean loss (with the NLL term), reward accuracy and mean reward margin."""
        training = network.training
        network.train(False)
        found, size, learned = Told(), 2 * self.given.config.batch_size, 0.0
        with torch.no_grad():
            for at in range(0, len(unseen), size):
                some = unseen[at : at + size]
                batch = self.join(some, unseen)
                sides, each, _, spoken = self.sides(network, batch)
                judged = self.judge(sides)
                if self.learn:  # the share is over all pairs
                    learned += float(self._learned(batch, each, spoken))
                found.add(
                    eval_loss=judged.loss,
                    accuracy=(judged.chosen > judged.rejected).float(),
                    eval_margin=judged.chosen - judged.rejected,
                )
        network.train(training)
        told = found.means()
        return told | {"eval_loss": told["eval_loss"] + learned / max(1, len(unseen)), "eval_rows": len(unseen)}


class Singles:
    """The loss of single completions (KTO).

    Its KL estimate uses mismatched completions of the whole step's prompts.
    """

    def __init__(
        self, given: Given, *, beta: float, good_weight: float, bad_weight: float, measured: bool, live: bool = False
    ) -> None:
        still(given.tuned.network)
        self.given, self.told, self.measured = given, Told(), measured
        self.options = {"beta": beta, "good_weight": good_weight, "bad_weight": bad_weight}
        self.start = Start(given.tuned.network) if live else None
        self.others = (
            {
                example.id: example
                for some in (given.material.examples, given.material.unseen)
                for example in crossed(some, given.config.max_length)
            }
            if measured
            else {}
        )
        self.known: dict[str, list[float]] = {}
        if not live:
            self.known = given.references(
                [*given.material.examples, *given.material.unseen, *self.others.values()], given.join
            )
        self.distance = torch.zeros((), device=given.device)

    def way(self) -> Way:
        """Return the training method for the training loop."""
        return Way(self.loss, self.join, self.look, said, self.told.means)

    def join(self, some: Sequence[Answered], step: Sequence[Answered]) -> Branches:
        """Collate some examples of a step; its first micro-batch also has the examples for the KL estimate."""
        first = bool(self.measured) and some[0] is step[0]
        others = (
            [self.others[example.id + OTHER] for example in step if example.id + OTHER in self.others] if first else []
        )
        return replace(
            self.given.join(some),
            given={
                "good": torch.tensor([example.good for example in some], device=self.given.device),
                "ids": [e.id for e in some],
                "first": first,
                "others": others,
            },
        )

    def ratios(self, network: Any, batch: Branches, ids: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return (log-ratio of policy to reference of each completion, token entropies)."""
        found, entropy, _ = logprobs(network, batch)
        if self.start is not None:
            with self.start.again():
                reference = sums(network, batch)
        else:
            reference = torch.tensor([self.known[id][0] for id in ids], device=self.given.device)
        return batch.summed(found) - reference, entropy

    def away(self, network: Any, others: Sequence[Answered]) -> Tensor:
        """Return the KL estimate on these examples."""
        size, found = self.given.config.batch_size, []
        with torch.no_grad():
            for at in range(0, len(others), size):
                some = others[at : at + size]
                found.append(self.ratios(network, self.given.join(some), [e.id for e in some])[0])
        return distance(torch.cat(found)) if found else torch.zeros((), device=self.given.device)

    def loss(self, network: Any, batch: Branches) -> Tensor:
        """Compute the loss as a sum over the completions of a batch."""
        if batch.given["first"]:
            self.distance = self.away(network, batch.given["others"])
        ratios, entropy = self.ratios(network, batch, batch.given["ids"])
        good, rewards = batch.given["good"], self.options["beta"] * ratios.detach()
        self.told.add(chosen=rewards[good], rejected=rewards[~good], entropy=entropy, distance=self.distance)
        return kto(ratios, good, self.distance, **self.options).sum()

    def look(self, network: Any, unseen: Sequence[Answered]) -> dict[str, float]:
        """Evaluate held-out completions: mean loss, and the AUC of rewards of desirable over undesirable ones."""
        training = network.training
        network.train(False)
        size = self.given.config.batch_size
        away = (
            self.away(network, [self.others[e.id + OTHER] for e in unseen if e.id + OTHER in self.others])
            if self.measured
            else torch.zeros((), device=self.given.device)
        )
        found, good = [], []
        with torch.no_grad():
            for at in range(0, len(unseen), size):
                some = unseen[at : at + size]
                found.append(self.ratios(network, self.given.join(some), [e.id for e in some])[0])
                good += [e.good for e in some]
        network.train(training)
        ratios, wanted = torch.cat(found), torch.tensor(good, device=self.given.device)
        ahead = ratios[wanted][:, None] - ratios[~wanted][None]
        told = {"eval_loss": float(kto(ratios, wanted, away, **self.options).mean())}
        if ahead.numel():  # else there is one label only, and nothing to rank
            told |= {
                "accuracy": float(((ahead > 0).float() + 0.5 * (ahead == 0).float()).mean()),
                "eval_margin": float(self.options["beta"] * ahead.mean()),
            }
        return told


def crossed(examples: Sequence[Answered], most: int) -> list[Answered]:
    """Return each example's prompt with the completion of the nearest earlier example that has another prompt.

    Together they have at most `most` tokens. Used for the KL estimate of KTO.
    """
    made = []
    longest = min(most, max((len(example.ids) for example in examples), default=0))  # which is known to fit the model
    for at, example in enumerate(examples):
        others = (examples[at - back] for back in range(1, len(examples)))
        other = next(
            (
                e
                for e in others
                if e.prompt != example.prompt and len(example.prompt) + len(e.answers[0].ids) <= longest
            ),
            None,
        )
        if other is not None:
            made.append(replace(example, id=example.id + OTHER, answers=other.answers))
    return made


def said(found: Mapping[str, float]) -> str:
    """Format evaluation metrics as a log message."""
    return f"held-out completions: loss {found['eval_loss']:.4f}" + (
        f", reward accuracy {found['accuracy']:.1%}, margin {found['eval_margin']:+.3f}"
        if "accuracy" in found
        else ", all with one label"
    )
