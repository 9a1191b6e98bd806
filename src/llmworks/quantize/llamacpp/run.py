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
from llmworks.model.golden import record
from llmworks.model.io.layer_reader import Source
from llmworks.model.io.weights import check_weights
from llmworks.quantize.calibrate.divergence import Damage
from llmworks.quantize.calibrate.imatrix import importance, read_importance, write_importance
from llmworks.quantize.calibrate.texts import calibration, check_length
from llmworks.quantize.llamacpp.allocation import Table, allocated, table_of
from llmworks.quantize.llamacpp.config import BOUNDS, bound_of
from llmworks.quantize.llamacpp.metadata import read_config
from llmworks.quantize.llamacpp.types import PLAIN, base_of, bits_of, types_of
from llmworks.quantize.llamacpp.writer import Tensors, Written, write_gguf
from llmworks.quantize.report.card import gguf_name, hub_name, write_card
from llmworks.quantize.report.page import figures
from llmworks.tokenize.chat.golden import require
from llmworks.tokenize.load import load_tokenizer, read_json

if TYPE_CHECKING:
    from llmworks.quantize.calibrate.layerwise import Walk
    from llmworks.quantize.llamacpp.config import GgufConfig, ImatrixConfig


def run(config: GgufConfig, model: Model, ctx: Context, data: Dataset | None, sensed: Report | None) -> Model:
    """Run `gguf.gguf`."""
    check(model)
    golden = model.golden or record(model.path)
    if config.allocate_bits and data is None and sensed is None:
        raise DataError(
            "config.allocate_bits requires `data`: conversations or documents like those the model is used for"
        )
    seen: Mapping[str, Any] | None = None
    table: Table | None = None
    walk: Walk | None = None
    wanted = config.use_imatrix and base_of(config.type) not in (*PLAIN, "Q8_0")
    if sensed is not None:
        seen, table = known(sensed, model)
    if data is not None:
        source = Source(model.path)
        check_length(config.max_seq_length, source.shape.max_position_embeddings)
        looks = 0 if sensed is not None else config.num_calibration_samples if wanted or config.allocate_bits else 0
        ids, held = calibration(
            load_tokenizer(model.path), data, looks, config.eval_samples, config.max_seq_length, ctx.seed
        )
        found, walk = importance(source, ids, held, ctx)
        seen = found if sensed is None and looks else seen
        if config.allocate_bits and sensed is None:
            table = table_of(source, ids[: config.sensitivity_samples], ctx, found)
    seen = seen if wanted or config.allocate_bits else None
    given, expected = _choose_formats(config, table, model, seen)
    target = ctx.out / "model.gguf"
    written = write_gguf(model.path, target, config.type, ctx.progress, seen, given)
    engine = LlamaCppEngine(target, name="model.gguf")
    try:
        bound = bound_of(config.type)
        bound = max(bound, BOUNDS["q8"]) if config.allocate_bits else bound  # whose formats have at most 8 bits
        gap = require(golden, engine.tokenizer, engine.stops, engine.logits, mean_within=bound, step="quantize.gguf")
        damage = _damage(walk, engine) if walk is not None and len(walk.held) else {}
    finally:
        engine.close()
    assert gap is not None
    size, weights = target.stat().st_size, sum(math.prod(shape) for shape in written.shapes.values())
    metrics: dict[str, Any] = {
        **({} if expected is None else {"expected_kl": round(expected, 5)}),
        "bytes": size,
        "bits_per_weight": round(_bits(written), 4),
        "weights": weights,
        "fallen": len(written.fallen),
        **{name: round(value, 6) for name, value in damage.items()},
        "golden_gap_mean": round(gap.mean, 5),
        "golden_gap_largest": round(gap.largest, 5),
        "golden_greedy_agreement": round(gap.same_greedy, 5),
    }
    _write_card(config, seen, ctx, model, metrics, data)
    _describe(ctx, model, config.type, written, metrics)
    about = {
        "format": "gguf",
        "type": config.type,
        "importance": seen is not None,
        "allocated": config.allocate_bits,
        **({"calibration": data.name} if data is not None else {}),
    }
    return Model(ctx.out, golden=golden, metrics=metrics, about=about)


def _choose_formats(
    config: GgufConfig, table: Mapping[str, Mapping[str, float]] | None, model: Model, seen: Mapping[str, Any] | None
) -> tuple[dict[str, str], float | None]:
    """Return the formats of tensors by their names, and their expected KL divergence."""
    given, expected = dict(config.tensor_types), None
    if config.allocate_bits:
        if not table:
            raise DataError(
                "config.allocate_bits needs the costs of formats, which `imatrix` lacks: create it with"
                " sensitivity_samples above 0"
            )
        tensors = Tensors(model.path, read_config(model.path))
        kinds, expected = allocated(
            table,
            tensors.shapes,
            types_of(tensors.shapes, config.type, tensors.layout(seen is not None), config.tensor_types),
        )
        given |= {
            f"^{re.escape(name)}$": kind
            for name, kind in kinds.items()
            if not any(re.search(pattern, name) for pattern in config.tensor_types)
        }
    return given, expected


def _write_card(
    config: GgufConfig,
    seen: Mapping[str, Any] | None,
    ctx: Context,
    model: Model,
    metrics: dict[str, Any],
    data: Dataset | None,
) -> None:
    """Write the file's model card."""
    said = (
        f"in GGUF format for llama.cpp, {config.type}"
        + (", formats allocated by sensitivity" if config.allocate_bits else "")
        + (", with an importance matrix." if seen is not None else ".")
    )
    write_card(
        ctx.out,
        model,
        said,
        form="gguf",
        method=config.type,
        bits=0,
        name=hub_name(model.name, "gguf", 0),
        metrics=metrics,
        data=data,
        file=gguf_name(model.name, config.type),
    )


