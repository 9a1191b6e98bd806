"""Quantize a model block by block: read a block, quantize it, write it to scratch, and pass its outputs on to the
next.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from llmworks.core.context import Context
from llmworks.core.memory import keep_freed
from llmworks.model.io.decoder_files import to_standard
from llmworks.model.io.layer_reader import Source
from llmworks.model.lowbit.activations import read_rounded
from llmworks.quantize.calibrate.layerwise import Part, Passing, Walk, layer_of

if TYPE_CHECKING:
    pass


BINS = 121  # bins of a weight histogram


SEEN = 1 << 17  # weights of a matrix sampled for its histogram


class Matrix(Protocol):
    """A quantized matrix: `integer.Whole`, or `bnb_4bit.Matrix`."""

    @property
    def grid(self) -> Any:
        """Return its quantization grid."""

    @property
    def bits(self) -> float:
        """Return the bits per weight, scales included."""

    def weight(self) -> Tensor:
        """Return the dequantized matrix [rows, columns]."""


class Method(Protocol):
    """A method of quantizing matrices."""

    texts: int  # number of calibration sequences

    def prepare(self, passing: Passing, grids: Callable[[str], Any]) -> None:
        """Transform a block before its parts are quantized."""

    def part(self, passing: Passing, part: Part, grids: Callable[[str], Any]) -> Mapping[str, Matrix]:
        """Return the quantized matrices of layers with the same input, by name; those whose grid is None are
        skipped.
        """


def _walked(
    source: Source,
    ids: Tensor,
    held: Tensor,
    ctx: Context,
    method: Method,
    grid_of: Callable[[str], Any],
    form: Any,
    stored: torch.dtype,
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Quantize all blocks. Return (statistics of each layer, the divergence). Finished blocks are written to
    scratch.
    """

    folder = ctx.scratch / "blocks"
    folder.mkdir(exist_ok=True)
    keep_freed()
    with torch.inference_mode():
        walk = Walk(source, ids, held, ctx.scratch / "walk", stored)
        with ctx.progress.bar("quantize", source.shape.num_hidden_layers, "blocks") as bar:
            bar.advance(walk.done)
            for passing in walk.blocks():
                head, told = f"decoder.blocks.{passing.number}.", []
                grids = functools.partial(_grid_of, source, grid_of, head)
                method.prepare(passing, grids)
                for name, tensor in passing.block.state_dict().items():
                    if tensor.ndim < 2 or grids(name.removesuffix(".weight")) is None:
                        tensor.copy_(tensor.to(stored))
                plain = {f"{head}{name}": tensor for name, tensor in passing.block.state_dict().items()}
                tensors: dict[str, Tensor] = {}
                for part in passing.parts:
                    for name, matrix in method.part(passing, part, grids).items():
                        layer, before = layer_of(passing.block, name), plain.pop(f"{head}{name}.weight")
                        after = matrix.weight()
                        lost = float((after - before).square().sum() / before.square().sum().clamp(min=1e-30))
                        layer.weight = torch.nn.Parameter(after, requires_grad=False)
                        if matrix.grid.inputs:
                            read_rounded(layer, matrix.grid.inputs)
                        tensors |= form.tensors_of(source.rename(f"{head}{name}"), matrix)
                        told.append(
                            {
                                "name": source.rename(f"{head}{name}"),
                                "layer": name,
                                "block": passing.number,
                                "lost": lost,
                                "bits": matrix.bits,
                                "weights": before.numel(),
                                "shape": shape_of(before, after),
                                "apart": passing.apart.get(name),
                            }
                        )
                passing.finish()
                _save_block(source, plain, tensors, folder, passing, told, stored)
                passing.done()
                bar.advance()
        damage = walk.damage() if len(held) else {}
    return [one for file in sorted(folder.glob("*.json")) for one in json.loads(file.read_text())], damage


def _save_block(
    source: Source,
    plain: dict[str, Any],
    tensors: dict[str, Tensor],
    folder: Path,
    passing: Passing,
    told: list[dict[str, Any]],
    stored: torch.dtype,
) -> None:
    """Write a finished block to scratch, with the statistics of its layers."""
    from safetensors.torch import save_file

    rest = to_standard(plain, source.kind) if source.kind else plain
    save_file(
        {name: tensor.to(stored).contiguous() for name, tensor in rest.items()} | tensors,
        folder / f"{passing.number:05}.safetensors",
    )
    (folder / f"{passing.number:05}.json").write_text(json.dumps(told))


def shape_of(before: Tensor, after: Tensor) -> dict[str, Any]:
    """Return histograms of the weights before and after, in evenly spaced rows (about SAMPLED weights): counts of
    BINS equal bins within five times their root mean square; values beyond it are in the outer bins.
    """
    step = max(1, before.numel() // SEEN)
    before, after = before[::step], after[::step]
    high = 5 * float(before.square().mean().sqrt()) or 1.0
    low = -high
    return {
        "low": low,
        "high": high,
        "before": torch.histc(before.clamp(low, high), BINS, low, high).int().tolist(),
        "after": torch.histc(after.clamp(low, high), BINS, low, high).int().tolist(),
    }


def _grid_of(source: Source, grid_of: Callable[[str], Any], head: str, name: str) -> Any:
    return grid_of(source.rename(f"{head}{name}"))
