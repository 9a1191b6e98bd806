"""Read and write bitsandbytes' LLM.int8() checkpoints, which transformers loads: int8 weights, one scale per row.

Dettmers et al. 2022 (arXiv:2208.07339). Inputs are quantized except outliers. bitsandbytes keeps a whole column as soon
as one token of a batch has an outlier in it; here each outlier is kept alone, so that tokens are independent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from llmworks.core.errors import ModelError
from llmworks.model.lowbit.activations import InputQuantization
from llmworks.model.lowbit.integer import Grid, IntegerMatrix, Scales

METHOD = "bitsandbytes"
THRESHOLD = 6.0


def tensors_of(name: str, matrix: IntegerMatrix) -> dict[str, Tensor]:
    """Return the tensors of a quantized layer `name` with one scale per row."""
    return {
        f"{name}.weight": matrix.codes.contiguous(),
        f"{name}.SCB": (matrix.scales.scale[:, 0] * 127).float().contiguous(),
        f"{name}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def config_of(grids: Mapping[str, Grid], ignored: Sequence[str]) -> dict[str, Any]:
    """Build `quantization_config`; `ignored`: layers that are not quantized."""
    inputs = next(iter(grids.values())).inputs
    threshold = inputs.threshold if inputs else 0.0
    return {
        "quant_method": METHOD,
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": threshold,
        "llm_int8_skip_modules": list(ignored),
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def weights(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Iterator[tuple[str, IntegerMatrix | Tensor]]:
    """Yield (name, tensor or quantized matrix) of a directory's weights. ModelError for a layer without scales."""
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        if part in ("SCB", "weight_format"):
            continue
        if part == "weight" and f"{layer}.SCB" in tensors and tensor.dtype != torch.int8:
            raise ModelError(
                f"{layer}: has scales (SCB), but {str(tensor.dtype).removeprefix('torch.')} weights instead of int8"
            )
        if f"{layer}.weight_format" in tensors and part == "weight" and int(tensors[f"{layer}.weight_format"]):
            raise ModelError(
                f"{layer}: its int8 weights are in a GPU's tile order (weight_format"
                f" {int(tensors[f'{layer}.weight_format'])}); only row-major weights are supported"
            )
        if tensor.dtype == torch.int8:
            scale = tensors.get(f"{layer}.SCB")
            if scale is None or scale.numel() != len(tensor) or not scale.isfinite().all():
                raise ModelError(
                    f"{layer}: its scales (SCB) are missing, not finite, or not one for each of its {len(tensor)} rows"
                )
            row_scales = scale.float().view(-1, 1) / 127
            yield name, IntegerMatrix(tensor, Scales(row_scales, torch.zeros_like(row_scales)), Grid(8))
        else:
            yield name, tensor


def get_input_quantization(config: Mapping[str, Any], name: str) -> InputQuantization | None:
    """Return how a layer's inputs are quantized; None: they are not."""
    if any(
        part == name or part in name.split(".") or name.startswith(f"{part}.")
        for part in config.get("llm_int8_skip_modules") or ()
    ):
        return None
    return InputQuantization(
        8, "last", float(THRESHOLD if config.get("llm_int8_threshold") is None else config["llm_int8_threshold"])
    )
