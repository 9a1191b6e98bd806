"""Mixtures of experts: they load in transformers and compute what they must; routers are those of mergekit-moe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3Config

from llmworks.cli import main
from llmworks.core.artifact import Artifact, Model
from llmworks.core.context import Context
from llmworks.core.errors import LlmworksError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.merge.experts import experts
from llmworks.merge.moe.config import ExpertsConfig
from llmworks.merge.moe.router import compute_router_rows
from llmworks.model.io.load import load_model
from llmworks.runtime.session import load
from tests.oracles.gates import PROMPTS
from tests.oracles.merge_models import save
from tests.oracles.merges import models

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("experts")
    models(place)
    save(place / "few-a", "a", joined=("t h", "i n", "a n"), special=("<x>",))
    return place


def mixed(given: dict[str, Any], family: Path, out: Path) -> Model:
    config = ExpertsConfig.model_validate(given)
    found: dict[str, Artifact] = {name: load(str(family / name)) for name in config.model_names()}
    for folder in (out, out.parent / f"{out.name}-scratch"):
        folder.mkdir(parents=True)
    made: Any = experts(
        config,
        found,
        Context(out, out.parent / f"{out.name}-scratch", 0, Progress(quiet=True), ReportBuilder(), lambda _: None),
    )  # type: ignore[arg-type, return-value]
    assert isinstance(made, Model)
    return made


def twice(name: str, **more: Any) -> list[dict[str, Any]]:
    return [{"source_model": name, **more}, {"source_model": name, **more}, {"source_model": name, **more}]


@pytest.mark.parametrize("mode", ["cheap_embed", "hidden", "hidden_avg"])
def test_routers_are_those_of_mergekit(mode: str, family: Path) -> None:
    """mergekit runs the base in bfloat16 for its states."""
    config = ExpertsConfig.model_validate(
        {"base_model": "few", "experts": [{"source_model": "few", **one} for one in PROMPTS], "gate_mode": mode}
    )
    found = compute_router_rows(config, family / "few", config.experts, 0, 4, 16)
    said = torch.tensor(json.loads((Path(__file__).parents[1] / "fixtures" / "gates.json").read_text())[mode])
    assert torch.allclose(found, said, atol=1e-5 if mode == "cheap_embed" else 0.03)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
def test_copies_of_one_model_compute_what_it_computes(kind: str, family: Path, tmp_path: Path) -> None:
    """Sparse upcycling: whatever the router says, chances of the chosen experts sum to 1."""
    base = family / "few" if kind == "mixtral" else _qwen(tmp_path / "qwen3", 3)
    (tmp_path / "base").symlink_to(base)
    mixed({"base_model": "base", "experts": twice("base"), "gate_mode": "random"}, tmp_path, tmp_path / "out")
    made, dense = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (tmp_path / "out", base))
    assert type(made).__name__ == {"mixtral": "MixtralForCausalLM", "qwen3": "Qwen3MoeForCausalLM"}[kind]
    with torch.no_grad():
        assert torch.allclose(made(input_ids=IDS).logits, dense(input_ids=IDS).logits, atol=2e-5)


def _qwen(path: Path, number: int) -> Path:
    torch.manual_seed(number)
    kind: Any = Qwen2Config if number == 2 else Qwen3Config
    config = kind(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        **({"head_dim": 16} if number == 3 else {}),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def test_a_shared_expert_beside(tmp_path: Path) -> None:
    """Qwen2-MoE: with routers of zeros, an expert of all tokens that is the model, by a gate of a half, adds half of
    its layer to the experts' own.
    """
    _qwen(tmp_path / "base", 2)
    made = mixed(
        {
            "base_model": "base",
            "experts": twice("base"),
            "shared_experts": [{"source_model": "base"}],
            "gate_mode": "uniform_random",
            "experts_per_token": 1,
        },
        tmp_path,
        tmp_path / "out",
    )
    assert made.metrics["experts"] == 3
    loaded, dense = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (tmp_path / "out", tmp_path / "base")
    )
    assert type(loaded).__name__ == "Qwen2MoeForCausalLM"
    states = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in (0, 1):
            moe, plain = loaded.model.layers[layer].mlp, dense.model.layers[layer].mlp
            gate = torch.sigmoid(states @ moe.shared_expert_gate.weight.T)
            found = moe(states)
            assert torch.allclose(
                found[0] if isinstance(found, tuple) else found, plain(states) * (1 + gate), atol=1e-5
            )


def test_experts_of_two_models(family: Path, tmp_path: Path) -> None:
    """Each expert has its model's layers, in Mixtral's names; its last matrix times residual_scale, with noise of the
    size that was asked for.
    """
    given = {
        "base_model": "few",
        "experts": [
            {"source_model": "few", **PROMPTS[0]},
            {"source_model": "few-a", **PROMPTS[1], "residual_scale": 0.5, "noise_scale": 0.25},
        ],
        "gate_mode": "hidden",
        "experts_per_token": 1,
    }
    made = mixed(given, family, tmp_path / "out")
    assert made.golden is not None
    found, parents = (
        load_file(tmp_path / "out" / "model.safetensors"),
        [load_file(family / name / "model.safetensors") for name in ("few", "few-a")],
    )
    for part, name in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
        first, second = (found[f"model.layers.2.block_sparse_moe.experts.{at}.{name}.weight"] for at in (0, 1))
        wanted = [parent[f"model.layers.2.mlp.{part}.weight"] for parent in parents]
        assert torch.equal(first, wanted[0])
        noise = second / (0.5 if part == "down_proj" else 1) - wanted[1]
        assert 0.2 < float(noise.std()) < 0.3
    assert torch.equal(
        found["model.layers.1.self_attn.q_proj.weight"], parents[0]["model.layers.1.self_attn.q_proj.weight"]
    )
    with torch.no_grad():
        assert torch.isfinite(load_model(tmp_path / "out")(input_ids=IDS).logits).all()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no prompts": ({"experts": twice("few")}, "experts.0: has no positive_prompts"),
    "the same prompts": ({"experts": twice("few", positive_prompts=["a"])}, "all experts have the same prompts"),
    "too many a token": (
        {"experts": twice("few"), "gate_mode": "random", "experts_per_token": 4},
        "experts_per_token is 4, but there are 3 experts",
    ),
    "shared in mixtral": (
        {
            "experts": twice("few"),
            "gate_mode": "random",
            "architecture": "mixtral",
            "shared_experts": [{"source_model": "few"}],
        },
        "the layout mixtral has no shared experts",
    ),
    "none shared in qwen": (
        {"experts": twice("few"), "gate_mode": "random", "architecture": "qwen"},
        "set shared_experts",
    ),
    "another kind": ({"experts": twice("few"), "gate_mode": "random", "architecture": "qwen3"}, "few is a llama"),
    "a key": ({"experts": twice("few"), "gate_mode": "random", "routers": 1}, "routers"),
    "shapes": ({"experts": [*twice("few"), {"source_model": "wide"}], "gate_mode": "random"}, "its shapes differ"),
    "no tokenizer": (
        {"base_model": "a", "experts": [{"source_model": "a", "positive_prompts": ["x"]}], "experts_per_token": 1},
        "has no tokenizer",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, family: Path, tmp_path: Path) -> None:
    from pydantic import ValidationError

    given, said = BAD[name]
    if not (family / "wide").exists():
        _wide(family / "wide")
    with pytest.raises((LlmworksError, ValidationError)) as error:
        mixed({"base_model": "few", **given}, family, tmp_path / "out")
    assert said in str(error.value)


def _wide(path: Path) -> None:
    from safetensors.torch import save_file

    save(path, "a", joined=("t h", "i n", "a n"), special=("<x>",))
    tensors = load_file(path / "model.safetensors")
    for name in [one for one in tensors if ".mlp." in one]:
        tensors[name] = torch.cat([tensors[name]] * 2, dim=1 if "down" in name else 0).contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_mergekits_file(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(family)
    file = tmp_path / "moe.yml"
    file.write_text(
        "base_model: few\ngate_mode: cheap_embed\ndtype: bfloat16\nexperts_per_token: 1\nexperts:\n  - source_model:"
        " few\n    positive_prompts: [the thing]\n  - source_model: few-a\n    positive_prompts: ['12345']\n   "
        " negative_prompts:\n"
    )
    assert (
        main(["merge", str(file), "--out", str(tmp_path / "out"), "--workspace", str(tmp_path / "ws"), "--quiet"]) == 0
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_local_experts"] == 2
    assert main(["verify", str(tmp_path / "out"), "--workspace", str(tmp_path / "ws")]) == 0
