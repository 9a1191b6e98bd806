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
    from llmworks.model.anatomy.parts import ModelPart
    from llmworks.model.shape import RecurrentShape, Shape

    AnyShape = Shape | RecurrentShape
    from llmworks.core.report import ReportBuilder

BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}


class ModelShowConfig(Config):
    """Context length and number format for which FLOPs and KV cache are computed."""

    context_length: int = Field(
        0,
        ge=0,
        description="context length in tokens, the current one included; 0 = the model's maximum, at most 4,096",
    )
    kv_cache_dtype: str = Field(
        "float32", pattern="^(float32|bfloat16|float16)$", description="number format of the KV cache"
    )


def show(config: ModelShowConfig, model: Model, ctx: Context, other: Model | None = None) -> Report:
    """Report layers, parameters, FLOPs and a block diagram of one model, or compare two.

    Errors: ModelError for an unknown architecture; UserError for a context_length beyond learned positions.
    """
    from llmworks.model.anatomy.drawing import draw
    from llmworks.model.anatomy.parts import list_parts
    from llmworks.model.shape import Shape

    names = [model.name or model.path.name]
    if other is not None:
        names.append(other.name or other.path.name)
        if names[0] == names[1]:
            names = [f"{names[0]} (1)", f"{names[1]} (2)"]
    shapes = {name: read_model_shape(one) for name, one in zip(names, (model, other), strict=False) if one is not None}
    context = config.context_length or min(4096, *(shape.max_position_embeddings for shape in shapes.values()))
    for name, shape in shapes.items():
        learned = isinstance(shape, Shape) and shape.position_embedding_type == "learned"
        if learned and context > (most := shape.max_position_embeddings):
            raise UserError(f"config.context_length is {context:,}, but {name} has {most:,} position embeddings")
    element_bytes = BYTES_PER_ELEMENT[config.kv_cache_dtype]
    parts_by_model = {name: list_parts(shape, context) for name, shape in shapes.items()}
    rows = _build_figure_rows(parts_by_model, context, shapes, element_bytes)
    report = ctx.report
    report.title = " vs. ".join(names)
    report.subtitle = "; ".join(_summarize(name, parts) for name, parts in parts_by_model.items()) + "."
    _store_figures(report, context, parts_by_model, element_bytes)
    note = (
        f"FLOPs count matrix products only, a multiply-add as two, for one token with a context of {context:,}"
        " tokens, itself included; a training step takes about three times as many. KV cache in"
        f" {config.kv_cache_dtype}."
    )
    report.add_table("Figures", ("what", *names), rows, note=note)
    report.add_drawing("Block" if len(shapes) == 1 else "Blocks", draw(shapes), plain="(diagram: see report.html)")
    if len(shapes) == 2:
        report.add_table("Differences", ("field", *names), _diff_shapes(*shapes.values()))
    lines = [report.subtitle, ""]
    for name, parts in parts_by_model.items():
        table = _build_layer_rows(parts, element_bytes)
        report.add_table(
            f"Layers of {name}",
            ("block", "part", "shape", "parameters", "FLOPs", "KV cache, bytes"),
            table,
            note="Identical blocks are listed once; figures are for one block and one token.",
        )
        lines += _format_terminal_table(name, table)
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
            "parameters": sum(p.parameters for p in parts_by_model[names[0]]),
            "flops_per_token": sum(p.flops for p in parts_by_model[names[0]]),
        },
    )


def _build_figure_rows(
    parts_by_model: dict[str, list[ModelPart]],
    context: int,
    shapes: dict[str, Shape | RecurrentShape],
    element_bytes: int,
) -> list[tuple[object, ...]]:
    """Return the rows of the figures table: parameters, FLOPs, KV cache."""
    from llmworks.model.anatomy.parts import count_cache_elements, count_state_elements

    rows = []
    for what, values in (
        ("parameters", [sum(p.parameters for p in parts) for parts in parts_by_model.values()]),
        ("active parameters per token", [sum(p.active_parameters for p in parts) for parts in parts_by_model.values()]),
        (
            "parameters without embeddings",
            [
                sum(p.parameters for p in parts if p.name not in ("embedding", "position", "head"))
                for parts in parts_by_model.values()
            ],
        ),
        ("FLOPs per token", [sum(p.flops for p in parts) for parts in parts_by_model.values()]),
        (
            "of which attention",
            [sum(p.flops for p in parts if p.name == "attention") for parts in parts_by_model.values()],
        ),
        (
            "KV cache per token, bytes",
            [sum(p.cache_elements for p in parts) * element_bytes for parts in parts_by_model.values()],
        ),
        (
            f"KV cache of {context:,} tokens, bytes",
            [count_cache_elements(shape, context) * element_bytes for shape in shapes.values()],
        ),
        ("recurrent state, bytes", [count_state_elements(shape) * element_bytes for shape in shapes.values()]),
    ):
        if any(values):
            rows.append((what, *values))
    return rows


