"""Layers that compute with whole numbers, beside the plain weights that these stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import make_tokenizer
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from llmworks.core.artifact import Model
from llmworks.core.context import Context
from llmworks.core.errors import ModelError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.core.types import Message, Request, Sampling
from llmworks.generate.engines.torch import TorchEngine
from llmworks.model.golden import record_golden
from llmworks.model.io.decoder_files import load_decoder
from llmworks.model.io.load import load_model
from llmworks.model.io.weights import StoredTensors
from llmworks.model.lowbit import linear as low_bit
from llmworks.model.lowbit.integer import Grid, quantize_matrix
from llmworks.model.lowbit.linear import Int4Linear, Int8Linear, LowBitLinear, make_low_bit_layer
from llmworks.quantize.int8 import Int8Config, int8
from llmworks.quantize.rtn import RtnConfig, rtn

runs = pytest.mark.skipif(
    not low_bit.is_available(),
    reason="this CPU has no instructions for bfloat16, so that such layers are not used on it",
)


def apart(a: Tensor, b: Tensor) -> float:
    """Of their size."""
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of two layers, whose queries, keys and values have biases, and whose rows fill the kernel's blocks."""
    out, tokenizer = tmp_path_factory.mktemp("biased"), make_tokenizer()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
            initializer_range=0.1,
        )
    )
    for layer in model.model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            nn.init.normal_(part.bias, std=0.2)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def quantized(stage: Callable[..., Any], config: Any, path: Path, folder: Path) -> Path:
    (folder / "scratch").mkdir()
    (folder / "out").mkdir()
    stage(
        config,
        Model(path, golden=record_golden(path)),
        Context(
            folder / "out",
            folder / "scratch",
            0,
            Progress(quiet=True),
            ReportBuilder(),
            lambda _: pytest.fail("no engine is needed"),
        ),
    )
    return folder / "out"


@runs
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [
        (4, 64, True),
        (4, 64, False),
        (4, 32, False),
        (3, 128, True),
        (2, 32, False),
        (4, 0, True),
        (4, 192, False),
        (8, 0, True),
        (6, 0, True),
    ],
)
def test_layers_compute_what_their_weights_do(bits: int, group: int, symmetric: bool) -> None:
    """By the kernel and by weights made anew; within what rounding to bfloat16 takes (2^-9 of each number)."""
    draw = torch.Generator().manual_seed(bits)
    matrix = quantize_matrix(torch.randn(128, 384, generator=draw), Grid(bits, group, symmetric, stored="bfloat16"))
    layer = make_low_bit_layer(matrix)
    assert layer is not None
    assert type(layer) is (Int4Linear if bits <= 4 else Int8Linear)
    assert layer.shape == (128, 384)
    for rows in (1, layer.max_kernel_rows, layer.max_kernel_rows + 1, 200):
        x = torch.randn(rows, 384, generator=draw)
        assert apart(layer(x), x @ matrix.weight().T) < 0.006
        assert apart(layer.forward_kernel(x.bfloat16()).float(), layer.forward_dense(x.bfloat16()).float()) < 0.006
    rounded = x.bfloat16()
    exact = rounded.double() @ matrix.weight().double().T
    assert apart(layer.forward_kernel(rounded).double(), exact) < 0.004
    assert torch.equal(layer(x.view(2, 100, 384)), layer(x).view(2, 100, 128))


@runs
def test_weights_made_anew_are_the_stored_ones() -> None:
    """Of a symmetric grid with scales in bfloat16: to the bit, but for rounding the product to bfloat16."""
    matrix = quantize_matrix(
        torch.randn(192, 256, generator=torch.Generator().manual_seed(0)), Grid(4, 32, stored="bfloat16")
    )
    layer = make_low_bit_layer(matrix)
    assert isinstance(layer, Int4Linear)
    assert torch.equal(layer.forward_dense(torch.eye(256).bfloat16()).T, matrix.weight().bfloat16())


@runs
def test_what_has_no_kernel_has_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(128, 96)
    assert make_low_bit_layer(quantize_matrix(weight[:96], Grid(4, 32))) is None  # rows that do not fill a block
    assert make_low_bit_layer(quantize_matrix(weight, Grid(4, 48))) is None
    assert make_low_bit_layer(quantize_matrix(weight, Grid(8, 32))) is None
    assert make_low_bit_layer(quantize_matrix(weight, Grid(8, 0, symmetric=False))) is None
    assert make_low_bit_layer(quantize_matrix(weight, Grid(8, -1))) is None
    assert (
        make_low_bit_layer(quantize_matrix(weight[:, :40], Grid(8))) is None
    )  # rows that do not begin where the kernel can read them
    assert make_low_bit_layer(quantize_matrix(weight, Grid(4, 32))) is not None
    monkeypatch.setattr(low_bit, "is_available", lambda: False)
    assert make_low_bit_layer(quantize_matrix(weight, Grid(4, 32))) is None


@runs
@pytest.mark.parametrize(
    ("stage", "config"),
    [
        (rtn, RtnConfig(bits=4, group_size=32)),
        (rtn, RtnConfig(bits=4, group_size=32, symmetric=False)),
        (rtn, RtnConfig(bits=8, group_size=0)),
        (int8, Int8Config(bits=8, group_size=0)),
    ],
    ids=["absmax-4", "zeropoint-4", "absmax-8", "int8"],
)
def test_a_directory_runs_as_whole_numbers(
    stage: Callable[..., Any], config: Any, biased: Path, tmp_path: Path
) -> None:
    """The engine's model has no plain weights in its blocks, keeps biases and rounded inputs, and computes what the
    plain one does; adapters and training get the plain one.
    """
    made = quantized(stage, config, biased, tmp_path)
    dense, low = load_decoder(made), load_model(made, low_bit=True)
    layers = [module for module in low.modules() if isinstance(module, LowBitLinear)]
    assert len(layers) == 14
    assert sum(layer.bias is not None for layer in layers) == 6
    assert all(bool(layer._forward_pre_hooks) is (stage is int8) for layer in layers)
    assert not [module for module in low.decoder.blocks.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad():
        for length in (5, 120):
            ids = torch.arange(3, 3 + length)[None] % 90
            expected, given = dense(input_ids=ids).logits, low(input_ids=ids).logits
            assert given.dtype == torch.float32
            assert (
                0 < apart(given, expected) < (0.04 if stage is int8 else 0.02)
            )  # other whole numbers, where inputs are near a half
    assert not [module for module in load_model(made).modules() if isinstance(module, LowBitLinear)]
    answers = TorchEngine.open(made).generate(
        [Request((Message("user", "what is the weather"),), sampling=Sampling(max_tokens=8))]
    )
    assert answers[0].ids


def test_files_are_read_tensor_by_tensor(biased: Path) -> None:
    """What is loaded is no page of a file: that may change; a tied head stays tied."""
    stored = StoredTensors(biased)
    assert len(stored) == len(list(stored)) == 26
    model = load_decoder(biased)
    assert model.head.weight is model.decoder.embedding.weight
    before = model.decoder.norm.weight.detach().clone()
    with torch.no_grad():
        model.decoder.norm.weight.add_(1)
    assert torch.equal(stored["model.norm.weight"], before)
    assert torch.equal(load_decoder(biased).decoder.norm.weight, before)
    config = biased / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"intermediate_size": 192', '"intermediate_size": 256'))
    try:
        with pytest.raises(ModelError, match=r"gate.weight has shape \(192, 128\), config.json requires \(256, 128\)"):
            load_decoder(biased)
    finally:
        config.write_text(text)
