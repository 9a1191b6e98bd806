"""The data card of a dataset (README.md): sources, licenses, rows dropped and why, lengths, languages, examples.

Facts are carried from dataset to dataset in `about`, so that every card shows the whole processing history. Cards
contain no dates.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from llmworks.core.artifact import Dataset
from llmworks.core.context import Context
from llmworks.core.documents import iterate_documents, list_shards, read_tables
from llmworks.core.types import Json
from llmworks.data.store.rows import Row, write_chat, write_preference

EXAMPLES = 3
EXAMPLE_CHARACTERS = 500
# How datasets.load_dataset finds the rows among the other files.
FRONT = ("---", "configs:", "- config_name: default", '  data_files: "*.parquet"', "---", "")
SHARES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def finish_dataset(
    ctx: Context,
    stage: str,
    parents: Sequence[Dataset],
    *,
    dropped: Mapping[str, int] | None = None,
    metrics: Mapping[str, Any] | None = None,
    note: str = "",
    extra: Mapping[str, Any] | None = None,
) -> Dataset:
    """Write the data card of the documents in `ctx.out` and return them as a dataset."""
    facts = measure_documents(ctx)
    sources = {s["name"]: s for parent in parents for s in get_sources(parent)}
    history = _merge_histories([parent.about.get("history", []) for parent in parents])
    of = ", ".join(sources) if len(sources) < 3 else f"{len(sources)} sources"
    entry: Json = {"stage": stage, "of": of, "documents": facts["documents"], "dropped": dict(dropped or {})}
    if note:
        entry["note"] = note
    history.append(entry)
    about = {
        "schema": "text",
        "documents": facts["documents"],
        "characters": facts["characters"],
        "dropped": dict(dropped or {}),
        "languages": facts["languages"],
        "sources": list(sources.values()),
        "history": history,
        **(extra or {}),
    }
    (ctx.out / "README.md").write_text(render_card(about, facts), encoding="utf-8")
    return Dataset(
        ctx.out,
        metrics={"documents": facts["documents"], "characters": facts["characters"], **(metrics or {})},
        about=about,
    )


def finish_rows(
    ctx: Context,
    stage: str,
    parents: Sequence[Dataset],
    rows: Sequence[Row],
    *,
    dropped: Mapping[str, int] | None = None,
    metrics: Mapping[str, Any] | None = None,
    note: str = "",
    extra: Mapping[str, Any] | None = None,
) -> Dataset:
    """Write conversations or preference pairs (at least one) into `ctx.out`, with their data card."""
    pairs = "chosen" in rows[0]
    (write_preference if pairs else write_chat)(ctx.out, rows)
    sources = {s["name"]: s for parent in parents for s in get_sources(parent)}
    history = _merge_histories([parent.about.get("history", []) for parent in parents])
    of = ", ".join(sources) if len(sources) < 3 else f"{len(sources)} sources"
    history.append(
        {
            "stage": stage,
            "of": of,
            "documents": len(rows),
            "dropped": dict(dropped or {}),
            **({"note": note} if note else {}),
        }
    )
    about = {
        "schema": "preference" if pairs else "chat",
        "rows": len(rows),
        "dropped": dict(dropped or {}),
        "sources": list(sources.values()),
        "history": history,
        **(extra or {}),
    }
    (ctx.out / "README.md").write_text(
        render_card(about, measure_rows(rows), "preference pairs" if pairs else "conversations"), encoding="utf-8"
    )
    return Dataset(ctx.out, metrics={"rows": len(rows), **(metrics or {})}, about=about)


def measure_rows(rows: Sequence[Row]) -> Json:
    """Return counts, length quantiles and the first examples of conversations or preference pairs."""
    import numpy as np

    turns = [
        row["messages"] if "messages" in row else [*row["prompt"], *row["chosen"], *row["rejected"]] for row in rows
    ]
    sizes = np.array([sum(len(m.get("content") or "") for m in messages) for messages in turns])
    examples = [
        {
            "id": row["id"],
            "text": "\n\n".join(
                f"{m['role']}: {m.get('content') or json.dumps(m.get('tool_calls'), ensure_ascii=False)}"
                for m in messages
            )[:EXAMPLE_CHARACTERS],
        }
        for row, messages in zip(rows[:EXAMPLES], turns, strict=False)
    ]
    return {
        "documents": len(rows),
        "characters": int(sizes.sum()),
        "languages": {},
        "examples": examples,
        "lengths": {f"{share:.0%}": int(np.quantile(sizes, share)) for share in SHARES},
    }


def get_sources(dataset: Dataset) -> list[Json]:
    """Return the sources of a dataset: those of its card, the asset that it is, or external files."""
    known: list[Json] | None = dataset.about.get("sources")
    if known is not None:
        return known
    if "asset" in dataset.about:
        return [
            {"name": dataset.about["asset"], "licence": dataset.about["licence"], "what": dataset.about.get("what", "")}
        ]
    return [{"name": dataset.name, "licence": "not stated", "what": "external files"}]


def _merge_histories(histories: Sequence[list[Json]]) -> list[Json]:
    """Concatenate histories; an entry shared by several parents appears once."""
    found: list[Json] = []
    for history in histories:
        found += [entry for entry in history if entry not in found]
    return found


def measure_documents(ctx: Context) -> Json:
    """Return counts, length quantiles, languages and the first examples of the documents in `ctx.out`."""
    import numpy as np
    import pyarrow.compute as pc

    lengths: list[Any] = []
    languages: Counter[str] = Counter()
    examples: list[Json] = []
    for file in list_shards(Dataset(ctx.out)):
        for table in read_tables(file):
            lengths.append(pc.utf8_length(table["text"]).to_numpy())
            found = pc.extract_regex(table["metadata"], r'"language": "(?P<code>[a-z]+)"')
            languages.update(code["code"] for code in found.to_pylist() if code)
            if len(examples) < EXAMPLES:
                for document in iterate_documents(table.slice(0, EXAMPLES - len(examples))):
                    examples.append(
                        {"id": document.id, "text": document.text[:EXAMPLE_CHARACTERS], "metadata": document.metadata}
                    )
    sizes = np.concatenate(lengths)
    return {
        "documents": len(sizes),
        "characters": int(sizes.sum()),
        "languages": dict(languages.most_common()),
        "examples": examples,
        "lengths": {f"{share:.0%}": int(np.quantile(sizes, share)) for share in SHARES},
    }


def render_card(about: Json, facts: Json, what: str = "documents") -> str:
    """Render the card as Markdown; `what` names the rows."""
    lines = [
        *FRONT,
        "# Data card",
        "",
        (
            f"{facts['documents']:,} {what}, {facts['characters']:,} characters; about {facts['characters'] // 4:,}"
            " tokens at 4 characters each."
        ),
        "",
    ]
    lines += ["## Sources", "", "| source | license | description |", "|---|---|---|"]
    lines += [
        f"| {_escape_cell(s['name'])} | {_escape_cell(s['licence'])} | {_escape_cell(s['what'])} |"
        for s in about["sources"]
    ]
    lines += [
        "",
        "## Processing history",
        "",
        f"| stage | input | {what} kept | dropped | reasons |",
        "|---|---|---|---|---|",
    ]
    for entry in about["history"]:
        why = "; ".join(
            f"{reason} {n:,}" for reason, n in sorted(entry["dropped"].items(), key=lambda item: -item[1])[:12]
        )
        lines.append(
            f"| {entry['stage']} | {_escape_cell(entry['of'])} | {entry['documents']:,} |"
            f" {sum(entry['dropped'].values()):,} |"
            f" {_escape_cell('; '.join(filter(None, (why, entry.get('note', '')))))} |"
        )
    near = sum(entry["dropped"].get("near-duplicate", 0) for entry in about["history"])
    compared = [e for e in about["history"] if e["stage"] == "data.dedup"]
    if compared:
        before = sum(e["documents"] + sum(e["dropped"].values()) for e in compared)
        lines += ["", f"Near-duplicate rate before deduplication: {near / max(1, before):.2%}."]
    lines += [
        "",
        "## Lengths",
        "",
        f"| quantile ({what}) | characters |",
        "|---|---|",
        *(f"| {share} | {size:,} |" for share, size in facts["lengths"].items()),
    ]
    if facts["languages"]:
        lines += [
            "",
            "## Languages",
            "",
            "| code | documents |",
            "|---|---|",
            *(f"| {code} | {n:,} |" for code, n in list(facts["languages"].items())[:20]),
        ]
    lines += ["", "## Examples"]
    for example in facts["examples"]:
        shown = example["text"].replace("~~~", "~ ~ ~")
        lines += ["", f"`{example['id']}`", "", "~~~text", shown, "~~~"]
    return "\n".join(lines) + "\n"


def _escape_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
