"""Models whose states are turned: they compute the same, and nothing of them is large any more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmworks.core.artifact import Model
from llmworks.core.context import Context
from llmworks.core.errors import ModelError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.model.io.decoder_files import load_decoder
from llmworks.quantize.algorithms.config import RotateConfig
from llmworks.quantize.algorithms.hadamard import hadamard, random_hadamard
from llmworks.quantize.rotate import rotate
from tests.conftest import make_pico


def rotated(model: Path, folder: Path, **given: Any) -> Model:
    (folder / "out").mkdir(parents=True)
    (folder / "scratch").mkdir()
    return rotate(
        RotateConfig(**given),
        Model(model),
        Context(
            folder / "out",
            folder / "scratch",
            0,
            Progress(quiet=True),
            ReportBuilder(),
            lambda _: pytest.fail("no engine is needed"),
        ),
    )


@pytest.mark.parametrize("order", [1, 2, 12, 20, 28, 36, 64, 576, 640, 1536])
def test_hadamard_matrices_are(order: int) -> None:
    """576 is no power of two, but 16 x 36, and 36 is of Paley's second kind (17)."""
    made = hadamard(order)
    assert bool((made.abs() == 1).all())
    assert torch.equal(made @ made.T, order * torch.eye(order, dtype=torch.float64))
    turn = random_hadamard(order, 3)
    assert torch.allclose(turn @ turn.T, torch.eye(order, dtype=torch.float64), atol=1e-12)


def test_there_is_none_of_some_orders() -> None:
    with pytest.raises(ModelError, match="no Hadamard matrix of order 6 is known"):
        hadamard(6)


@pytest.mark.parametrize("values", [True, False])
def test_a_rotated_model_computes_the_same(values: bool, pico: Path, tmp_path: Path) -> None:
    """In our decoder and in transformers, the head no longer tied to the embedding; a large column of the state is
    gone.
    """
    tensors = load_file(pico / "model.safetensors")
    for name, tensor in tensors.items():  # as states of large models have it
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[5] *= 30
    for name in ("model.layers.0.input_layernorm.weight", "model.norm.weight"):
        tensors[name] = torch.rand(64, generator=torch.Generator().manual_seed(1)) + 0.5
    large = tmp_path / "large"
    make_pico(large, seed=0)
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    made = rotated(large, tmp_path / "r", rotate_values=values)
    config = json.loads((made.path / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(made.path / "model.safetensors")
    ids = torch.randint(0, config["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = load_decoder(large)(input_ids=ids).logits
        assert torch.allclose(load_decoder(made.path)(input_ids=ids).logits, before, atol=2e-4, rtol=1e-4)
        assert torch.allclose(
            AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)(input_ids=ids).logits,
            before,
            atol=2e-4,
            rtol=1e-4,
        )
    name = "model.layers.1.mlp.down_proj.weight"
    rows = [load_file(path / "model.safetensors")[name].square().mean(1).sqrt() for path in (large, made.path)]
    assert float(rows[0].max() / rows[0].median()) > 15
    assert float(rows[1].max() / rows[1].median()) < 3
    if values:
        assert not torch.allclose(
            load_decoder(made.path).decoder.blocks[0].attention.value.weight.norm(dim=1),
            load_decoder(large).decoder.blocks[0].attention.value.weight.norm(dim=1),
        )


def test_norms_that_cannot_be_folded_are_refused(tmp_path: Path) -> None:
    from llmworks.model.io.decoder_files import save_decoder
    from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
    from llmworks.model.shape import Shape

    for norm, match in (({"norm": "layer"}, "it must have RMSNorm"), ({"norm_position": "sandwich"}, "as Gemma does")):
        shape = Shape.model_validate(
            {
                "vocab_size": 64,
                "hidden_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "intermediate_size": 48,
                "max_position_embeddings": 64,
                "tie_word_embeddings": True,
                **norm,
            }
        )
        folder = tmp_path / next(iter(norm.values()))
        folder.mkdir()
        save_decoder(DecoderForCausalLM(DecoderConfig(shape=shape.model_dump())), folder)
        with pytest.raises(ModelError, match=match):
            rotated(folder, tmp_path / f"{folder.name}-r")
