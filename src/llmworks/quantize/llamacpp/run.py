"""Convert a Hugging Face directory to a GGUF file: importance matrix, file, golden tokens in llama.cpp, divergence,
report.

See `gguf.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from llmworks.core.artifact import Dataset, Model, Report
from llmworks.core.context import Context
from llmworks.core.errors import DataError, ModelError
from llmworks.generate.engines.llamacpp import LlamaCppEngine
from llmworks.model.golden import record_golden
from llmworks.model.io.layer_reader import LayerReader
from llmworks.model.io.weights import check_weights, weight_files
from llmworks.quantize.calibrate.calibration_data import check_length, load_samples
from llmworks.quantize.calibrate.divergence import Divergence
from llmworks.quantize.calibrate.imatrix import compute_importance, read_importance, write_importance
from llmworks.quantize.llamacpp.allocation import FormatCosts, allocate_formats, estimate_format_costs
from llmworks.quantize.llamacpp.config import BOUNDS, max_gap_for_type
from llmworks.quantize.llamacpp.metadata import read_config
from llmworks.quantize.llamacpp.types import PLAIN, assign_formats, get_base_format, get_bits_per_weight
from llmworks.quantize.llamacpp.writer import GgufTensorReader, WrittenTensors, write_gguf
from llmworks.quantize.report.card import gguf_name, hub_name, write_card
from llmworks.quantize.report.page import add_metrics_table
from llmworks.tokenize.chat.golden import require_replay
from llmworks.tokenize.load import load_tokenizer, read_json

if TYPE_CHECKING:
    from llmworks.quantize.calibrate.layerwise import LayerwiseCalibration
    from llmworks.quantize.llamacpp.config import GgufConfig, ImatrixConfig


def run(config: GgufConfig, model: Model, ctx: Context, data: Dataset | None, imatrix_report: Report | None) -> Model:
    """Run `gguf.gguf`."""
    check_convertible(model)
    golden = model.golden or record_golden(model.path)
    if config.allocate_bits and data is None and imatrix_report is None:
        raise DataError("config.allocate_bits requires `data` like that the model is used for")
    importance_matrix: Mapping[str, Any] | None = None
    table: FormatCosts | None = None
    calibration_run: LayerwiseCalibration | None = None
    wanted = config.use_imatrix and get_base_format(config.type) not in (*PLAIN, "Q8_0")
    if imatrix_report is not None:
        importance_matrix, table = read_imatrix_report(imatrix_report, model)
    if data is not None:
        source = LayerReader(model.path)
        check_length(config.max_seq_length, source.shape.max_position_embeddings)
        calibrates = imatrix_report is None and (wanted or config.allocate_bits)
        num_samples = config.num_calibration_samples if calibrates else 0
        sizes = (num_samples, config.eval_samples, config.max_seq_length)
        ids, eval_ids = load_samples(load_tokenizer(model.path), data, *sizes, ctx.seed)
        found, calibration_run = compute_importance(source, ids, eval_ids, ctx)
        importance_matrix = found if imatrix_report is None and num_samples else importance_matrix
        if config.allocate_bits and imatrix_report is None:
            table = estimate_format_costs(source, ids[: config.sensitivity_samples], ctx, found)
    importance_matrix = importance_matrix if wanted or config.allocate_bits else None
    overrides, expected = _choose_formats(config, table, model, importance_matrix)
    target = ctx.out / "model.gguf"
    written = write_gguf(model.path, target, config.type, ctx.progress, importance_matrix, overrides)
    engine = LlamaCppEngine(target, name="model.gguf")
    try:
        bound = max_gap_for_type(config.type)
        bound = max(bound, BOUNDS["q8"]) if config.allocate_bits else bound  # whose formats have at most 8 bits
        replayed = (golden, engine.tokenizer, engine.stops, engine.logits)
        gap = require_replay(*replayed, mean_tolerance=bound, step="quantize.gguf")
        compares = calibration_run is not None and len(calibration_run.eval_ids)
        divergence = _measure_divergence(calibration_run, engine) if calibration_run is not None and compares else {}
    finally:
        engine.close()
    assert gap is not None
    size, weights = target.stat().st_size, sum(math.prod(shape) for shape in written.shapes.values())
    metrics: dict[str, Any] = {
        **({} if expected is None else {"expected_kl": round(expected, 5)}),
        "bytes": size,
        "bits_per_weight": round(_get_bits_per_weight(written), 4),
        "weights": weights,
        "fallback_tensors": len(written.fallback_tensors),
        **{name: round(value, 6) for name, value in divergence.items()},
        "golden_gap_mean": round(gap.mean, 5),
        "golden_gap_max": round(gap.maximum, 5),
        "golden_greedy_agreement": round(gap.top1_agreement, 5),
    }
    _write_card(config, importance_matrix, ctx, model, metrics, data)
    _write_report(ctx, model, config.type, written, metrics)
    about = {
        "format": "gguf",
        "type": config.type,
        "importance": importance_matrix is not None,
        "allocated": config.allocate_bits,
        **({"calibration": data.name} if data is not None else {}),
    }
    return Model(ctx.out, golden=golden, metrics=metrics, about=about)


def _choose_formats(
    config: GgufConfig,
    table: Mapping[str, Mapping[str, float]] | None,
    model: Model,
    importance_matrix: Mapping[str, Any] | None,
) -> tuple[dict[str, str], float | None]:
    """Return the formats of tensors by their names, and their expected KL divergence."""
    overrides, expected = dict(config.tensor_types), None
    if config.allocate_bits:
        if not table:
            raise DataError(
                "config.allocate_bits needs the costs of formats, which `imatrix` lacks: create it with"
                " sensitivity_samples above 0"
            )
        tensors = GgufTensorReader(model.path, read_config(model.path))
        kinds, expected = allocate_formats(
            table,
            tensors.shapes,
            assign_formats(
                tensors.shapes,
                config.type,
                tensors.get_mix_parameters(importance_matrix is not None),
                config.tensor_types,
            ),
        )
        overrides |= {
            f"^{re.escape(name)}$": kind
            for name, kind in kinds.items()
            if not any(re.search(pattern, name) for pattern in config.tensor_types)
        }
    return overrides, expected


def _write_card(
    config: GgufConfig,
    importance_matrix: Mapping[str, Any] | None,
    ctx: Context,
    model: Model,
    metrics: dict[str, Any],
    data: Dataset | None,
) -> None:
    """Write the file's model card."""
    summary = (
        f"in GGUF format for llama.cpp, {config.type}"
        + (", formats allocated by sensitivity" if config.allocate_bits else "")
        + (", with an importance matrix." if importance_matrix is not None else ".")
    )
    write_card(
        ctx.out,
        model,
        summary,
        form="gguf",
        method=config.type,
        bits=0,
        name=hub_name(model.name, "gguf", 0),
        metrics=metrics,
        data=data,
        file=gguf_name(model.name, config.type),
    )


