"""Calibrated rounding: all layers of a part have the same inputs, so their rows are processed as one matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmworks.model.lowbit.integer import Grid, IntegerMatrix, Scales, quantize_matrix
from llmworks.model.nn.norm import RMSNorm
from llmworks.quantize.algorithms.awq import search_clipping, search_input_scales
from llmworks.quantize.algorithms.gptq import quantize_gptq
from llmworks.quantize.algorithms.smoothquant import search_smoothing_scales
from llmworks.quantize.calibrate.layerwise import BlockInputs, BlockPart, get_layer

Grids = Callable[[str], Grid | None]


class GptqMethod:
    """GPTQ; see `gptq.py`. `awq_scaling`: scale inputs before, as AWQ does."""

    def __init__(
        self,
        num_calibration_samples: int,
        *,
        dampening_frac: float,
        act_order: bool,
        mse_scales: bool,
        awq_scaling: bool = False,
    ) -> None:
        self.num_calibration_samples, self.dampening_frac, self.act_order, self.mse_scales, self.awq_scaling = (
            num_calibration_samples,
            dampening_frac,
            act_order,
            mse_scales,
            awq_scaling,
        )

    def prepare(self, block_inputs: BlockInputs, grids: Grids) -> None:
        """Scale the parts' inputs, if configured."""
        if self.awq_scaling:
            AwqMethod(self.num_calibration_samples, apply_clip=False).prepare(block_inputs, grids)

    def quantize_part(self, block_inputs: BlockInputs, part: BlockPart, grids: Grids) -> dict[str, IntegerMatrix]:
        """Quantize the layers of a part."""
        moments = block_inputs.collect_statistics(part)
        kinds: dict[Grid, list[str]] = {}
        for name in part.layers:
            wanted = grids(name)
            if wanted is not None:
                kinds.setdefault(wanted, []).append(name)
        found = {}
        for wanted, names in kinds.items():
            weights = [get_layer(block_inputs.block, name).weight for name in names]
            made = quantize_gptq(
                torch.cat(weights),
                moments.hessian,
                wanted,
                dampening_frac=self.dampening_frac,
                act_order=self.act_order,
                mse_scales=self.mse_scales,
            )
            rows = [len(weight) for weight in weights]
            for name, codes, scale, zero in zip(
                names,
                *(torch.split(all_rows, rows) for all_rows in (made.codes, made.scales.scale, made.scales.zero)),
                strict=True,
            ):
                found[name] = IntegerMatrix(codes, Scales(scale, zero), wanted)
        return found


class AwqMethod:
    """AWQ; see `awq.py`. `apply_clip`: search clipping ranges by the groups' output error."""

    def __init__(self, num_calibration_samples: int, *, apply_clip: bool) -> None:
        self.num_calibration_samples, self.apply_clip = num_calibration_samples, apply_clip

    def prepare(self, block_inputs: BlockInputs, grids: Grids) -> None:
        """Compute the scales of all parts of the unmodified block, then apply them; the block's function is
        unchanged.
        """
        scales: list[tuple[BlockPart, Tensor]] = []
        for part in block_inputs.parts:
            moments, weights = (
                block_inputs.collect_statistics(part, with_abs_mean=True),
                [get_layer(block_inputs.block, name).weight for name in part.layers],
            )
            wanted = [grids(name) for name in part.layers]
            mean = _reduce_shared_columns(block_inputs.block, part, moments.abs_mean)
            if mean is not None and wanted[0] is not None and all(grid == wanted[0] for grid in wanted):
                scales.append((part, search_input_scales(weights, moments.hessian, mean, wanted[0])[0]))
        for part, scale in scales:
            scale_inputs(block_inputs.block, part.layers, scale)

    def quantize_part(self, block_inputs: BlockInputs, part: BlockPart, grids: Grids) -> dict[str, IntegerMatrix]:
        """Quantize the layers of a part."""
        hessian, found = block_inputs.collect_statistics(part).hessian, {}
        for name in part.layers:
            wanted, weight = grids(name), get_layer(block_inputs.block, name).weight
            if wanted is not None:
                found[name] = quantize_matrix(
                    weight, wanted, search_clipping(weight, hessian, wanted) if self.apply_clip else None
                )
        return found


