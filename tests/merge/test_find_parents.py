"""Parents told by weights alone: twenty families whose truth is known, strangers among the candidates."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llmworks.merge.ancestry import Ancestry, infer_ancestry
from llmworks.merge.plan.layout import read_layout
from tests.merge.test_experts import mixed
from tests.merge.test_methods_conformance import merged

SIZES = {
    "self_attn.q_proj": (1, 1),
    "self_attn.k_proj": (0.5, 1),
    "self_attn.v_proj": (0.5, 1),
    "self_attn.o_proj": (1, 1),
    "mlp.up_proj": (1.5, 1),
    "mlp.gate_proj": (1.5, 1),
    "mlp.down_proj": (1, 1.5),
}


def write(path: Path, tensors: dict[str, Any], width: int, layers: int, **more: Any) -> None:
    path.mkdir()
    save_file(
        {name: np.ascontiguousarray(value.astype(np.float32)) for name, value in tensors.items()},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": int(1.5 * width),
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 32,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
    }
    (path / "config.json").write_text(json.dumps({**config, **more}))


def fresh(seed: int, width: int, layers: int) -> dict[str, Any]:
    """A model of its own."""
    draw = np.random.default_rng(seed)
    tensors = {
        "model.embed_tokens.weight": draw.standard_normal((32, width)),
        "model.norm.weight": 1 + 0.1 * draw.standard_normal(width),
    }
    for layer in range(layers):
        for part, (out, inside) in SIZES.items():
            tensors[f"model.layers.{layer}.{part}.weight"] = (
                draw.standard_normal((int(out * width), int(inside * width))) * 0.05
            )
        for part in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{part}.weight"] = 1 + 0.1 * draw.standard_normal(width)
    return tensors


def tuned(tensors: dict[str, Any], seed: int, size: float, rank: int = 0) -> dict[str, Any]:
    """A model that learned something: by a share of its weights' size, of a low rank where one is given."""
    draw = np.random.default_rng(seed)
    made = {}
    for name, value in tensors.items():
        if value.ndim == 1 or (rank and "layers" not in name):
            made[name] = value.copy()
            continue
        change = (
            draw.standard_normal((value.shape[0], rank)) @ draw.standard_normal((rank, value.shape[1])) / rank**0.5
            if rank
            else draw.standard_normal(value.shape)
        )
        made[name] = value + change * size * value.std()
    return made


def weighted(*pairs: tuple[str, float], **more: Any) -> list[dict[str, Any]]:
    return [{"model": name, "parameters": {"weight": weight, **more}} for name, weight in pairs]


KINDS: list[tuple[str, Any]] = [
    ("same", None),
    ("tuned", None),
    ("low rank", None),
    ("tuned twice", None),
    ("half precision", None),
    ("stranger", None),
    ("another shape", None),
    ("linear", {"merge_method": "linear", "models": weighted(("a", 0.7), ("b", 0.3))}),
    ("three", {"merge_method": "linear", "models": weighted(("a", 0.5), ("b", 0.3), ("c", 0.2))}),
    ("slerp", {"merge_method": "slerp", "base_model": "a", "models": [{"model": "b"}], "parameters": {"t": 0.4}}),
    (
        "task_arithmetic",
        {"merge_method": "task_arithmetic", "base_model": "base", "models": weighted(("a", 0.5), ("c", 0.3))},
    ),
    ("minus", {"merge_method": "task_arithmetic", "base_model": "base", "models": weighted(("a", 0.8), ("b", -0.5))}),
    (
        "ties",
        {
            "merge_method": "ties",
            "base_model": "base",
            "models": weighted(("a", 0.4), ("b", 0.4), density=0.6),
            "parameters": {"normalize": False},
        },
    ),
    (
        "dare",
        {"merge_method": "dare_ties", "base_model": "base", "models": weighted(("b", 0.4), ("c", 0.3), density=0.5)},
    ),
    ("stock", {"merge_method": "model_stock", "base_model": "base", "models": [{"model": name} for name in "abc"]}),
    ("breadcrumbs", {"merge_method": "breadcrumbs", "base_model": "base", "models": weighted(("a", 0.5), density=0.8)}),
    ("passthrough", "layers"),
    ("of one", "own layers"),
    ("experts", "experts"),
    ("merged and tuned", {"merge_method": "linear", "models": weighted(("a", 0.5), ("c", 0.5))}),
]


