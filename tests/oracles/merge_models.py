"""Small models that are merged, here and by mergekit: the same numbers wherever they are made.

Needs numpy, safetensors and tokenizers alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

WIDTH, INNER, LAYERS, HEADS, TOKENS = 16, 24, 4, 2, 48
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": TOKENS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_theta": 10000.0,
}
SHAPES = {
    "input_layernorm": (WIDTH,),
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (8, WIDTH),
    "self_attn.v_proj": (8, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "post_attention_layernorm": (WIDTH,),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}
FAMILY = {
    "base": (0, 0.0),
    "a": (1, 0.3),
    "b": (2, 0.3),
    "c": (3, 0.1),
    "far": (4, 3.0),
}  # seed of the difference from the base, and its size


def tensors(name: str, tokens: int = TOKENS, *, head: bool = True) -> dict[str, Any]:
    """A model's weights, fp32."""
    seed, size = FAMILY[name]
    base, own = np.random.default_rng(0), np.random.default_rng(seed)
    shapes = {
        "model.embed_tokens.weight": (tokens, WIDTH),
        **{f"model.layers.{layer}.{part}.weight": shape for layer in range(LAYERS) for part, shape in SHAPES.items()},
        "model.norm.weight": (WIDTH,),
        **({"lm_head.weight": (tokens, WIDTH)} if head else {}),
    }
    found = {}
    for tensor, shape in shapes.items():
        value = base.standard_normal(
            (TOKENS, *shape[1:]) if shape[0] == tokens and len(shape) > 1 and "layers" not in tensor else shape
        )
        value = value + size * own.standard_normal(value.shape)
        value = np.resize(value, shape) if value.shape != shape else value
        found[tensor] = value.astype(np.float32)
    return found


def tokenizer(path: Path, joined: tuple[str, ...], special: tuple[str, ...]) -> int:
    """A tokenizer of bytes, pairs that are joined ("t h") and special tokens; how many tokens."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = {
        token: at
        for at, token in enumerate(
            ["<s>", "</s>", *sorted(ByteLevel.alphabet()), *(pair.replace(" ", "") for pair in joined)]
        )
    }
    added = [
        {
            "id": vocabulary[token],
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in ("<s>", "</s>")
    ]
    for token in special:
        vocabulary[token] = len(vocabulary)
        added.append(
            {
                "id": vocabulary[token],
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        )
    definition = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": list(joined),
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(definition))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"})
    )
    return len(vocabulary)


def save(
    path: Path,
    name: str,
    *,
    kind: str = "F32",
    joined: tuple[str, ...] = (),
    special: tuple[str, ...] = (),
    head: bool = True,
    rows: int = 0,
) -> Path:
    """A Hugging Face directory. `joined`: a tokenizer that joins these, with as many rows as it has tokens."""
    path.mkdir(parents=True)
    count = tokenizer(path, joined, special) if joined else TOKENS
    found = tensors(name, rows or count, head=head)
    (path / "config.json").write_text(
        json.dumps(
            {
                **CONFIG,
                "vocab_size": rows or count,
                "tie_word_embeddings": not head,
                "torch_dtype": "bfloat16" if kind == "BF16" else "float32",
            }
        )
    )
    if kind == "BF16":
        import torch
        from safetensors.torch import save_file as save_torch

        save_torch(
            {tensor: torch.from_numpy(value).bfloat16() for tensor, value in found.items()},
            path / "model.safetensors",
            metadata={"format": "pt"},
        )
    else:
        save_file(found, path / "model.safetensors", metadata={"format": "pt"})
    return path
