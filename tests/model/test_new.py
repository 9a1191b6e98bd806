"""New models: drawn by the seed, saved as what they are, usable by every stage that takes a model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from llmworks.cli import main
from llmworks.core.types import Message, Request, Sampling
from llmworks.generate.engines.torch import TorchEngine
from llmworks.tokenize.load import load_tokenizer


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    return tmp_path


SMALL = (
    "--set",
    "hidden_size=32",
    "--set",
    "num_hidden_layers=2",
    "--set",
    "num_attention_heads=4",
    "--set",
    "max_position_embeddings=128",
)


def new(workspace: Path, pico: Path, name: str, *words: str) -> Path:
    assert main(["model", "new", str(pico), *SMALL, *words, "--out", str(workspace / name), "--quiet"]) == 0
    return workspace / name


def test_a_standard_shape_needs_no_llmworks(workspace: Path, pico: Path) -> None:
    made = new(workspace, pico, "m")
    loaded = AutoModelForCausalLM.from_pretrained(made)
    assert isinstance(loaded, LlamaForCausalLM)
    tokenizer = load_tokenizer(made)
    assert loaded.config.vocab_size == math.ceil(len(tokenizer) / 64) * 64
    assert (loaded.config.eos_token_id, loaded.generation_config.eos_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.eos_token_id,
    )
    assert float(loaded.lm_head.weight.std().detach()) == pytest.approx(0.02, rel=0.1)
    assert float(loaded.model.layers[0].mlp.down_proj.weight.std().detach()) == pytest.approx(0.02 / 2, rel=0.1)
    manifest = json.loads((made / "manifest.json").read_text())
    assert manifest["golden"]["conversations"]
    assert manifest["metrics"]["parameters"] == sum(p.numel() for p in loaded.parameters())


def test_the_seed_decides(workspace: Path, pico: Path) -> None:
    one, other = (new(workspace, pico, f"s{seed}", "--seed", str(seed)) for seed in (0, 1))
    first = (one / "model.safetensors").read_bytes()
    assert first != (other / "model.safetensors").read_bytes()
    assert main(["verify", str(one)]) == 0  # derived again, the same bytes


def test_a_shape_of_its_own_answers(workspace: Path, pico: Path) -> None:
    made = new(workspace, pico, "m", "--set", "position_embedding_type=alibi", "--set", "experts={num_experts: 4}")
    engine = TorchEngine.open(made)
    (answer,) = engine.generate([Request((Message("user", "hi"),), sampling=Sampling(max_tokens=5))])
    assert answer.completion_tokens > 0
    assert main(["verify", "--golden", str(made)]) == 0


def test_mistakes(workspace: Path, pico: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (
        (["--set", "num_attention_heads=5"], "hidden_size 32 is not divisible by num_attention_heads 5"),
        (["--set", "vocab_size=10"], "the tokenizer has"),
        (["--set", "hiden=3"], "did you mean 'hidden_size'"),
        (["--set", "position_embedding_type=rotary"], "'rope'"),
    ):
        assert main(["model", "new", str(pico), *SMALL, *words, "--out", str(workspace / "o"), "--quiet"]) == 2
        told = capsys.readouterr().err.strip()
        assert says in told
        assert len(told.splitlines()) == 1
