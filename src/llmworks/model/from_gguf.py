"""Stage `model.from_gguf`: convert a GGUF file to a Hugging Face directory (safetensors, tokenizer, template, golden
tokens).

Dequantizes the blocks to fp32 with the vectorized `gguf` reader, without further loss. Supports the layouts of Llama,
Qwen2, Qwen3, Gemma 3 and Phi-3; any other architecture is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from llmworks.core.artifact import Config, Model
from llmworks.core.context import Context
from llmworks.core.errors import ModelError
from llmworks.model.gguf.layout import LAYOUTS, MODEL_TYPES

if TYPE_CHECKING:
    from gguf import GGUFReader


class FromGgufConfig(Config):
    """Number format of the converted model."""

    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="number format of the written weights; float32 keeps the dequantized blocks exactly"
    )


def from_gguf(config: FromGgufConfig, source: Model, ctx: Context) -> Model:
    """Convert a GGUF file to a Hugging Face directory.

    Errors: ModelError for a truncated file or an unsupported architecture.
    """
    from llmworks.model.golden import record_golden

    write_hf_directory(source.gguf_path, ctx.out, dtype=config.dtype)
    golden = record_golden(ctx.out)
    return Model(ctx.out, golden=golden, about={"format": "hf", "dtype": config.dtype})


def open_reader(path: Path) -> GGUFReader:
    """Open a GGUF file with the `gguf` reader. ModelError when it is not a GGUF file or is truncated."""
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ModelError(f"{path}: not a readable GGUF file, or truncated ({error}); fetch it again") from None


def read_metadata(reader: GGUFReader) -> dict[str, Any]:
    """Return all key-value metadata of a GGUF file as Python values."""
    try:
        return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    except (ValueError, IndexError, KeyError) as error:
        raise ModelError(f"a metadata key of the GGUF file cannot be read ({error}); fetch it again") from None


def _get_stops(meta: Mapping[str, Any]) -> int | list[int] | None:
    """Return the end-of-sequence, end-of-turn and end-of-message ids: one as a number, several as a list."""
    names = ("eos", "eot", "eom")
    stops = [int(meta[key]) for name in names if (key := f"tokenizer.ggml.{name}_token_id") in meta]
    stops = list(dict.fromkeys(stops))
    return stops[0] if len(stops) == 1 else stops or None


def write_hf_directory(path: Path, out: Path, dtype: str = "float32") -> None:
    """Write config, tokenizer, generation config and weights of the GGUF file `path` into the directory `out`."""
    reader = open_reader(path)
    meta = read_metadata(reader)
    config = _build_config(path, reader, meta, dtype)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": _get_stops(meta),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    from llmworks.model.gguf.tokenizer import write_tokenizer

    write_tokenizer(meta, out)
    write_weights(reader, meta, out, dtype)


def read_quantization_type(path: Path) -> str:
    """Return llama.cpp's name of a file's quantization type, as q4_k_m; "" if the file has none."""
    from gguf import LlamaFileType

    file_type = read_metadata(open_reader(path)).get("general.file_type")
    names = {int(one): one.name.removeprefix("MOSTLY_").removeprefix("ALL_").lower() for one in LlamaFileType}
    return names.get(int(file_type), "") if isinstance(file_type, int) else ""


def read_hf_config(path: Path) -> dict[str, Any]:
    """Return the `config.json` that a GGUF file converts to. ModelError for an unsupported architecture."""
    reader = open_reader(path)
    return _build_config(path, reader, read_metadata(reader), "float32")


def _build_config(path: Path, reader: GGUFReader, meta: dict[str, Any], dtype: str) -> dict[str, Any]:
    architecture = meta.get("general.architecture")
    if architecture not in MODEL_TYPES:
        raise ModelError(
            f"{path}: architecture {architecture!r} cannot be converted, only {', '.join(MODEL_TYPES)}; it can still"
            " be run"
            f" as it is (gguf:{path})"
        )
    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    try:
        return build_hf_config(meta, tied, dtype)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path}: a metadata key of the GGUF file is missing or invalid ({error}); fetch it again"
        ) from None


def build_hf_config(meta: dict[str, Any], tied: bool, dtype: str) -> dict[str, Any]:
    """Build `config.json` from GGUF metadata.

    ModelError for RoPE scaling, which is not converted.
    """
    architecture = str(meta["general.architecture"])
    kind = MODEL_TYPES[architecture]
    fields = {
        key.removeprefix(f"{architecture}."): value for key, value in meta.items() if key.startswith(f"{architecture}.")
    }
    if fields.get("rope.scaling.type", "none") != "none":
        raise ModelError(f"this GGUF file uses RoPE scaling ({fields['rope.scaling.type']}), which cannot be converted")
    heads = int(fields["attention.head_count"])
    hidden = int(fields["embedding_length"])
    width = int(fields.get("attention.key_length", hidden // heads))
    theta = float(fields.get("rope.freq_base", 10000.0))
    fields_by_model_type = _get_specific_fields(fields, width, theta)
    specific_fields = fields_by_model_type[kind]
    return {
        "architectures": [LAYOUTS[kind].model_class],
        "model_type": kind,
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": int(fields["feed_forward_length"]),
        "num_hidden_layers": int(fields["block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields.get("attention.head_count_kv", heads)),
        **({} if kind == "phi3" else {"head_dim": width}),
        "max_position_embeddings": int(fields["context_length"]),
        "rms_norm_eps": round(float(fields["attention.layer_norm_rms_epsilon"]), 12),
        **({} if "rope_parameters" in specific_fields else {"rope_theta": theta}),
        **({} if "hidden_activation" in specific_fields else {"hidden_act": "silu"}),
        **specific_fields,
        "tie_word_embeddings": tied,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": dtype,
    }


def _get_specific_fields(fields: dict[str, Any], width: int, theta: float) -> dict[str, dict[str, Any]]:
    """Return the config fields specific to each architecture."""
    fields_by_model_type: dict[str, dict[str, Any]] = {
        "llama": {"attention_bias": False, "mlp_bias": False},
        "qwen2": {"use_sliding_window": False},
        "qwen3": {"use_sliding_window": False, "attention_bias": False},
        "phi3": {
            "sliding_window": int(fields.get("attention.sliding_window", 0)) or None,
            "original_max_position_embeddings": int(
                fields.get("rope.scaling.original_context_length", fields["context_length"])
            ),
        },
        "gemma3_text": {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": width,
            "sliding_window": int(fields.get("attention.sliding_window", 0)),
            "layer_types": [
                ("full" if (i + 1) % 6 == 0 else "sliding") + "_attention" for i in range(int(fields["block_count"]))
            ],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": theta},
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": float(fields.get("rope.freq_base_swa", 10000.0)),
                },
            },
        },
    }
    return fields_by_model_type


def write_weights(reader: GGUFReader, meta: dict[str, Any], out: Path, dtype: str) -> None:
    """Dequantize every tensor to `model.safetensors`, with the rows of Q and K back in Hugging Face order."""
    import numpy as np
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    from llmworks.model.gguf.layout import deinterleave_rows, get_interleaved_heads, to_hf_name

    architecture = meta["general.architecture"]
    layout = LAYOUTS[MODEL_TYPES[architecture]]
    heads = int(meta[f"{architecture}.attention.head_count"])
    kv_heads = int(meta.get(f"{architecture}.attention.head_count_kv", heads))
    tensors: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        name = to_hf_name(tensor.name, MODEL_TYPES[architecture])
        if name is None:
            if tensor.name == "rope_freqs.weight":
                raise ModelError("this GGUF file scales its RoPE frequencies (rope_freqs), which cannot be converted")
            raise ModelError(f"the GGUF tensor {tensor.name!r} has no counterpart in this architecture")
        shape = tuple(int(n) for n in reversed(tensor.shape))
        weight = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(shape)
        interleaved = get_interleaved_heads(tensor.name, heads, kv_heads) if layout.interleaved else None
        if interleaved is not None:
            weight = deinterleave_rows(weight, interleaved)
        if layout.unit_offset and name.endswith("norm.weight"):
            weight = weight - 1
        tensors[name] = torch.from_numpy(np.array(weight, order="C")).to(getattr(torch, dtype))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
