"""GPTQ against the update that it reformulates, AWQ against the outputs that it is to keep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmworks.core.errors import ModelError
from llmworks.model.lowbit.integer import Grid, fit_scales, quantize_matrix, split_groups
from llmworks.quantize.algorithms.awq import compute_output_error, search_clipping, search_input_scales
from llmworks.quantize.algorithms.calibrated import scale_inputs
from llmworks.quantize.algorithms.gptq import quantize_gptq
from tests.model.test_families import THEIRS, made


def harm(before: Tensor, after: Tensor, hessian: Tensor) -> float:
    """The mean squared change of a layer's outputs, over its rows: of inputs with these second moments."""
    apart = (after - before).double()
    return float(((apart @ hessian.double()) * apart).sum() / len(before))


def layer(seed: int, rows: int = 12, columns: int = 64, tokens: int = 512) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, inputs, their second moments); inputs that are alike, and a few that are large."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=draw) @ torch.randn(columns, columns, generator=draw) / 8
    x[:, :3] *= 8
    return torch.randn(rows, columns, generator=draw), x, x.T @ x / tokens


def brain_surgeon(weight: Tensor, hessian: Tensor, grid: Grid, damping: float) -> Tensor:
    """Optimal Brain Quantization in the order of columns (Frantar et al. 2022, equations 2 and 3): after each column
    the whole inverse is updated.
    """
    rest, count = weight.double().clone(), len(hessian)
    inverse = torch.linalg.inv(hessian.double() + damping * hessian.diagonal().mean() * torch.eye(count))
    scales, made = None, torch.empty_like(rest)
    size = grid.get_group_size(count)
    for column in range(count):
        if column % size == 0:
            scales = fit_scales(rest[:, None, column : column + size].float(), grid)
        assert scales is not None
        s, z = scales.scale[:, 0].double(), scales.zero[:, 0].double()
        made[:, column] = ((rest[:, column] / s + z).round().clamp(grid.low, grid.high) - z) * s
        error = (rest[:, column] - made[:, column]) / inverse[column, column]
        rest -= error[:, None] * inverse[column]
        inverse = inverse - inverse[:, column, None] * inverse[column] / inverse[column, column]
        inverse[column, column] = 1.0  # it is done, and never read again
    return made.float()


@pytest.mark.parametrize("grid", [Grid(4, 16), Grid(4, 32, symmetric=False), Grid(3), Grid(8, 16)], ids=str)
def test_gptq_is_optimal_brain_quantization(grid: Grid) -> None:
    weight, _, hessian = layer(0)
    ours = quantize_gptq(weight, hessian, grid, dampening_frac=0.01, mse_scales=False).weight()
    theirs = brain_surgeon(weight, hessian, grid, 0.01)
    assert float((ours != theirs).float().mean()) < 0.01 or torch.allclose(
        ours, theirs, atol=1e-5
    )  # a tie in rounding may fall either way
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("by_activation", [False, True])
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("grid", [Grid(4, 16), Grid(3, 0, symmetric=False), Grid(4, -1)], ids=str)
def test_gptq_changes_outputs_less_than_rounding(grid: Grid, search: bool, by_activation: bool) -> None:
    for seed in range(4):
        weight, _, hessian = layer(seed, rows=24, columns=192)
        ours = quantize_gptq(weight, hessian, grid, act_order=by_activation, mse_scales=search)
        assert harm(weight, ours.weight(), hessian) < 0.8 * harm(
            weight, quantize_matrix(weight, grid).weight(), hessian
        )


def test_harm_is_the_mean_squared_change_of_outputs() -> None:
    weight, x, hessian = layer(1)
    after = quantize_matrix(weight, Grid(3)).weight()
    assert harm(weight, after, hessian) == pytest.approx(
        float((x @ (after - weight).T).square().sum(0).div(len(x)).mean()), rel=1e-4
    )
    assert compute_output_error(weight, after, hessian) == pytest.approx(
        harm(weight, after, hessian) * len(weight), rel=1e-4
    )


