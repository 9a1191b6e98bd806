"""Rotate a model's hidden states block by block: fold norms into the layers after them, one rotation into all layers
that read and write the residual stream, another into values and the output projection.

See `rotate.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmworks.core.artifact import Model
from llmworks.core.context import Context
from llmworks.core.errors import ModelError
from llmworks.model.io.decoder_files import to_standard
from llmworks.model.io.layer_forward import compute_logits
from llmworks.model.io.layer_reader import LayerReader, concatenate_files
from llmworks.model.shape import Shape
from llmworks.quantize.algorithms.hadamard import random_hadamard
from llmworks.quantize.run import copy_other_files
from llmworks.tokenize.chat.golden import record_golden, require_replay
from llmworks.tokenize.load import get_stop_ids, load_tokenizer

if TYPE_CHECKING:
    from llmworks.model.shape import Shape
    from llmworks.quantize.algorithms.config import RotateConfig

MAX_GOLDEN_GAP = {"float32": 0.02, "float16": 0.1, "bfloat16": 0.3}  # maximum mean change of golden logits


def rotate_model(config: RotateConfig, model: Model, ctx: Context) -> Model:
    """Run `rotate.rotate`."""

    source, shape = _open_rotatable(model)
    tokenizer = load_tokenizer(model.path)
    golden = model.golden or record_golden(
        tokenizer, get_stop_ids(model.path, tokenizer), lambda some: compute_logits(source, [some])[0]
    )
    files = _rotate_blocks(shape, ctx, config, source)
    concatenate_files(files, ctx.out / "model.safetensors")
    settings = {key: value for key, value in source.config.items() if key != "torch_dtype"} | {
        "dtype": config.dtype,
        "tie_word_embeddings": False,
    }
    if "shape" in settings:
        settings["shape"] = settings["shape"] | {"tied": False}
    (ctx.out / "config.json").write_text(json.dumps(settings, indent=2))
    copy_other_files(model.path, ctx.out)
    written = LayerReader(ctx.out)
    sequences = [list(one.ids) for one in golden.conversations]
    known = dict(zip(map(tuple, sequences), compute_logits(written, sequences), strict=True))
    gap = require_replay(
        golden,
        tokenizer,
        get_stop_ids(ctx.out, tokenizer),
        lambda some: known[tuple(some)],
        mean_tolerance=MAX_GOLDEN_GAP[config.dtype],
        step="quantize.rotate",
    )
    assert gap is not None
    before, after = (
        max(_get_max_to_rms(one, block) for block in range(shape.num_hidden_layers)) for one in (source, written)
    )
    metrics = {
        "golden_gap_mean": round(gap.mean, 6),
        "golden_greedy_agreement": round(gap.top1_agreement, 5),
        "max_abs_before": round(before, 3),
        "max_abs": round(after, 3),
    }
    ctx.report.title = f"{model.name} rotated"
    ctx.report.subtitle = (
        f"The function is unchanged; golden logits differ by {gap.mean:.2g} on average. The largest weight of a row"
        f" is at most {before:.1f} times the row's root mean square before, {after:.1f} times after."
    )
    ctx.report.data = metrics
    ctx.progress.log(ctx.report.subtitle)
    return Model(
        ctx.out,
        golden=golden,
        metrics=metrics,
        about={"format": "hf", "dtype": config.dtype, "architecture": str(model.about.get("architecture", ""))},
    )


def _open_rotatable(model: Model) -> tuple[LayerReader, Shape]:
    """Open the directory for reading block by block; return it with its shape. ModelError for one that cannot be
    rotated.
    """
    if model.format != "hf":
        raise ModelError(
            f"{model.name}: only a Hugging Face directory can be rotated, not {model.format}; convert it with the"
            " stage model.from_gguf"
        )
    source = LayerReader(model.path)
    shape = source.shape
    if (
        shape.norm != "rms"
        or shape.norm_position == "post"
        or shape.position_embedding_type in ("learned", "sinusoidal")
        or shape.experts
    ):
        raise ModelError(
            f"{model.name}: cannot be rotated: it must have RMSNorm before each part, rotary positions, and no experts"
        )
    if shape.norm_position == "sandwich":
        raise ModelError(
            f"{model.name}: cannot be rotated: it also normalizes a block's outputs before they are added to the"
            " residual stream (as Gemma does), and those norm weights cannot be folded"
        )
    return source, shape


def _rotate_blocks(shape: Shape, ctx: Context, config: RotateConfig, source: LayerReader) -> list[Path]:
    """Rotate each block into a file of its own."""
    from safetensors.torch import save_file

    turn = random_hadamard(shape.hidden_size, ctx.seed)
    number = getattr(torch, config.dtype)
    files = []
    with torch.inference_mode(), ctx.progress.bar("rotate", shape.num_hidden_layers + 1, "blocks") as bar:
        for block in range(-1, shape.num_hidden_layers):
            tensors = {name: tensor.double() for name, tensor in source.read_decoder_tensors(block).items()}
            made = (
                _rotate_embedding_and_head(tensors, turn, shape)
                if block < 0
                else _rotate_block(
                    tensors,
                    block,
                    turn,
                    shape,
                    random_hadamard(shape.head_size, ctx.seed + 1) if config.rotate_values else None,
                )
            )
            files.append(ctx.scratch / f"{block + 1:05}.safetensors")
            named = {name: tensor.to(torch.float32).to(number).contiguous() for name, tensor in made.items()}
            save_file(to_standard(named, source.kind) if source.kind else named, files[-1])
            bar.advance()
    return files


def _get_max_to_rms(source: LayerReader, block: int) -> float:
    """Return the largest ratio of a block's weights to the root mean square of their row."""
    matrices = [tensor for tensor in source.read_decoder_tensors(block).values() if tensor.ndim == 2]
    return max(
        float((tensor.abs().amax(1) / tensor.square().mean(1).sqrt().clamp(min=1e-12)).max()) for tensor in matrices
    )