def _store_figures(
    report: ReportBuilder, context: int, parts_by_model: dict[str, list[ModelPart]], element_bytes: int
) -> None:
    """Store the figures in the report's machine-readable data."""
    report.data = {
        "context": context,
        "models": {
            name: {
                "parameters": sum(p.parameters for p in parts),
                "active": sum(p.active_parameters for p in parts),
                "flops_per_token": sum(p.flops for p in parts),
                "cache_bytes": sum(p.cache_elements for p in parts) * element_bytes,
            }
            for name, parts in parts_by_model.items()
        },
    }


def _summarize(name: str, parts: Sequence[ModelPart]) -> str:
    return (
        f"{name} has {sum(p.parameters for p in parts):,} parameters and takes {sum(p.flops for p in parts) / 1e6:,.1f}"
        " million FLOPs per token"
    )


def read_model_shape(model: Model) -> AnyShape:
    """Read the shape of a Hugging Face directory or a GGUF file. ModelError for an unknown architecture."""
    from pydantic import ValidationError

    from llmworks.model.io.families import parse_shape
    from llmworks.model.shape import RecurrentShape, read_stored
    from llmworks.tokenize.load import read_json

    if model.format == "gguf":
        from llmworks.model.from_gguf import read_hf_config

        config = read_hf_config(model.gguf_path)
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
        return parse_shape(config)[1]
    except ValidationError as error:
        raise ModelError(f"{model.path}/config.json: {error.errors()[0]['msg']}") from None
    except ModelError as error:
        raise ModelError(f"{model.path}: {error}") from None


def _diff_shapes(one: AnyShape, two: AnyShape) -> list[tuple[str, str, str]]:
    """Return the shape fields that differ between two models; derived sizes are resolved."""
    from llmworks.model.shape import RecurrentShape

    sides = []
    for shape in (one, two):
        flat = {k: v for k, v in shape.model_dump().items() if not isinstance(v, dict)} | {
            f"{k}.{n}": w for k, v in shape.model_dump().items() if isinstance(v, dict) for n, w in v.items()
        }
        flat |= (
            {"hidden_size": shape.inner_size}
            if isinstance(shape, RecurrentShape)
            else {
                "intermediate_size": shape.inner_size,
                "num_key_value_heads": shape.num_kv_heads,
                "head_dim": shape.head_size,
            }
        )
        sides.append({"architecture": getattr(shape, "rnn_type", "decoder"), **flat})
    return [
        (name, str(sides[0][name]), str(sides[1][name]))
        for name in sides[0]
        if name in sides[1] and sides[0][name] != sides[1][name]
    ]


def _build_layer_rows(parts: Sequence[ModelPart], width: int) -> list[tuple[object, ...]]:
    """Build the layer table, one row per part; blocks identical but for their number are listed once."""
    kinds: list[tuple[list[int], list[ModelPart]]] = []
    for where, group in ((where, list(group)) for where, group in groupby(parts, key=lambda part: part.block)):
        numbers = [int(where)] if where else []
        identical = next((kind for kind in kinds if where and kind[0] and _is_identical(kind[1], group)), None)
        if identical:
            identical[0].extend(numbers)
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
                    _format_ranges(numbers),
                    part.name,
                    shape + (f" (tied to {part.tied_to})" if part.tied_to else ""),
                    part.parameters,
                    part.flops,
                    part.cache_elements * width,
                )
            )
    return rows


def _format_ranges(numbers: Sequence[int]) -> str:
    """Format 0, 1, 2, 4 as "0–2, 4"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _is_identical(one: Sequence[ModelPart], two: Sequence[ModelPart]) -> bool:
    return [(p.name, p.tensors, p.flops, p.cache_elements) for p in one] == [
        (p.name, p.tensors, p.flops, p.cache_elements) for p in two
    ]


def _format_terminal_table(name: str, rows: Sequence[tuple[object, ...]]) -> list[str]:
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
