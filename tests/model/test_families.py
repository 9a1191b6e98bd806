"""The decoder is Llama, Mistral, Qwen2, Qwen3, Gemma 3 and GPT-2: the same logits as transformers', read and written,
with random and with real weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GgufConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from llmworks.core.errors import ModelError
from llmworks.model.io.decoder_files import load_decoder, save_decoder
from llmworks.model.io.families import find_standard, parse_shape
from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
from llmworks.model.shape import Shape

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}
THEIRS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama, tied, biased": LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama, wide heads": LlamaConfig(**SIZES, head_dim=20),
    "llama, multi-query": LlamaConfig(**{**SIZES, "num_key_value_heads": 1}),
    "llama, linear": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    ),
    "llama 3": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "factor": 8.0,
            "rope_theta": 500000.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "llama, yarn": LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=5),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen2, window": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=0),
    "gemma3": Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        sliding_window=6,
        sliding_window_pattern=2,
        query_pre_attn_scalar=24,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    ),
    "gemma3, stretched": Gemma3TextConfig(
        **SIZES,
        head_dim=16,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=24,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gpt2": GPT2Config(vocab_size=97, n_embd=48, n_layer=3, n_head=4, n_positions=64, attn_implementation="eager"),
}
IDS = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(0))


def made(config: Any, folder: Path) -> Any:
    """A model of theirs with weights far from their usual beginning, saved."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model


def logits(model: Any, ids: torch.Tensor = IDS, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=ids, **given).logits)


@pytest.mark.parametrize("name", THEIRS)
def test_logits_both_ways(name: str, tmp_path: Path) -> None:
    theirs = made(THEIRS[name], tmp_path / "theirs")
    expected = logits(theirs)
    assert expected.std() > 0.3
    ours = load_decoder(tmp_path / "theirs")
    assert (logits(ours) - expected).abs().max() < 1e-4
    kind = save_decoder(ours, tmp_path / "back")
    assert (
        json.loads((tmp_path / "back/config.json").read_text())["model_type"]
        == kind
        == (theirs.config.model_type if "window" not in name else kind)
    )
    before, after = (
        {k: v for f in (tmp_path / side).glob("*.safetensors") for k, v in load_file(f).items()}
        for side in ("theirs", "back")
    )
    if kind == theirs.config.model_type:
        assert set(after) == set(before)
        assert all(torch.equal(after[k], before[k]) for k in after)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    assert (logits(again) - expected).abs().max() < 1e-4
    mask = torch.ones_like(IDS)
    mask[1, :7] = 0
    padded, wanted = (
        logits(ours, attention_mask=mask),
        logits(theirs, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)),
    )
    assert (padded - wanted)[mask.bool()].abs().max() < 1e-4


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2"])
def test_generated_text_is_theirs(name: str, tmp_path: Path) -> None:
    theirs = made(THEIRS[name], tmp_path)
    ours = load_decoder(tmp_path)
    prompts = IDS[:, :9]
    mask = torch.ones_like(prompts)
    mask[0, :3] = 0
    for options in ({}, {"num_beams": 3}):
        settings: Any = {
            "max_new_tokens": 25,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": None,
            "attention_mask": mask,
            **options,
        }
        assert torch.equal(ours.generate(prompts, **settings), theirs.generate(prompts, **settings))


