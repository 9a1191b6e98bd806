"""Calibrated rounding: all layers of a part have the same inputs, so their rows are processed as one matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmworks.model.lowbit.integer import Grid, Scales, Whole, whole
from llmworks.model.nn.norm import RMSNorm
from llmworks.quantize.algorithms.awq import clipped, input_scales
from llmworks.quantize.algorithms.gptq import solve
from llmworks.quantize.algorithms.smoothquant import smoothing
from llmworks.quantize.calibrate.layerwise import Part, Passing, layer_of

Grids = Callable[[str], Grid | None]


class Gptq:
    """GPTQ; see `gptq.py`. `awq_scaling`: scale inputs before, as AWQ does."""

    def __init__(self, texts: int, *, damping: float, by_activation: bool, search: bool, scale: bool = False) -> None:
        self.texts, self.damping, self.by_activation, self.search, self.scale = (
            texts,
            damping,
            by_activation,
            search,
            scale,
        )

    def prepare(self, passing: Passing, grids: Grids) -> None:
        """Scale the parts' inputs, if configured."""
        if self.scale:
            Awq(self.texts, clip=False).prepare(passing, grids)

    def part(self, passing: Passing, part: Part, grids: Grids) -> dict[str, Whole]:
        """Quantize the layers of a part."""
        moments = passing.moments(part)
        kinds: dict[Grid, list[str]] = {}
        for name in part.layers:
            wanted = grids(name)
            if wanted is not None:
                kinds.setdefault(wanted, []).append(name)
        found = {}
        for wanted, names in kinds.items():
            weights = [layer_of(passing.block, name).weight for name in names]
            made = solve(
                torch.cat(weights),
                moments.hessian,
                wanted,
                damping=self.damping,
                by_activation=self.by_activation,
                search=self.search,
            )
            rows = [len(weight) for weight in weights]
            for name, codes, scale, zero in zip(
                names,
                *(torch.split(all_rows, rows) for all_rows in (made.codes, made.scales.scale, made.scales.zero)),
                strict=True,
            ):
                found[name] = Whole(codes, Scales(scale, zero), wanted)
        return found


class Awq:
    """AWQ; see `awq.py`. `apply_clip`: search clipping ranges by the groups' output error."""

    def __init__(self, texts: int, *, clip: bool) -> None:
        self.texts, self.clip = texts, clip

    def prepare(self, passing: Passing, grids: Grids) -> None:
        """Compute the scales of all parts of the unmodified block, then apply them; the block's function is
        unchanged.
        """
        scales: list[tuple[Part, Tensor]] = []
        for part in passing.parts:
            moments, weights = (
                passing.moments(part, sizes=True),
                [layer_of(passing.block, name).weight for name in part.layers],
            )
            wanted = [grids(name) for name in part.layers]
            mean = _as_given(passing.block, part, moments.mean)
            if mean is not None and wanted[0] is not None and all(grid == wanted[0] for grid in wanted):
                scales.append((part, input_scales(weights, moments.hessian, mean, wanted[0])[0]))
        for part, scale in scales:
            scale_inputs(passing.block, part.layers, scale)

    def part(self, passing: Passing, part: Part, grids: Grids) -> dict[str, Whole]:
        """Quantize the layers of a part."""
        hessian, found = passing.moments(part).hessian, {}
        for name in part.layers:
            wanted, weight = grids(name), layer_of(passing.block, name).weight
            if wanted is not None:
                found[name] = whole(weight, wanted, clipped(weight, hessian, wanted) if self.clip else None)
        return found


class Smooth:
    """SmoothQuant; see `smoothquant.py`. `smoothing_strengths`: candidates for the smoothing strength."""

    def __init__(self, texts: int, *, powers: Sequence[float]) -> None:
        self.texts, self.powers = texts, tuple(powers)

    def prepare(self, passing: Passing, grids: Grids) -> None:
        """Compute the scales of all parts of the unmodified block, then apply them."""
        scales: list[tuple[Part, Tensor]] = []
        for part in passing.parts:
            moments, weights = passing.moments(part), [layer_of(passing.block, name).weight for name in part.layers]
            wanted = [grids(name) for name in part.layers]
            most = _as_given(passing.block, part, moments.most, largest=True)
            if (
                most is not None
                and wanted[0] is not None
                and wanted[0].inputs
                and all(grid == wanted[0] for grid in wanted)
            ):
                scales.append(
                    (
                        part,
                        smoothing(
                            weights,
                            moments.sample,
                            most,
                            wanted[0],
                            wanted[0].inputs,
                            self.powers,
                            functools.partial(_as_given, passing.block, part, largest=True),
                        )[0],
                    )
                )
        for part, scale in scales:
            scale_inputs(passing.block, part.layers, scale)

    def part(self, passing: Passing, part: Part, grids: Grids) -> dict[str, Whole]:
        """Round the layers of a part to nearest."""
        for _ in passing.inputs(part):  # computes the hidden states as a side effect
            pass
        found = {}
        for name in part.layers:
            wanted = grids(name)
            if wanted is not None:
                found[name] = whole(layer_of(passing.block, name).weight, wanted)
        return found


def _as_given(block: Any, part: Part, known: Tensor, *, largest: bool = False) -> Tensor | None:
    """Return a statistic of each input column of a part, averaged (or maximized) over columns that can only be
    scaled together; None if nothing before the part can be scaled.
    """
    if part.layers[0] == "feed_forward.down":
        return (
            known if block.feed_forward.gate is not None else None
        )  # without a gate the activation function lies between them
    if part.layers[0] != "attention.out":
        return None if block.place == "post" else known
    attention = block.attention
    if attention.groups == attention.heads:
        return known
    heads = known.view(attention.groups, -1, attention.per_head)  # query heads fed by one value head
    each = heads.amax(1, keepdim=True) if largest else heads.mean(1, keepdim=True)
    return each.expand(-1, attention.heads // attention.groups, -1).reshape(-1)


def scale_inputs(block: Any, layers: Sequence[str], scale: Tensor) -> None:
    """Multiply columns of layers by `scale` [columns] and divide what produces their inputs by it; the function is
    unchanged.
    """
    for name in layers:
        layer_of(block, name).weight.mul_(scale)
    if layers[0] == "feed_forward.down":
        _divide_rows(layer_of(block, "feed_forward.up"), scale)
    elif layers[0] == "attention.out":
        attention = block.attention
        _divide_rows(attention.value, scale.view(attention.groups, -1, attention.per_head)[:, 0].reshape(-1))
    else:
        norm = block.attention_norm if layers[0] == "attention.query" else block.feed_forward_norm
        divide_norm(norm, scale)


def _divide_rows(layer: Any, scale: Tensor) -> None:
    layer.weight.div_(scale[:, None])
    if layer.bias is not None:
        layer.bias.div_(scale)


def divide_norm(norm: Any, scale: Tensor) -> None:
    """Divide a norm's outputs by scaling its weights, which may be stored as offsets from 1."""
    if isinstance(norm, RMSNorm) and norm.from_zero:
        norm.weight.copy_((1 + norm.weight) / scale - 1)
        return
    norm.weight.div_(scale)
    if getattr(norm, "bias", None) is not None:
        norm.bias.div_(scale)
