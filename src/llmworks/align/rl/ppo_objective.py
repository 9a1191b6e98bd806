"""The objective of PPO: a policy and a value head trained on rollouts (Schulman et al. 2017, arXiv:1707.06347)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmworks.align.losses.ppo import gae, token_rewards, value_loss, whiten
from llmworks.align.preference.batch import CompletionBatch
from llmworks.align.preference.logprobs import hidden_states
from llmworks.align.preference.objective import MethodContext
from llmworks.align.rl.objective import PolicyLossOptions, RolloutObjective
from llmworks.align.rl.rollout import Rollout
from llmworks.align.rl.sampling import RolloutSampler
from llmworks.model.io.reward_head import create_reward_head


class PpoObjective(RolloutObjective):
    """PPO: a value head on the policy's hidden states is trained together with the policy.

    `vf_coef`: weight of the value loss; `cliprange_value`: clipping range of the value prediction.
    """

    def __init__(
        self,
        context: MethodContext,
        sampler: RolloutSampler,
        loss_options: PolicyLossOptions,
        *,
        kl_coef: float,
        gamma: float,
        gae_lambda: float,
        vf_coef: float,
        cliprange_value: float,
        normalize_advantages: bool,
    ) -> None:
        super().__init__(
            context,
            sampler,
            loss_options,
            lambda made: torch.zeros(len(made.completions), sampler.options.num_generations),
            needs_old_logprobs=True,
        )
        self.kl_coef, self.gamma, self.gae_lambda, self.vf_coef, self.cliprange_value, self.normalize_advantages = (
            kl_coef,
            gamma,
            gae_lambda,
            vf_coef,
            cliprange_value,
            normalize_advantages,
        )
        network = context.tuned.network
        torch.manual_seed(context.ctx.seed)
        self.value_head = create_reward_head(network.get_input_embeddings().weight.shape[1], "whole").to(context.device)
        network.score = self.value_head
        sampler.record_hook = self.record_values

    def clean_up(self) -> None:
        """Remove the value head, which is not part of the policy."""
        del self.context.tuned.network.score

    def record_values(self, rollout: Rollout) -> None:
        """Record the value prediction of each token before any update."""
        network = self.sampler.network
        examples, size = self.sampler.to_examples(rollout), self.sampler.options.batch_size
        with torch.no_grad():
            for at in range(0, len(examples), size):
                batch = self.context.collate(examples[at : at + size])
                values = iter(
                    self.value_head(hidden_states(network, batch)[batch.positions_before])[:, 0].float().tolist()
                )
                for group in rollout.completions[at : at + size]:
                    for one in group:
                        one.values = [next(values) for _ in one.ids]

    def process_rollout(self, number: int, rollout: Rollout) -> None:
        """Compute advantages and returns of all tokens of a rollout."""
        flat = [one for group in rollout.completions for one in group]
        owner = torch.tensor([at for at, one in enumerate(flat) for _ in one.ids])
        old, values = (torch.tensor([v for one in flat for v in getattr(one, name)]) for name in ("old", "values"))
        reference = torch.tensor([v for one in flat for v in one.reference]) if flat[0].reference else old
        scores = torch.tensor([one.reward for one in flat]).nan_to_num(0.0)
        counted = torch.tensor(
            [one.reward == one.reward and (self.loss_options.train_on_truncated or not one.truncated) for one in flat]
        )[owner]  # others are excluded, here as in the loss
        advantages, returns = gae(
            token_rewards(scores, old, reference, owner, kl_coef=self.kl_coef),
            values,
            owner,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
        )
        weighed_by = torch.zeros_like(advantages)
        weighed_by[counted] = (
            whiten(advantages[counted]) if self.normalize_advantages and bool(counted.any()) else advantages[counted]
        )
        rest = iter(zip(weighed_by.tolist(), returns.tolist(), strict=True))
        for one in flat:
            both = [next(rest) for _ in one.ids]
            one.advantages, one.returns = [a for a, _ in both], [r for _, r in both]
        rollout.metrics |= {
            "kl": float((old - reference).mean()),
            "explained_variance": explained_variance(values[counted], returns[counted]),
        }
        self.record_rollout(number, rollout)

    def loss(self, network: Any, batch: CompletionBatch) -> Tensor:
        """Compute the policy loss plus the value loss of the same hidden states."""
        token_logprobs, entropy, values = self._logprobs_and_values(network, batch)
        total, policy_loss_terms, old_logprobs = self._policy_loss(batch, token_logprobs)
        value_losses = value_loss(values, batch.extras["values"], batch.extras["returns"], self.cliprange_value)
        self.means.add(
            entropy=entropy,
            clip_ratio=policy_loss_terms.clipped.float(),
            ratio=(token_logprobs.detach() - old_logprobs).exp(),
            value_loss=value_losses,
        )
        return ((total + self.vf_coef * value_losses) * self._token_weights(batch)).sum()

    def _logprobs_and_values(self, network: Any, batch: CompletionBatch) -> tuple[Tensor, Tensor, Tensor]:
        from llmworks.model.loss.linear_logprobs import linear_logprobs

        here = hidden_states(network, batch)[batch.positions_before]
        found, entropy = linear_logprobs(
            here, network.get_output_embeddings(), batch.target_ids, self.sampler.options.temperature
        )
        return found, entropy, self.value_head(here)[:, 0].float()


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Return the explained variance of returns by values; below 0 where a constant would be better."""
    variance = float(returns.var(correction=0)) if len(returns) else 0.0
    return 1 - float((returns - values).var(correction=0)) / variance if variance > 1e-12 else 0.0