def family(number: int, place: Path) -> tuple[Ancestry, dict[str, Any]]:
    """(what is deduced, the truth): the child's name is nowhere in what is looked at."""
    name, given = KINDS[number]
    luck = random.Random(number)
    width, layers = luck.choice([32, 48, 64]), luck.choice([4, 6, 8])
    base = fresh(number, width, layers)
    root = tuned(base, 6, 0.2) if name == "stock" else base  # model stock keeps what its models learned in common
    models = {
        "base": base,
        **{
            one: tuned(root, 1000 + 10 * number + at, luck.uniform(0.05, 0.3), rank=luck.choice([0, 0, 4]))
            for at, one in enumerate("abc")
        },
        "stranger": fresh(500 + number, width, layers),
        "stranger2": fresh(900 + number, width, layers),
    }
    for one, tensors in models.items():
        write(place / one, tensors, width, layers)
    truth: dict[str, Any] = {"relation": "unknown", "parents": set()}
    child = place / "child"
    if name == "same":
        write(child, models["b"], width, layers)
        truth = {"relation": "same", "parents": {"b"}}
    elif name in ("tuned", "low rank"):
        write(
            child,
            tuned(models["base" if name == "tuned" else "c"], 7, 0.08, rank=4 if name == "low rank" else 0),
            width,
            layers,
        )
        truth = {"relation": "tuned", "parents": {"base" if name == "tuned" else "c"}}
    elif name == "tuned twice":
        write(child, tuned(tuned(models["a"], 7, 0.05), 8, 0.1), width, layers)
        truth = {"relation": "tuned", "parents": {"a"}}
    elif name == "half precision":
        write(
            child,
            {tensor: value.astype(np.float16).astype(np.float32) for tensor, value in models["c"].items()},
            width,
            layers,
        )
        truth = {"relation": "tuned", "parents": {"c"}}
    elif name == "stranger":
        write(child, fresh(77, width, layers), width, layers)
    elif name == "another shape":
        write(child, fresh(78, width + 16, layers), width + 16, layers)
    elif given == "layers":
        spans = [("a", 0, layers - 1), ("stranger", 1, layers), ("b", layers - 2, layers)]
        merged(
            {
                "merge_method": "passthrough",
                "slices": [{"sources": [{"model": who, "layer_range": [low, high]}]} for who, low, high in spans],
            },
            place,
            child,
        )
        truth = {
            "relation": "layers",
            "parents": {"a", "stranger", "b"},
            "layers": [(who, at) for who, low, high in spans for at in range(low, high)],
        }
    elif given == "own layers":
        merged(
            {
                "merge_method": "passthrough",
                "slices": [
                    {"sources": [{"model": "c", "layer_range": [0, layers]}]},
                    {"sources": [{"model": "c", "layer_range": [1, 3]}]},
                ],
            },
            place,
            child,
        )
        truth = {"relation": "layers", "parents": {"c"}, "layers": [("c", at) for at in [*range(layers), 1, 2]]}
    elif given == "experts":
        mixed(
            {
                "base_model": "base",
                "experts": [{"source_model": "a"}, {"source_model": "c"}, {"source_model": "stranger"}],
                "gate_mode": "random",
            },
            place,
            child,
        )
        truth = {
            "relation": "experts",
            "parents": {"base", "a", "c", "stranger"},
            "experts": {0: "a", 1: "c", 2: "stranger"},
        }
    else:
        merged(given, place, place / "merged" if name == "merged and tuned" else child)
        if name == "merged and tuned":
            write(child, tuned(load_file(place / "merged" / "model.safetensors"), 9, 0.05), width, layers)
        truth = {
            "relation": "merged",
            "parents": (
                {one["model"] for one in given["models"]} | ({given["base_model"]} if "base_model" in given else set())
            ),
        }
    return infer_ancestry(read_layout("child", child), {one: read_layout(one, place / one) for one in models}), truth


@pytest.mark.parametrize("number", range(len(KINDS)), ids=[name for name, _ in KINDS])
def test_parents_are_found(number: int, tmp_path: Path) -> None:
    found, truth = family(number, tmp_path)
    assert (found.relation, set(found.parents)) == (truth["relation"], truth["parents"]), found.summary
    if "layers" in truth:
        assert [next(iter(layer.coefficients)) for layer in found.layers] == truth["layers"]
        assert all(layer.is_equal for layer in found.layers)
    if "experts" in truth:
        assert found.experts == truth["experts"]


def test_shares_are_the_weights(tmp_path: Path) -> None:
    found, _ = family(8, tmp_path)
    assert found.parents == pytest.approx({"a": 0.5, "b": 0.3, "c": 0.2}, abs=0.01)
