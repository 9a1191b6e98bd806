"""Stage `model.from_gguf`: a GGUF file becomes a Hugging Face directory (safetensors, tokenizer, template, golden tokens).

Reads the blocks with the vectorised `gguf` reader and dequantizes to fp32, which loses nothing that the file still has.
Knows the layouts of Llama and Qwen2; says so for any other architecture.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from llmworks.artifact import Config, Model
from llmworks.context import Context
from llmworks.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer


CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class FromGgufConfig(Config):
    """How to write the converted model."""

    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="number format of the written weights; float32 keeps every bit of the dequantized blocks"
    )


def from_gguf(config: FromGgufConfig, source: Model, ctx: Context) -> Model:
    """Convert a GGUF file of Llama's or Qwen2's layout to a Hugging Face directory.

    Errors: ModelError for a truncated file or another architecture. Equality with the transformers loader is a test.
    """
    from llmworks.model.golden import record

    write_hf_directory(source.gguf_path, ctx.out, dtype=config.dtype)
    golden = record(ctx.out)
    return Model(ctx.out, golden=golden, about={"format": "hf", "dtype": config.dtype})


def open_reader(path: Path) -> GGUFReader:
    """The `gguf` reader over a file, or ModelError with one line when the file is no GGUF or cut short."""
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ModelError(f"{path}: not a readable GGUF file, or truncated ({error}); fetch it again") from None


def metadata(reader: GGUFReader) -> dict[str, Any]:
    """All key-value fields of a GGUF file as Python values."""
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def write_hf_directory(path: Path, out: Path, dtype: str = "float32") -> None:
    """Write config, tokenizer, generation config and weights of the GGUF file `path` into the directory `out`."""
    reader = open_reader(path)
    meta = metadata(reader)
    config = _config(path, reader, meta, dtype)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(meta, out)
    write_weights(reader, meta, out, dtype)


def config_of(path: Path) -> dict[str, Any]:
    """The `config.json` that a GGUF file converts to. ModelError for another architecture."""
    reader = open_reader(path)
    return _config(path, reader, metadata(reader), "float32")


def _config(path: Path, reader: GGUFReader, meta: dict[str, Any], dtype: str) -> dict[str, Any]:
    architecture = meta.get("general.architecture")
    if architecture not in CLASSES:
        raise ModelError(
            f"{path}: architecture {architecture!r} cannot be converted, only {' and '.join(map(repr, CLASSES))}; it can still be run as it is (gguf:{path})"
        )
    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    return hf_config(meta, tied, dtype)


def hf_config(meta: dict[str, Any], tied: bool, dtype: str) -> dict[str, Any]:
    """The `config.json` of a Llama or Qwen2 model from GGUF metadata."""
    kind = str(meta["general.architecture"])
    own = {key.removeprefix(f"{kind}."): value for key, value in meta.items() if key.startswith(f"{kind}.")}
    heads = int(own["attention.head_count"])
    hidden = int(own["embedding_length"])
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": int(own["feed_forward_length"]),
        "num_hidden_layers": int(own["block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(own.get("attention.head_count_kv", heads)),
        "head_dim": int(own.get("attention.key_length", hidden // heads)),
        "max_position_embeddings": int(own["context_length"]),
        "rms_norm_eps": round(float(own["attention.layer_norm_rms_epsilon"]), 12),
        "rope_theta": float(own.get("rope.freq_base", 10000.0)),
        "hidden_act": "silu",
        **({"attention_bias": False, "mlp_bias": False} if kind == "llama" else {"use_sliding_window": False}),
        "tie_word_embeddings": tied,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": dtype,
    }


def write_tokenizer(meta: dict[str, Any], out: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    build_tokenizer(meta).save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer_options(meta)}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tokenizer_of(meta: dict[str, Any]) -> Any:
    """The transformers tokenizer that GGUF metadata describe, template included, without writing a file."""
    from transformers import PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=build_tokenizer(meta), **tokenizer_options(meta))


def build_tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE as GGUF's tokenizer model "gpt2" describes it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    from llmworks.model.gguf_layout import CONTROL, USER_DEFINED

    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2" or pre not in ("smollm", "gpt-2", "qwen2"):
        raise ModelError(f"the GGUF tokenizer {kind!r} with pre-tokenizer {pre!r} is not known here, only 'gpt2' with 'smollm', 'gpt-2' or 'qwen2'")
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if pre == "smollm" else byte_level
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    types = zip(tokens, meta["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_tokens(
        [AddedToken(token, special=kind == CONTROL, normalized=False) for token, kind in types if kind in (CONTROL, USER_DEFINED)]
    )
    return tokenizer


def tokenizer_options(meta: dict[str, Any]) -> dict[str, Any]:
    """Special tokens, length and template as `tokenizer_config.json` has them."""
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    named = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id", "pad_token": "padding_token_id"}
    options: dict[str, Any] = {
        role: tokens[int(meta[f"tokenizer.ggml.{key}"])] for role, key in named.items() if f"tokenizer.ggml.{key}" in meta
    }
    options |= {
        "model_max_length": int(meta[f"{meta['general.architecture']}.context_length"]),
        "clean_up_tokenization_spaces": False,
        "add_bos_token": bool(meta.get("tokenizer.ggml.add_bos_token", False)),
    }
    if "tokenizer.chat_template" in meta:
        options["chat_template"] = meta["tokenizer.chat_template"]
    return options


def write_weights(reader: GGUFReader, meta: dict[str, Any], out: Path, dtype: str) -> None:
    """Dequantize every tensor to `model.safetensors`, rows of Q and K back in Hugging Face order."""
    import numpy as np
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    from llmworks.model.gguf_layout import deinterleave_rows, heads_of, to_hf_name

    kind = meta["general.architecture"]
    heads = int(meta[f"{kind}.attention.head_count"])
    kv_heads = int(meta.get(f"{kind}.attention.head_count_kv", heads))
    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        name = to_hf_name(tensor.name)
        if name is None:
            if tensor.name == "rope_freqs.weight":
                raise ModelError("this GGUF file scales its rotary frequencies (rope_freqs), which conversion does not carry over")
            raise ModelError(f"the GGUF tensor {tensor.name!r} has no place in such a model")
        shape = tuple(int(n) for n in reversed(tensor.shape))
        weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(shape)
        interleaved = heads_of(tensor.name, heads, kv_heads) if kind == "llama" else None
        if interleaved is not None:
            weight = deinterleave_rows(weight, interleaved)
        tensors[name] = torch.from_numpy(np.array(weight, order="C")).to(getattr(torch, dtype))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
