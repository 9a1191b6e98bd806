"""What a model comes to, counted from its shape: parameters of the real modules, operations that PyTorch counts, bytes
that a cache really takes.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from llmworks.cli import main
from llmworks.model.anatomy.drawing import draw
from llmworks.model.anatomy.parts import count_cache_elements, count_state_elements, list_parts
from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
from llmworks.model.nn.recurrent import RecurrentForCausalLM, RecurrentModelConfig
from llmworks.model.shape import RecurrentShape, Shape

SHAPES: dict[str, dict[str, Any]] = {
    "usual": {"num_key_value_heads": 2},
    "gpt-2": {
        "norm": "layer",
        "position_embedding_type": "learned",
        "gated_mlp": False,
        "bias": "all",
        "tie_word_embeddings": False,
    },
    "gemma": {
        "norm_position": "sandwich",
        "use_qk_norm": True,
        "sliding_window": 8,
        "global_attn_every_n_layers": 2,
        "head_dim": 12,
        "num_key_value_heads": 1,
    },
    "experts": {"experts": {"num_experts": 4, "num_experts_per_tok": 4}, "bias": "qkv"},
    "post": {"norm_position": "post", "position_embedding_type": "alibi"},
}
SEEN = 21


@pytest.mark.parametrize("name", SHAPES)
def test_a_decoder_comes_to_what_it_is(name: str) -> None:
    shape = Shape.model_validate(
        {
            "vocab_size": 61,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 48,
            **SHAPES[name],
        }
    )
    model = DecoderForCausalLM(DecoderConfig(shape=shape.model_dump()))
    model.train(False)
    parts = list_parts(shape, SEEN)
    assert sum(p.parameters for p in parts) == sum(p.numel() for p in model.parameters())
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.randint(0, 61, (1, SEEN - 1)), past_key_values=cache)
        with (
            FlopCounterMode(display=False) as counter,
            sdpa_kernel(SDPBackend.MATH),
        ):  # the others are not counted on a CPU
            model(torch.randint(0, 61, (1, 1)), past_key_values=cache)
    windows = sum(
        4 * 4 * shape.head_size * (SEEN - shape.get_sliding_window(i)) for i in range(3) if shape.get_sliding_window(i)
    )  # hidden, but computed by the kernel
    assert sum(p.flops for p in parts) == counter.get_total_flops() - windows
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert sum(p.cache_elements for p in parts) * SEEN == kept
    if not shape.sliding_window:
        assert count_cache_elements(shape, SEEN) == kept


def test_experts_that_are_not_chosen_cost_nothing() -> None:
    usual = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    all_of = list_parts(Shape.model_validate({**usual, "experts": {"num_experts": 4, "num_experts_per_tok": 4}}), 9)
    half = list_parts(Shape.model_validate({**usual, "experts": {"num_experts": 4, "num_experts_per_tok": 2}}), 9)
    assert (
        sum(p.parameters for p in half) == sum(p.parameters for p in all_of) == sum(p.active_parameters for p in all_of)
    )
    routed = sum(p.parameters for p in all_of if "experts" in p.name)
    assert sum(p.active_parameters for p in half) == sum(p.active_parameters for p in all_of) - routed / 2
    assert sum(p.flops for p in half) == sum(p.flops for p in all_of) - routed


@pytest.mark.parametrize("kind", ["mlp", "rnn", "lstm", "gru"])
def test_a_recurrent_model_comes_to_what_it_is(kind: str) -> None:
    shape = RecurrentShape.model_validate(
        {
            "rnn_type": kind,
            "vocab_size": 61,
            "embedding_dim": 16,
            "hidden_size": 24,
            "num_hidden_layers": 1 if kind == "mlp" else 2,
        }
    )
    model = RecurrentForCausalLM(RecurrentModelConfig(shape=shape.model_dump()))
    model.train(False)
    parts = list_parts(shape, 9)
    assert sum(p.parameters for p in parts) == sum(p.numel() for p in model.parameters())
    matrices = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.dim() == 2 and name not in ("embedding.weight", "head.weight")
    )
    assert sum(p.flops for p in parts) == 2 * (matrices + 61 * 16)
    with torch.no_grad():
        state = model(torch.randint(0, 61, (1, 30)), use_cache=True).past_key_values.state
    assert count_state_elements(shape) == count_cache_elements(shape, 1000) == sum(s.numel() for s in state)


def test_drawings_hold_what_shapes_say() -> None:
    def words(*shapes: Any) -> list[str]:
        tree = ET.fromstring(draw({f"m{i}": shape for i, shape in enumerate(shapes)}))
        return [element.text or "" for element in tree.iter() if element.tag.endswith("text")]

    usual = words(
        Shape.model_validate({"num_key_value_heads": 2, "rope_parameters": {"rope_type": "yarn", "factor": 4}})
    )
    assert {
        "× 8",
        "RMSNorm",
        "8 query heads of 64, 2 key-value (grouped-query)",
        "RoPE scaling yarn, factor 4",
        "512 → 1,408 → 512, SwiGLU",
    } <= set(usual)
    assert usual.count("RMSNorm") == 3
    assert words(Shape(norm_position="sandwich")).count("RMSNorm") == 5
    assert words(Shape(norm_position="post")).count("RMSNorm") == 2
    two = words(
        Shape(sliding_window=64, global_attn_every_n_layers=3, experts={"num_experts": 8, "num_experts_per_tok": 2}),
        RecurrentShape(rnn_type="lstm", num_hidden_layers=2),
    )  # type: ignore[arg-type]
    assert {"sliding window 64 tokens, full attention every 3 layers", "8 experts, 2 per token", "LSTM"} <= set(two)
    assert two.count("LSTM") == 2


def test_the_stage(
    pico: Path, pico_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    assert (
        main(
            [
                "model",
                "recurrent",
                str(pico),
                "--set",
                "hidden_size=32",
                "--set",
                "rnn_type=gru",
                "--out",
                str(tmp_path / "gru"),
                "--quiet",
            ]
        )
        == 0
    )
    capsys.readouterr()
    assert (
        main(
            [
                "model",
                "show",
                str(pico),
                str(tmp_path / "gru"),
                "--set",
                "context_length=100",
                "--out",
                str(tmp_path / "two"),
                "--quiet",
            ]
        )
        == 0
    )
    told = capsys.readouterr().out
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["context"] == 100
    assert sorted(m["parameters"] for m in report["models"].values()) == sorted(
        sum(p.numel() for p in load(path).parameters()) for path in (pico, tmp_path / "gru")
    )
    assert "0–1" in told  # two blocks that are alike, once
    page = (tmp_path / "two" / "report.html").read_text()
    assert page.count("<svg") == 1
    assert "Differences" in page
    assert main(["model", "show", str(pico), str(pico_gguf), "--out", str(tmp_path / "same"), "--quiet"]) == 0
    one, other = json.loads((tmp_path / "same" / "report.json").read_text())["models"].values()
    assert one == other
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    for words, says in (
        ([str(tmp_path / "bert")], "'bert' is not supported; supported: llama"),
        ([str(pico), "--set", "kv_cache_dtype=int8"], "cache"),
        ([str(tmp_path / "none")], "none"),
    ):
        assert main(["model", "show", *words, "--out", str(tmp_path / "o"), "--quiet"]) == 2
        wrong = capsys.readouterr().err.strip()
        assert says in wrong
        assert len(wrong.splitlines()) == 1


def load(path: Path) -> Any:
    from llmworks.model.io.load import load_model

    return load_model(path)
