"""Whole numbers: published worked examples, compressed-tensors' scales, rounding and packing, and what a grid
promises.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams

from llmworks.core.errors import ModelError
from llmworks.model.lowbit.integer import (
    Grid,
    Scales,
    dequantize_groups,
    fit_scales,
    pack_integers,
    quantize_groups,
    quantize_matrix,
    search_scales,
    split_groups,
    unpack_integers,
)

KINDS = list(itertools.product((8, 4, 3), (0, 32), (True, False)))


def test_the_worked_examples() -> None:
    """Weights between -3 and 3.2 in 8 bits: 0.1 is 4 by absmax, since 127 / 3.2 * 0.1 = 3.97; and -1 by zero point,
    which is -5, since 255 / 6.2 = 41.13.
    """
    weights = torch.tensor([[-3.0, 0.1, 3.2]])
    even = quantize_matrix(weights, Grid(8))
    assert even.codes.tolist() == [[-119, 4, 127]]
    assert float(even.weight()[0, 1]) == pytest.approx(4 * 3.2 / 127)
    apart = quantize_matrix(weights, Grid(8, symmetric=False))
    assert apart.codes.tolist() == [[-128, -1, 127]]
    assert apart.scales.zero.tolist() == [[-5.0]]
    assert float(apart.weight()[0, 1]) == pytest.approx(4 * 6.2 / 255)


@pytest.mark.parametrize(("bits", "group", "symmetric"), KINDS)
def test_scales_and_rounding_are_those_of_compressed_tensors(bits: int, group: int, symmetric: bool) -> None:
    weights = torch.randn(24, 96, generator=torch.Generator().manual_seed(bits)) + (0 if symmetric else 0.4)
    grid = Grid(bits, group, symmetric, edge="between")
    groups = split_groups(weights, grid)
    args = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="group" if group else "channel",
        group_size=group or None,
    )
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    made = quantize_matrix(weights, grid)
    assert torch.allclose(made.scales.scale, scale.view_as(made.scales.scale))
    assert torch.equal(made.scales.zero, zero.view_as(made.scales.zero).float())
    theirs = quantize(weights, scale, zero, args, dtype=torch.int8)
    assert torch.equal(made.codes, theirs)
    assert torch.allclose(made.weight(), dequantize(theirs, scale, zero, args))


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_is_that_of_compressed_tensors(bits: int) -> None:
    codes = torch.randint(
        -(1 << (bits - 1)), 1 << (bits - 1), (7, 37), dtype=torch.int8, generator=torch.Generator().manual_seed(bits)
    )
    words = pack_integers(codes, bits)
    assert torch.equal(words, pack_to_int32(codes, bits))
    assert torch.equal(unpack_integers(words, bits, 37), codes)
    assert torch.equal(unpack_from_int32(words, bits, torch.Size((7, 37))), codes)


@pytest.mark.parametrize(("bits", "group", "symmetric"), KINDS)
def test_no_weight_moves_by_more_than_half_a_step(bits: int, group: int, symmetric: bool) -> None:
    weights = torch.randn(24, 96, generator=torch.Generator().manual_seed(1))
    grid = Grid(bits, group, symmetric)
    groups = split_groups(weights, grid)
    made = quantize_matrix(weights, grid)
    apart = (split_groups(made.weight(), grid) - groups).abs() / made.scales.scale[..., None]
    assert float(apart.max()) <= (0.5 if symmetric else 1.0) + 1e-4  # a zero point is rounded itself


def test_a_search_never_loses_more_and_zeros_stay_zeros() -> None:
    weights = torch.randn(16, 64, generator=torch.Generator().manual_seed(2)) ** 3
    weights[3] = 0
    grid = Grid(4, 32)
    groups = split_groups(weights, grid)

    def lost(scales: Scales) -> Any:
        return (dequantize_groups(quantize_groups(groups, scales, grid), scales) - groups).square().sum(-1)

    plain, found = lost(fit_scales(groups, grid)), lost(search_scales(groups, grid))
    assert bool((found <= plain).all())
    assert float(found.sum()) < 0.9 * float(plain.sum())
    assert not quantize_matrix(weights, grid).weight()[3].any()


def test_scales_are_rounded_before_they_are_used() -> None:
    weights = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    for stored in ("float16", "bfloat16"):
        made = quantize_matrix(weights, Grid(4, 32, stored=stored))  # type: ignore[arg-type]
        assert torch.equal(made.scales.scale, made.scales.scale.to(getattr(torch, stored)).float())


def test_what_is_refused() -> None:
    with pytest.raises(
        ModelError, match="rows of 576 weights are not divisible by group size 128; possible: 16, 32, 48, 64, 96, 192"
    ):
        quantize_matrix(torch.ones(2, 576), Grid(4, 128))
    with pytest.raises(ModelError, match="2 of its weights are NaN or infinite"):
        quantize_matrix(torch.tensor([[1.0, float("nan"), float("inf")]]), Grid(4))