def check_convertible(model: Model) -> None:
    """Check that a model can be converted to GGUF. ModelError otherwise."""
    if model.format != "hf":
        raise ModelError(f"{model.path}: is already {model.format}; quantize.gguf takes a Hugging Face directory")
    check_weights(model.path)
    read_config(model.path)
    if read_json(model.path / "config.json").get("quantization_config"):
        raise ModelError(f"{model.path}: is already quantized; give the unquantized model")


def read_imatrix_report(imatrix_report: Report, model: Model) -> tuple[dict[str, Any], FormatCosts]:
    """Read the result of `quantize.imatrix`. DataError for another report, or one of another model."""
    file = imatrix_report.path / "importance.gguf"
    if not file.exists():
        raise DataError(f"{imatrix_report.name}: is not a result of quantize.imatrix (no importance.gguf)")
    report = imatrix_report.read()
    if report["model"] != model.digest:
        raise DataError(
            f"{imatrix_report.name}: was computed for another model ({report['model'][:12]}), this is"
            f" {model.digest[:12]}"
        )
    return read_importance(file), report["costs"]


def compute_imatrix(config: ImatrixConfig, model: Model, ctx: Context, data: Dataset) -> Report:
    """Run `quantize.imatrix`."""
    check_convertible(model)
    source = LayerReader(model.path)
    check_length(config.max_seq_length, source.shape.max_position_embeddings)
    ids, eval_ids = load_samples(
        load_tokenizer(model.path), data, config.num_calibration_samples, 0, config.max_seq_length, ctx.seed
    )
    found, _ = compute_importance(source, ids, eval_ids, ctx)
    write_importance(
        ctx.out / "importance.gguf", found, data.name, config.num_calibration_samples, config.max_seq_length
    )
    table = (
        estimate_format_costs(source, ids[: config.sensitivity_samples], ctx, found)
        if config.sensitivity_samples
        else {}
    )
    ctx.report.title = f"Importance matrix of {model.name}"
    ctx.report.subtitle = f"Inputs of {len(found)} matrices, on {ids.numel():,} tokens of {data.name}."
    ctx.report.data = {"model": model.digest, "metrics": {"tokens": ids.numel(), "tensors": len(found)}, "costs": table}
    if table:
        rows = sorted(
            ((name, *(f"{kind} {cost:.5f}" for kind, cost in kinds.items())) for name, kinds in table.items()),
            key=lambda row: -max(table[row[0]].values()),
        )
        ctx.report.subtitle += (
            f" The cost of each quantization format for each of {len(table)} tensors, in nats per token, is below,"
            " most sensitive first."
        )
        ctx.report.add_table(
            "Costs",
            ("tensor", *[""] * max(len(row) - 1 for row in rows)),
            [(*row, *[""] * (max(map(len, rows)) - len(row))) for row in rows[:60]],
        )
    return Report(
        ctx.out,
        metrics={"tokens": ids.numel(), "tensors": len(found)},
        about={"model": model.digest, "calibration": data.name},
    )