class SmoothQuantMethod:
    """SmoothQuant; see `smoothquant.py`. `smoothing_strengths`: candidates for the smoothing strength."""

    def __init__(self, num_calibration_samples: int, *, smoothing_strengths: Sequence[float]) -> None:
        self.num_calibration_samples, self.smoothing_strengths = num_calibration_samples, tuple(smoothing_strengths)

    def prepare(self, block_inputs: BlockInputs, grids: Grids) -> None:
        """Compute the scales of all parts of the unmodified block, then apply them."""
        scales: list[tuple[BlockPart, Tensor]] = []
        for part in block_inputs.parts:
            moments, weights = (
                block_inputs.collect_statistics(part),
                [get_layer(block_inputs.block, name).weight for name in part.layers],
            )
            wanted = [grids(name) for name in part.layers]
            most = _reduce_shared_columns(block_inputs.block, part, moments.max_abs, use_max=True)
            if (
                most is not None
                and wanted[0] is not None
                and wanted[0].inputs
                and all(grid == wanted[0] for grid in wanted)
            ):
                scales.append(
                    (
                        part,
                        search_smoothing_scales(
                            weights,
                            moments.sample,
                            most,
                            wanted[0],
                            wanted[0].inputs,
                            self.smoothing_strengths,
                            functools.partial(_reduce_shared_columns, block_inputs.block, part, use_max=True),
                        )[0],
                    )
                )
        for part, scale in scales:
            scale_inputs(block_inputs.block, part.layers, scale)

    def quantize_part(self, block_inputs: BlockInputs, part: BlockPart, grids: Grids) -> dict[str, IntegerMatrix]:
        """Round the layers of a part to nearest."""
        for _ in block_inputs.iter_inputs(part):  # computes the hidden states as a side effect
            pass
        found = {}
        for name in part.layers:
            wanted = grids(name)
            if wanted is not None:
                found[name] = quantize_matrix(get_layer(block_inputs.block, name).weight, wanted)
        return found


def _reduce_shared_columns(block: Any, part: BlockPart, statistic: Tensor, *, use_max: bool = False) -> Tensor | None:
    """Return a statistic of each input column of a part, averaged (or maximized) over columns that can only be
    scaled together; None if nothing before the part can be scaled.
    """
    if part.layers[0] == "feed_forward.down":
        return (
            statistic if block.feed_forward.gate is not None else None
        )  # without a gate the activation function lies between them
    if part.layers[0] != "attention.out":
        return None if block.norm_position == "post" else statistic
    attention = block.attention
    if attention.num_kv_heads == attention.num_heads:
        return statistic
    heads = statistic.view(attention.num_kv_heads, -1, attention.head_size)  # query heads fed by one value head
    each = heads.amax(1, keepdim=True) if use_max else heads.mean(1, keepdim=True)
    return each.expand(-1, attention.num_heads // attention.num_kv_heads, -1).reshape(-1)


def scale_inputs(block: Any, layers: Sequence[str], scale: Tensor) -> None:
    """Multiply columns of layers by `scale` [columns] and divide what produces their inputs by it; the function is
    unchanged.
    """
    for name in layers:
        get_layer(block, name).weight.mul_(scale)
    if layers[0] == "feed_forward.down":
        _divide_rows(get_layer(block, "feed_forward.up"), scale)
    elif layers[0] == "attention.out":
        attention = block.attention
        _divide_rows(attention.value, scale.view(attention.num_kv_heads, -1, attention.head_size)[:, 0].reshape(-1))
    else:
        norm = block.attention_norm if layers[0] == "attention.query" else block.feed_forward_norm
        divide_norm(norm, scale)


def _divide_rows(layer: Any, scale: Tensor) -> None:
    layer.weight.div_(scale[:, None])
    if layer.bias is not None:
        layer.bias.div_(scale)


def divide_norm(norm: Any, scale: Tensor) -> None:
    """Divide a norm's outputs by scaling its weights, which may be stored as offsets from 1."""
    if isinstance(norm, RMSNorm) and norm.unit_offset:
        norm.weight.copy_((1 + norm.weight) / scale - 1)
        return
    norm.weight.div_(scale)
    if getattr(norm, "bias", None) is not None:
        norm.bias.div_(scale)
