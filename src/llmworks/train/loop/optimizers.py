"""Optimizers: AdamW, Lion, and Muon for matrices with AdamW for the other parameters.

Weight decay applies to matrices only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmworks.core.errors import MissingDependency
from llmworks.train.loop.schedule import OptimizerConfig


class Lion(torch.optim.Optimizer):
    """Lion: update by the sign of the momentum (Chen et al. 2023, arXiv:2302.06675, algorithm 2).

    u = sign(b1 m + (1 - b1) g); p <- p - lr (u + decay p); m <- b2 m + (1 - b2) g. One moment, half of Adam's memory.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Perform one optimizer step."""
        for group in self.param_groups:
            (b1, b2), rate = group["betas"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum: Tensor = self.state[p].setdefault("momentum", torch.zeros_like(p))
                update = momentum.mul(b1).add_(p.grad, alpha=1 - b1).sign_()
                p.mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate)
                momentum.mul_(b2).add_(p.grad, alpha=1 - b2)


def create_optimizers(
    model: nn.Module, config: OptimizerConfig, lr_multipliers: Mapping[str, float] | None = None
) -> list[torch.optim.Optimizer]:
    """Create the optimizers of all trainable parameters.

    Each parameter group has `lr_multiplier`, taken from `lr_multipliers` by the last component of the parameter name.

    Errors: MissingDependency for adamw_8bit without bitsandbytes or a GPU.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices, vectors = [p for p in trained.values() if p.dim() >= 2], [p for p in trained.values() if p.dim() < 2]
    betas, rate, decay = (config.beta1, config.beta2), config.learning_rate, config.weight_decay

    def groups(decayed: list[nn.Parameter], rest: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": same, "weight_decay": d, "times": times}
            for params, d in ((decayed, decay), (rest, 0.0))
            for times, some in _split_by_multiplier(params)
            for same in _group_by_placement(some)
        ]

    multipliers = {id(p): (lr_multipliers or {}).get(name.rpartition(".")[2], 1.0) for name, p in trained.items()}

    def _split_by_multiplier(params: list[nn.Parameter]) -> list[tuple[float, list[nn.Parameter]]]:
        return [
            (lr_multiplier, [p for p in params if multipliers[id(p)] == lr_multiplier])
            for lr_multiplier in sorted(set(multipliers.values()))
        ]

    if config.name == "lion":
        return [Lion(groups(matrices, vectors), rate, betas)]
    if config.name == "adamw_8bit":
        return [_import_adamw_8bit()(groups(matrices, vectors), lr=rate, betas=betas)]
    if config.name == "muon":
        inner = find_linear_weights(model)
        muon_matrices = [p for p in matrices if id(p) in inner]
        other = [p for p in matrices if id(p) not in inner]
        # update RMS matched to AdamW's, so that one learning rate and one weight decay serve both (Liu et al. 2025,
        # arXiv:2502.16982)
        found: list[torch.optim.Optimizer] = (
            [torch.optim.Muon(muon_matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")]
            if muon_matrices
            else []
        )
        return [
            *found,
            *(
                [torch.optim.AdamW(groups(other, vectors), lr=rate, betas=betas, fused=True)]
                if other or vectors
                else []
            ),
        ]
    return [torch.optim.AdamW(groups(matrices, vectors), lr=rate, betas=betas, fused=True)]


def _group_by_placement(params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters that one fused kernel may update together: same device mesh and same placements."""
    found: dict[Any, list[nn.Parameter]] = {}
    for p in params:
        found.setdefault((getattr(p, "device_mesh", None), getattr(p, "placements", None)), []).append(p)
    return list(found.values())


def find_linear_weights(model: nn.Module) -> set[int]:
    """Return the ids of the weight matrices of all linear layers except the LM head."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear) and module is not head}


def _import_adamw_8bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found, attr-defined, unused-ignore]
    except ImportError:
        raise MissingDependency(
            "optimizer.name adamw_8bit needs a GPU and bitsandbytes; install it with: pip install bitsandbytes"
        ) from None
    if not torch.cuda.is_available():
        raise MissingDependency("optimizer.name adamw_8bit needs a GPU; use adamw or lion here")
    return AdamW8bit