def _get_bits_per_weight(written: WrittenTensors) -> float:
    """Return the average bits per weight, scales included."""
    weights = {name: math.prod(shape) for name, shape in written.shapes.items()}
    return sum(get_bits_per_weight(written.types[name]) * count for name, count in weights.items()) / sum(
        weights.values()
    )


def _measure_divergence(calibration_run: LayerwiseCalibration, engine: LlamaCppEngine) -> dict[str, float]:
    """Compare the file in llama.cpp with the original model on the held-out sequences."""
    found = Divergence()
    with torch.inference_mode():
        for ids, state in zip(calibration_run.eval_ids, calibration_run.quantized_states, strict=True):
            new = torch.from_numpy(engine.logits(ids.tolist()))
            for some in torch.split(torch.arange(len(ids)), 64):
                found.add(calibration_run.compute_logits(state[some]), new[some], ids[some[0] + 1 : some[-1] + 2])
    return found.compute_metrics()


def _write_report(ctx: Context, model: Model, kind: str, written: WrittenTensors, metrics: Mapping[str, Any]) -> None:
    before = sum(file.stat().st_size for file in weight_files(model.path))
    report = ctx.report
    report.title = f"{model.name} as GGUF, {kind}"
    report.subtitle = (
        f"{metrics['bytes'] / 1e6:,.1f} MB of {before / 1e6:,.1f}; {metrics['bits_per_weight']:.2f} bits per weight."
    )
    if written.fallback_tensors:
        report.subtitle += (
            f" {len(written.fallback_tensors)} of {len(written.types)} tensors have a fallback format, because"
            f" {kind}'s block"
            " size does not divide their rows."
        )
    if "kl" in metrics:
        report.subtitle += (
            f" In llama.cpp, on {metrics['eval_tokens']:,.0f} held-out tokens, the KL divergence from the original"
            f" model is {metrics['kl']:.4f} nats per token; top-1 agreement {metrics['top1_agreement']:.1%}; perplexity"
            f" {metrics['original_perplexity']:.3f} before, {metrics['perplexity']:.3f} after."
        )
    report.data = {"metrics": dict(metrics), "types": written.types, "fallback_tensors": list(written.fallback_tensors)}
    add_metrics_table(report, metrics)
    kinds: dict[str, list[str]] = {}
    for name, found in written.types.items():
        kinds.setdefault(found, []).append(name)
    report.add_table(
        "Quantization formats",
        ("format", "tensors", "weights", "examples"),
        [
            (found, len(names), sum(math.prod(written.shapes[name]) for name in names), ", ".join(names[:3]))
            for found, names in sorted(kinds.items(), key=lambda one: -len(one[1]))
        ],
    )
    ctx.progress.log(report.subtitle)
