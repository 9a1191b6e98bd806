"""Write LoRA adapters combined from several; one matrix at a time in memory. Also used by `extract_lora.py`.

See `combine_adapters.py`.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmworks.core.artifact import Adapter, Golden, Model, check_base
from llmworks.core.context import Context
from llmworks.core.errors import ModelError, UserError
from llmworks.merge.adapter import TOKENIZER_FILES, fold_files
from llmworks.merge.execute.tensor_group import TensorGroup
from llmworks.merge.lora.config import CombineAdaptersConfig
from llmworks.merge.lora.low_rank import low_rank_factors
from llmworks.merge.plan.catalogue import METHODS
from llmworks.merge.plan.plan import BLOCK
from llmworks.merge.vocabulary.tokenizer_files import make_logits_function
from llmworks.model.lora.adapter_io import BASE_FILE, PREFIX, LoraMatrices, read_lora_matrices
from llmworks.tokenize.chat import golden
from llmworks.tokenize.load import get_stop_ids, load_tokenizer

FactorPairs = dict[str, tuple[Tensor, Tensor]]  # by layer: A and B, whose product is the change


def combine_adapters(
    config: CombineAdaptersConfig, adapters: Mapping[str, Adapter], model: Model, ctx: Context
) -> Adapter:
    """Run the stage."""
    if len(adapters) < 2:
        raise UserError("only one adapter given; give at least two to combine")
    unknown = next((name for name in config.weights if name not in adapters), None)
    if unknown is not None:
        raise UserError(f"weights: unknown adapter {unknown!r}; given: {', '.join(adapters)}")
    factors = {name: _load_factors(adapter, model, ctx) for name, adapter in adapters.items()}
    weights = {name: float(config.weights.get(name, 1.0)) for name in adapters}
    if config.normalize and config.combination_type in ("cat", "linear", "svd"):
        total = sum(weights.values())
        if abs(total) < 1e-9:
            raise UserError("the weights sum to zero and cannot be normalized; change them, or set normalize=false")
        weights = {name: weight / total for name, weight in weights.items()}
    rank = config.svd_rank or max(len(one.a) for pairs in factors.values() for one in pairs.values())
    made, lost, whole = _merge_layers(factors, config, weights, ctx, rank)
    write_adapter(ctx.out, made, model)
    source = next(
        (adapter.path for adapter in adapters.values() if (adapter.path / "tokenizer.json").exists()), model.path
    )
    for file in TOKENIZER_FILES:
        if (source / file).exists():
            shutil.copyfile(source / file, ctx.out / file)
    relative_error = (lost / whole) ** 0.5 if whole else 0.0
    metrics: dict[str, Any] = {
        "adapters": len(adapters),
        "layers": len(made),
        "rank": max(len(a) for a, _ in made.values()),
        "relative_error": round(relative_error, 6),
    }
    recorded, _ = record_golden(ctx, model, None)
    page = ctx.report
    page.title = f"Combined adapters of {model.name}"
    page.subtitle = f"{', '.join(adapters)} by {config.combination_type}: rank {metrics['rank']}" + (
        f"; relative error of the truncation {relative_error:.1%}."
        if config.combination_type not in ("cat", "linear")
        else "."
    )
    page.add_table(
        "Adapters",
        ("name", "weight", "ranks", "layers"),
        [
            (name, f"{weights[name]:g}", str(max(len(one.a) for one in pairs.values())), len(pairs))
            for name, pairs in factors.items()
        ],
    )
    page.data = {"weights": weights, **metrics}
    ctx.progress.log(page.subtitle)
    return Adapter(
        ctx.out,
        metrics=metrics,
        golden=recorded,
        about={"base": model.digest, "method": config.combination_type, "rank": metrics["rank"], "base_kept": "as-is"},
    )


def _merge_layers(
    factors: dict[str, dict[str, LoraMatrices]],
    config: CombineAdaptersConfig,
    weights: dict[str, float],
    ctx: Context,
    rank: int,
) -> tuple[dict[str, tuple[Tensor, Tensor]], float, float]:
    """Return the factors of each layer, the squared norm lost by truncation, and the total squared norm."""
    made: FactorPairs = {}
    lost = whole = 0.0
    for layer in dict.fromkeys(layer for pairs in factors.values() for layer in pairs):
        layer_factors = {name: pairs[layer] for name, pairs in factors.items() if layer in pairs}
        shapes = {name: (len(one.b), one.a.shape[1]) for name, one in layer_factors.items()}
        if len(set(shapes.values())) > 1:
            raise ModelError(
                f"{layer}: its shapes differ: {', '.join(f'{name} {list(shape)}' for name, shape in shapes.items())};"
                " the adapters belong to different models"
            )
        if config.combination_type == "cat":
            made[layer] = (
                torch.cat([one.a * (weights[name] * one.scale) for name, one in layer_factors.items()]),
                torch.cat([one.b for one in layer_factors.values()], dim=1),
            )
        elif config.combination_type == "linear":
            made[layer] = _average_factors(layer, layer_factors, weights)
        else:
            change = _merge_products(config, layer, layer_factors, weights, ctx.seed)
            a, b, miss = low_rank_factors(change, rank)
            size = float(change.square().sum())
            lost, whole, made[layer] = lost + miss**2 * size, whole + size, (a, b)
    return made, lost, whole


def _load_factors(adapter: Adapter, model: Model, ctx: Context) -> dict[str, LoraMatrices]:
    """Read an adapter's factors by layer.

    Errors: ArtifactError for an adapter of another model; ModelError for one that is not a plain LoRA.
    """
    if not check_base(adapter, model):
        ctx.progress.log(
            f"warning: {adapter.name} does not record the digest of its base model; assuming it was trained on"
            f" {model.name}"
        )
    config, found = read_lora_matrices(adapter.path, adapter.name)
    if config.get("use_dora") or (adapter.path / BASE_FILE).exists():
        raise ModelError(
            f"{adapter.name}: {'is a DoRA' if config.get('use_dora') else 'was trained on a 4-bit base (QLoRA)'},"
            " so its change is not a product of two matrices; merge it into its model (llmworks merge adapter), then"
            " merge the models"
        )
    return found


def _average_factors(
    layer: str, layer_factors: Mapping[str, LoraMatrices], weights: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """Return sums of factors, each scaled by the square root of its weight and scale, with the sign in A (peft,
    `add_weighted_adapter` with "linear").
    """
    ranks = {name: len(one.a) for name, one in layer_factors.items()}
    if len(set(ranks.values())) > 1:
        raise UserError(
            f"{layer}: factors of different ranks cannot be averaged"
            f" ({', '.join(f'{name} {rank}' for name, rank in ranks.items())}); use cat or svd"
        )
    shares = {name: weights[name] * one.scale for name, one in layer_factors.items()}
    a = [one.a * math.copysign(abs(shares[name]) ** 0.5, shares[name]) for name, one in layer_factors.items()]
    b = [one.b * abs(shares[name]) ** 0.5 for name, one in layer_factors.items()]
    return torch.stack(a).sum(0), torch.stack(b).sum(0)


def _merge_products(
    config: CombineAdaptersConfig,
    layer: str,
    layer_factors: Mapping[str, LoraMatrices],
    weights: Mapping[str, float],
    seed: int,
) -> Tensor:
    """Merge the products of a layer's factors by a method of `merge`, as task vectors of a base of zeros."""
    products = [(one.b @ one.a) * one.scale for one in layer_factors.values()]
    shape, flat = tuple(products[0].shape), [torch.zeros(products[0].numel()), *(one.flatten() for one in products)]
    method = METHODS["task_arithmetic" if config.combination_type == "svd" else config.combination_type]
    own = {parameter.name: parameter.default for parameter in method.parameters if parameter.of == "other"}
    each = [
        {},
        *(
            {**own, "weight": weights[name], "density": 1.0 if config.combination_type == "svd" else config.density}
            for name in layer_factors
        ),
    ]
    shared = {parameter.name: parameter.default for parameter in method.parameters if parameter.of == "tensor"} | {
        "normalize": config.normalize and config.combination_type != "svd"
    }
    group = TensorGroup(
        layer,
        shape,
        torch.float32,
        0,
        shared,
        each,
        lambda first, count: [one[first : first + count] for one in flat],
        seed,
    )
    piece, size = method.load_function()(group), group.numel if method.needs_whole_tensors else BLOCK
    made = [
        piece(group.read(start, min(size, group.numel - start)), number)
        for number, start in enumerate(range(0, group.numel, size))
    ]
    merged: Tensor = torch.cat(made).view(shape)
    return merged


