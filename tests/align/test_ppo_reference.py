"""PPO beside Stable-Baselines3's: the same draws, worth the same, after the same steps."""

from __future__ import annotations

from typing import Any, SupportsFloat

import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure

from llmworks.align.losses.policy import policy_loss
from llmworks.align.losses.ppo import gae, value_loss

WORTH = np.array([[0.0, 0.5, 1.0, -0.5], [0.3, -0.2, 0.0, 0.9], [1.5, 0.0, 0.1, 0.2]])  # of each word at each place
DISCOUNT, TRACE, CLIP, EPOCHS, RATE = 0.9, 0.8, 0.1, 6, 0.01


class Arms(gymnasium.Env[Any, Any]):
    """Answers of `length` words out of four: with one it is a bandit with four arms."""

    def __init__(self, length: int) -> None:
        self.length, self.at = length, 0
        self.observation_space = gymnasium.spaces.Box(0.0, 1.0, (length,), np.float32)
        self.action_space = gymnasium.spaces.Discrete(4)

    def seen(self) -> Any:
        return np.eye(self.length + 1, self.length, dtype=np.float32)[self.at]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.at = 0
        return self.seen(), {}

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        worth = float(WORTH[self.at, int(action)])
        self.at += 1
        return self.seen(), worth, self.at == self.length, False, {}


class Drawn(BaseCallback):
    """The weights that drew."""

    def _on_rollout_end(self) -> None:
        self.began = {name: value.clone() for name, value in self.model.policy.state_dict().items()}

    def _on_step(self) -> bool:
        return True


@pytest.mark.parametrize("length", [1, 3])
def test_ppo_is_stable_baselines(length: int) -> None:
    """One draw and six passes over it: advantages, returns, what was clipped, and every weight of policy and values
    afterwards.
    """
    count = 96
    theirs = PPO(
        "MlpPolicy",
        Arms(length),
        n_steps=count,
        batch_size=count,
        n_epochs=EPOCHS,
        gamma=DISCOUNT,
        gae_lambda=TRACE,
        clip_range=CLIP,
        vf_coef=0.5,
        ent_coef=0.0,
        max_grad_norm=0.5,
        learning_rate=RATE,
        normalize_advantage=False,
        policy_kwargs={"net_arch": [8]},
        seed=3,
        device="cpu",
    )
    theirs.set_logger(configure(None, []))
    drawn = Drawn()
    theirs.learn(count, callback=drawn)
    buffer: Any = theirs.rollout_buffer
    flat = {
        name: torch.tensor(getattr(buffer, name)).reshape(count, -1)
        for name in ("observations", "actions", "rewards", "values", "log_probs", "advantages", "returns")
    }
    rewards, values, old = (flat[name][:, 0] for name in ("rewards", "values", "log_probs"))
    owner = torch.arange(count) // length
    assert (flat["observations"].argmax(1) == torch.arange(count) % length).all()  # in the order of the draws

    advantages, returns = gae(rewards, values, owner, gamma=DISCOUNT, gae_lambda=TRACE)
    assert torch.allclose(advantages, flat["advantages"][:, 0], atol=1e-6)
    assert torch.allclose(returns, flat["returns"][:, 0], atol=1e-6)

    ours: Any = PPO("MlpPolicy", Arms(length), policy_kwargs={"net_arch": [8]}, learning_rate=RATE, device="cpu").policy
    ours.load_state_dict(drawn.began)
    counts, clipped = torch.full((count // length,), length), []
    for _ in range(EPOCHS):
        worth, logprobs, _ = ours.evaluate_actions(flat["observations"], flat["actions"][:, 0].long())
        token = policy_loss(logprobs, logprobs - old, advantages, owner, counts, epsilon_low=CLIP, epsilon_high=CLIP)
        clipped.append(float(token.clipped.float().mean()))
        ours.optimizer.zero_grad()
        (token.loss.mean() + value_loss(worth.flatten(), values, returns, float("inf")).mean()).backward()
        torch.nn.utils.clip_grad_norm_(ours.parameters(), 0.5)
        ours.optimizer.step()

    moved = 0.0
    for name, value in theirs.policy.state_dict().items():
        assert torch.allclose(ours.state_dict()[name], value, atol=2e-6), name
        moved = max(moved, float((value - drawn.began[name]).abs().max()))
    assert moved > 0.02
    assert clipped[-1] > 0
