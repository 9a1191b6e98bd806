"""Stage `model.show`: show one or two models layer by layer: shapes, parameters, FLOPs, KV cache, and a block diagram.

Computed from the configuration alone; weights are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from pydantic import Field

from llmworks.core.artifact import Config, Model, Report
from llmworks.core.context import Context
from llmworks.core.errors import ModelError, UserError

if TYPE_CHECKING:
    from llmworks.model.anatomy.parts import Part
    from llmworks.model.shape import RecurrentShape, Shape

    Any_Shape = Shape | RecurrentShape
    from llmworks.core.report import ReportBuilder

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class ShowConfig(Config):
    """Context length and number format for which FLOPs and KV cache are computed."""

    context_length: int = Field(
        0,
        ge=0,
        description="context length in tokens, the current one included; 0 = the model's maximum, at most 4,096",
    )
    kv_cache_dtype: str = Field(
        "float32", pattern="^(float32|bfloat16|float16)$", description="number format of the KV cache"
    )


def show(config: ShowConfig, model: Model, ctx: Context, other: Model | None = None) -> Report:
    """Report layers, parameters, FLOPs and a block diagram of one model, or compare two.

    Errors: ModelError for an unknown architecture; UserError for a context_length beyond learned positions.
    """
    from llmworks.model.anatomy.drawing import draw
    from llmworks.model.anatomy.parts import parts_of
    from llmworks.model.shape import Shape

    names = [model.name or model.path.name]
    if other is not None:
        names.append(other.name or other.path.name)
        if names[0] == names[1]:
            names = [f"{names[0]} (1)", f"{names[1]} (2)"]
    shapes = {name: shape_of_model(one) for name, one in zip(names, (model, other), strict=False) if one is not None}
    context = config.context_length or min(4096, *(shape.max_position_embeddings for shape in shapes.values()))
    for name, shape in shapes.items():
        learned = isinstance(shape, Shape) and shape.position_embedding_type == "learned"
        if learned and context > (most := shape.max_position_embeddings):
            raise UserError(f"config.context_length is {context:,}, but {name} has {most:,} position embeddings")
    width = BYTES[config.kv_cache_dtype]
    found = {name: parts_of(shape, context) for name, shape in shapes.items()}
    rows = _figures(found, context, shapes, width)
    report = ctx.report
    report.title = " vs. ".join(names)
    report.lead = "; ".join(_line(name, parts) for name, parts in found.items()) + "."
    _keep_figures(report, context, found, width)
    note = (
        f"FLOPs count matrix products only, a multiply-add as two, for one token with a context of {context:,}"
        " tokens, itself included; a training step takes about three times as many. KV cache in"
        f" {config.kv_cache_dtype}."
    )
    report.table("Figures", ("what", *names), rows, note=note)
    report.drawing("Block" if len(shapes) == 1 else "Blocks", draw(shapes), plain="(diagram: see report.html)")
    if len(shapes) == 2:
        report.table("Differences", ("field", *names), _differences(*shapes.values()))
    lines = [report.lead, ""]
    for name, parts in found.items():
        table = _table(parts, width)
        report.table(
            f"Layers of {name}",
            ("block", "part", "shape", "parameters", "FLOPs", "KV cache, bytes"),
            table,
            note="Identical blocks are listed once; figures are for one block and one token.",
        )
        lines += _plain(name, table)
    report.terminal = "\n".join(
        [
            *lines,
            "For one token and a context of "
            + f"{context:,} tokens; KV cache in bytes. Identical blocks are listed once, with one block's figures.",
        ]
    )
    return Report(
        ctx.out,
        metrics={
            "parameters": sum(p.parameters for p in found[names[0]]),
            "work": sum(p.work for p in found[names[0]]),
        },
    )


def _figures(
    found: dict[str, list[Part]], context: int, shapes: dict[str, Shape | RecurrentShape], width: int
) -> list[tuple[object, ...]]:
    """Return the rows of the figures table: parameters, FLOPs, KV cache."""
    from llmworks.model.anatomy.parts import cached, state_of

    rows = []
    for what, values in (
        ("parameters", [sum(p.parameters for p in parts) for parts in found.values()]),
        ("active parameters per token", [sum(p.active for p in parts) for parts in found.values()]),
        (
            "parameters without embeddings",
            [
                sum(p.parameters for p in parts if p.name not in ("embedding", "position", "head"))
                for parts in found.values()
            ],
        ),
        ("FLOPs per token", [sum(p.work for p in parts) for parts in found.values()]),
        ("of which attention", [sum(p.work for p in parts if p.name == "attention") for parts in found.values()]),
        ("KV cache per token, bytes", [sum(p.cache for p in parts) * width for parts in found.values()]),
        (f"KV cache of {context:,} tokens, bytes", [cached(shape, context) * width for shape in shapes.values()]),
        ("recurrent state, bytes", [state_of(shape) * width for shape in shapes.values()]),
    ):
        if any(values):
            rows.append((what, *values))
    return rows


def _keep_figures(report: ReportBuilder, context: int, found: dict[str, list[Part]], width: int) -> None:
    """Store the figures in the report's machine-readable data."""
    report.data = {
        "context": context,
        "models": {
            name: {
                "parameters": sum(p.parameters for p in parts),
                "active": sum(p.active for p in parts),
                "work": sum(p.work for p in parts),
                "cache_bytes": sum(p.cache for p in parts) * width,
            }
            for name, parts in found.items()
        },
    }


