"""LoRA: starts as the model itself, is what peft computes, and folds into the same function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmworks.errors import ModelError
from llmworks.model import lora
from llmworks.model.fold import fold_into, weights_of
from llmworks.model.load import check_weights, load_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft reads a name that transformers renamed
IDS = torch.tensor([[1, 5, 9, 200, 17, 3]])


def trained(pico: Path, out: Path, rank: int = 4) -> torch.nn.Module:
    """The pico model with a random, non-zero adapter, saved to `out`."""
    model = load_model(pico)
    torch.manual_seed(1)
    lora.attach(model, "all-linear", rank, 8.0)
    with torch.no_grad():
        for _, layer in lora.layers(model):
            layer.b.normal_(std=0.05)
    out.mkdir(exist_ok=True)
    lora.save_adapter(model, out, rank=rank, alpha=8.0, dropout=0.0, base_name=str(pico))
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_starts_as_the_model_itself(pico: Path) -> None:
    model = load_model(pico)
    before = logits(model)
    lora.attach(model, "all-linear", 4, 8.0)
    assert torch.equal(logits(model), before)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(n.endswith((".a", ".b")) for n in trainable)


def test_peft_loads_it_and_computes_the_same(pico: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    ours = logits(trained(pico, tmp_path / "adapter"))
    theirs = PeftModel.from_pretrained(load_model(pico), tmp_path / "adapter")
    assert torch.allclose(logits(theirs), ours, atol=1e-5)
    assert not torch.allclose(ours, logits(load_model(pico)), atol=1e-2)


def test_folded_equals_unfolded_and_peft_merge(pico: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    unfolded = logits(trained(pico, tmp_path / "adapter"))
    folded = load_model(pico)
    assert fold_into(weights_of(folded), tmp_path / "adapter") == 14
    assert torch.allclose(logits(folded), unfolded, atol=1e-4)
    merged = PeftModel.from_pretrained(load_model(pico), tmp_path / "adapter").merge_and_unload()
    for (name, a), (_, b) in zip(folded.named_parameters(), merged.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_peft_adapter_with_rank_stabilised_scale_folds(pico: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(2)
    model = get_peft_model(
        load_model(pico), LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "theirs")
    ours = load_model(pico)
    fold_into(weights_of(ours), tmp_path / "theirs")
    merged = PeftModel.from_pretrained(load_model(pico), tmp_path / "theirs").merge_and_unload()
    assert torch.allclose(logits(ours), logits(merged), atol=1e-4)


def test_wrong_model_is_refused_before_anything_changes(pico: Path, tmp_path: Path) -> None:
    trained(pico, tmp_path / "adapter")
    with pytest.raises(ModelError, match="has no layer"):
        fold_into(lambda layer: None, tmp_path / "adapter")
    weight = torch.zeros(3, 3)
    with pytest.raises(ModelError, match="has the shape"):
        fold_into(lambda layer: weight, tmp_path / "adapter")
    assert not weight.any()


def test_unknown_options_and_targets_are_refused(pico: Path, tmp_path: Path) -> None:
    trained(pico, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ModelError, match="use_dora"):
        lora.read_adapter(tmp_path / "adapter")
    with pytest.raises(ModelError, match="no linear layer named 'w1'"):
        lora.attach(load_model(pico), ["w1"], 4, 8.0)


@pytest.mark.parametrize("cut", [3, 200, -10])
def test_truncated_safetensors_is_named(pico: Path, tmp_path: Path, cut: int) -> None:
    import shutil

    shutil.copytree(pico, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ModelError, match=r"model\.safetensors.*(truncated|broken)"):
        check_weights(tmp_path / "m")
