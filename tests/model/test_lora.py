"""LoRA and its kin: start as the model itself, are what peft computes, forward and backward, and fold into the same
function.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmworks.core.errors import ModelError
from llmworks.model.io.decoder_files import load_decoder
from llmworks.model.io.load import load_adaptable, load_model
from llmworks.model.io.weights import check_weights
from llmworks.model.lora import adapter_io as adapter
from llmworks.model.lora import lora
from llmworks.model.lora.lora import LoraLinear, LoraSettings
from llmworks.model.lora.merge_adapter import make_weight_lookup, merge_adapter_into
from llmworks.model.lowbit.nf4 import replace_with_nf4

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"
)  # peft reads a name that transformers renamed
IDS = torch.tensor([[1, 5, 9, 200, 17, 3]])
KINDS = {
    "plain": LoraSettings(4, 8.0),
    "stabilised": LoraSettings(4, 8.0, use_rslora=True),
    "magnitudes": LoraSettings(4, 8.0, use_dora=True),
    "both": LoraSettings(8, 8.0, use_rslora=True, use_dora=True),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def shaken(model: nn.Module) -> None:
    """Every adapter's numbers at random, so that each of them shows."""
    torch.manual_seed(3)
    with torch.no_grad():
        for _, layer in lora.iter_lora_layers(model):
            layer.b.normal_(std=0.05)
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + 0.2 * torch.rand_like(layer.magnitude))


def trained(pico: Path, out: Path, kind: LoraSettings = KINDS["plain"], targets: Any = "all-linear") -> Any:
    """The pico model with a random adapter, saved to `out`."""
    model, rename = load_adaptable(pico)
    torch.manual_seed(1)
    lora.attach_lora(model, targets, kind, rename)
    shaken(model)
    out.mkdir(exist_ok=True)
    adapter.save_adapter(model, out, kind, base_name=str(pico), rename=rename)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
        return found


@kinds
def test_starts_as_the_model_itself(pico: Path, kind: str) -> None:
    model = load_model(pico)
    before = logits(model)
    lora.attach_lora(model, "all-linear", KINDS[kind])
    assert torch.allclose(logits(model), before, atol=2e-5)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(n.endswith((".a", ".b", ".magnitude")) for n in trainable)


@kinds
def test_peft_loads_it_and_computes_the_same_forward_and_backward(pico: Path, tmp_path: Path, kind: str) -> None:
    """Our decoder's adapter in transformers' model, by peft: the same logits, the same gradient of every number that is
    trained.
    """
    from peft import PeftModel

    ours = trained(pico, tmp_path / "adapter", KINDS[kind])
    theirs = PeftModel.from_pretrained(load_model(pico), tmp_path / "adapter", is_trainable=True)
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-4)
    assert not torch.allclose(logits(ours), logits(load_model(pico)), atol=1e-2)
    for model in (ours.train(), theirs.train()):
        model(input_ids=IDS).logits.log_softmax(-1)[0, range(5), IDS[0, 1:]].sum().backward()
    _, rename = load_adaptable(pico)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    compared = 0
    for name, layer in lora.iter_lora_layers(ours):
        stem = f"base_model.model.{rename(name)}"
        for own, name_there in (
            (layer.a, "lora_A.default.weight"),
            (layer.b, "lora_B.default.weight"),
            (layer.magnitude, "lora_magnitude_vector.default.weight"),
        ):
            if own is not None:
                there = gradients[f"{stem}.{name_there}"]
                assert own.grad is not None
                assert float((own.grad - there).norm() / there.norm()) < 1e-4, (name, name_there)
                compared += 1
    assert compared == len(gradients) == 14 * (3 if KINDS[kind].use_dora else 2)


def test_one_operation_is_the_two_that_it_stands_for() -> None:
    """The fused layer against W x + s B (A x) by autograd, in fp64; with a bias; also where the input needs no
    gradient.
    """
    torch.manual_seed(0)
    for bias in (False, True):
        layer = LoraLinear(nn.Linear(10, 7, bias=bias), LoraSettings(3, 5.0)).double()
        layer.base.requires_grad_(False)
        nn.init.normal_(layer.b)
        x = torch.randn(2, 4, 10, dtype=torch.float64, requires_grad=True)
        plain = (
            nn.functional.linear(x, layer.base.weight, layer.base.bias)
            + nn.functional.linear(nn.functional.linear(x, layer.a), layer.b) * 5 / 3
        )
        weights = torch.randn(2, 4, 7, dtype=torch.float64)
        wanted = torch.autograd.grad((plain * weights).sum(), [x, layer.a, layer.b])
        found = torch.autograd.grad((layer(x) * weights).sum(), [x, layer.a, layer.b])
        assert torch.allclose(layer(x), plain)
        assert all(torch.allclose(one, other) for one, other in zip(found, wanted, strict=True))
        (layer(x.detach()) * weights).sum().backward()
        assert layer.a.grad is not None
        assert torch.allclose(layer.a.grad, wanted[1])


