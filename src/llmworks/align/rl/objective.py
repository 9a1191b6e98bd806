"""Losses of online methods: rollouts become advantages and a policy loss, with the metrics of each step.

Does not define formulas (see `losses`) or run the engine (see `rollouts`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from llmworks.align.losses.dpo import dpo
from llmworks.align.losses.policy import Form, Mean, Weighed, distance, ratios, shares, weighed
from llmworks.align.losses.ppo import gae, token_rewards, value_loss, whitened
from llmworks.align.losses.sides import Sides
from llmworks.align.preference.batch import Branches
from llmworks.align.preference.logprobs import logprobs, states, still
from llmworks.align.preference.objective import Given, Told
from llmworks.align.rl.experience import Asked, Rollout
from llmworks.align.rl.rollouts import Drawing, Rollouts, joined
from llmworks.core.progress import write_whole
from llmworks.model.io.reward_head import new_head
from llmworks.train.finetune.method import Way

SHOWN, WIDE = 2, 600  # samples of a rollout kept for the report, and characters of each


@dataclass(frozen=True)
class Objective:
    """Options of the policy loss in `losses/policy.py`.

    `kl`: weight of the KL penalty; `unbiased`: weight the KL estimate by the importance ratio; `whole`: truncated
    completions are trained on, too.
    """

    form: Form = "clip"
    mean: Mean = "seq-mean-token-mean"
    level: Literal["token", "sequence"] = "token"
    summed: bool = False
    low: float = 0.2
    high: float = 0.2
    ceiling: float = 0.0
    kl: float = 0.0
    unbiased: bool = False
    whole: bool = True


class Groups:
    """Training on completions sampled from the policy during training.

    `advantages`: function from a rollout to advantages [prompts, completions]; `old`: whether it needs the
    log-probabilities at sampling time.
    """

    def __init__(
        self,
        given: Given,
        drawing: Drawing,
        objective: Objective,
        advantages: Callable[[Rollout], Tensor],
        *,
        old: bool = False,
    ) -> None:
        still(given.tuned.network)
        self.given, self.drawing, self.objective, self.advantages, self.needs_old, self.told = (
            given,
            drawing,
            objective,
            advantages,
            old,
            Told(),
        )
        self.seen: list[float] = []  # rewards of the held-out prompts at the last evaluation
        self.texts: list[str] = []
        self.figures: dict[str, float] = {}
        habit = drawing.habit
        self.once = habit.updates * habit.passes == 1  # fully on-policy: the trained policy is the sampling policy
        self.dull = 0

    def way(self) -> Way:
        """Return the training method for the training loop."""
        self.began = self._began()
        scratch = self.given.ctx.scratch
        steps = Rollouts(
            self.drawing,
            scratch / "rollouts",
            epochs=self.given.config.num_train_epochs,
            seed=self.given.ctx.seed,
            join=self.join,
            heard=self.heard,
            old=not self.once or self.needs_old,
        )
        return Way(
            self.loss,
            lambda some, _: some,
            self.look,
            said,
            self.tell,
            steps,
            lambda: bool(self.given.config.metric_for_best_model) or not self.seen,
            self.done,
        )

    def done(self) -> None:
        """Do nothing; subclasses clean up here."""

    def heard(self, number: int, made: Rollout) -> None:
        """Compute the advantages of a rollout's tokens and record its metrics and samples."""
        values = self.advantages(made)
        for row, group in zip(values.tolist(), made.drawn, strict=True):
            for advantage, one in zip(row, group, strict=True):
                one.advantages = [advantage] * len(one.ids)
        self.keep(number, made)

    def keep(self, number: int, made: Rollout) -> None:
        """Record the metrics and samples of a rollout; warn when it has no learning signal."""
        self.figures = made.figures
        self.dull = self.dull + 1 if made.figures["alike"] == 1.0 else 0
        if self.dull in (3, 30):
            self.given.ctx.progress.say(
                f"warning: in {self.dull} rollouts all completions"
                f" {'of each prompt ' if self.drawing.habit.answers > 1 else ''}had the same reward, so there is"
                " no learning signal; use easier or harder prompts, sample more completions, or raise temperature"
            )
        file = self.given.ctx.scratch / "samples.json"
        kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if str(number) not in kept:
            kept[str(number)] = [
                {
                    "prompt": self.drawing.asked[prompt].prompt[-1].content[-WIDE:],
                    "answer": group[0].text[:WIDE],
                    "reward": group[0].reward,
                    "cut": group[0].cut,
                }
                for prompt, group in list(zip(made.prompts, made.drawn, strict=True))[:SHOWN]
            ]
            write_whole(file, json.dumps(kept))

    def join(self, made: Rollout, some: Sequence[int], step: Sequence[int]) -> Branches:
        """Collate the completions of some prompts into a micro-batch of a step."""
        batch = joined(self.given, self.drawing, made, some)
        of_step = [one for i in step for one in made.drawn[i]]
        learned = sum(len(one.ids) for one in of_step if self.objective.whole or not one.cut)
        return replace(batch, given=batch.given | {"answers": len(of_step), "tokens": learned})

    def tell(self) -> dict[str, float]:
        """Return the metrics of a step: of its rollout and of the loss."""
        return {**self.figures, **self.told.means()}

    def loss(self, network: Any, batch: Branches) -> Tensor:
        """Compute the loss as a sum over the completions of a step."""
        found, entropy, _ = logprobs(network, batch, self.drawing.habit.temperature)
        total, worth, old = self._policy(batch, found)
        objective = self.objective
        if objective.kl and "reference" in batch.given:
            away = distance(found, batch.given["reference"])
            self.told.add(kl=away)
            if objective.unbiased:
                away = away * ratios(found, old, batch.owner, batch.counts, "token").exp()
            total = total + objective.kl * away
        self.told.add(entropy=entropy, clipped=worth.clipped.float(), ratio=(found.detach() - old).exp())
        if self.once and self.drawing.habit.temperature == 1.0:
            gap = (found.detach() - batch.given["engine"]).abs()
            self.told.add(engine_gap=gap[~gap.isnan()])
        return (total * self._shares(batch)).sum()

    def _policy(self, batch: Branches, found: Tensor) -> tuple[Tensor, Weighed, Tensor]:
        """Return (loss of each token, policy loss with clipping, log-probabilities at sampling time)."""
        old = found.detach() if self.once or "old" not in batch.given else batch.given["old"]
        o = self.objective
        log = ratios(found, old, batch.owner, batch.counts, o.level, summed=o.summed)
        worth = weighed(
            found,
            log,
            batch.given["advantages"],
            batch.owner,
            batch.counts,
            form=o.form,
            low=o.low,
            high=o.high,
            ceiling=o.ceiling,
        )
        return worth.loss, worth, old

    def _shares(self, batch: Branches) -> Tensor:
        """Return the loss weight of each token.

        0 for completions without a reward and, where they are masked, for truncated completions.
        """
        known = ~batch.given["reward"].isnan() & (~batch.given["cut"] | self.objective.whole)
        counted: Tensor = (
            shares(
                batch.owner,
                batch.counts,
                self.objective.mean,
                answers=batch.given["answers"],
                tokens=batch.given["tokens"],
                longest=self.drawing.habit.longest,
            )
            * known[batch.owner]
        )
        return counted

    def _answered(self, asked: Sequence[Asked]) -> tuple[list[float], list[str]]:
        """Return rewards and texts of greedy completions of held-out prompts."""
        groups = self.drawing.answers(asked, 1, 0.0, lambda *_: 0)
        return [valued[0].total for valued in self.drawing.valued(groups, held=True)], [
            group[0][0].text for group in groups
        ]

    def _began(self) -> list[float]:
        """Return the rewards of held-out prompts before the first step."""
        file = self.given.ctx.scratch / "began.json"
        if not file.exists():
            write_whole(
                file, json.dumps(self._answered(self.given.material.unseen)[0] if self.given.material.unseen else [])
            )
        found: list[float] = json.loads(file.read_text(encoding="utf-8"))
        return found

    def look(self, network: Any, unseen: Sequence[Asked]) -> dict[str, float]:
        """Evaluate greedy completions of held-out prompts: the mean reward (`accuracy`) and its negative as a loss."""
        self.seen, self.texts = self._answered(unseen)
        known = [value for value in self.seen if value == value]
        mean = sum(known) / max(1, len(known))
        return {"eval_loss": -mean, "accuracy": mean}


