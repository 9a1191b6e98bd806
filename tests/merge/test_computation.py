"""Models that compute differently with the same shapes of weights are not merged without a word."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmworks.core.errors import LlmworksError
from llmworks.merge.plan.computation import read_computation
from llmworks.runtime.session import Session
from tests.conftest import make_pico, make_tokenizer

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
LLAMA = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 48}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "gemma2": ("gemma2", {**LLAMA, "head_dim": 8, "sliding_window": 32}),
}
CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_theta": 500_000.0}, "rope_parameters.rope_theta is 500000.0, of a 10000.0"),
    ("llama", {"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001, of a 1e-06"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', of a 'silu'"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "rope_parameters.factor is 4.0"),
    ("llama", {"num_attention_heads": 2, "num_key_value_heads": 1}, "num_attention_heads is 2, of a 4"),
    ("gpt2", {"layer_norm_epsilon": 1e-3}, "layer_norm_epsilon is 0.001, of a 1e-05"),
    ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu', of a 'gelu_new'"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2", {"n_head": 2}, "n_head is 2, of a 4"),
    ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar is 64, of a 256"),
    ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping is None, of a 30.0"),
    ("gemma2", {"sliding_window": 16}, "sliding_window is 16, of a 32"),
    ("gemma2", {"layer_types": ["full_attention", "full_attention"]}, "layer_types is ['full_attention'"),
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    made = {}
    for name, (kind, fields) in SHAPES.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **fields)
        made[name] = folder / name
        AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


def variant(path: Path, out: Path, **fields: Any) -> Path:
    shutil.copytree(path, out)
    config = json.loads((out / "config.json").read_text())
    if {"rope_theta", "rope_scaling"} & set(fields):  # as files before transformers 5 have it
        config.pop("rope_parameters", None)
    (out / "config.json").write_text(json.dumps({**config, **fields}))
    return out


def merge(tmp_path: Path, a: Path, b: Path, **config: Any) -> Any:
    session = Session(tmp_path / "workspace", quiet=True)
    fields = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 1.0}}
    return session.make("merge", models={"a": a, "b": b}, config={**fields, **config})


@pytest.mark.parametrize(("shape", "change", "message"), CHANGES)
def test_another_computation_is_refused(
    originals: dict[str, Path], tmp_path: Path, shape: str, change: dict[str, Any], message: str
) -> None:
    other = variant(originals[shape], tmp_path / "b", **change)
    with pytest.raises(LlmworksError, match="computes differently") as caught:
        merge(tmp_path, originals[shape], other)
    assert message in str(caught.value)
    fields = [
        part.split(" is ")[0].split(" ")[-1]
        for part in str(caught.value).split("combined: ")[1].split(". The")[0].split("; ")
    ]
    made = merge(tmp_path, originals[shape], other, ignore_config_differences=fields)
    kept, given = (json.loads((path / "config.json").read_text()) for path in (made.path, originals[shape]))
    assert all(kept.get(name) == given.get(name) for name in change if name in given)


@pytest.mark.parametrize("shape", SHAPES)
def test_other_names_of_the_same_computation_pass(originals: dict[str, Path], tmp_path: Path, shape: str) -> None:
    """Defaults left out, RoPE as older files write it, token ids, names, dropout, versions."""
    other = variant(originals[shape], tmp_path / "b", use_cache=False, attention_dropout=0.2, attn_pdrop=0.3)
    config = json.loads((other / "config.json").read_text())
    rope = config.pop("rope_parameters", None)
    if rope:
        config["rope_theta"] = rope["rope_theta"]
    for name in ("rms_norm_eps", "layer_norm_epsilon", "hidden_act", "activation_function", "attention_bias"):
        config.pop(name, None)
    config |= {"_name_or_path": "somewhere", "transformers_version": "4.30.0", "initializer_range": 0.5}
    (other / "config.json").write_text(json.dumps(config))
    assert merge(tmp_path, originals[shape], other).path.is_dir()


def test_an_unknown_architecture_is_compared_by_its_own_fields() -> None:
    one = {"model_type": "house-made", "hidden_size": 32, "rope_theta": 1e4, "mystery": 1.5, "rope_scaling": None}
    other = {**one, "rope_scaling": {"type": "yarn", "factor": 2.0}, "pad_token_id": 3, "attention_dropout": 0.1}
    found = read_computation(one)
    assert found == {"hidden_size": 32, "rope_parameters.rope_theta": 1e4, "mystery": 1.5}
    assert read_computation(other) == {**found, "rope_parameters.type": "yarn", "rope_parameters.factor": 2.0}


@pytest.mark.parametrize("stage", ["merge.extract", "merge.experts"])
def test_other_stages_that_combine_weights(tmp_path: Path, stage: str) -> None:
    base, tuned = make_pico(tmp_path / "a"), make_pico(tmp_path / "tuned", seed=1)
    other = variant(tuned, tmp_path / "b", rms_norm_eps=1e-2)
    session = Session(tmp_path / "workspace", quiet=True)
    experts = [{"source_model": name, "positive_prompts": [name]} for name in ("a", "b")]
    inputs: dict[str, Any] = {"model": other, "base": base}
    if stage == "merge.experts":
        inputs = {"models": {"a": base, "b": other}, "config": {"base_model": "a", "experts": experts}}
    with pytest.raises(LlmworksError, match=r"computes differently.*rms_norm_eps"):
        session.make(stage, **inputs)
