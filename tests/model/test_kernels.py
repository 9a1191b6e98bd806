"""Kernels of others compute what the functions beside them compute, and a CPU never touches them."""

from __future__ import annotations

import warnings

import pytest
import torch

from llmworks.model import kernels
from llmworks.model.feed_forward import _SiluGate
from llmworks.model.nf4 import _levels, dynamic_map, pack, unpack
from llmworks.model.norm import RMSNorm

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import bitsandbytes.functional as bnb


@pytest.mark.parametrize("double", [False, True], ids=["once", "double"])
def test_nf4_is_unpacked_alike(double: bool) -> None:
    """Their call, on a CPU, which is the same as on a GPU."""
    torch.manual_seed(5)
    packed = pack(torch.randn(96, 128) * 0.05, double=double)
    made = kernels.unpack_with(bnb, packed.codes, packed.scales, packed.second, packed.mean, packed.shape, (dynamic_map(), _levels(packed.codes.device)[0]))
    torch.testing.assert_close(made, unpack(packed), rtol=1e-6, atol=1e-8)


def test_a_cpu_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 8)
    assert kernels.rms_norm(x, torch.ones(8), 1e-5, from_zero=False) is None
    assert kernels.silu_gate(x, x) is None
    assert kernels.unpack_nf4(x.to(torch.uint8), x, None, 0.0, (3, 8), (x, x)) is None
    kernels.found.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LLMWORKS_KERNELS", "0")
    assert kernels.found("math") is None
    kernels.found.cache_clear()
    monkeypatch.delenv("LLMWORKS_KERNELS")
    assert kernels.found("math") is not None
    assert kernels.found("no_such_kernels") is None
    kernels.found.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("from_zero", [False, True], ids=["llama", "gemma"])
def test_the_norm_is_ours(from_zero: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(6)
    norm = RMSNorm(96, 1e-5, from_zero=from_zero).cuda()
    with torch.no_grad():
        norm.weight.add_(torch.randn_like(norm.weight) * 0.1)
    x = torch.randn(2, 7, 96, device="cuda", requires_grad=True)
    found = []
    for on in ("1", "0"):
        monkeypatch.setenv("LLMWORKS_KERNELS", on)
        kernels.found.cache_clear()
        assert (kernels.rms_norm(x, norm.weight, 1e-5, from_zero=from_zero) is None) == (on == "0"), "install llmworks[gpu]"
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
    for ours, theirs in zip(torch.autograd.grad(plain.sum(), (gate, up)), torch.autograd.grad(fused.sum(), (gate, up)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("double", [False, True], ids=["once", "double"])
def test_nf4_is_unpacked_alike_on_a_gpu(double: bool) -> None:
    packed = pack(torch.randn(96, 128, device="cuda") * 0.05, double=double)
    made = kernels.unpack_nf4(packed.codes, packed.scales, packed.second, packed.mean, packed.shape, (dynamic_map(), _levels(packed.codes.device)[0]))
    assert made is not None, "install llmworks[gpu]"
    torch.testing.assert_close(made, unpack(packed), rtol=1e-6, atol=1e-8)