class Actor(Groups):
    """PPO: a value head on the policy's hidden states is trained together with the policy.

    `worth`: weight of the value loss; `held`: clipping range of the value prediction.
    """

    def __init__(
        self,
        given: Given,
        drawing: Drawing,
        objective: Objective,
        *,
        reference_kl: float,
        discount: float,
        trace: float,
        worth: float,
        held: float,
        white: bool,
    ) -> None:
        super().__init__(
            given, drawing, objective, lambda made: torch.zeros(len(made.drawn), drawing.habit.answers), old=True
        )
        self.reference_kl, self.discount, self.trace, self.worth, self.held, self.white = (
            reference_kl,
            discount,
            trace,
            worth,
            held,
            white,
        )
        network = given.tuned.network
        torch.manual_seed(given.ctx.seed)
        self.head = new_head(network.get_input_embeddings().weight.shape[1], "whole").to(given.device)
        network.score = self.head
        drawing.noting = self.note

    def done(self) -> None:
        """Remove the value head, which is not part of the policy."""
        del self.given.tuned.network.score

    def note(self, made: Rollout) -> None:
        """Record the value prediction of each token before any update."""
        network = self.drawing.network
        examples, size = self.drawing.examples(made), self.drawing.habit.size
        with torch.no_grad():
            for at in range(0, len(examples), size):
                batch = self.given.join(examples[at : at + size])
                values = iter(self.head(states(network, batch)[batch.at])[:, 0].float().tolist())
                for group in made.drawn[at : at + size]:
                    for one in group:
                        one.values = [next(values) for _ in one.ids]

    def heard(self, number: int, made: Rollout) -> None:
        """Compute advantages and returns of all tokens of a rollout."""
        flat = [one for group in made.drawn for one in group]
        owner = torch.tensor([at for at, one in enumerate(flat) for _ in one.ids])
        old, values = (torch.tensor([v for one in flat for v in getattr(one, name)]) for name in ("old", "values"))
        reference = torch.tensor([v for one in flat for v in one.reference]) if flat[0].reference else old
        scores = torch.tensor([one.reward for one in flat]).nan_to_num(0.0)
        counted = torch.tensor([one.reward == one.reward and (self.objective.whole or not one.cut) for one in flat])[
            owner
        ]  # others are excluded, here as in the loss
        advantages, returns = gae(
            token_rewards(scores, old, reference, owner, kl=self.reference_kl),
            values,
            owner,
            discount=self.discount,
            trace=self.trace,
        )
        weighed_by = torch.zeros_like(advantages)
        weighed_by[counted] = (
            whitened(advantages[counted]) if self.white and bool(counted.any()) else advantages[counted]
        )
        rest = iter(zip(weighed_by.tolist(), returns.tolist(), strict=True))
        for one in flat:
            both = [next(rest) for _ in one.ids]
            one.advantages, one.returns = [a for a, _ in both], [r for _, r in both]
        made.figures |= {
            "kl": float((old - reference).mean()),
            "explained": explained(values[counted], returns[counted]),
        }
        self.keep(number, made)

    def loss(self, network: Any, batch: Branches) -> Tensor:
        """Compute the policy loss plus the value loss of the same hidden states."""
        found, entropy, read = self._both(network, batch)
        total, worth, old = self._policy(batch, found)
        wrong = value_loss(read, batch.given["values"], batch.given["returns"], self.held)
        self.told.add(
            entropy=entropy, clipped=worth.clipped.float(), ratio=(found.detach() - old).exp(), value_loss=wrong
        )
        return ((total + self.worth * wrong) * self._shares(batch)).sum()

    def _both(self, network: Any, batch: Branches) -> tuple[Tensor, Tensor, Tensor]:
        from llmworks.model.loss.linear_logprobs import linear_logprobs

        here = states(network, batch)[batch.at]
        found, entropy = linear_logprobs(
            here, network.get_output_embeddings(), batch.wanted, self.drawing.habit.temperature
        )
        return found, entropy, self.head(here)[:, 0].float()


