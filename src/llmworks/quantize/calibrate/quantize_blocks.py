"""Quantize a model block by block: read a block, quantize it, write it to scratch, and pass its outputs on to the
next.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llmworks.core.context import Context
from llmworks.core.machine import retain_freed_blocks
from llmworks.model.io.decoder_files import to_standard
from llmworks.model.io.layer_reader import LayerReader
from llmworks.model.lowbit.activations import quantize_inputs
from llmworks.quantize.calibrate.layerwise import BlockInputs, BlockPart, LayerwiseCalibration, get_layer

BINS = 121  # bins of a weight histogram


SAMPLED = 1 << 17  # weights of a matrix sampled for its histogram


class QuantizedMatrix(Protocol):
    """A quantized matrix: `integer.Whole`, or `bnb_4bit.Matrix`."""

    @property
    def grid(self) -> Any:
        """Return its quantization grid."""

    @property
    def bits(self) -> float:
        """Return the bits per weight, scales included."""

    def weight(self) -> Tensor:
        """Return the dequantized matrix [rows, columns]."""


class QuantizationMethod(Protocol):
    """A method of quantizing matrices."""

    num_calibration_samples: int  # number of calibration sequences

    def prepare(self, block_inputs: BlockInputs, grids: Callable[[str], Any]) -> None:
        """Transform a block before its parts are quantized."""

    def quantize_part(
        self, block_inputs: BlockInputs, part: BlockPart, grids: Callable[[str], Any]
    ) -> Mapping[str, QuantizedMatrix]:
        """Return the quantized matrices of layers with the same input, by name; those whose grid is None are
        skipped.
        """


def quantize_blocks(
    source: LayerReader,
    ids: Tensor,
    eval_ids: Tensor,
    ctx: Context,
    method: QuantizationMethod,
    get_grid: Callable[[str], Any],
    form: Any,
    stored: torch.dtype,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Quantize all blocks. Return (statistics of each layer, the divergence). Finished blocks are written to
    scratch.
    """

    folder = ctx.scratch / "blocks"
    folder.mkdir(exist_ok=True)
    retain_freed_blocks()
    with torch.inference_mode():
        calibration = LayerwiseCalibration(source, ids, eval_ids, ctx.scratch / "walk", stored)
        with ctx.progress.bar("quantize", source.shape.num_hidden_layers, "blocks") as bar:
            bar.advance(calibration.num_done)
            for block_inputs in calibration.iter_blocks():
                head, layer_stats = f"decoder.blocks.{block_inputs.index}.", []
                grids = functools.partial(_get_grid, source, get_grid, head)
                method.prepare(block_inputs, grids)
                for name, tensor in block_inputs.block.state_dict().items():
                    if tensor.ndim < 2 or grids(name.removesuffix(".weight")) is None:
                        tensor.copy_(tensor.to(stored))
                plain = {f"{head}{name}": tensor for name, tensor in block_inputs.block.state_dict().items()}
                tensors: dict[str, Tensor] = {}
                for part in block_inputs.parts:
                    for name, matrix in method.quantize_part(block_inputs, part, grids).items():
                        layer, before = get_layer(block_inputs.block, name), plain.pop(f"{head}{name}.weight")
                        after = matrix.weight()
                        lost = float((after - before).square().sum() / before.square().sum().clamp(min=1e-30))
                        layer.weight = torch.nn.Parameter(after, requires_grad=False)
                        if matrix.grid.inputs:
                            quantize_inputs(layer, matrix.grid.inputs)
                        tensors |= form.tensors_of(source.rename(f"{head}{name}"), matrix)
                        layer_stats.append(
                            {
                                "name": source.rename(f"{head}{name}"),
                                "layer": name,
                                "block": block_inputs.index,
                                "lost": lost,
                                "bits": matrix.bits,
                                "weights": before.numel(),
                                "shape": make_weight_histograms(before, after),
                                "apart": block_inputs.outlier_ratios.get(name),
                            }
                        )
                block_inputs.compute_outputs()
                _save_block(source, plain, tensors, folder, block_inputs, layer_stats, stored)
                block_inputs.mark_done()
                bar.advance()
        divergence = calibration.measure_divergence() if len(eval_ids) else {}
    return [one for file in sorted(folder.glob("*.json")) for one in json.loads(file.read_text())], divergence


def _save_block(
    source: LayerReader,
    plain: dict[str, Any],
    tensors: dict[str, Tensor],
    folder: Path,
    block_inputs: BlockInputs,
    layer_stats: list[dict[str, Any]],
    stored: torch.dtype,
) -> None:
    """Write a finished block to scratch, with the statistics of its layers."""
    from safetensors.torch import save_file

    rest = to_standard(plain, source.kind) if source.kind else plain
    save_file(
        {name: tensor.to(stored).contiguous() for name, tensor in rest.items()} | tensors,
        folder / f"{block_inputs.index:05}.safetensors",
    )
    (folder / f"{block_inputs.index:05}.json").write_text(json.dumps(layer_stats))


def make_weight_histograms(before: Tensor, after: Tensor) -> dict[str, Any]:
    """Return histograms of the weights before and after, in evenly spaced rows (about SAMPLED weights): counts of
    BINS equal bins within five times their root mean square; values beyond it are in the outer bins.
    """
    step = max(1, before.numel() // SAMPLED)
    before, after = before[::step], after[::step]
    high = 5 * float(before.square().mean().sqrt()) or 1.0
    low = -high
    return {
        "low": low,
        "high": high,
        "before": torch.histc(before.clamp(low, high), BINS, low, high).int().tolist(),
        "after": torch.histc(after.clamp(low, high), BINS, low, high).int().tolist(),
    }


def _get_grid(source: LayerReader, get_grid: Callable[[str], Any], head: str, name: str) -> Any:
    return get_grid(source.rename(f"{head}{name}"))
