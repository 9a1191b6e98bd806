"""Read a decoder from a directory of a standard architecture, and write it as the architecture it matches.

Names and shapes are in `families.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmworks.core.errors import ModelError
from llmworks.core.machine import trim_heap
from llmworks.model.io.families import STANDARD_ARCHITECTURES, find_standard, parse_shape
from llmworks.model.io.weights import StoredTensors, check_weights, require_causal_model
from llmworks.model.lowbit.checkpoint import apply_input_quantization, iter_weights, to_dense
from llmworks.model.lowbit.integer import IntegerMatrix
from llmworks.model.lowbit.linear import LowBitLinear, make_low_bit_layer, replace_linear
from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
from llmworks.tokenize.load import read_json


def to_standard(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Convert the decoder's tensors to the names and layout of an architecture."""
    names = STANDARD_ARCHITECTURES[kind].names
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if kind == "gpt2" and (
            found := re.search(r"decoder\.blocks\.(\d+)\.attention\.(query|key|value)\.(weight|bias)", name)
        ):
            if found[2] == "query":  # GPT-2 has one matrix for all three, transposed
                parts = [tensors[name.replace("query", part)] for part in ("query", "key", "value")]
                out[f"transformer.h.{found[1]}.attn.c_attn.{found[3]}"] = (
                    torch.cat(parts).T.contiguous() if found[3] == "weight" else torch.cat(parts)
                )
            continue
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        turned = kind == "gpt2" and name.endswith((".c_proj.weight", ".c_fc.weight"))
        out[name] = tensor.T.contiguous() if turned else tensor
    return out