def _line(name: str, parts: Sequence[Part]) -> str:
    return (
        f"{name} has {sum(p.parameters for p in parts):,} parameters and takes {sum(p.work for p in parts) / 1e6:,.1f}"
        " million FLOPs per token"
    )


def shape_of_model(model: Model) -> Any_Shape:
    """Read the shape of a Hugging Face directory or a GGUF file. ModelError for an unknown architecture."""
    from pydantic import ValidationError

    from llmworks.model.io.families import shape_of
    from llmworks.model.shape import RecurrentShape, read_stored
    from llmworks.tokenize.load import read_json

    if model.format == "gguf":
        from llmworks.model.from_gguf import config_of

        config = config_of(model.gguf_path)
    elif (model.path / "embedding.json").exists():
        raise ModelError("holds word vectors, which have no layers; see `llmworks show` and its report")
    elif model.path.is_dir():
        config = read_json(model.path / "config.json")
    else:
        raise ModelError(f"{model.name}: is {model.format}; give a Hugging Face directory or a GGUF file")
    try:
        if config.get("model_type") == "llmworks_ngram":
            raise ModelError("is an n-gram model, which has no layers; see `llmworks show` for its counts")
        if config.get("model_type") == "llmworks_recurrent":
            return RecurrentShape.model_validate(read_stored(config.get("shape") or {}))
        return shape_of(config)[1]
    except ValidationError as error:
        raise ModelError(f"{model.path}/config.json: {error.errors()[0]['msg']}") from None
    except ModelError as error:
        raise ModelError(f"{model.path}: {error}") from None


def _differences(one: Any_Shape, two: Any_Shape) -> list[tuple[str, str, str]]:
    """Return the shape fields that differ between two models; derived sizes are resolved."""
    from llmworks.model.shape import RecurrentShape

    sides = []
    for shape in (one, two):
        flat = {k: v for k, v in shape.model_dump().items() if not isinstance(v, dict)} | {
            f"{k}.{n}": w for k, v in shape.model_dump().items() if isinstance(v, dict) for n, w in v.items()
        }
        flat |= (
            {"hidden_size": shape.inner}
            if isinstance(shape, RecurrentShape)
            else {
                "intermediate_size": shape.inner,
                "num_key_value_heads": shape.groups,
                "head_dim": shape.per_head,
            }
        )
        sides.append({"architecture": getattr(shape, "rnn_type", "decoder"), **flat})
    return [
        (name, str(sides[0][name]), str(sides[1][name]))
        for name in sides[0]
        if name in sides[1] and sides[0][name] != sides[1][name]
    ]


def _table(parts: Sequence[Part], width: int) -> list[tuple[object, ...]]:
    """Build the layer table, one row per part; blocks identical but for their number are listed once."""
    kinds: list[tuple[list[int], list[Part]]] = []
    for where, group in ((where, list(group)) for where, group in groupby(parts, key=lambda part: part.where)):
        numbers = [int(where)] if where else []
        alike = next((kind for kind in kinds if where and kind[0] and _same(kind[1], group)), None)
        if alike:
            alike[0].extend(numbers)
        else:
            kinds.append((numbers, group))
    rows: list[tuple[object, ...]] = []
    for numbers, group in kinds:
        for part in group:
            shape = (
                "; ".join(
                    "×".join(map(str, sizes)) + ("" if name == "weight" else f" {name}")
                    for name, sizes in part.tensors.items()
                )
                or "–"
            )
            rows.append(
                (
                    _ranges(numbers),
                    part.name,
                    shape + (f" (tied to {part.shares})" if part.shares else ""),
                    part.parameters,
                    part.work,
                    part.cache * width,
                )
            )
    return rows


def _ranges(numbers: Sequence[int]) -> str:
    """Format 0, 1, 2, 4 as "0–2, 4"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _same(one: Sequence[Part], two: Sequence[Part]) -> bool:
    return [(p.name, p.tensors, p.work, p.cache) for p in one] == [(p.name, p.tensors, p.work, p.cache) for p in two]


def _plain(name: str, rows: Sequence[tuple[object, ...]]) -> list[str]:
    """Format the layer table for a terminal."""
    cells = [("block", "part", "shape", "parameters", "operations", "cache")] + [
        tuple(f"{c:,}" if isinstance(c, int) else str(c) for c in row) for row in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(6)]
    return [
        name,
        *(
            "  "
            + "  ".join(
                c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ),
        "",
    ]
