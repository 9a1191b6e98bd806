"""Stage `data.clean`: repair documents, identify their language and apply published quality filters.

Dropped documents are kept in `dropped/`, each with the first rule that it violated. The rules are in `filters/`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from llmworks.core.artifact import Config, Dataset
from llmworks.core.context import Context
from llmworks.core.documents import DocumentWriter
from llmworks.core.errors import DataError
from llmworks.core.types import Document, Json
from llmworks.data.card import finish_dataset
from llmworks.data.filters.c4 import C4
from llmworks.data.filters.fineweb import FineWeb
from llmworks.data.filters.gopher import GopherQuality, GopherRepetition
from llmworks.data.filters.instruction import Instruction
from llmworks.data.filters.language import Language, check_codes
from llmworks.data.filters.repair import Repair
from llmworks.data.store.parts import PartResults, Span, plan_spans, process_parts

if TYPE_CHECKING:
    from llmworks.data.filters.rules import FilterDecisions
    from llmworks.data.filters.words import WordVocabulary

BATCH_DOCUMENTS = 500
BATCH_CHARACTERS = 1 << 20
SAMPLES = 3  # documents dropped by each rule, from each part


class CleanConfig(Config):
    """Filters, applied in this order; null disables one.

    The defaults are FineWeb's, after a repair of lines.
    """

    repair: Repair | None = Field(
        default_factory=Repair, description="repair encoding and white space, remove boilerplate lines"
    )
    language: Language | None = Field(
        default_factory=Language, description="identify the language and optionally filter by it"
    )
    gopher_repetition: GopherRepetition | None = Field(
        default_factory=GopherRepetition, description="Gopher's repetition rules"
    )
    gopher_quality: GopherQuality | None = Field(default_factory=GopherQuality, description="Gopher's quality rules")
    c4: C4 | None = Field(
        default_factory=lambda: C4(filter_no_terminal_punct=False),
        description="C4's rules, as FineWeb uses them: without filter_no_terminal_punct",
    )
    fineweb: FineWeb | None = Field(default_factory=FineWeb, description="FineWeb's own rules")
    instruction: Instruction | None = Field(None, description="length and symbol rules for instruction data")


def clean(config: CleanConfig, data: Dataset, ctx: Context) -> Dataset:
    """Repair and filter documents; dropped ones go to `dropped/` with their reason.

    Adds `language` and `language_score` to the metadata.

    Errors: UserError for an unknown language code; DataError when nothing is left; MissingDependency without the extra
    `corpus`.
    """
    if config.language:
        check_codes(config.language.languages)
    done = process_parts(ctx, "clean", partial(_clean_part, config), plan_spans(data))
    kept, dropped = done.sum_values("kept"), done.sum_counters("dropped")
    if not kept:
        raise DataError(
            f"{data.name}: all {dropped.total()} documents were dropped; the most frequent reason:"
            f" {dropped.most_common(1)[0][0]}"
        )
    done.gather(ctx.out)
    _report(ctx, data, done)
    metrics = {
        "documents": kept,
        "dropped": dropped.total(),
        "characters": done.sum_values("characters"),
        "changed": done.sum_values("changed"),
    }
    return finish_dataset(ctx, "data.clean", [data], dropped=dict(dropped.most_common()), metrics=metrics)


def batch_documents(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Yield batches of BATCH_DOCUMENTS documents, or fewer of at least BATCH_CHARACTERS characters."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _clean_part(config: CleanConfig, part: Span, folder: Path) -> Json:
    from llmworks.data.filters.words import WordVocabulary

    tally = FilterStatistics()
    words = WordVocabulary()
    with DocumentWriter(folder) as writer, DocumentWriter(folder / "dropped", reasons=True) as dropped:
        for batch in batch_documents(part.documents()):
            tally.before += sum(len(d.text) for d in batch)
            for document, reason in filter_batch(config, batch, words, tally):
                if reason:
                    dropped.add(document, reason)
                    tally.add_dropped(document, reason)
                else:
                    writer.add(document)
    return {**vars(tally), "kept": writer.documents, "characters": writer.characters}


class FilterStatistics:
    """Counters and samples collected while documents are filtered."""

    def __init__(self) -> None:
        self.before = 0
        self.changed = 0
        self.dropped: Counter[str] = Counter()
        self.lines: Counter[str] = Counter()
        self.languages: Counter[str] = Counter()
        self.histograms: dict[str, Json] = {}
        self.samples: dict[str, list[Json]] = {}

    def add_dropped(self, document: Document, reason: str) -> None:
        """Count a dropped document; keep the beginning of the first few as samples."""
        self.dropped[reason] += 1
        samples = self.samples.setdefault(reason, [])
        if len(samples) < SAMPLES:
            samples.append({"id": document.id, "text": document.text[:600]})

    def add_histograms(self, rules: str, judgement: FilterDecisions) -> None:
        """Add a batch's histograms to those of the part, under the name of the rule set."""
        for label, histogram in judgement.histograms.items():
            known = self.histograms.setdefault(
                f"{rules}: {label}", {**histogram, "counts": [0] * len(histogram["counts"])}
            )
            known["counts"] = [a + b for a, b in zip(known["counts"], histogram["counts"], strict=True)]


