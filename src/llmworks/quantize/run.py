"""Quantize a model's matrices to integers: layerwise calibration, writing, evaluation, report.

How a matrix is rounded is up to each method.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError, ModelError
from llmworks.model.io.layer_forward import compute_logits
from llmworks.model.io.layer_reader import LayerReader, concatenate_files
from llmworks.model.io.weights import weight_files
from llmworks.model.lowbit.checkpoint import FORMATS
from llmworks.quantize.calibrate.calibration_data import check_length, load_samples
from llmworks.quantize.calibrate.quantize_blocks import QuantizationMethod, quantize_blocks
from llmworks.quantize.config import BaseQuantizeConfig, max_gap_for_bits
from llmworks.quantize.report.card import hub_name, write_card
from llmworks.tokenize.chat.golden import record_golden, require_replay
from llmworks.tokenize.load import get_stop_ids, load_tokenizer

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from llmworks.core.artifact import Golden
    from llmworks.tokenize.chat.golden import LogitDifference

FLOAT16_MAX = 65504.0  # the largest float16
NOT_COPIED = ("model.safetensors.index.json", "config.json", "manifest.json", "README.md")


def run(
    config: BaseQuantizeConfig,
    model: Model,
    ctx: Context,
    data: Dataset | None,
    method: QuantizationMethod,
    grid: Any,
    about: Mapping[str, Any],
    form: str = "compressed-tensors",
    grids: Mapping[str, Any] | None = None,
) -> Model:
    """Write a directory in a format of `model.lowbit.checkpoint.FORMS`.

    The golden tokens are replayed on the written files. `grids`: of layers, by name, that differ from `grid`.

    Errors: ModelError for a model that is quantized already, of another architecture, or with NaN or infinite weights;
    DataError for too little data; GoldenMismatch when the result computes something else.
    """
    source = open_source(model)
    if method.num_calibration_samples and data is None:
        raise DataError(
            "this method requires calibration data; give `data`: conversations or documents like those the model is"
            " used for"
        )
    tokenizer = load_tokenizer(model.path)
    eval_ids, ids = _load_samples(data, config, source, tokenizer, method, ctx)
    stored = "float16" if form in ("gptq", "awq", "hqq") else choose_dtype(source, config.dtype)
    grid, others = (
        replace(grid, stored=stored),
        {name: replace(one, stored=stored) for name, one in (grids or {}).items()},
    )
    skip = make_ignore_filter(source, config.ignore)
    golden = model.golden or record_golden(
        tokenizer, get_stop_ids(model.path, tokenizer), lambda some: compute_logits(source, [some])[0]
    )
    layer_stats, divergence = quantize_blocks(
        source,
        ids,
        eval_ids,
        ctx,
        method,
        lambda name: None if skip(name) else others.get(name, grid),
        FORMATS[form],
        getattr(torch, stored),
    )
    grid_by_layer = {one["name"]: others.get(one["name"], grid) for one in layer_stats}
    ignored = _list_ignored(source, skip)
    _write_directory(source, ctx, stored, FORMATS[form].config_of(grid_by_layer, ignored))
    gap = _replay(ctx, golden, tokenizer, grid_by_layer, grid, about)
    size = sum(file.stat().st_size for file in ctx.out.glob("*.safetensors"))
    weights, metrics = _collect_metrics(layer_stats, size, divergence, gap)
    _write_card(layer_stats, weights, grid, about, ctx, model, form, metrics, data, grid_by_layer)
    _write_report(ctx, model, about, layer_stats, metrics)
    ctx.progress.log(ctx.report.subtitle)
    return _build_model(ctx, golden, metrics, stored, model, grid, about, data)


def _load_samples(
    data: Dataset | None,
    config: BaseQuantizeConfig,
    source: LayerReader,
    tokenizer: PreTrainedTokenizerBase,
    method: QuantizationMethod,
    ctx: Context,
) -> tuple[Tensor, Tensor]:
    """Return token ids of held-out sequences, and of calibration sequences; empty without data."""
    if data is not None:
        check_length(config.max_seq_length, source.shape.max_position_embeddings)
        ids, eval_ids = load_samples(
            tokenizer, data, method.num_calibration_samples, config.eval_samples, config.max_seq_length, ctx.seed
        )
    else:
        ids = eval_ids = torch.zeros(0, config.max_seq_length, dtype=torch.long)
    return eval_ids, ids


def _list_ignored(source: LayerReader, is_ignored: Callable[[str], bool]) -> list[str]:
    """Return the names of unquantized layers."""
    ignored = [
        "lm_head",
        *(
            name.removesuffix(".weight")
            for name, shape in source.shapes.items()
            if source.get_block_number(name) >= 0 and len(shape) == 2 and is_ignored(name)
        ),
    ]
    return ignored


def _replay(
    ctx: Context,
    golden: Golden,
    tokenizer: PreTrainedTokenizerBase,
    grid_by_layer: dict[Any, Any],
    grid: Any,
    about: Mapping[str, Any],
) -> LogitDifference:
    """Replay the golden tokens on the written files. GoldenMismatch when they compute something else."""
    made = LayerReader(ctx.out, quantized=True)
    sequences = [list(one.ids) for one in golden.conversations]
    known = dict(zip(map(tuple, sequences), compute_logits(made, sequences), strict=True))
    gap = require_replay(
        golden,
        tokenizer,
        get_stop_ids(ctx.out, tokenizer),
        lambda some: known[tuple(some)],
        mean_tolerance=max_gap_for_bits(
            min(one.bits for one in grid_by_layer.values()), quantized_activations=bool(grid.inputs)
        ),
        step=f"quantize.{about['method']}",
    )
    assert gap is not None
    return gap


def _collect_metrics(
    layer_stats: list[dict[str, Any]], size: int, divergence: dict[str, float], gap: LogitDifference
) -> tuple[Any, dict[str, Any]]:
    """Return the number of quantized weights, and metrics: size, bits, divergence, golden tokens."""
    weights = sum(one["weights"] for one in layer_stats)
    metrics = {
        "bytes": size,
        "bits_per_weight": round(sum(one["bits"] * one["weights"] for one in layer_stats) / weights, 4),
        "quantized_weights": weights,
        **{name: round(value, 6) for name, value in divergence.items()},
        "golden_gap_mean": round(gap.mean, 5),
        "golden_gap_max": round(gap.maximum, 5),
        "golden_greedy_agreement": round(gap.top1_agreement, 5),
    }
    return weights, metrics


def _write_card(
    layer_stats: list[dict[str, Any]],
    weights: Any,
    grid: Any,
    about: Mapping[str, Any],
    ctx: Context,
    model: Model,
    form: str,
    metrics: dict[str, Any],
    data: Dataset | None,
    grid_by_layer: dict[Any, Any],
) -> None:
    """Write the model card beside the weights."""
    bits, inputs = (
        round(sum(grid_by_layer[one["name"]].bits * one["weights"] for one in layer_stats) / weights, 2),
        grid.inputs.bits if grid.inputs else 16,
    )
    summary = (
        f"its matrices in {bits:g} bits per weight, "
        + (f"group size {grid.group}" if grid.group else "per-row scales")
        + (f", activations in {inputs} bits" if inputs < 16 else "")
        + f", by {about['method']}."
    )
    write_card(
        ctx.out,
        model,
        summary,
        form=form,
        method=str(about["method"]),
        bits=bits,
        name=hub_name(model.name, form, bits, inputs=inputs),
        metrics=metrics,
        data=data,
    )


def _write_report(
    ctx: Context, model: Model, about: Mapping[str, Any], layer_stats: list[dict[str, Any]], metrics: dict[str, Any]
) -> None:
    """Write the report."""
    from llmworks.quantize.report.page import write_report

    write_report(
        ctx.report,
        model.name,
        str(about["method"]),
        layer_stats,
        metrics,
        sum(file.stat().st_size for file in weight_files(model.path)),
    )


def _build_model(
    ctx: Context,
    golden: Golden,
    metrics: dict[str, Any],
    stored: str | Any,
    model: Model,
    grid: Any,
    about: Mapping[str, Any],
    data: Dataset | None,
) -> Model:
    """Return the artifact, with how it was made."""
    return Model(
        ctx.out,
        golden=golden,
        metrics=metrics,
        about={
            "format": "hf",
            "dtype": stored,
            "architecture": str(model.about.get("architecture", "")),
            "bits": grid.bits,
            "group": grid.group,
            "symmetric": grid.symmetric,
            **about,
            **({"calibration": data.name} if data is not None else {}),
        },
    )


def open_source(model: Model) -> LayerReader:
    """Open the model's directory for reading block by block. ModelError for one that cannot be quantized."""
    if model.format != "hf":
        raise ModelError(
            f"{model.name}: only a Hugging Face directory can be quantized, not {model.format}; convert it with the"
            " stage model.from_gguf"
        )
    source = LayerReader(model.path)
    if source.kind == "gpt2" or source.shape.experts:
        fused = "its queries, keys and values are stored as one matrix"
        raise ModelError(
            f"{model.name}: {fused if source.kind == 'gpt2' else 'its experts are not stored as separate matrices'},"
            " which compressed-tensors does not support; try quantize.gguf"
        )
    return source


