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

from llmworks.model.lowbit.activations import InputQuantization, quantize_tokens
from llmworks.model.lowbit.integer import Grid, IntegerMatrix, quantize_matrix
from llmworks.quantize.calibrate.layerwise import BlockInputs, BlockPart, get_layer


class StraightThroughLinear(nn.Linear):
    """A linear layer with rounded weights and activations and straight-through gradients."""

    def __init__(self, base: nn.Linear, grid: Grid) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight = nn.Parameter(base.weight.detach().clone())
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach().clone(), requires_grad=False)
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in] -> [..., out]."""
        if self.grid.inputs:
            x = x + (_round_activations(x, self.grid.inputs) - x).detach()
        weight = self.weight + (quantize_matrix(self.weight.detach(), self.grid).weight() - self.weight).detach()
        return F.linear(x, weight, self.bias)


def _round_activations(x: Tensor, reading: InputQuantization) -> Tensor:
    return quantize_tokens(x.detach(), reading)


class BlockDistillation:
    """ZeroQuant's distillation: each block is trained by Adam for some epochs, with a learning rate that decays
    linearly to zero; it keeps its original weights if training does not reduce the error.
    """

    def __init__(
        self, num_calibration_samples: int, *, num_train_epochs: int, batch_size: int, learning_rate: float, seed: int
    ) -> None:
        self.num_calibration_samples, self.num_train_epochs, self.batch_size, self.learning_rate, self.seed = (
            num_calibration_samples,
            num_train_epochs,
            batch_size,
            learning_rate,
            seed,
        )

    def prepare(self, block_inputs: BlockInputs, grids: Callable[[str], Grid | None]) -> None:
        """Distill the block; its weights become those that round best."""
        names = {name: grid for part in block_inputs.parts for name in part.layers if (grid := grids(name)) is not None}
        if not self.num_train_epochs or not names:
            return
        walk, before = block_inputs.calibration, block_inputs.input_states
        walk_block: Any = block_inputs.block
        target = torch.cat([walk.run_block(walk_block, before[at : at + len(ids)]) for at, ids in walk.iter_chunks()])
        with torch.inference_mode(False), torch.enable_grad():
            learner = copy.deepcopy(block_inputs.block)
            for name, tensor in list(learner.named_parameters()):
                parent, _, leaf = name.rpartition(".")
                setattr(learner.get_submodule(parent), leaf, nn.Parameter(tensor.detach().clone(), requires_grad=False))
            layers: dict[str, StraightThroughLinear] = {}
            for name, grid in names.items():
                parent, _, leaf = name.rpartition(".")
                layers[name] = StraightThroughLinear(get_layer(learner, name), grid)
                setattr(learner.get_submodule(parent), leaf, layers[name])
            first, last = self._train(block_inputs, learner, layers, target)
        if last < first:
            for name, layer in layers.items():
                get_layer(block_inputs.block, name).weight.copy_(layer.weight.detach())

    def _train(
        self, block_inputs: BlockInputs, learner: Any, layers: dict[str, StraightThroughLinear], target: Tensor
    ) -> tuple[float, float]:
        """Train the block. Return the mean squared error before and after."""
        walk, before = block_inputs.calibration, block_inputs.input_states
        optimizer = torch.optim.Adam(
            [
                {"params": [layer.weight], "lr": self.learning_rate * float(layer.weight.detach().abs().mean())}
                for layer in layers.values()
            ],
            betas=(0.9, 0.95),
        )
        count, places = len(before), walk.make_positions(1)
        steps = self.num_train_epochs * -(-count // self.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        draw = torch.Generator().manual_seed(self.seed + block_inputs.index)

        def gap(chosen: Tensor) -> Tensor:
            with walk.source.mount_block(walk.stack, learner) as stack:
                made: Tensor = stack.run_blocks(before[chosen].clone(), places.expand(len(chosen), -1))
            return F.mse_loss(made, target[chosen].clone())

        def whole_gap() -> float:
            with torch.no_grad():
                return (
                    sum(float(gap(some)) * len(some) for some in torch.split(torch.arange(count), self.batch_size))
                    / count
                )

        first = whole_gap()
        for _ in range(self.num_train_epochs):
            for chosen in torch.split(torch.randperm(count, generator=draw), self.batch_size):
                gap(chosen).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        return first, whole_gap()

    def quantize_part(
        self, block_inputs: BlockInputs, part: BlockPart, grids: Callable[[str], Grid | None]
    ) -> dict[str, IntegerMatrix]:
        """Round the layers of a part to nearest."""
        for _ in block_inputs.iter_inputs(part):  # computes the hidden states as a side effect
            pass
        wanted = {name: grids(name) for name in part.layers}
        return {
            name: quantize_matrix(get_layer(block_inputs.block, name).weight, grid)
            for name, grid in wanted.items()
            if grid is not None
        }