def filter_batch(
    config: CleanConfig, batch: list[Document], words: WordVocabulary, tally: FilterStatistics
) -> Iterator[tuple[Document, str]]:
    """Yield (document, reason) for a batch: repaired documents with an empty reason if kept, else as the violated rule
    received them.
    """
    import numpy as np

    from llmworks.data.filters import c4, fineweb, gopher, instruction

    documents = list(batch)
    reasons = [""] * len(batch)
    left = list(range(len(batch)))
    if config.repair:
        _repair_documents(config.repair, documents, reasons, tally)
        left = [i for i in left if not reasons[i]]
    if config.language:
        _identify_languages(config.language, documents, left, reasons, tally)
        left = [i for i in left if not reasons[i]]

    counted: dict[int, tuple[str, int]] = {}  # index -> (text, its number of words)

    def apply(*judged: tuple[str, FilterDecisions]) -> None:
        """Apply the results of rule sets on the same texts; the first violated rule counts."""
        nonlocal left
        for rules, judgement in judged:
            tally.add_histograms(rules, judgement)
        for i, *found in zip(left, *(judgement.reasons for _, judgement in judged), strict=True):
            reasons[i] = next(filter(None, found), "")
        left = [i for i in left if not reasons[i]]

    if (config.gopher_repetition or config.gopher_quality) and left:
        encoded = words.encode([documents[i].text for i in left])
        counted = {i: (documents[i].text, count) for i, count in zip(left, encoded.counts.tolist(), strict=True)}
        judged = []
        if config.gopher_repetition:
            judged.append(("gopher", gopher.filter_gopher_repetition(config.gopher_repetition, encoded, words)))
        if config.gopher_quality:
            judged.append(("gopher", gopher.filter_gopher_quality(config.gopher_quality, encoded, words)))
        apply(*judged)
    if config.c4 and left:
        texts, judgement, lines = c4.filter_c4(config.c4, [documents[i].text for i in left], words)
        tally.lines.update(lines)
        for i, text, reason in zip(left, texts, judgement.reasons, strict=True):
            if not reason and text != documents[i].text:
                documents[i] = replace(documents[i], text=text)
        apply(("c4", judgement))
    if config.fineweb and left:
        changed = [i for i in left if counted.get(i, ("", 0))[0] is not documents[i].text]
        again = words.encode([documents[i].text for i in changed]).counts.tolist()
        counted |= {i: (documents[i].text, count) for i, count in zip(changed, again, strict=True)}
        counts = np.array([counted[i][1] for i in left])
        apply(("fineweb", fineweb.filter_fineweb(config.fineweb, [documents[i].text for i in left], counts)))
    if config.instruction and left:
        apply(("instruction", instruction.filter_instructions(config.instruction, [documents[i].text for i in left])))
    for before, document, reason in zip(batch, documents, reasons, strict=True):
        if not reason and not document.text.strip():
            reason = "nothing is left"
        tally.changed += not reason and document.text != before.text
        yield document, reason


def _repair_documents(config: Repair, documents: list[Document], reasons: list[str], tally: FilterStatistics) -> None:
    from llmworks.data.filters.repair import repair

    for i, document in enumerate(documents):
        text, lines = repair(config, document.text)
        if lines:
            tally.lines["boilerplate"] += lines
        if not text:
            reasons[i] = "nothing is left"
        elif text != document.text:
            documents[i] = replace(document, text=text)


def _identify_languages(
    config: Language, documents: list[Document], left: list[int], reasons: list[str], tally: FilterStatistics
) -> None:
    from llmworks.data.filters.language import identify_language

    for i in left:
        code, score = identify_language(documents[i].text)
        tally.languages[code or "?"] += 1
        documents[i] = replace(
            documents[i], metadata={**documents[i].metadata, "language": code, "language_score": round(score, 3)}
        )
        if config.languages and not (code in config.languages and score >= config.language_threshold):
            reasons[i] = f"language: {code or '?'}" if code not in config.languages else "language: not sure"


def _report(ctx: Context, data: Dataset, done: PartResults) -> None:
    kept, dropped = done.sum_values("kept"), done.sum_counters("dropped")
    before, after = done.sum_values("before"), done.sum_values("characters")
    report = ctx.report
    report.title = f"{data.name} after cleaning"
    report.subtitle = (
        f"{kept:,} of {kept + dropped.total():,} documents are kept, {after:,} of {before:,} characters"
        f" ({after / max(before, 1):.1%}); {done.sum_values('changed'):,} of the kept documents were changed."
    )
    report.data = {
        "kept": kept,
        "dropped": dict(dropped),
        "lines": dict(done.sum_counters("lines")),
        "languages": dict(done.sum_counters("languages")),
    }
    every = kept + dropped.total()
    report.add_table(
        "Dropped documents",
        ("first violated rule", "documents", "share"),
        [(r, n, f"{n / every:.2%}") for r, n in dropped.most_common()],
        note="They are in dropped/ with their reason. Rules are applied in order; each document counts once.",
    )
    if lines := done.sum_counters("lines"):
        report.add_table("Dropped lines", ("reason", "lines"), lines.most_common())
    if languages := done.sum_counters("languages"):
        report.add_table("Languages", ("code", "documents"), languages.most_common(20))
    histograms: dict[str, Json] = {}
    for summary in done.summaries:
        for label, histogram in summary["histograms"].items():
            known = histograms.setdefault(label, {**histogram, "counts": [0] * len(histogram["counts"])})
            known["counts"] = [a + b for a, b in zip(known["counts"], histogram["counts"], strict=True)]
    if histograms:
        report.add_histograms(
            "Distributions of the filtered quantities",
            histograms,
            note="Documents by value; red lines are the thresholds, the last bar includes all larger values.",
        )
    samples = {
        reason: [s for summary in done.summaries for s in summary["samples"].get(reason, [])][:SAMPLES]
        for reason in dropped
    }
    report.add_samples(
        "Samples of dropped documents",
        [{"why": f"{reason} · {s['id']}", "text": s["text"]} for reason in dropped for s in samples[reason]],
        note="The beginning of a few documents per reason.",
    )