def choose_dtype(source: LayerReader, dtype: str) -> Any:
    """Return the dtype of what is not quantized."""
    if dtype != "auto":
        return dtype
    found = "bfloat16"
    for number in range(-1, source.shape.num_hidden_layers):
        tensors = source.read_tensors(number).values()
        if any(
            float(tensor.abs().max()) > FLOAT16_MAX
            for tensor in tensors
            if tensor.is_floating_point() and tensor.numel()
        ):
            return "bfloat16" if all(_is_exact_in_bfloat16(tensor) for tensor in tensors) else "float32"
        if not all(_is_exact_in_bfloat16(tensor) for tensor in tensors):
            found = "float16"
    return found


def _is_exact_in_bfloat16(tensor: Tensor) -> bool:
    """Return whether bfloat16 represents a tensor exactly."""
    return tensor.dtype == torch.bfloat16 or torch.equal(tensor.float(), tensor.bfloat16().float())


def make_ignore_filter(source: LayerReader, ignore: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that says whether a layer, by its name in the directory, is ignored. ModelError for a
    pattern that matches no layer.
    """
    names = [name.removesuffix(".weight") for name in source.files if source.get_block_number(name) >= 0]
    outside = [name for name in source.files if source.get_block_number(name) < 0] + ["lm_head"]  # or tied
    for part in ignore:  # the embedding and the head are never quantized
        if not any(part in name for name in names + outside):
            raise ModelError(f"config.ignore: no layer name contains {part!r}; an example of a name is {names[0]}")
    matrices = [name for name, shape in source.shapes.items() if source.get_block_number(name) >= 0 and len(shape) == 2]
    if all(any(part in name for part in ignore) for name in matrices):
        raise ModelError(
            f"config.ignore: all {len(matrices)} matrices of blocks are ignored; nothing is left to quantize"
        )
    return lambda name: any(part in name for part in ignore)


def _write_directory(source: LayerReader, ctx: Context, stored: str, quantization: Mapping[str, Any]) -> None:
    """Write the directory: weights in one file, the config, and all other files unchanged."""
    from safetensors.torch import save_file

    number = getattr(torch, stored)
    outside = ctx.scratch / "blocks" / "outside.safetensors"
    save_file({name: tensor.to(number).contiguous() for name, tensor in source.read_tensors(-1).items()}, outside)
    concatenate_files(
        [*sorted((ctx.scratch / "blocks").glob("0*.safetensors")), outside], ctx.out / "model.safetensors"
    )
    config = {key: value for key, value in source.config.items() if key != "torch_dtype"} | {
        "dtype": stored,
        "quantization_config": dict(quantization),
    }
    (ctx.out / "config.json").write_text(json.dumps(config, indent=2))
    copy_other_files(source.path, ctx.out)


def copy_other_files(source: Path, out: Path) -> None:
    """Copy tokenizer, template, generation config: all files that are not weights."""
    for file in sorted(source.iterdir()):
        if (
            file.is_file()
            and file.suffix not in (".safetensors", ".bin", ".pt", ".pth", ".gguf")
            and file.name not in NOT_COPIED
            and not file.name.startswith(".")
        ):
            shutil.copyfile(file, out / file.name)
