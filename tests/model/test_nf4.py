"""NF4 is bitsandbytes', to the last bit; the layer that keeps its weight so computes with what the bits say."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from llmworks.model.lora.lora import LoraLinear, LoraSettings
from llmworks.model.lowbit.nf4 import NF4Linear, get_dynamic_map, pack_4bit, unpack_4bit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes.functional as bnb

MATRICES = {
    "normal": lambda: torch.randn(96, 128) * 0.05,
    "with outliers": lambda: torch.randn(64, 576) * 0.02 + 3.0 * (torch.rand(64, 576) > 0.999),
    "a block of zeros": lambda: torch.cat([torch.zeros(1, 64), torch.randn(3, 64)]),
    "many scales": lambda: torch.randn(640, 256).exp() - 1,
    "constant": lambda: torch.full((4, 64), 0.25),
}


@pytest.mark.parametrize("double", [False, True], ids=["once", "double"])
@pytest.mark.parametrize("what", MATRICES)
def test_codes_and_values_are_those_of_bitsandbytes(what: str, double: bool) -> None:
    torch.manual_seed(4)
    weight = MATRICES[what]()
    codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    made = pack_4bit(weight, double_quant=double)
    assert torch.equal(made.codes, codes.view(-1))
    if not double:
        assert torch.equal(unpack_4bit(made), bnb.dequantize_4bit(codes, state))
        return
    assert made.nested_scales is not None
    assert torch.equal(made.nested_scales, state.state2.absmax)
    assert made.nested_offset == float(state.offset)
    # their kernel on a CPU takes the second nearest for some that are nearly half way; what it stands for is the
    # nearest of their map
    centred = (single := pack_4bit(weight, double_quant=False).scales) - single.mean()
    relative = (
        centred
        * (1.0 / made.nested_scales.where(made.nested_scales > 0, torch.ones(()))).repeat_interleave(256)[
            : len(centred)
        ]
    )
    assert torch.equal(made.scales.long(), (relative[:, None] - bnb.create_dynamic_map()).abs().argmin(1))
    if float(made.nested_scales.min()) > 0:  # of scales that are all alike any code says the same
        assert int((made.scales.int() - state.absmax.int()).abs().max()) <= 1
        assert float((made.scales != state.absmax).float().mean()) < 0.02
    same = (made.scales == state.absmax).repeat_interleave(64)[: weight.numel()]
    assert torch.equal(unpack_4bit(made).view(-1)[same], bnb.dequantize_4bit(codes, state).view(-1)[same])


def test_the_map_of_scales_is_theirs() -> None:
    assert torch.equal(get_dynamic_map(), bnb.create_dynamic_map())


def test_bits_of_a_weight() -> None:
    """The paper's figure: 4.5 bits, 4.127 with scales in 8 bits."""
    weight = torch.randn(1024, 1024)
    assert pack_4bit(weight, double_quant=False).bits == 4.5
    assert pack_4bit(weight).bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-9)


@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_computes_with_its_bits(bias: bool) -> None:
    torch.manual_seed(0)
    base = nn.Linear(128, 96, bias=bias)
    layer = NF4Linear(base)
    x = torch.randn(3, 5, 128, requires_grad=True)
    plain = nn.Linear(128, 96, bias=bias)
    plain.load_state_dict(base.state_dict() | {"weight": unpack_4bit(pack_4bit(base.weight))})
    assert torch.allclose(layer(x), plain(x), atol=1e-6)
    assert 0.01 < float(((layer(x) - base(x)).norm() / base(x).norm()).detach()) < 0.2
    found, there = (torch.autograd.grad(y.square().sum(), x)[0] for y in (layer(x), plain(x)))
    assert torch.allclose(found, there, rtol=1e-4, atol=1e-4)
    adapted = LoraLinear(layer, LoraSettings(4, 8.0))
    nn.init.normal_(adapted.b)
    other = LoraLinear(plain, LoraSettings(4, 8.0, dropout=0.5)).eval()  # with dropout it is the plain sum
    other.load_state_dict({"a": adapted.a, "b": adapted.b}, strict=False)
    assert torch.allclose(adapted(x), other(x), atol=1e-4)
    found, there = (torch.autograd.grad(y.square().sum(), x)[0] for y in (adapted(x), other(x)))
    assert torch.allclose(found, there, rtol=1e-3, atol=1e-2)


def test_a_matrix_of_an_odd_size_comes_back() -> None:
    torch.manual_seed(1)
    weight = torch.randn(3, 7)
    assert unpack_4bit(pack_4bit(weight)).shape == (3, 7)
    assert float((unpack_4bit(pack_4bit(weight, double_quant=False)) - weight).norm() / weight.norm()) < 0.15