def test_faster_b_is_peft_s_lora_plus(pico: Path) -> None:
    """Three steps of AdamW with B sixteen times as fast: peft's optimizer makes the same adapter."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    from llmworks.train.loop.optimizers import create_optimizers
    from llmworks.train.loop.schedule import OptimizerConfig

    theirs = get_peft_model(load_model(pico), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    ours = load_model(pico)
    lora.attach_lora(ours, ["q_proj", "down_proj"], KINDS["plain"])
    names = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, layer in lora.iter_lora_layers(ours):
            layer.a.copy_(names[f"base_model.model.{name}.lora_A.default.weight"])
    (mine,) = create_optimizers(ours, OptimizerConfig(learning_rate=1e-3), {"b": 16.0})
    other = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, weight_decay=0.0)
    for group in mine.param_groups:
        group["lr"] = 1e-3 * group["times"]
    for _ in range(3):
        for model, optimizer in ((ours, mine), (theirs, other)):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, layer in lora.iter_lora_layers(ours):
        assert torch.allclose(layer.a, names[f"base_model.model.{name}.lora_A.default.weight"], atol=1e-5), name
        assert torch.allclose(layer.b, names[f"base_model.model.{name}.lora_B.default.weight"], atol=1e-5), name
        assert float(layer.b.detach().abs().max()) > 0.03  # three steps of 0.016


@kinds
def test_folded_equals_unfolded_and_peft_merge(pico: Path, tmp_path: Path, kind: str) -> None:
    from peft import PeftModel

    unfolded = logits(trained(pico, tmp_path / "adapter", KINDS[kind]))
    folded = load_model(pico)
    assert merge_adapter_into(make_weight_lookup(folded), tmp_path / "adapter").layers == 14
    assert float((logits(folded) - unfolded).abs().max() / unfolded.abs().max()) < 1e-5
    merged = PeftModel.from_pretrained(load_model(pico), tmp_path / "adapter").merge_and_unload()
    for (name, a), (_, b) in zip(folded.named_parameters(), merged.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


PEFT: dict[str, dict[str, Any]] = {
    "stabilised": {"use_rslora": True},
    "magnitudes": {"use_dora": True},
    "ranks and alphas of their own": {
        "rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\.down_proj": 6},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
    },
}


@pytest.mark.parametrize("what", PEFT)
def test_adapters_of_peft_fold(pico: Path, tmp_path: Path, what: str) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(2)
    model = get_peft_model(
        load_model(pico),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **PEFT[what]),
    )
    model.save_pretrained(tmp_path / "theirs")
    ours = load_model(pico)
    merge_adapter_into(make_weight_lookup(ours), tmp_path / "theirs")
    merged = PeftModel.from_pretrained(load_model(pico), tmp_path / "theirs").merge_and_unload()
    assert torch.allclose(logits(ours), logits(merged), atol=1e-4)
    assert not torch.allclose(logits(ours), logits(load_model(pico)), atol=1e-2)


def test_beside_four_bits_the_fold_is_what_was_trained(pico: Path, tmp_path: Path) -> None:
    """All layers in nf4, an adapter beside some: folded into what the bits say, also where there is no adapter, and not
    into the weights as they were.
    """
    model, rename = load_adaptable(pico)
    names = lora.find_linear_layers(model)
    replace_with_nf4(model, names)
    torch.manual_seed(1)
    lora.attach_lora(model, ["q_proj", "up_proj"], KINDS["plain"], rename)
    shaken(model)
    adapter.save_adapter(
        model,
        tmp_path,
        KINDS["plain"],
        base_name="pico",
        rename=rename,
        base={"kept": "nf4", "double": True, "layers": sorted(map(rename, names))},
    )
    folded = load_model(pico)
    done = merge_adapter_into(make_weight_lookup(folded), tmp_path)
    assert done.layers == 4
    assert 0.03 < done.base_error < 0.12  # nf4 loses some percent of normal weights
    assert torch.allclose(logits(folded), logits(model), atol=1e-4)
    (tmp_path / adapter.BASE_FILE).unlink()
    other = load_model(pico)
    assert merge_adapter_into(make_weight_lookup(other), tmp_path).base_error == 0
    assert not torch.allclose(logits(other), logits(model), atol=1e-2)
    (tmp_path / adapter.BASE_FILE).write_text('{"kept": "int3"}')
    with pytest.raises(ModelError, match="quantized as 'int3'; only nf4"):
        merge_adapter_into(make_weight_lookup(other), tmp_path)


def test_wrong_model_is_refused_before_anything_changes(pico: Path, tmp_path: Path) -> None:
    trained(pico, tmp_path / "adapter")
    with pytest.raises(ModelError, match="has no layer"):
        merge_adapter_into(lambda layer: None, tmp_path / "adapter")
    weight = torch.zeros(3, 3)
    with pytest.raises(ModelError, match="has shape"):
        merge_adapter_into(lambda layer: weight, tmp_path / "adapter")
    assert not weight.any()


def test_unknown_options_and_targets_are_refused(pico: Path, tmp_path: Path) -> None:
    trained(pico, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    for change, message in (
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "only LORA"),
        ({"r": 0}, "rank"),
    ):
        file.write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=message):
            adapter.read_adapter(tmp_path / "adapter")
    file.write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ModelError, match="has no lora_magnitude_vector"):
        merge_adapter_into(make_weight_lookup(load_model(pico)), tmp_path / "adapter")
    model, rename = load_adaptable(pico)
    with pytest.raises(ModelError, match=r"no linear layer named 'w1'; it has down_proj, gate_proj, k_proj"):
        lora.attach_lora(model, ["w1"], KINDS["plain"], rename)


def test_the_decoder_is_adapted_as_transformers_model(pico: Path, tmp_path: Path) -> None:
    """An adapter of one model, put into the other, by the names of the files."""
    ours = trained(pico, tmp_path / "adapter")
    theirs = load_model(pico)
    torch.manual_seed(9)
    lora.attach_lora(theirs, "all-linear", KINDS["plain"])
    adapter.load_adapter_state(theirs, adapter.read_adapter(tmp_path / "adapter")[1])
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-4)
    assert type(ours) is type(load_decoder(pico))


@pytest.mark.parametrize("cut", [3, 200, -10])
def test_truncated_safetensors_is_named(pico: Path, tmp_path: Path, cut: int) -> None:
    import shutil

    shutil.copytree(pico, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ModelError, match=r"model\.safetensors.*(truncated|broken)"):
        check_weights(tmp_path / "m")
