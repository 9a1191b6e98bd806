"""GPTQ and AWQ checkpoints: what gptqmodel wrote is read as it reads it, what is written here is what it writes;
exports keep their golden tokens.
"""

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
from torch import Tensor

from llmworks.core.artifact import Dataset
from llmworks.core.errors import ModelError
from llmworks.model.io.decoder_files import load_decoder
from llmworks.model.lowbit.checkpoint import dequantize_all
from llmworks.model.lowbit.gptq_awq import AwqFormat, GptqFormat
from llmworks.model.lowbit.integer import Grid, IntegerMatrix, Scales, quantize_matrix
from llmworks.quantize.gptq import GptqConfig
from tests.quantize.test_quantize import quantized, texts  # noqa: F401 (a fixture)

FOUND: dict[str, Any] = json.loads(
    gzip.decompress((Path(__file__).parents[1] / "fixtures" / "gptq_layouts.json.gz").read_bytes())
)


def tensor(given: dict[str, Any]) -> Tensor:
    return torch.from_numpy(
        np.frombuffer(base64.b64decode(given["data"]), given["dtype"]).reshape(given["shape"]).copy()
    )


@pytest.mark.parametrize("way", FOUND)
def test_what_gptqmodel_wrote_is_read_as_it_reads_it(way: str) -> None:
    """Also columns out of order, and zero points that are kept less one."""
    tensors = {f"layer.{name}": tensor(given) for name, given in FOUND[way]["tensors"].items()}
    weight, expected = dequantize_all(tensors, FOUND[way]["config"])["layer.weight"], tensor(FOUND[way]["weight"])
    assert weight.shape == (64, 128)
    assert torch.allclose(weight[: len(expected)], expected, atol=1e-6)


@pytest.mark.parametrize("way", ["gptq", "gptq_v2, zero points", "awq"])
def test_what_is_written_is_what_gptqmodel_wrote(way: str) -> None:
    """Its codes, scales and zero points, taken apart and written again: the same words."""
    tensors = {name: tensor(given) for name, given in FOUND[way]["tensors"].items()}
    form: Any = AwqFormat if way == "awq" else GptqFormat
    weight = dequantize_all({f"layer.{name}": one for name, one in tensors.items()}, FOUND[way]["config"])[
        "layer.weight"
    ]
    scale = tensors["scales"].float().T.contiguous()
    symmetric = way == "gptq"
    grid = Grid(4, 32, symmetric=symmetric, stored="float16")
    steps = (weight.view(64, -1, 32) / scale[..., None]).round()
    if symmetric:
        zero = torch.zeros_like(scale)
    else:
        other = {
            **tensors,
            "scales": torch.ones_like(tensors["scales"]),
            "qweight": torch.zeros_like(tensors["qweight"]),
        }  # codes of 0: what is left are the zero points
        zero = (
            -8
            - dequantize_all({f"layer.{name}": one for name, one in other.items()}, FOUND[way]["config"])[
                "layer.weight"
            ].view(64, -1, 32)[..., 0]
        )
    made = form.tensors_of(
        "layer", IntegerMatrix((steps + zero[..., None]).view(64, 128).to(torch.int8), Scales(scale, zero), grid)
    )
    assert sorted(made) == sorted(f"layer.{name}" for name in tensors)
    for name, one in tensors.items():
        assert torch.equal(made[f"layer.{name}"], one), name


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_all_bits_come_back(bits: int, symmetric: bool) -> None:
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(bits))
    weight[3, :32] = weight[3, :32].abs()  # its zero point is the smallest number
    matrix = quantize_matrix(weight, Grid(bits, 32, symmetric=symmetric, stored="float16"))
    config = GptqFormat.config_of({"layer": matrix.grid}, ["lm_head", "model.layers.0.mlp.up_proj"])
    assert config["dynamic"] == {"-:^model\\.layers\\.0\\.mlp\\.up_proj$": {}}
    assert torch.equal(dequantize_all(GptqFormat.tensors_of("layer", matrix), config)["layer.weight"], matrix.weight())
    if bits == 4:
        assert torch.equal(
            dequantize_all(AwqFormat.tensors_of("layer", matrix), AwqFormat.config_of({"layer": matrix.grid}, []))[
                "layer.weight"
            ],
            matrix.weight(),
        )


@pytest.mark.parametrize("form", ["gptq", "awq"])
@pytest.mark.parametrize("stage", ["absmax", "gptq", "awq"])
def test_the_form_changes_nothing(stage: str, form: str, pico: Path, texts: Dataset, tmp_path: Path) -> None:
    """The same model as in compressed-tensors, to the bit."""
    one, other = (
        quantized(stage, pico, texts, tmp_path / name, save_format=name, dtype="float16")
        for name in ("compressed-tensors", form)
    )
    assert json.loads((other.path / "config.json").read_text())["quantization_config"]["quant_method"] == form
    for mine, theirs in zip(load_decoder(other.path).parameters(), load_decoder(one.path).parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_has_no_place_is_refused(pico: Path, texts: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="save_format: awq does not support 8 bits"):
        GptqConfig(save_format="awq", bits=8)
    with pytest.raises(ValidationError, match="dtype: save_format gptq stores scales in float16"):
        GptqConfig(save_format="gptq", dtype="bfloat16")
    with pytest.raises(ModelError, match="60 x 64 weights of 4 bits do not fill 32-bit words"):
        GptqFormat.tensors_of("layer", quantize_matrix(torch.randn(60, 64), Grid(4, 32)))
    with pytest.raises(ModelError, match="layer: its tensors do not match"):
        dequantize_all(
            {"layer.qweight": torch.zeros(16, 64, dtype=torch.int32), "layer.scales": torch.ones(4, 64)},
            {"quant_method": "gptq", "bits": 4},
        )
    with pytest.raises(
        ModelError, match=r"only AWQ checkpoints of 4 bits, version gemm, are supported, not 4 bits, gemv"
    ):
        dequantize_all({}, {"quant_method": "awq", "bits": 4, "version": "gemv"})
