"""Stage `tokenize.compare`: compare tokenizers on the same texts by compression, fertility, lossless round trip and
token boundaries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Dataset, Model, Report, Tokenizer
from llmworks.core.context import Context
from llmworks.core.documents import read_documents
from llmworks.core.errors import UserError
from llmworks.tokenize import view
from llmworks.tokenize.chat.named_templates import load_model_tokenizer
from llmworks.tokenize.statistics import TokenizerUsage, get_group, measure_usage

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder

SAMPLE_CHARACTERS, TERMINAL_CHARACTERS, MAX_SAMPLES = (
    400,
    160,
    6,
)  # characters shown of a text on the page and in the terminal, texts shown
SAMPLES = {
    "English": "The quick brown fox can't jump over 12,345 lazy dogs; it's 3.14159 metres away.",
    "German": "Die Donaudampfschifffahrtsgesellschaft fährt übermorgen um 7:45 Uhr.",
    "Chinese": "人工智能正在改变我们的生活方式。",
    "Russian": "Съешь же ещё этих мягких французских булок.",
    "code": "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2  # m²\n",
    "signs": "   two  spaces\t\ttabs 👩‍💻 naïve ½ x≠y",
}


class CompareConfig(Config):
    """Texts to compare the tokenizers on."""

    text: str = Field(
        "", description="text to tokenize; without it and without data, short samples of several languages"
    )
    max_characters: int = Field(2_000_000, gt=0, description="maximum number of characters taken from the documents")


def compare(
    config: CompareConfig, tokenizers: dict[str, Tokenizer | Model | Adapter], ctx: Context, data: Dataset | None = None
) -> Report:
    """Measure each tokenizer on the same texts; a text that decoding does not restore exactly is counted as lossy.

    Errors: UserError without a tokenizer; ModelError for a model without one; DataError for data that are not
    documents.
    """
    if not tokenizers:
        raise UserError("compare needs at least one tokenizer; name each: --tokenizers NAME=REF")
    loaded = {name: load_model_tokenizer(artifact) for name, artifact in tokenizers.items()}
    texts = _collect_texts(config, data)
    usages: dict[str, TokenizerUsage] = {}
    with ctx.progress.bar("measure", len(loaded), "tokenizers") as bar:
        for name, tokenizer in loaded.items():
            usages[name] = measure_usage(tokenizer, texts)
            bar.advance()
    best = max(
        usages, key=lambda name: (-usages[name].total.lossy, usages[name].total.bytes_per_token)
    )  # a lossy tokenizer is never the best
    rows, metrics = _build_rows(loaded, usages, best)
    report = ctx.report
    report.title = (
        f"{len(loaded)} tokenizers on {data.name if data else 'a text' if config.text else 'six sample texts'}"
    )
    losing = [name for name, usage in usages.items() if usage.total.lossy]
    report.subtitle = f"{best} compresses best: {usages[best].total.bytes_per_token:.2f} bytes per token." + (
        f" {' and '.join(losing)} {'does' if len(losing) == 1 else 'do'} not round-trip every text." if losing else ""
    )
    _report_metrics(report, texts, usages, best, rows)
    groups = sorted(usages[best].groups, key=lambda g: -usages[best].groups[g].bytes)[:20]
    report.add_table(
        "Bytes per token",
        ("group", *loaded),
        [(group, *(usages[name].groups[group].bytes_per_token for name in loaded)) for group in groups],
    )
    _show_boundaries(report, texts, groups, loaded)
    return Report(ctx.out, metrics=metrics)


def _build_rows(
    loaded: dict[str, Any], usages: dict[str, TokenizerUsage], best: str
) -> tuple[list[tuple[str, int, int, float, float, float, int]], dict[str, float]]:
    """Return a table row for each tokenizer, and the metrics."""
    metrics: dict[str, float] = {}
    rows = []
    for name, tokenizer in loaded.items():
        whole = usages[name].total
        metrics |= {f"{name}_bytes_per_token": round(whole.bytes_per_token, 4), f"{name}_lost": whole.lossy}
        rows.append(
            (
                name,
                len(tokenizer),
                whole.tokens,
                whole.bytes_per_token,
                whole.fertility,
                whole.tokens / usages[best].total.tokens,
                whole.lossy,
            )
        )
    return rows, metrics


def _report_metrics(
    report: ReportBuilder,
    texts: list[tuple[str, str]],
    usages: dict[str, TokenizerUsage],
    best: str,
    rows: list[tuple[str, int, int, float, float, float, int]],
) -> None:
    """Report the metrics of all tokenizers."""
    report.data = {
        "texts": len(texts),
        "bytes": usages[best].total.bytes,
        "tokenizers": {
            row[0]: {
                "vocabulary": row[1],
                "tokens": row[2],
                "bytes_per_token": row[3],
                "tokens_per_word": row[4],
                "lost": row[6],
            }
            for row in rows
        },
    }
    columns = (
        "tokenizer",
        "vocabulary",
        "tokens",
        "bytes per token",
        "tokens per word",
        f"tokens relative to {best}",
        "lossy texts",
    )
    report.add_table("Metrics", columns, rows)


def _show_boundaries(
    report: ReportBuilder, texts: list[tuple[str, str]], groups: list[str], loaded: dict[str, Any]
) -> None:
    """Show the token boundaries of each tokenizer in some of the texts, for the page and the terminal."""
    lines = [report.subtitle]
    firsts = (
        texts
        if len(texts) <= MAX_SAMPLES
        else [(group, next(text for g, text in texts if g == group)) for group in groups[:MAX_SAMPLES]]
    )
    for group, text in ((group, text[:SAMPLE_CHARACTERS]) for group, text in firsts):
        drawn = {
            name: tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            for name, tokenizer in loaded.items()
        }
        page = "".join(
            f"<p class=note>{view.escape_html(name)}: {len(ids)}"
            f" tokens</p>{view.format_boundaries_html(loaded[name], ids)}"
            for name, ids in drawn.items()
        )
        plain = "\n\n".join(
            f"{name}: {len(ids)} tokens\n{view.format_boundaries_plain(loaded[name], ids)}"
            for name, ids in drawn.items()
        )
        report.add_drawing(f"Token boundaries: {group}", view.BOUNDARY_STYLE + page, plain=plain)
        short = {
            name: tokenizer(text[:TERMINAL_CHARACTERS], add_special_tokens=False, split_special_tokens=True)[
                "input_ids"
            ]
            for name, tokenizer in loaded.items()
        }
        lines += [
            f"\n{group}",
            *(
                f"{name:<16} {len(ids):>5}  {view.format_boundaries_ansi(loaded[name], ids)}"
                for name, ids in short.items()
            ),
        ]
    report.terminal = "\n".join(lines)


def _collect_texts(config: CompareConfig, data: Dataset | None) -> list[tuple[str, str]]:
    """Return the (group, text) pairs to compare on."""
    found = [("the text", config.text)] if config.text else []
    left = config.max_characters
    for document in read_documents(data) if data is not None else ():
        found.append((get_group(document), document.text[:left]))
        left -= len(document.text)
        if left <= 0:
            break
    return found or list(SAMPLES.items())
