"""Layer-by-layer knowledge distillation: train a block with rounded weights and activations to reproduce its original
outputs, on inputs from the already quantized blocks before it.

Yao et al. 2022 (arXiv:2206.01861), section 3.2. Gradients pass through rounding unchanged (straight-through estimator:
Bengio et al. 2013, arXiv:1308.3432).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmworks.model.lowbit.activations import Reading, round_tokens
from llmworks.model.lowbit.integer import Grid, Whole, whole
from llmworks.quantize.calibrate.layerwise import Part, Passing, layer_of


class Learning(nn.Linear):
    """A linear layer with rounded weights and activations and straight-through gradients."""

    def __init__(self, base: nn.Linear, grid: Grid) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight = nn.Parameter(base.weight.detach().clone())
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach().clone(), requires_grad=False)
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        if self.grid.inputs:
            x = x + (_rounded(x, self.grid.inputs) - x).detach()
        weight = self.weight + (whole(self.weight.detach(), self.grid).weight() - self.weight).detach()
        return F.linear(x, weight, self.bias)


def _rounded(x: Tensor, reading: Reading) -> Tensor:
    return round_tokens(x.detach(), reading)


class Distilled:
    """ZeroQuant's distillation: each block is trained by Adam for some epochs, with a learning rate that decays
    linearly to zero; it keeps its original weights if training does not reduce the error.
    """

    def __init__(self, texts: int, *, epochs: int, batch: int, rate: float, seed: int) -> None:
        self.texts, self.epochs, self.batch, self.rate, self.seed = texts, epochs, batch, rate, seed

    def prepare(self, passing: Passing, grids: Callable[[str], Grid | None]) -> None:
        """Distill the block; its weights become those that round best."""
        names = {name: grid for part in passing.parts for name in part.layers if (grid := grids(name)) is not None}
        if not self.epochs or not names:
            return
        walk, before = passing.walk, passing.before
        walk_block: Any = passing.block
        wanted = torch.cat([walk.through(walk_block, before[at : at + len(ids)]) for at, ids in walk.chunks()])
        with torch.inference_mode(False), torch.enable_grad():
            learner = copy.deepcopy(passing.block)
            for name, tensor in list(learner.named_parameters()):
                parent, _, leaf = name.rpartition(".")
                setattr(learner.get_submodule(parent), leaf, nn.Parameter(tensor.detach().clone(), requires_grad=False))
            layers: dict[str, Learning] = {}
            for name, grid in names.items():
                parent, _, leaf = name.rpartition(".")
                layers[name] = Learning(layer_of(learner, name), grid)
                setattr(learner.get_submodule(parent), leaf, layers[name])
            first, last = self._taught(passing, learner, layers, wanted)
        if last < first:
            for name, layer in layers.items():
                layer_of(passing.block, name).weight.copy_(layer.weight.detach())

    def _taught(
        self, passing: Passing, learner: Any, layers: dict[str, Learning], wanted: Tensor
    ) -> tuple[float, float]:
        """Train the block. Return the mean squared error before and after."""
        walk, before = passing.walk, passing.before
        optimizer = torch.optim.Adam(
            [
                {"params": [layer.weight], "lr": self.rate * float(layer.weight.detach().abs().mean())}
                for layer in layers.values()
            ],
            betas=(0.9, 0.95),
        )
        count, places = len(before), walk.positions(1)
        steps = self.epochs * -(-count // self.batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        draw = torch.Generator().manual_seed(self.seed + passing.number)

        def gap(chosen: Tensor) -> Tensor:
            with walk.source.only(walk.stack, learner) as stack:
                made: Tensor = stack.through(before[chosen].clone(), places.expand(len(chosen), -1))
            return F.mse_loss(made, wanted[chosen].clone())

        def whole_gap() -> float:
            with torch.no_grad():
                return (
                    sum(float(gap(some)) * len(some) for some in torch.split(torch.arange(count), self.batch)) / count
                )

        first = whole_gap()
        for _ in range(self.epochs):
            for chosen in torch.split(torch.randperm(count, generator=draw), self.batch):
                gap(chosen).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        return first, whole_gap()

    def part(self, passing: Passing, part: Part, grids: Callable[[str], Grid | None]) -> dict[str, Whole]:
        """Round the layers of a part to nearest."""
        for _ in passing.inputs(part):  # computes the hidden states as a side effect
            pass
        wanted = {name: grids(name) for name in part.layers}
        return {
            name: whole(layer_of(passing.block, name).weight, grid) for name, grid in wanted.items() if grid is not None
        }