def from_standard(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Invert `to_standard`. The mask buffers of old GPT-2 files are dropped."""
    names = {theirs: ours for ours, theirs in STANDARD_ARCHITECTURES[kind].names.items()}
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if kind == "gpt2":
            name = (
                name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            )  # saved from the base model without head
            if name.endswith((".attn.bias", ".attn.masked_bias")):
                continue
            if found := re.fullmatch(r"transformer\.h\.(\d+)\.attn\.c_attn\.(weight|bias)", name):
                for part, piece in zip(
                    ("query", "key", "value"), (tensor.T if found[2] == "weight" else tensor).chunk(3), strict=True
                ):
                    out[f"decoder.blocks.{found[1]}.attention.{part}.{found[2]}"] = piece.contiguous()
                continue
            if name.endswith((".c_proj.weight", ".c_fc.weight")):
                tensor = tensor.T.contiguous()
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        out[name] = tensor
    return out


def make_rename(kind: str) -> Callable[[str], str]:
    """Return a function from the decoder's module names to an architecture's names ("": the same names)."""
    names = STANDARD_ARCHITECTURES[kind].names if kind else {}

    def rename(name: str) -> str:
        dotted = f"{name}."
        for ours, theirs in names.items():
            dotted = dotted.replace(ours, theirs)
        return dotted[:-1]

    return rename


def load_decoder(path: Path, *, low_bit: bool = False) -> DecoderForCausalLM:
    """Load the decoder from a directory of any supported architecture, fp32, in evaluation mode.

    Reads tensor by tensor, so that peak memory is the model itself.
    `low_bit`: keep 4- and 8-bit layers quantized where this CPU has kernels for it (`lowbit/linear.py`); for inference.
    Errors: ModelError for a broken directory, an unsupported architecture, or tensors that are missing, unexpected or
    of another shape, by name.
    """
    check_weights(path)
    require_causal_model(path)
    config = read_json(path / "config.json")
    kind, shape = parse_shape(config)
    method = config.get("quantization_config")
    with torch.device("meta"):
        model = DecoderForCausalLM(DecoderConfig(shape=shape.model_dump()))
    expected_shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors: dict[str, Any] = {}
    quantized: set[str] = set()
    for name, what in iter_weights(StoredTensors(path), method) if method else StoredTensors(path).items():
        if not isinstance(what, Tensor):
            quantized.add(name.removesuffix(".weight"))
        whole = make_low_bit_layer(what) if low_bit and kind != "gpt2" and isinstance(what, IntegerMatrix) else None
        one: Any = whole or to_dense(what)
        tensors |= from_standard({name: one}, kind) if kind else {name: one}
        if not isinstance(what, Tensor):
            trim_heap()  # else fragmentation from unpacking doubles the memory in use
    if shape.tie_word_embeddings and "decoder.embedding.weight" in tensors:
        check_tied_head(path, tensors)
        tensors["head.weight"] = tensors["decoder.embedding.weight"]
    _check_shapes(
        path,
        {name: what.shape if isinstance(what, LowBitLinear) else tuple(what.shape) for name, what in tensors.items()},
        expected_shapes,
    )
    model.load_state_dict(
        {name: what for name, what in tensors.items() if isinstance(what, Tensor)}, assign=True, strict=False
    )
    if shape.tie_word_embeddings:
        model.head.weight = model.decoder.embedding.weight
    for name, layer in tensors.items():
        if isinstance(layer, LowBitLinear):
            replace_linear(model, name.removesuffix(".weight"), layer)
    model.train(False)
    if method:
        apply_input_quantization(model, method, make_rename(kind), quantized)
    return model


def check_tied_head(path: Path, tensors: Mapping[str, Any]) -> None:
    """Check that a separate head in the files equals the embedding where the config ties them.

    ModelError where they differ, since programs disagree on which one to use.
    """
    head, embedding = tensors.get("head.weight"), tensors["decoder.embedding.weight"]
    if head is not None and head is not embedding and not (isinstance(head, Tensor) and torch.equal(head, embedding)):
        raise ModelError(
            f"{path}: config.json has tie_word_embeddings, but the files hold an embedding and a different head; set it"
            " to false, or remove lm_head.weight"
        )


def _check_shapes(
    path: Path, shapes: Mapping[str, tuple[int, ...]], expected_shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check that the weights match the config. ModelError for the first mismatch."""
    for problem, names in (
        ("is missing", sorted(set(expected_shapes) - set(shapes))),
        ("has unexpected", sorted(set(shapes) - set(expected_shapes))),
    ):
        if names:
            raise ModelError(
                f"{path}: {problem} {names[0]}"
                + (f" and {len(names) - 1} more" if len(names) > 1 else "")
                + " (decoder tensor names); the weights and config.json do not match"
            )
    for name, shape in expected_shapes.items():
        if shapes[name] != shape:
            raise ModelError(f"{path}: {name} has shape {shapes[name]}, config.json requires {shape}")


def save_decoder(model: DecoderForCausalLM, out: Path, *, token_ids: Mapping[str, Any] | None = None) -> str:
    """Write config.json and model.safetensors, as the standard architecture that the shape matches, else as our own.

    Returns the architecture's name ("" for our own). `token_ids`: bos_token_id, eos_token_id, pad_token_id of the
    config.
    """
    from safetensors.torch import save_file

    kind = find_standard(model.shape)
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if not (model.shape.tie_word_embeddings and name == "head.weight")
    }
    if kind:
        tensors = to_standard(tensors, kind)
        config = {
            "architectures": [STANDARD_ARCHITECTURES[kind].architecture],
            "model_type": kind,
            **STANDARD_ARCHITECTURES[kind].write(model.shape),
        }
    else:
        config = {
            "architectures": ["DecoderForCausalLM"],
            "model_type": DecoderConfig.model_type,
            "shape": model.shape.model_dump(),
            "tie_word_embeddings": model.shape.tie_word_embeddings,
        }
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(
        json.dumps({**config, **(token_ids or {}), "dtype": str(model.dtype).removeprefix("torch.")}, indent=2) + "\n",
        encoding="utf-8",
    )
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return kind
