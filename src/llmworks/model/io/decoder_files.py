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
from llmworks.core.memory import trim
from llmworks.model.io.families import STANDARDS, shape_of, standard_of
from llmworks.model.io.weights import Stored, check_weights, refuse_scorer
from llmworks.model.lowbit.checkpoint import plain, round_inputs, weights
from llmworks.model.lowbit.integer import Whole
from llmworks.model.lowbit.linear import LowBitLinear, low_bit_layer, put
from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
from llmworks.tokenize.load import read_json


def to_standard(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Convert the decoder's tensors to the names and layout of an architecture."""
    names = STANDARDS[kind].names
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
    names = {theirs: ours for ours, theirs in STANDARDS[kind].names.items()}
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


def rename_of(kind: str) -> Callable[[str], str]:
    """Return a function from the decoder's module names to an architecture's names ("": the same names)."""
    names = STANDARDS[kind].names if kind else {}

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
    refuse_scorer(path)
    config = read_json(path / "config.json")
    kind, shape = shape_of(config)
    method = config.get("quantization_config")
    with torch.device("meta"):
        model = DecoderForCausalLM(DecoderConfig(shape=shape.model_dump()))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, Any] = {}
    quantized: set[str] = set()
    for name, what in weights(Stored(path), method) if method else Stored(path).items():
        if not isinstance(what, Tensor):
            quantized.add(name.removesuffix(".weight"))
        whole = low_bit_layer(what) if low_bit and kind != "gpt2" and isinstance(what, Whole) else None
        one: Any = whole or plain(what)
        found |= from_standard({name: one}, kind) if kind else {name: one}
        if not isinstance(what, Tensor):
            trim()  # else fragmentation from unpacking doubles the memory in use
    if shape.tie_word_embeddings and "decoder.embedding.weight" in found:
        check_tied(path, found)
        found["head.weight"] = found["decoder.embedding.weight"]
    _check_shapes(
        path,
        {name: what.shape if isinstance(what, LowBitLinear) else tuple(what.shape) for name, what in found.items()},
        wanted,
    )
    model.load_state_dict(
        {name: what for name, what in found.items() if isinstance(what, Tensor)}, assign=True, strict=False
    )
    if shape.tie_word_embeddings:
        model.head.weight = model.decoder.embedding.weight
    for name, layer in found.items():
        if isinstance(layer, LowBitLinear):
            put(model, name.removesuffix(".weight"), layer)
    model.train(False)
    if method:
        round_inputs(model, method, rename_of(kind), quantized)
    return model


def check_tied(path: Path, found: Mapping[str, Any]) -> None:
    """Check that a separate head in the files equals the embedding where the config ties them.

    ModelError where they differ, since programs disagree on which one to use.
    """
    head, embedding = found.get("head.weight"), found["decoder.embedding.weight"]
    if head is not None and head is not embedding and not (isinstance(head, Tensor) and torch.equal(head, embedding)):
        raise ModelError(
            f"{path}: config.json has tie_word_embeddings, but the files hold an embedding and a different head; set it"
            " to false, or remove lm_head.weight"
        )


def _check_shapes(path: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the weights match the config. ModelError for the first mismatch."""
    for problem, names in (
        ("is missing", sorted(set(wanted) - set(found))),
        ("has unexpected", sorted(set(found) - set(wanted))),
    ):
        if names:
            raise ModelError(
                f"{path}: {problem} {names[0]}"
                + (f" and {len(names) - 1} more" if len(names) > 1 else "")
                + " (decoder tensor names); the weights and config.json do not match"
            )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ModelError(f"{path}: {name} has shape {found[name]}, config.json requires {shape}")


def save_decoder(model: DecoderForCausalLM, out: Path, *, token_ids: Mapping[str, Any] | None = None) -> str:
    """Write config.json and model.safetensors, as the standard architecture that the shape matches, else as our own.

    Returns the architecture's name ("" for our own). `token_ids`: bos_token_id, eos_token_id, pad_token_id of the
    config.
    """
    from safetensors.torch import save_file

    kind = standard_of(model.shape)
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if not (model.shape.tie_word_embeddings and name == "head.weight")
    }
    if kind:
        tensors = to_standard(tensors, kind)
        config = {
            "architectures": [STANDARDS[kind].architecture],
            "model_type": kind,
            **STANDARDS[kind].write(model.shape),
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