def write_adapter(out: Path, pairs: FactorPairs, base: Model) -> None:
    """Write a peft directory.

    The most common rank is `r`, others are in `rank_pattern`; alpha equals the rank, so the scale is 1.
    """
    from safetensors.torch import save_file

    ranks = [len(a) for a, _ in pairs.values()]
    common = max(set(ranks), key=ranks.count)
    others = {layer: len(a) for layer, (a, _) in pairs.items() if len(a) != common}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.ref.removeprefix("hf:") or base.name,
        "r": common,
        "lora_alpha": common,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted({layer.rpartition(".")[2] for layer in pairs}),
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": others,
        "alpha_pattern": others,
    }
    save_file(
        {
            f"{PREFIX}{layer}.lora_{part}.weight": one.contiguous()
            for layer, both in pairs.items()
            for part, one in zip("AB", both, strict=True)
        },
        out / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def record_golden(
    ctx: Context, base: Model, previous: Golden | None
) -> tuple[Golden | None, golden.LogitDifference | None]:
    """Record golden logits of base and adapter, merged in a scratch folder, and their gap to a previous record. None
    without a tokenizer.
    """
    folder = ctx.scratch / "folded"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base.path, folder, ignore=shutil.ignore_patterns("*.safetensors", "manifest.json", "report"))
    for file in TOKENIZER_FILES:
        if (ctx.out / file).exists():
            shutil.copyfile(ctx.out / file, folder / file)
    if not (folder / "tokenizer.json").exists():
        shutil.rmtree(folder)
        return None, None
    fold_files(base.path, ctx.out, folder, "the adapter")
    tokenizer = load_tokenizer(folder)
    logits = functools.cache(lambda ids: make_logits_function(folder)(ids))
    recorded = golden.record_golden(tokenizer, get_stop_ids(folder, tokenizer), lambda ids: logits(tuple(ids)))
    gap = golden.replay_logits(previous, lambda ids: logits(tuple(ids))) if previous is not None else None
    shutil.rmtree(folder)
    return recorded, gap
