"""Compute llama.cpp's importance matrix: the mean square of each input column of each matrix, on calibration data.

Does not know GGUF quantization formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmworks.core.context import Context
from llmworks.core.errors import DataError
from llmworks.model.gguf.layout import to_gguf_name
from llmworks.model.io.layer_reader import LayerReader
from llmworks.quantize.calibrate.layerwise import LayerwiseCalibration


def compute_importance(
    source: LayerReader, ids: Tensor, eval_ids: Tensor, ctx: Context
) -> tuple[dict[str, Any], LayerwiseCalibration]:
    """Return (mean squares by the tensor's GGUF name, numpy fp32 [columns]; the finished calibration, which holds the
    hidden states of the held-out sequences).

    Blocks are processed one by one; an interrupted run resumes at its block.
    """
    folder = ctx.scratch / "importance"
    folder.mkdir(exist_ok=True)
    with torch.inference_mode():
        calibration = LayerwiseCalibration(source, ids, eval_ids, ctx.scratch / "walk")
        with ctx.progress.bar("imatrix", source.shape.num_hidden_layers, "blocks") as bar:
            bar.advance(calibration.num_done)
            for block_inputs in calibration.iter_blocks():
                found: dict[str, Tensor] = {}
                for part in block_inputs.parts if calibration.num_samples else ():
                    squares, tokens = torch.zeros(0), 0
                    for x in block_inputs.iter_inputs(part):
                        added = x.square().sum(0, dtype=torch.float64)
                        squares, tokens = (added if not tokens else squares + added), tokens + len(x)
                    for layer in part.layers:
                        found[source.rename(f"decoder.blocks.{block_inputs.index}.{layer}")] = (
                            squares / tokens
                        ).float()
                if calibration.num_samples:
                    block_inputs.compute_outputs()
                torch.save(found, folder / f"{block_inputs.index:05}.pt")
                block_inputs.mark_done()
                bar.advance()
        made: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.pt")):
            made |= torch.load(file, weights_only=True)
        if calibration.num_samples:
            made["lm_head"] = _get_head_inputs(calibration)
    return {
        name: values.numpy() for layer, values in made.items() if (name := to_gguf_name(f"{layer}.weight"))
    }, calibration


def _get_head_inputs(calibration: LayerwiseCalibration) -> Tensor:
    squares, tokens = torch.zeros(calibration.hidden_size, dtype=torch.float64), 0
    for at, ids in calibration.iter_chunks():
        state = calibration.stack.norm(
            calibration.open_states(calibration.source.shape.num_hidden_layers)[at : at + len(ids)]
        )
        squares, tokens = squares + state.square().sum((0, 1), dtype=torch.float64), tokens + ids.numel()
    return (squares / tokens).float()


def write_importance(target: Path, importance: Mapping[str, Any], data: str, num_samples: int, length: int) -> None:
    """Write the imatrix file that llama.cpp's tools read: sums of squares and counts by tensor."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(target, "")
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [data])
    writer.add_uint32("imatrix.chunk_count", num_samples)
    writer.add_uint32("imatrix.chunk_size", length)
    for name, squares in sorted(importance.items()):
        writer.add_tensor(
            f"{name}.in_sum2", np.asarray(squares * np.float32(num_samples * length), dtype=np.float32)[None]
        )
        writer.add_tensor(f"{name}.counts", np.array([[num_samples * length]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_importance(file: Path) -> dict[str, Any]:
    """Read an imatrix file: mean squares by the tensor's name, numpy fp32 [columns]. DataError for an invalid file."""
    from libgguf import load_imatrix

    try:
        return {str(name): values for name, values in load_imatrix(file).items()}
    except (ValueError, OSError, KeyError) as error:
        raise DataError(f"{file}: is not an importance matrix ({error})") from None
