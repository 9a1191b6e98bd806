"""Half-quadratic quantization: the solver beside the reference's own results, the form beside its own files."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from llmworks.core.artifact import Dataset
from llmworks.core.errors import ModelError
from llmworks.model.io.decoder_files import load_decoder
from llmworks.model.lowbit import hqq as hqq_layout
from llmworks.model.lowbit.checkpoint import dequantize_all
from llmworks.model.lowbit.integer import (
    Grid,
    IntegerMatrix,
    dequantize_groups,
    fit_scales,
    quantize_groups,
    quantize_matrix,
    split_groups,
)
from llmworks.model.lowbit.linear import Int4Linear, is_available, make_low_bit_layer
from llmworks.quantize.algorithms.hqq import POWER, optimize_zero_points, quantize_hqq
from llmworks.quantize.hqq import HqqConfig
from tests.quantize.test_quantize import quantized, texts  # noqa: F401

FOUND: dict[str, Any] = json.loads(
    gzip.decompress((Path(__file__).parents[1] / "fixtures" / "hqq_layout.json.gz").read_bytes())
)
CONFIG = {"quant_method": "hqq"}


def tensor(given: dict[str, Any]) -> Tensor:
    return torch.from_numpy(
        np.frombuffer(base64.b64decode(given["data"]), given["dtype"]).reshape(given["shape"]).copy()
    )


def grid_of(bits: int) -> Grid:
    return Grid(bits, 32, symmetric=False, stored="float16", real_zero_points=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_form_is_that_of_hqq(bits: int) -> None:
    """What it wrote is read as it reads it, and written again: every tensor to the bit, those that it tells itself by,
    too.
    """
    stored = {f"layer.{name}": tensor(given) for name, given in FOUND["ways"][str(bits)]["tensors"].items()}
    ((name, matrix),) = hqq_layout.weights(stored, CONFIG)
    assert name == "layer.weight"
    assert isinstance(matrix, IntegerMatrix)
    assert torch.allclose(
        matrix.weight(), tensor(FOUND["ways"][str(bits)]["weight"]).float(), atol=1e-3
    )  # which it computes in fp16
    made = hqq_layout.tensors_of("layer", IntegerMatrix(matrix.codes, matrix.scales, grid_of(bits)))
    assert set(made) == set(stored)
    for name, one in made.items():
        assert one.dtype == stored[name].dtype, name
        assert name == "layer.round_zero" or torch.equal(one, stored[name]), (
            name
        )  # whether it began at whole numbers, which it does with 4 bits


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_solver_is_as_good_as_the_reference(bits: int) -> None:
    """In what it minimizes, the mean of |error|^p, and clearly better than ranges from the smallest to the largest (8
    bits leave nothing to gain).
    """
    weight = tensor(FOUND["weight"])
    theirs = dequantize_all(
        {f"layer.{name}": tensor(given) for name, given in FOUND["ways"][str(bits)]["tensors"].items()}, CONFIG
    )["layer.weight"]
    grid = grid_of(bits)

    def loss(made: Tensor) -> float:
        return float((made - weight).abs().pow(POWER).mean())

    assert loss(quantize_hqq(weight, grid).weight()) <= loss(theirs) * 1.002
    if bits < 8:
        assert loss(quantize_hqq(weight, grid).weight()) < 0.97 * loss(
            quantize_matrix(weight, Grid(bits, 32, symmetric=False)).weight()
        )


def test_a_zero_point_by_hand() -> None:
    """The turns of the solver written out for one group."""
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(1)) * 0.05
    weight[0, 5] = 0.4
    grid = Grid(4, 64, symmetric=False, real_zero_points=True)
    groups = split_groups(weight, grid)
    first = fit_scales(groups, grid)
    assert float(dequantize_groups(quantize_groups(groups, first, grid), first).max()) == pytest.approx(0.4)
    scale, zero, beta, best, least = float(first.scale), float(first.zero), 10.0, float(first.zero), float("inf")
    for _ in range(20):
        codes = [min(7, max(-8, round(float(w) / scale + zero))) for w in weight[0]]
        apart = [float(w) - (q - zero) * scale for w, q in zip(weight[0], codes, strict=True)]
        error = sum(map(abs, apart)) / 64
        if error >= least:
            break
        best, least = zero, error
        kept = [(1 if e > 0 else -1) * max(0.0, abs(e) - max(abs(e), 1e-12) ** -0.3 / beta) for e in apart]
        zero = sum(q - (float(w) - e) / scale for w, q, e in zip(weight[0], codes, kept, strict=True)) / 64
        beta *= 1.01
    assert float(optimize_zero_points(groups, first, grid).zero) == pytest.approx(best, abs=1e-4)
    assert best != float(first.zero)


def test_a_directory(pico: Path, texts: Dataset, tmp_path: Path) -> None:
    """Written, read again, measured; its bits count zero points of 16."""
    made = quantized("hqq", pico, texts, tmp_path, dtype="float16")
    config = json.loads((made.path / "config.json").read_text())["quantization_config"]
    assert config["quant_config"]["weight_quant_params"]["group_size"] == 32
    assert config["skip_modules"] == ["lm_head"]
    stored = load_file(made.path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    expected = quantize_hqq(load_file(pico / "model.safetensors")[f"{name}.weight"], grid_of(4))
    assert torch.equal(load_decoder(made.path).decoder.blocks[1].feed_forward.up.weight, expected.weight())
    assert stored[f"{name}.W_q"].shape == (96, 32)
    assert made.metrics["bits_per_weight"] == pytest.approx(4 + 32 / 32, abs=0.01)
    assert made.metrics["kl"] < quantized("zeropoint", pico, texts, tmp_path / "plain").metrics["kl"] * 1.2


@pytest.mark.skipif(
    not is_available(), reason="this CPU has no instructions for bfloat16, so that such layers are not used on it"
)
def test_real_zero_points_run_as_whole_numbers() -> None:
    matrix = quantize_hqq(
        torch.randn(128, 256, generator=torch.Generator().manual_seed(3)),
        Grid(4, 64, symmetric=False, real_zero_points=True, stored="float16"),
    )
    layer = make_low_bit_layer(matrix)
    assert isinstance(layer, Int4Linear)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(4))
    expected = x @ matrix.weight().T
    assert float((layer(x) - expected).norm() / expected.norm()) < 0.008


def test_what_has_no_place_is_refused() -> None:
    with pytest.raises(ValidationError, match="Input should be 2, 3, 4 or 8"):
        HqqConfig(bits=5)
    weight = torch.randn(5, 64)
    with pytest.raises(ModelError, match="layer: its 5 groups do not fill bytes of 2, which the format hqq requires"):
        hqq_layout.tensors_of("layer", quantize_matrix(weight, Grid(4, 0, symmetric=False, real_zero_points=True)))
    made = hqq_layout.tensors_of("layer", quantize_matrix(weight, Grid(8, 32, symmetric=False, real_zero_points=True)))
    with pytest.raises(
        ModelError, match=r"layer: only hqq layers of 2, 3, 4 or 8 bits with groups along rows \(axis 1\)"
    ):
        dequantize_all({**made, "layer.axis": torch.tensor(0)}, CONFIG)
    with pytest.raises(ModelError, match="layer: its tensors do not match"):
        dequantize_all({**made, "layer.scale": torch.ones(7, 1)}, CONFIG)
    with pytest.raises(ModelError, match="layer: its tensors do not match"):
        dequantize_all({name: one for name, one in made.items() if not name.endswith("zero")}, CONFIG)
    with pytest.raises(ModelError, match="the format hqq has one bit width"):
        hqq_layout.config_of({"a": Grid(4, 32), "b": Grid(8, 32)}, [])