def test_where_inputs_know_nothing_of_one_another_gptq_is_rounding() -> None:
    weight, _, _ = layer(2)
    for grid in (Grid(4, 16), Grid(4, 0, symmetric=False)):
        assert torch.equal(
            quantize_gptq(weight, torch.eye(64), grid, mse_scales=False).codes, quantize_matrix(weight, grid).codes
        )


def test_an_input_that_is_always_zero_has_no_weight_and_a_singular_matrix_is_damped() -> None:
    weight, _, hessian = layer(3)
    hessian[5], hessian[:, 5] = 0, 0
    assert not quantize_gptq(weight, hessian, Grid(4, 16)).weight()[:, 5].any()
    one = torch.ones(1, 64)
    assert torch.isfinite(quantize_gptq(weight, one.T @ one, Grid(4, 16), dampening_frac=1e-12).weight()).all()
    with pytest.raises(ModelError, match="NaN or infinite"):
        quantize_gptq(weight, hessian * float("nan"), Grid(4, 16))


def test_awq_finds_a_power_that_keeps_outputs_and_clipping_keeps_more() -> None:
    weight, x, hessian = layer(4, rows=48)
    grid = Grid(4, 32, symmetric=False)
    scale, power, without, least = search_input_scales([weight[:16], weight[16:]], hessian, x.abs().mean(0), grid)
    assert 0 < power < 1
    assert least < 0.8 * without
    plain = quantize_matrix(weight * scale, grid)
    assert compute_output_error(weight, plain.weight() / scale, hessian) == pytest.approx(least, rel=1e-3)
    moments = hessian / (scale[:, None] * scale)
    narrow = quantize_matrix(weight * scale, grid, search_clipping(weight * scale, moments, grid))
    blocks = torch.block_diag(*(moments[at : at + 32, at : at + 32] for at in (0, 32)))  # what the search looks at
    assert compute_output_error(weight * scale, narrow.weight(), blocks) <= compute_output_error(
        weight * scale, plain.weight(), blocks
    )


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "mistral"])
def test_scaled_inputs_change_nothing(name: str, tmp_path: Path) -> None:
    """Norms that count from 0 or from 1, biases, grouped heads."""
    from llmworks.model.io.decoder_files import load_decoder

    made(THEIRS[name], tmp_path / name)
    model: Any = load_decoder(tmp_path / name)
    ids = torch.randint(0, model.shape.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        for block in model.decoder.blocks:
            attention = block.attention
            for layers, columns in (
                (("attention.query", "attention.key", "attention.value"), model.shape.hidden_size),
                (("feed_forward.gate", "feed_forward.up"), model.shape.hidden_size),
                (("feed_forward.down",), model.shape.inner_size),
            ):
                scale_inputs(block, layers, torch.rand(columns, generator=draw) + 0.5)
            each = torch.rand(attention.num_kv_heads, 1, attention.head_size, generator=draw) + 0.5
            scale_inputs(
                block,
                ("attention.out",),
                each.expand(-1, attention.num_heads // attention.num_kv_heads, -1).reshape(-1),
            )
        after = model(input_ids=ids).logits
    assert torch.allclose(before, after, atol=1e-5 * float(before.abs().max()))


def test_scales_of_grouped_heads_are_shared() -> None:
    from types import SimpleNamespace

    from llmworks.quantize.algorithms.calibrated import _reduce_shared_columns
    from llmworks.quantize.calibrate.layerwise import BlockPart

    block = SimpleNamespace(norm_position="pre", attention=SimpleNamespace(num_kv_heads=2, num_heads=4, head_size=3))
    mean = _reduce_shared_columns(block, BlockPart(("attention.out",)), torch.arange(12.0))
    assert mean is not None
    assert mean.view(2, 2, 3).tolist() == [[[1.5, 2.5, 3.5]] * 2, [[7.5, 8.5, 9.5]] * 2]
    assert split_groups(mean.view(1, -1), Grid(4, 3)).shape == (1, 4, 3)