def test_a_shape_is_saved_as_what_it_is() -> None:
    usual = {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    found = {
        "llama": {},
        "mistral": {"sliding_window": 8},
        "qwen2": {"bias": "qkv"},
        "qwen3": {"use_qk_norm": True},
        "": {"position_embedding_type": "alibi"},
        "gpt2": {
            "norm": "layer",
            "position_embedding_type": "learned",
            "gated_mlp": False,
            "bias": "all",
            "hidden_act": "gelu_pytorch_tanh",
        },
        "gemma3_text": {
            "norm_position": "sandwich",
            "norm_unit_offset": True,
            "use_qk_norm": True,
            "scale_embedding": True,
            "sliding_window": 8,
            "global_attn_every_n_layers": 2,
            "hidden_act": "gelu_pytorch_tanh",
        },
    }
    for kind, more in found.items():
        shape = Shape.model_validate({**usual, **more})
        assert find_standard(shape) == kind
    for more in (
        {"experts": {}},
        {"norm_position": "post"},
        {"rope_parameters": {"rope_type": "ntk", "factor": 2}},
        {"position_embedding_type": "none"},
        {"norm": "layer"},
        {"sliding_window": 5, "local_rope_theta": 77.0},
        {**found["gemma3_text"], "attention_multiplier": 0.9},
        {**found["gemma3_text"], "num_hidden_layers": 7, "global_attn_every_n_layers": 8},
    ):
        assert find_standard(Shape.model_validate({**usual, **more})) == ""


@pytest.mark.parametrize(
    "more",
    [
        {"position_embedding_type": "alibi"},
        {"experts": {"num_experts": 4}},
        {"norm_position": "post", "position_embedding_type": "sinusoidal"},
        {"rope_parameters": {"rope_type": "ntk", "factor": 4}},
    ],
)
def test_shapes_of_its_own_come_back(more: dict[str, Any], tmp_path: Path) -> None:
    shape = Shape.model_validate(
        {
            "vocab_size": 97,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            **more,
        }
    )
    model = DecoderForCausalLM(DecoderConfig(shape=shape.model_dump())).eval()
    assert save_decoder(model, tmp_path, token_ids={"eos_token_id": 5}) == ""
    assert torch.equal(logits(load_decoder(tmp_path)), logits(model))
    through = AutoModelForCausalLM.from_pretrained(tmp_path).eval()  # known to transformers here
    assert torch.equal(logits(through), logits(model))
    assert through.config.eos_token_id == 5


def test_broken_directories_are_told(tmp_path: Path) -> None:
    made(THEIRS["llama"], tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    tensors, config = load_file(file), json.loads((tmp_path / "m/config.json").read_text())

    def told(
        match: str, change_tensors: dict[str, Any] | None = None, change_config: dict[str, Any] | None = None
    ) -> None:
        broken = {k: v for k, v in {**tensors, **(change_tensors or {})}.items() if v is not None}
        save_file(broken, file, metadata={"format": "pt"})
        (tmp_path / "m/config.json").write_text(
            json.dumps({k: v for k, v in {**config, **(change_config or {})}.items() if v is not ...})
        )
        with pytest.raises(ModelError, match=match) as caught:
            load_decoder(tmp_path / "m")
        assert "\n" not in str(caught.value)

    told(r"is missing decoder\.blocks\.1\.feed_forward\.up\.weight ", {"model.layers.1.mlp.up_proj.weight": None})
    told(r"has unexpected model\.extra\.weight", {"model.extra.weight": torch.zeros(2)})
    told(r"is missing .* and 8 more", None, {"num_hidden_layers": 4})
    told(
        r"decoder\.norm\.weight has shape \(49,\), config.json requires \(48,\)",
        {"model.norm.weight": torch.zeros(49)},
    )
    told("num_attention_heads 4 is not divisible by num_key_value_heads 3", None, {"num_key_value_heads": 3})
    told("'rms_norm_eps' is missing", None, {"rms_norm_eps": ...})
    told("the architecture 'bert' is not supported; supported: llama, mistral, qwen2", None, {"model_type": "bert"})
    told("RoPE type 'longrope'", None, {"rope_parameters": {"rope_type": "longrope"}})
    told("activation 'relu' is not supported", None, {"hidden_act": "relu"})
    told("truncate false", None, {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}})
    told("attention_bias without mlp_bias", None, {"attention_bias": True})
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="truncated"):
        load_decoder(tmp_path / "m")
    shutil.rmtree(tmp_path / "m")
    with pytest.raises(ModelError, match="no such model directory"):
        load_decoder(tmp_path / "m")
    with pytest.raises(ModelError, match="use_bidirectional_attention"):
        parse_shape({**Gemma3TextConfig(**SIZES, use_bidirectional_attention=True).to_dict()})
    with pytest.raises(ModelError, match="layer_types that differ"):
        parse_shape({**Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=2).to_dict()})
    with pytest.raises(ModelError, match="softcapping"):
        parse_shape({**Gemma3TextConfig(**SIZES, final_logit_softcapping=30.0).to_dict()})


@pytest.mark.slow
@pytest.mark.parametrize("asset", ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "gemma3-270m"])
def test_real_weights(asset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmworks import assets
    from llmworks.core.workspace import Workspace
    from llmworks.runtime.session import load

    monkeypatch.setenv("LLMWORKS_ACCEPT", asset)
    if asset == "gemma3-270m":  # read by transformers, since the stage model.from_gguf does not know its layout
        (file,) = assets.fetch(asset).glob("*.gguf")
        path = tmp_path / asset
        AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        ).save_pretrained(path)
    else:
        path = load(f"asset:{asset}", workspace=Workspace(tmp_path / "ws")).path
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ours = load_decoder(path)
    ids = torch.randint(0, 40_000, (1, 200), generator=torch.Generator().manual_seed(1))
    expected = logits(theirs, ids)
    assert (logits(ours, ids) - expected).abs().max() < 1e-4 * max(1.0, float(expected.abs().max()) / 10)
    for number in range(20):
        prompt = ids[:, number * 7 : number * 7 + 12]
        settings: Any = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        assert torch.equal(ours.generate(prompt, **settings), theirs.generate(prompt, **settings))
    save_decoder(ours, tmp_path / "back")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert (logits(again, ids) - expected).abs().max() < 1e-4
