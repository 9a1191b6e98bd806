"""Read a decoder from a directory of one of the standard families, and write it as the one that it is. The names
and shapes are in `families.py`.
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
    """Our tensors under the names, and in the layout, of an architecture."""
    names = STANDARDS[kind].names
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if kind == "gpt2" and (
            found := re.search(r"decoder\.blocks\.(\d+)\.attention\.(query|key|value)\.(weight|bias)", name)
        ):
            if found[2] == "query":  # one matrix holds all three, transposed
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
    """The reverse. Buffers that GPT-2's old files hold are left out."""
    names = {theirs: ours for ours, theirs in STANDARDS[kind].names.items()}
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if kind == "gpt2":
            name = (
                name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
            )  # the base model alone was saved
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
    """From the name of a module of the decoder to its name in an architecture ("": they are the same)."""
    names = STANDARDS[kind].names if kind else {}

    def rename(name: str) -> str:
        dotted = f"{name}."
        for ours, theirs in names.items():
            dotted = dotted.replace(ours, theirs)
        return dotted[:-1]

    return rename


def load_decoder(path: Path, *, low_bit: bool = False) -> DecoderForCausalLM:
    """The decoder of a directory of any known architecture, fp32, in evaluation mode; read tensor by tensor, so that
    the model is all that is in memory.

    `low_bit`: layers stay whole numbers of 4 or 8 bits where this CPU computes with them (`low_bit.py`); for inference.
    Errors: ModelError for a broken directory, an unknown architecture, or tensors that are missing, too many or of
    another shape, by name.
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
            trim()  # else what unpacking leaves between the weights comes to as much as they are
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
    """Whether a head that is said to be the embedding is.

    ModelError where the files hold another, which some programs would take and others not.
    """
    head, embedding = found.get("head.weight"), found["decoder.embedding.weight"]
    if head is not None and head is not embedding and not (isinstance(head, Tensor) and torch.equal(head, embedding)):
        raise ModelError(
            f"{path}: config.json says that head and embedding are one (tie_word_embeddings), the files hold two that"
            " differ; set it to false, or take lm_head.weight out"
        )


def _check_shapes(path: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Whether weights are those of a config. ModelError for the first that is not."""
    for problem, names in (
        ("has no", sorted(set(wanted) - set(found))),
        ("has more than the shape needs:", sorted(set(found) - set(wanted))),
    ):
        if names:
            raise ModelError(
                f"{path}: {problem} {names[0]}"
                + (f" and {len(names) - 1} more" if len(names) > 1 else "")
                + " (by the decoder's names); the weights and config.json do not belong together"
            )
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ModelError(f"{path}: {name} has the shape {found[name]}, config.json asks for {shape}")


def save_decoder(model: DecoderForCausalLM, out: Path, *, token_ids: Mapping[str, Any] | None = None) -> str:
    """Write config.json and model.safetensors, as the standard architecture that the shape is, else as its own; returns
    the architecture's name.

    `token_ids`: bos_token_id, eos_token_id, pad_token_id of the config.
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
