"""LoRA adapters as GGUF files: llama.cpp with one says what the folded model says, which it does not where rows of B
are not turned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llmworks.core.artifact import Adapter, Model
from llmworks.core.context import Context
from llmworks.core.errors import GoldenMismatch, LlmworksError, ModelError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.model.golden import record_golden
from llmworks.quantize.adapter import adapter
from llmworks.quantize.llamacpp import adapter as gguf_adapter
from llmworks.quantize.llamacpp.config import GgufAdapterConfig

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def made_by_peft(base: Path, out: Path, **given: Any) -> Path:
    """An adapter that changes what is said."""
    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **given}),
    )
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.15)
    model.save_pretrained(out)
    return out


def exported(base: Path, source: Path, folder: Path, kind: str = "f32") -> Adapter:
    (folder / "scratch").mkdir(parents=True)
    (folder / "out").mkdir()
    context = Context(
        folder / "out",
        folder / "scratch",
        0,
        Progress(quiet=True),
        ReportBuilder(),
        lambda _: pytest.fail("no engine is needed"),
    )
    return adapter(GgufAdapterConfig(type=kind), Adapter(source), Model(base, golden=record_golden(base)), context)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("f32", {}),
        ("f16", {}),
        ("f32", {"use_rslora": True}),
        ("f32", {"alpha_pattern": {"q_proj": 2.0, "layers.1.mlp.down_proj": 30}}),
        ("f32", {"rank_pattern": {"v_proj": 2}}),
        ("f32", {"target_modules": ["q_proj", "k_proj"]}),
    ],
    ids=["plain", "f16", "stabilised", "alphas", "ranks", "queries and keys"],
)
def test_llama_cpp_says_what_the_folded_model_says(
    kind: str, given: dict[str, Any], pico: Path, tmp_path: Path
) -> None:
    source = made_by_peft(pico, tmp_path / "adapter", **given)
    made = exported(pico, source, tmp_path, kind)
    assert made.metrics["logprob_gap"] < (2e-3 if kind == "f32" else 0.02)
    assert made.metrics["greedy_agreement"] == 1.0
    assert made.metrics["layers"] == (4 if "target_modules" in given else 14)
    assert {file.name for file in made.path.iterdir()} >= {
        "adapter.gguf",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not list((tmp_path / "scratch").iterdir())


def test_rows_of_queries_and_keys_are_turned(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the file is another adapter, and is refused."""
    source = made_by_peft(pico, tmp_path / "adapter", target_modules=["q_proj", "k_proj"])
    monkeypatch.setattr(gguf_adapter, "get_interleaved_heads", lambda *_: None)
    with pytest.raises(
        GoldenMismatch,
        match=r"quantize.adapter: log-probabilities of llama.cpp with adapter.gguf differ from .* by \d.\d+ nats",
    ):
        exported(pico, source, tmp_path)


def test_the_file_is_as_llama_cpp_names_it(pico: Path, tmp_path: Path) -> None:
    made = exported(pico, made_by_peft(pico, tmp_path / "adapter"), tmp_path)
    reader = gguf.GGUFReader(made.path / "adapter.gguf")
    said = {
        name: reader.fields[name].contents()
        for name in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
    }
    assert said == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors}
    assert shapes["blk.1.ffn_down.weight.lora_a"] == (96, 4)
    assert shapes["blk.1.ffn_down.weight.lora_b"] == (4, 64)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_what_has_no_place_is_refused(pico: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is a DoRA, whose magnitudes llama.cpp does not support"):
        exported(pico, made_by_peft(pico, tmp_path / "dora", use_dora=True), tmp_path / "1")
    with pytest.raises(ModelError, match=r"llama.cpp does not support the adapter's change of model.embed_tokens"):
        exported(
            pico, made_by_peft(pico, tmp_path / "embedding", target_modules=["embed_tokens", "q_proj"]), tmp_path / "2"
        )
    four = made_by_peft(pico, tmp_path / "four")
    (four / "base.json").write_text(
        json.dumps({"kept": "nf4", "double": True, "layers": ["model.layers.0.self_attn.q_proj"]})
    )
    with pytest.raises(ModelError, match="was trained on a 4-bit base model"):
        exported(pico, four, tmp_path / "3")
    with pytest.raises(LlmworksError, match=r"adapter_config.json"):
        exported(pico, pico, tmp_path / "4")
