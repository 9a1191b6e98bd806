"""Kernels of others compute what the functions beside them compute, and a CPU never touches them."""

from __future__ import annotations

import warnings

import pytest
import torch

from llmworks.model.lowbit.nf4 import _get_levels, get_dynamic_map, pack_4bit, unpack_4bit
from llmworks.model.nn import kernels
from llmworks.model.nn.feed_forward import FeedForward, _SiluGate
from llmworks.model.nn.norm import RMSNorm
from llmworks.model.shape import Shape

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes.functional as bnb


@pytest.mark.parametrize("double", [False, True], ids=["once", "double"])
def test_nf4_is_unpacked_alike(double: bool) -> None:
    """Their call, on a CPU, which is the same as on a GPU."""
    torch.manual_seed(5)
    packed = pack_4bit(torch.randn(96, 128) * 0.05, double_quant=double)
    made = kernels.dequantize_nf4_with(
        bnb,
        packed.codes,
        packed.scales,
        packed.nested_scales,
        packed.nested_offset,
        packed.shape,
        (get_dynamic_map(), _get_levels(packed.codes.device)[0]),
    )
    torch.testing.assert_close(made, unpack_4bit(packed), rtol=1e-6, atol=1e-8)


def test_a_cpu_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 8)
    assert kernels.rms_norm(x, torch.ones(8), 1e-5, unit_offset=False) is None
    assert kernels.silu_gate(x, x) is None
    assert kernels.dequantize_nf4(x.to(torch.uint8), x, None, 0.0, (3, 8), (x, x)) is None
    kernels.import_kernels.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LLMWORKS_KERNELS", "0")
    assert kernels.import_kernels("math") is None
    kernels.import_kernels.cache_clear()
    monkeypatch.delenv("LLMWORKS_KERNELS")
    assert kernels.import_kernels("math") is not None
    assert kernels.import_kernels("no_such_kernels") is None
    kernels.import_kernels.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("from_zero", [False, True], ids=["llama", "gemma"])
def test_the_norm_is_ours(from_zero: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(6)
    norm = RMSNorm(96, 1e-5, unit_offset=from_zero).cuda()
    with torch.no_grad():
        norm.weight.add_(torch.randn_like(norm.weight) * 0.1)
    x = torch.randn(2, 7, 96, device="cuda", requires_grad=True)
    found = []
    for on in ("1", "0"):
        monkeypatch.setenv("LLMWORKS_KERNELS", on)
        kernels.import_kernels.cache_clear()
        assert (kernels.rms_norm(x, norm.weight, 1e-5, unit_offset=from_zero) is None) == (on == "0"), (
            "install llmworks[gpu]"
        )
        y = norm(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), (x, norm.weight))))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_the_gate_is_ours() -> None:
    torch.manual_seed(7)
    gate, up = (torch.randn(5, 96, device="cuda", requires_grad=True) for _ in range(2))
    fused = kernels.silu_gate(gate, up)
    assert fused is not None, "install llmworks[gpu]"
    plain = _SiluGate.apply(gate, up)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(fused, plain)
    for ours, theirs in zip(
        torch.autograd.grad(plain.sum(), (gate, up)), torch.autograd.grad(fused.sum(), (gate, up)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("double", [False, True], ids=["once", "double"])
def test_nf4_is_unpacked_alike_on_a_gpu(double: bool) -> None:
    packed = pack_4bit(torch.randn(96, 128, device="cuda") * 0.05, double_quant=double)
    made = kernels.dequantize_nf4(
        packed.codes,
        packed.scales,
        packed.nested_scales,
        packed.nested_offset,
        packed.shape,
        (get_dynamic_map(), _get_levels(packed.codes.device)[0]),
    )
    assert made is not None, "install llmworks[gpu]"
    torch.testing.assert_close(made, unpack_4bit(packed), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_keeps_its_input_only_is_the_norm(dtype: torch.dtype) -> None:
    """Forward the same bits as without gradients; backward as autograd has it of the definition, in fp64."""
    torch.manual_seed(8)
    norm = RMSNorm(48, 1e-5)
    with torch.no_grad():
        norm.weight.add_(torch.randn_like(norm.weight) * 0.2)
    x = torch.randn(3, 5, 48, dtype=dtype, requires_grad=True)
    way = torch.randn(3, 5, 48)
    y = norm.train()(x)
    assert type(y.grad_fn).__name__ == "_RMSNormFunctionBackward"
    assert torch.equal(y, norm.eval()(x))
    exact, gain = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    wanted = torch.autograd.grad(
        (exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * gain * way).sum(), (exact, gain)
    )
    found = torch.autograd.grad((y * way).sum(), (x, norm.weight))
    assert found[0].dtype == dtype
    for ours, theirs, near in zip(found, wanted, (1e-5 if dtype == torch.float32 else 1e-2, 1e-5), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=near, atol=near)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_a_feed_forward_that_keeps_less_is_the_feed_forward(frozen: bool) -> None:
    """Forward and every gradient as autograd has them of the definition; with somebody who looks at its last matrix it
    goes the long way, to the same numbers.
    """
    torch.manual_seed(9)
    layer, x = (
        FeedForward(Shape(hidden_size=32, num_attention_heads=4, intermediate_size=48)),
        torch.randn(2, 5, 32, requires_grad=True),
    )
    layer.down.weight.requires_grad_(not frozen)
    assert layer.gate is not None
    way, weights = (
        torch.randn(2, 5, 32),
        (x, layer.gate.weight, layer.up.weight, *(() if frozen else (layer.down.weight,))),
    )
    plain = torch.nn.functional.linear(torch.nn.functional.silu(layer.gate(x)) * layer.up(x), layer.down.weight)
    wanted = torch.autograd.grad((plain * way).sum(), weights)
    short = layer(x)
    assert type(short.grad_fn).__name__ == "_SiluGateDownBackward"
    seen: list[torch.Tensor] = []
    hook = layer.down.register_forward_hook(lambda module, given, made: seen.append(given[0]))
    long = layer(x)
    hook.remove()
    assert len(seen) == 1
    for made in (short, long):
        torch.testing.assert_close(made, plain, rtol=1e-6, atol=1e-6)
        for ours, theirs in zip(torch.autograd.grad((made * way).sum(), weights), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
