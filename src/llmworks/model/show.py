"""Stage `model.show`: look inside a model, or two side by side: its layers with shapes, parameters, work and cache, and
its block as a drawing.

All of it comes from the configuration; weights are not read.
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
    """For which text work and cache are counted."""

    context_length: int = Field(
        0,
        ge=0,
        description="tokens that the counted token sees, itself included; 0: as many as the model reads, at most 4,096",
    )
    kv_cache_dtype: str = Field(
        "float32", pattern="^(float32|bfloat16|float16)$", description="number format of the cache"
    )


def show(config: ShowConfig, model: Model, ctx: Context, other: Model | None = None) -> Report:
    """The layer table, figures and drawing of one model, or of two with their differences.

    Errors: ModelError for an architecture that is not known; UserError for a context beyond learned positions.
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
        if (
            isinstance(shape, Shape)
            and shape.position_embedding_type == "learned"
            and context > shape.max_position_embeddings
        ):
            raise UserError(
                f"config.context is {context:,}, {name} has positions for {shape.max_position_embeddings:,}"
            )
    width = BYTES[config.kv_cache_dtype]
    found = {name: parts_of(shape, context) for name, shape in shapes.items()}
    rows = _figures(found, context, shapes, width)
    report = ctx.report
    report.title = " beside ".join(names)
    report.lead = "; ".join(_line(name, parts) for name, parts in found.items()) + "."
    _keep_figures(report, context, found, width)
    note = (
        f"Operations are those of matrix products, a multiply-add as two, of a token that sees {context:,}, itself"
        f" included; a training step takes about three times as many. The cache is in {config.kv_cache_dtype}."
    )
    report.table("Figures", ("what", *names), rows, note=note)
    report.drawing("The block" if len(shapes) == 1 else "The blocks", draw(shapes), plain="(drawing: see report.html)")
    if len(shapes) == 2:
        report.table("What differs", ("field", *names), _differences(*shapes.values()))
    lines = [report.lead, ""]
    for name, parts in found.items():
        table = _table(parts, width)
        report.table(
            f"Layers of {name}",
            ("block", "part", "shape", "parameters", "operations", "cache, bytes"),
            table,
            note="Blocks that are alike stand once; figures are those of one of them, for one token.",
        )
        lines += _plain(name, table)
    report.terminal = "\n".join(
        [
            *lines,
            "Of one token that sees "
            + f"{context:,}; cache in bytes. Blocks that are alike stand once, with the figures of one of them.",
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
    """Rows of figures: parameters, operations, cache."""
    from llmworks.model.anatomy.parts import cached, state_of

    rows = []
    for what, values in (
        ("parameters", [sum(p.parameters for p in parts) for parts in found.values()]),
        ("parameters that a token meets", [sum(p.active for p in parts) for parts in found.values()]),
        (
            "parameters without embeddings",
            [
                sum(p.parameters for p in parts if p.name not in ("embedding", "position", "head"))
                for parts in found.values()
            ],
        ),
        ("operations of a token", [sum(p.work for p in parts) for parts in found.values()]),
        ("of them attention's", [sum(p.work for p in parts if p.name == "attention") for parts in found.values()]),
        ("cache of a token, bytes", [sum(p.cache for p in parts) * width for parts in found.values()]),
        (f"cache of {context:,} tokens, bytes", [cached(shape, context) * width for shape in shapes.values()]),
        ("state of any text, bytes", [state_of(shape) * width for shape in shapes.values()]),
    ):
        if any(values):
            rows.append((what, *values))
    return rows


def _keep_figures(report: ReportBuilder, context: int, found: dict[str, list[Part]], width: int) -> None:
    """Keep the figures for programs."""
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
        " million operations for a token"
    )


def shape_of_model(model: Model) -> Any_Shape:
    """The shape of a Hugging Face directory or a GGUF file. ModelError for an architecture that is not known."""
    from pydantic import ValidationError

    from llmworks.model.io.families import shape_of
    from llmworks.model.shape import RecurrentShape, read_stored
    from llmworks.tokenize.load import read_json

    if model.format == "gguf":
        from llmworks.model.from_gguf import config_of

        config = config_of(model.gguf_path)
    elif (model.path / "embedding.json").exists():
        raise ModelError("holds word vectors, which have no layers; `llmworks show` and its report say what they know")
    elif model.path.is_dir():
        config = read_json(model.path / "config.json")
    else:
        raise ModelError(f"{model.name}: is {model.format}; what is shown is a Hugging Face directory or a GGUF file")
    try:
        if config.get("model_type") == "llmworks_ngram":
            raise ModelError("is an n-gram model, which has no layers; `llmworks show` says what was counted")
        if config.get("model_type") == "llmworks_recurrent":
            return RecurrentShape.model_validate(read_stored(config.get("shape") or {}))
        return shape_of(config)[1]
    except ValidationError as error:
        raise ModelError(f"{model.path}/config.json: {error.errors()[0]['msg']}") from None
    except ModelError as error:
        raise ModelError(f"{model.path}: {error}") from None


def _differences(one: Any_Shape, two: Any_Shape) -> list[tuple[str, str, str]]:
    """Fields that both have and that are not the same, derived sizes as what they come to."""
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
    """A row a part; blocks that are alike in all but their number once, where the first of them stands."""
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
                    shape + (f" (the {part.shares}'s)" if part.shares else ""),
                    part.parameters,
                    part.work,
                    part.cache * width,
                )
            )
    return rows


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 4 as "0–2, 4"."""
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
    """The table for a terminal."""
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