def _extract_norm_scale(tensors: dict[str, Tensor], name: str, shape: Shape) -> Tensor:
    """Return a norm's scale, and replace the norm's weights by the identity."""
    weight = tensors[name]
    scale = weight + 1 if shape.norm_unit_offset else weight
    tensors[name] = torch.zeros_like(weight) if shape.norm_unit_offset else torch.ones_like(weight)
    return scale


def _rotate_embedding_and_head(tensors: dict[str, Tensor], rotation: Tensor, shape: Shape) -> dict[str, Tensor]:
    """Rotate embedding and head, which become untied."""
    head = tensors.get("head.weight", tensors["decoder.embedding.weight"])
    made = {
        "decoder.embedding.weight": tensors["decoder.embedding.weight"] @ rotation,
        "head.weight": head * _extract_norm_scale(tensors, "decoder.norm.weight", shape) @ rotation,
        "decoder.norm.weight": tensors["decoder.norm.weight"],
    }
    return {**tensors, **made}


def _rotate_block(
    tensors: dict[str, Tensor], block: int, rotation: Tensor, shape: Shape, head_rotation: Tensor | None
) -> dict[str, Tensor]:
    """Rotate one block: the layers that read the residual stream, and those that write to it."""
    head = f"decoder.blocks.{block}."
    for norm, layers in (
        ("attention_norm", ("attention.query", "attention.key", "attention.value")),
        ("feed_forward_norm", ("feed_forward.gate", "feed_forward.up")),
    ):
        scale = _extract_norm_scale(tensors, f"{head}{norm}.weight", shape)
        for layer in layers:
            if f"{head}{layer}.weight" in tensors:
                tensors[f"{head}{layer}.weight"] = tensors[f"{head}{layer}.weight"] * scale @ rotation
    for layer in ("attention.out", "feed_forward.down"):
        tensors[f"{head}{layer}.weight"] = rotation.T @ tensors[f"{head}{layer}.weight"]
        if f"{head}{layer}.bias" in tensors:
            tensors[f"{head}{layer}.bias"] = rotation.T @ tensors[f"{head}{layer}.bias"]
    if head_rotation is not None:
        size = len(head_rotation)
        value, out = tensors[f"{head}attention.value.weight"], tensors[f"{head}attention.out.weight"]
        tensors[f"{head}attention.value.weight"] = (head_rotation.T @ value.view(-1, size, value.shape[1])).reshape(
            value.shape
        )
        if f"{head}attention.value.bias" in tensors:
            tensors[f"{head}attention.value.bias"] = (
                tensors[f"{head}attention.value.bias"].view(-1, size) @ head_rotation
            ).flatten()
        tensors[f"{head}attention.out.weight"] = (out.view(len(out), -1, size) @ head_rotation).reshape(out.shape)
    return tensors
