"""Extract a LoRA adapter from a model and its base: a truncated SVD of each matrix's difference."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from torch import Tensor

from llmworks.core.artifact import Adapter, Model
from llmworks.core.context import Context
from llmworks.core.errors import ModelError
from llmworks.merge.adapter import TOKENIZER_FILES
from llmworks.merge.execute.blocks import as_bytes
from llmworks.merge.lora.config import ExtractConfig
from llmworks.merge.lora.low_rank import low_rank_factors
from llmworks.merge.lora.merge_lora import FactorPairs, record_golden, write_adapter
from llmworks.merge.plan.computation import require_same_computation
from llmworks.merge.plan.layout import LAYER, CheckpointLayout, read_layout
from llmworks.model.io.safetensors_io import FLOAT_DTYPES, TORCH_DTYPES

CONV1D_MODELS = ("gpt2", "openai-gpt")  # model types with Conv1D


def extract_adapter(config: ExtractConfig, model: Model, base: Model, ctx: Context) -> Adapter:
    """Run the stage."""
    for one in (model, base):
        if one.format != "hf":
            raise ModelError(
                f"{one.name}: is a {one.format} file; an adapter can only be extracted from Hugging Face directories"
            )
    tuned, first = read_layout(model.name, model.path), read_layout(base.name, base.path)
    if str(first.config.get("model_type")) in CONV1D_MODELS:
        raise ModelError(
            f"{base.name}: is a {first.config['model_type']}, whose matrices are stored transposed (Conv1D);"
            " extracting an adapter from it is not supported"
        )
    _require_same_tensors(tuned, first)
    require_same_computation(base.name, {base.name: first, model.name: tuned})
    pairs, layer_stats, rest, total, lost = _extract_factors(first, tuned, ctx, config)
    for layout in (tuned, first):
        layout.shards.close()
    if not pairs:
        raise ModelError(f"{model.name} and {base.name} do not differ in any matrix of a layer that is not excluded")
    write_adapter(ctx.out, pairs, base)
    for file in TOKENIZER_FILES:
        if (model.path / file).exists():
            shutil.copyfile(model.path / file, ctx.out / file)
    relative_error = (lost / total) ** 0.5
    metrics: dict[str, Any] = {
        "relative_error": round(relative_error, 6),
        "rank": max(len(a) for a, _ in pairs.values()),
        "layers": len(pairs),
        "skipped_tensors": len(rest),
    }
    recorded, gap = record_golden(ctx, base, model.golden)
    if gap is not None:
        metrics |= {"golden_gap_mean": round(gap.mean, 5), "golden_greedy_agreement": round(gap.top1_agreement, 5)}
    _write_report(ctx, model, base, metrics, pairs, relative_error, rest, layer_stats)
    return Adapter(
        ctx.out,
        metrics=metrics,
        golden=recorded,
        about={"base": base.digest, "method": "extract", "rank": metrics["rank"], "base_kept": "as-is"},
    )


def _extract_factors(
    first: CheckpointLayout, tuned: CheckpointLayout, ctx: Context, config: ExtractConfig
) -> tuple[
    dict[str, tuple[Tensor, Tensor]], list[tuple[str, int, float, float]], list[tuple[str, float]], float, float
]:
    """Return the factors of each changed matrix, their statistics, other tensors that differ, and the squared norms
    of all changes and of the part that is lost.
    """
    pairs: FactorPairs = {}
    layer_stats: list[tuple[str, int, float, float]] = []
    rest: list[tuple[str, float]] = []
    total = lost = 0.0
    names = [
        name
        for name in {**first.places, **tuned.places}
        if (first.places.get(name) or tuned.places[name]).dtype in FLOAT_DTYPES
    ]
    with ctx.progress.bar("extract", len(names), "tensors") as bar:
        for name in names:
            before, after = (_read_tensor(layout, layout.resolve_tied(name) or name) for layout in (first, tuned))
            change, layer = after - before, name.removesuffix(".weight")
            size = float(change.square().sum())
            if (
                LAYER.match(name)
                and change.ndim == 2
                and name.endswith(".weight")
                and not any(part in name for part in config.exclude_modules)
            ):
                if size:
                    a, b, miss = low_rank_factors(change, config.max_rank, config.min_energy)
                    pairs[layer] = (a, b)
                    layer_stats.append(
                        (layer, len(a), (size / float(before.square().sum().clamp(min=1e-30))) ** 0.5, miss)
                    )
                    lost += miss**2 * size
            elif size:
                lost += size
                rest.append((name, (size / float(before.square().sum().clamp(min=1e-30))) ** 0.5))
            total += size
            bar.advance()
    return pairs, layer_stats, rest, total, lost


def _write_report(
    ctx: Context,
    model: Model,
    base: Model,
    metrics: dict[str, Any],
    pairs: dict[str, tuple[Tensor, Tensor]],
    relative_error: Any,
    rest: list[tuple[str, float]],
    layer_stats: list[tuple[str, int, float, float]],
) -> None:
    """Write the report: ranks of matrices, and differences that the adapter cannot represent."""
    page = ctx.report
    page.title, page.subtitle = (
        f"{model.name} as an adapter of {base.name}",
        f"Ranks up to {metrics['rank']} of {len(pairs)} matrices; relative approximation error {relative_error:.1%}"
        " of the"
        f" difference between {model.name} and"
        f" {base.name}" + (f", including {len(rest)} other tensors that differ." if rest else "."),
    )
    page.add_table(
        "Matrices",
        ("layer", "rank", "change, relative to the weights", "error, relative to the change"),
        [
            (layer, rank, f"{size:.2%}", f"{miss:.2%}")
            for layer, rank, size, miss in sorted(layer_stats, key=lambda one: -one[3])
        ],
        "Ratios of Frobenius norms.",
    )
    if rest:
        page.add_table(
            "Changed, but not in the adapter",
            ("tensor", "change, relative to the weights"),
            [(name, f"{size:.3%}") for name, size in sorted(rest, key=lambda one: -one[1])],
            "This LoRA cannot represent embeddings, heads, norms and biases; excluded layers are left out, too.",
        )
        ctx.progress.log(
            f"{len(rest)} tensors differ but are not in the adapter (embeddings, heads, norms, biases, excluded"
            f" layers); the most: {max(rest, key=lambda one: one[1])[0]}"
        )
    page.data = {
        "layers": {
            layer: {"rank": rank, "change": size, "relative_error": miss} for layer, rank, size, miss in layer_stats
        },
        **metrics,
    }
    ctx.progress.log(page.subtitle)


def _require_same_tensors(tuned: CheckpointLayout, base: CheckpointLayout) -> None:
    for name in {**base.places, **tuned.places}:
        one, other = tuned.places.get(name), base.places.get(name)
        if one is None or other is None:
            if name.endswith("lm_head.weight"):
                continue
            raise ModelError(
                f"{(base if other is None else tuned).name}: has no tensor {name}, which"
                f" {(tuned if other is None else base).name} has"
            )
        if one.shape != other.shape:
            raise ModelError(
                f"{name}: its shapes differ: {tuned.name} {list(one.shape)}, {base.name} {list(other.shape)}; an"
                " adapter cannot change shapes"
            )


def _read_tensor(layout: CheckpointLayout, name: str) -> Tensor:
    """Read a tensor in fp32. ModelError for NaN or infinite values."""
    place = layout.places[name]
    made = torch.empty(place.num_elements, dtype=getattr(torch, TORCH_DTYPES[place.dtype]))
    if place.num_elements:
        layout.shards.read(name, 0, as_bytes(made))
    found = made.float().view(place.shape)
    if not torch.isfinite(found).all():
        raise ModelError(f"{layout.name}: {name} holds NaN or infinite values")
    return found
