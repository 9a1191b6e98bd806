"""Write a GGUF file from a Hugging Face directory: metadata, tokenizer, tensors.

Layout as in llama.cpp's `convert_hf_to_gguf.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.gguf_writer import GGUFWriter

from llmworks.core.errors import ModelError
from llmworks.core.progress import Progress
from llmworks.model.gguf.layout import LAYOUTS, get_interleaved_heads, interleave_rows, to_gguf_name
from llmworks.model.io.decoder_files import check_tied_head
from llmworks.model.io.weights import StoredTensors, check_weights, read_header, weight_files
from llmworks.quantize.llamacpp.metadata import add_hyperparameters, compute_llama3_rope_factors, read_config
from llmworks.quantize.llamacpp.types import REQUIRE_IMATRIX, MixParameters, assign_formats
from llmworks.quantize.llamacpp.vocabulary import add_vocabulary


@dataclass(frozen=True)
class WrittenTensors:
    """The written tensors: formats and shapes, and the tensors with a fallback format instead of the file type's."""

    types: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    fallback_tensors: tuple[str, ...]


def write_gguf(
    source: Path,
    target: Path,
    kind: str,
    progress: Progress,
    importance: Mapping[str, Any] | None = None,
    overrides: Mapping[str, str] | None = None,
) -> WrittenTensors:
    """Write `target` from the Hugging Face directory `source`, one tensor in memory at a time.

    kind: the file's type (see `types.py`); importance: mean squares of a tensor's inputs, by its name, numpy fp32
    [columns]; overrides: formats by a regex on tensor names. Errors: ModelError for an unsupported architecture or
    tokenizer, or a type that requires an importance matrix without one.
    """
    import gguf

    check_weights(source)
    config = read_config(source)
    tensors = GgufTensorReader(source, config)
    layout = tensors.get_mix_parameters(importance is not None)
    types = assign_formats(tensors.shapes, kind, layout, overrides)
    wide = assign_formats({name: (*shape[:-1], 256) for name, shape in tensors.shapes.items()}, kind, layout, overrides)
    without_importance = [
        name
        for name, found in types.items()
        if name not in ("token_embd.weight", "output.weight")
        and (found in REQUIRE_IMATRIX or (kind == "q2_k_s" and found == "Q2_K"))
        and name not in (importance or {})
    ]
    if without_importance:
        raise ModelError(
            f"{kind} requires an importance matrix: {without_importance[0]} would be {types[without_importance[0]]};"
            " give `data` like that the"
            " model is used for"
        )
    writer = gguf.GGUFWriter(target, LAYOUTS[config["model_type"]].architecture)
    writer.add_file_type(getattr(gguf.LlamaFileType, {"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}")))
    add_hyperparameters(writer, config)
    add_vocabulary(writer, source, config)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_tensors(tensors, types, writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with progress.bar(f"write {kind}", len(tensors.shapes), "tensors") as bar:
        for name in tensors.shapes:
            writer.write_tensor_data(encode(tensors.read(name), types[name], (importance or {}).get(name)))
            bar.advance()
    writer.close()
    return WrittenTensors(
        types, dict(tensors.shapes), tuple(name for name, found in types.items() if found != wide[name])
    )


def _add_tensors(tensors: GgufTensorReader, types: dict[str, str], writer: GGUFWriter) -> None:
    """Add the shape and format of each tensor."""
    import gguf

    for name, shape in tensors.shapes.items():
        number = gguf.GGMLQuantizationType[types[name]]
        size, each = gguf.GGML_QUANT_SIZES[number]
        count = math.prod(shape)
        writer.add_tensor_info(
            name,
            (
                gguf.quant_shape_to_byte_shape(shape, number)
                if number not in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
                else shape
            ),
            np.dtype({"F32": np.float32, "F16": np.float16}.get(types[name], np.uint8)),
            count // size * each,
            raw_dtype=number,
        )


def encode(weight: Any, kind: str, importance: Any = None) -> Any:
    """Encode a numpy matrix [rows, columns] in a format's bytes. The simplest formats ignore the importance."""
    from libgguf import GGMLQuantizationType, quantize_rows

    if kind == "F32":
        return weight
    if kind == "F16":
        import torch

        half = torch.from_numpy(weight).half()  # five times as fast as numpy
        if half.isinf().any():
            raise ModelError("weights exceed the range of f16 (65504); use bf16 or f32")
        return half.numpy()
    return quantize_rows(
        weight, GGMLQuantizationType[kind], None if importance is None or kind == "Q8_0" else importance
    )


class GgufTensorReader:
    """The tensors of a directory with llama.cpp's names and row order: `shapes`, and each tensor on request, fp32."""

    def __init__(self, source: Path, config: Mapping[str, Any]) -> None:
        self.source = source
        self.layers = int(config["num_hidden_layers"])
        self.heads = int(config["num_attention_heads"])
        self.kv_heads = int(config.get("num_key_value_heads") or self.heads)
        tied = bool(config.get("tie_word_embeddings"))
        self.kind = str(config["model_type"])
        self.layout_of = LAYOUTS[self.kind]
        self.rows = int(config["vocab_size"])
        self.factors = compute_llama3_rope_factors(config)
        self.places: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in weight_files(source):
            for name, entry in sorted(read_header(file).items(), key=lambda one: get_sort_key(one[0])):
                if name == "__metadata__":
                    continue
                if name == "lm_head.weight" and tied:
                    stored = StoredTensors(source)
                    check_tied_head(
                        source,
                        {"head.weight": stored[name], "decoder.embedding.weight": stored["model.embed_tokens.weight"]},
                    )
                    continue
                gguf_name = to_gguf_name(name, self.kind)
                if gguf_name is None:
                    raise ModelError(
                        f"{source}: the tensor {name} is unknown in a {self.layout_of.architecture} GGUF file"
                    )
                self.places[gguf_name], self.shapes[gguf_name] = (file, name), tuple(entry["shape"])

        if self.factors is not None:
            self.shapes = {"rope_freqs.weight": self.factors.shape, **self.shapes}

    def get_mix_parameters(self, importance: bool) -> MixParameters:
        """Return what the mixes of formats depend on."""
        return MixParameters(self.layers, self.heads // self.kv_heads, "output.weight" not in self.shapes, importance)

    def read(self, gguf_name: str) -> Any:
        """Read one tensor as numpy. ModelError for NaN or infinite values."""
        import torch
        from safetensors import safe_open

        if gguf_name == "rope_freqs.weight":
            return self.factors
        file, name = self.places[gguf_name]
        opened: Any = safe_open(file, framework="pt")
        with opened as stored:
            weight = stored.get_tensor(name).to(torch.float32).numpy()
        if not np.isfinite(weight).all():
            raise ModelError(f"{self.source}: {name} holds {int((~np.isfinite(weight)).sum())} NaN or infinite values")
        if self.layout_of.unit_offset and name.endswith("norm.weight"):
            weight = weight + 1
        interleaved = get_interleaved_heads(name, self.heads, self.kv_heads) if self.layout_of.interleaved else None
        return np.ascontiguousarray(weight if interleaved is None else interleave_rows(weight, interleaved))


def get_sort_key(name: str) -> tuple[int, str]:
    """Return a sort key: tensors outside of blocks first, then block by block."""
    found = re.search(r"layers\.(\d+)\.", name)
    return (int(found[1]) if found else -1, name)
