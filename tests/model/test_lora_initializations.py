"""Adapters of every initialization that peft has: merged as peft computes them, or refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.conftest import make_pico

from llmworks.cli import main
from llmworks.core.errors import ModelError
from llmworks.generate.engines.torch import TorchEngine
from llmworks.model.io.load import load_model
from llmworks.model.lora.adapter_io import read_adapter, read_lora_matrices

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico(tmp_path_factory.mktemp("base") / "pico")


def save(base: Path, out: Path, init: Any, **fields: Any) -> torch.Tensor:
    """Save an adapter as if trained; return the logits of the live peft model."""
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(
        load_model(base),
        LoraConfig(init_lora_weights=init, target_modules=targets, **{"r": 4, "lora_alpha": 12, **fields}),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(out)
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["", "rslora", "dora"])
@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", "pissa", "olora"])
def test_merged_as_peft_computes(base: Path, tmp_path: Path, init: Any, fields: dict[str, Any]) -> None:
    live = save(base, tmp_path / "adapter", init, **fields)
    again = PeftModel.from_pretrained(load_model(base), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.allclose(again(input_ids=IDS).logits, live, atol=1e-4)  # peft reads it back
        merged = TorchEngine.open(base, adapter=tmp_path / "adapter").model(input_ids=IDS).logits
    assert torch.allclose(merged, live, atol=2e-4), float((merged - live).abs().max())


def test_rank_and_alpha_patterns_are_those_of_peft(base: Path, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}}
    live = save(base, tmp_path / "adapter", "pissa", **patterns)
    merged = TorchEngine.open(base, adapter=tmp_path / "adapter").model(input_ids=IDS).logits
    assert torch.allclose(merged, live, atol=2e-4)


def change(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "loftq", "lora_ga", "CorDA", "something new"])
def test_a_base_changed_by_what_is_not_recorded_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], init: str
) -> None:
    save(base, tmp_path / "adapter", True)
    change(tmp_path / "adapter", init_lora_weights=init)
    words = ["merge", "adapter", str(tmp_path / "adapter"), str(base)]
    assert main([*words, "--out", str(tmp_path / "out"), "--workspace", str(tmp_path / "ws"), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "init_lora_weights is" in line
    assert "path_initial_model_for_weight_conversion" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_without_its_base_it_is_refused(base: Path, tmp_path: Path, init: str) -> None:
    """To combine adapters, to convert one to GGUF, or to train it further."""
    save(base, tmp_path / "adapter", init)
    for read in (read_adapter, read_lora_matrices):
        with pytest.raises(ModelError, match=r"merge it into its base first"):
            read(tmp_path / "adapter")


@pytest.mark.parametrize(
    "fields",
    [
        {"alora_invocation_tokens": [5]},
        {"kasa_config": {"beta": 1}},
        {"arrow_config": {"top_k": 2}},
        {"use_qalora": True},
        {"layer_replication": [[0, 2]]},
        {"modules_to_save": ["lm_head"]},
        {"an_option_of_tomorrow": 3},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_options_that_change_the_computation_are_refused(base: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    save(base, tmp_path / "adapter", True)
    change(tmp_path / "adapter", **fields)
    with pytest.raises(ModelError, match=f"the adapter uses {next(iter(fields))}"):
        read_lora_matrices(tmp_path / "adapter")


@pytest.mark.parametrize("r", [2, 8])
def test_a_rank_that_contradicts_the_tensors_is_refused(base: Path, tmp_path: Path, r: int) -> None:
    """The scale is lora_alpha / r: with another r the update would be larger or smaller than trained."""
    save(base, tmp_path / "adapter", True)
    change(tmp_path / "adapter", r=r)
    with pytest.raises(ModelError, match=rf"matrices of rank 4, but adapter_config.json has r: {r}"):
        read_lora_matrices(tmp_path / "adapter")


def test_a_tensor_of_another_rank_is_refused(base: Path, tmp_path: Path) -> None:
    save(base, tmp_path / "adapter", True)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = copy.copy(load_file(file))
    for name in [name for name in tensors if "layers.1.self_attn.q_proj" in name]:
        tensors[name] = tensors[name][:2] if "lora_A" in name else tensors[name][:, :2].contiguous()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers.1.self_attn.q_proj has matrices of rank 2"):
        read_lora_matrices(tmp_path / "adapter")