def check(model: Model) -> None:
    """Check that a model can be converted to GGUF. ModelError otherwise."""
    if model.format != "hf":
        raise ModelError(f"{model.path}: is already {model.format}; quantize.gguf takes a Hugging Face directory")
    check_weights(model.path)
    read_config(model.path)
    if read_json(model.path / "config.json").get("quantization_config"):
        raise ModelError(f"{model.path}: is already quantized; give the unquantized model")


def known(sensed: Report, model: Model) -> tuple[dict[str, Any], Table]:
    """Read the result of `quantize.imatrix`. DataError for another report, or one of another model."""
    file = sensed.path / "importance.gguf"
    if not file.exists():
        raise DataError(f"{sensed.name}: is not a result of quantize.imatrix (no importance.gguf)")
    told = sensed.read()
    if told["model"] != model.digest:
        raise DataError(
            f"{sensed.name}: was computed for another model ({told['model'][:12]}), this is {model.digest[:12]}"
        )
    return read_importance(file), told["costs"]


def sense(config: ImatrixConfig, model: Model, ctx: Context, data: Dataset) -> Report:
    """Run `quantize.imatrix`."""
    check(model)
    source = Source(model.path)
    check_length(config.max_seq_length, source.shape.max_position_embeddings)
    ids, held = calibration(
        load_tokenizer(model.path), data, config.num_calibration_samples, 0, config.max_seq_length, ctx.seed
    )
    found, _ = importance(source, ids, held, ctx)
    write_importance(
        ctx.out / "importance.gguf", found, data.name, config.num_calibration_samples, config.max_seq_length
    )
    table = table_of(source, ids[: config.sensitivity_samples], ctx, found) if config.sensitivity_samples else {}
    ctx.report.title = f"Importance matrix of {model.name}"
    ctx.report.lead = f"Inputs of {len(found)} matrices, on {ids.numel():,} tokens of {data.name}."
    ctx.report.data = {"model": model.digest, "metrics": {"tokens": ids.numel(), "tensors": len(found)}, "costs": table}
    if table:
        rows = sorted(
            ((name, *(f"{kind} {cost:.5f}" for kind, cost in kinds.items())) for name, kinds in table.items()),
            key=lambda row: -max(table[row[0]].values()),
        )
        ctx.report.lead += (
            f" The cost of each quantization format for each of {len(table)} tensors, in nats per token, is below,"
            " most sensitive first."
        )
        ctx.report.table(
            "Costs",
            ("tensor", *[""] * max(len(row) - 1 for row in rows)),
            [(*row, *[""] * (max(map(len, rows)) - len(row))) for row in rows[:60]],
        )
    return Report(
        ctx.out,
        metrics={"tokens": ids.numel(), "tensors": len(found)},
        about={"model": model.digest, "calibration": data.name},
    )


def _bits(written: Written) -> float:
    """Return the average bits per weight, scales included."""
    weights = {name: math.prod(shape) for name, shape in written.shapes.items()}
    return sum(bits_of(written.types[name]) * count for name, count in weights.items()) / sum(weights.values())


def _damage(walk: Walk, engine: LlamaCppEngine) -> dict[str, float]:
    """Compare the file in llama.cpp with the original model on the held-out sequences."""
    found = Damage()
    with torch.inference_mode():
        for ids, state in zip(walk.held, walk.as_is, strict=True):
            new = torch.from_numpy(engine.logits(ids.tolist()))
            for some in torch.split(torch.arange(len(ids)), 64):
                found.add(walk.logits(state[some]), new[some], ids[some[0] + 1 : some[-1] + 2])
    return found.figures()


def _describe(ctx: Context, model: Model, kind: str, written: Written, metrics: Mapping[str, Any]) -> None:
    before = sum(file.stat().st_size for file in model.path.glob("*.safetensors"))
    report = ctx.report
    report.title = f"{model.name} as GGUF, {kind}"
    report.lead = (
        f"{metrics['bytes'] / 1e6:,.1f} MB of {before / 1e6:,.1f}; {metrics['bits_per_weight']:.2f} bits per weight."
    )
    if written.fallen:
        report.lead += (
            f" {len(written.fallen)} of {len(written.types)} tensors have a fallback format, because {kind}'s block"
            " size does not divide their rows."
        )
    if "kl" in metrics:
        report.lead += (
            f" In llama.cpp, on {metrics['eval_tokens']:,.0f} held-out tokens, the KL divergence from the original"
            f" model is {metrics['kl']:.4f} nats per token; top-1 agreement {metrics['top1_agreement']:.1%}; perplexity"
            f" {metrics['perplexity_before']:.3f} before, {metrics['perplexity']:.3f} after."
        )
    report.data = {"metrics": dict(metrics), "types": written.types, "fallen": list(written.fallen)}
    figures(report, metrics)
    kinds: dict[str, list[str]] = {}
    for name, found in written.types.items():
        kinds.setdefault(found, []).append(name)
    report.table(
        "Quantization formats",
        ("format", "tensors", "weights", "examples"),
        [
            (found, len(names), sum(math.prod(written.shapes[name]) for name in names), ", ".join(names[:3]))
            for found, names in sorted(kinds.items(), key=lambda one: -len(one[1]))
        ],
    )
    ctx.progress.say(report.lead)