class Contest(Groups):
    """Online DPO: the best and the worst completion of a prompt are a pair."""

    def __init__(self, given: Given, drawing: Drawing, *, kind: str, beta: float, whole: bool) -> None:
        super().__init__(
            given, drawing, Objective(whole=whole), lambda made: torch.zeros(len(made.drawn), drawing.habit.answers)
        )
        self.kind, self.beta = kind, beta

    def loss(self, network: Any, batch: Branches) -> Tensor:
        """Compute the loss summed over pairs, times the completions per prompt.

        Prompts whose completions all have the same reward give no pair.
        """
        found, entropy, _ = logprobs(network, batch, self.drawing.habit.temperature)
        each = self.drawing.habit.answers
        summed, reference = (batch.summed(x).view(-1, each) for x in (found, batch.given["reference"]))
        counts, rewards = (
            batch.counts.view(-1, each),
            batch.given["reward"]
            .masked_fill(batch.given["cut"] & (not self.objective.whole), torch.nan)
            .view(-1, each),
        )
        best, worst = (
            rewards.nan_to_num(-torch.inf).argmax(1, keepdim=True),
            rewards.nan_to_num(torch.inf).argmin(1, keepdim=True),
        )
        apart = (rewards.gather(1, best) - rewards.gather(1, worst))[:, 0]
        told = apart > 1e-9  # false where a reward is NaN

        def of(x: Tensor, which: Tensor) -> Tensor:
            return x.gather(1, which)[told, 0]

        sides = Sides(
            of(summed, best),
            of(summed, worst),
            of(counts, best),
            of(counts, worst),
            of(reference, best),
            of(reference, worst),
        )
        judged = dpo(sides, self.kind, beta=self.beta)
        self.told.add(
            entropy=entropy,
            chosen=judged.chosen,
            rejected=judged.rejected,
            margin=judged.chosen - judged.rejected,
            ranked=(judged.chosen > judged.rejected).float(),
            kl=found.detach() - batch.given["reference"],
        )
        return judged.loss.sum() * each + 0.0 * found.sum()


def explained(values: Tensor, returns: Tensor) -> float:
    """Return the explained variance of returns by values; below 0 where a constant would be better."""
    variance = float(returns.var(correction=0)) if len(returns) else 0.0
    return 1 - float((returns - values).var(correction=0)) / variance if variance > 1e-12 else 0.0


def said(found: Mapping[str, float]) -> str:
    """Format evaluation metrics as a log message."""
    return f"held-out prompts: mean reward {found['accuracy']:.4f}"
