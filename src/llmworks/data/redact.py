"""Stage `data.redact`: find PII and secrets in documents; redact them, tag the documents, or drop the documents.

The detectors are in `guard/pii.py` and `guard/secrets.py`. Findings are counted; their values are never written.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Config, Dataset
from llmworks.core.context import Context
from llmworks.core.documents import DocumentWriter
from llmworks.core.errors import DataError
from llmworks.core.types import Json
from llmworks.data.card import finish_dataset
from llmworks.data.store.parts import Span, plan_spans, process_parts
from llmworks.guard import SensitiveSpan, remove_overlaps

Kind = Literal["email", "phone", "ip", "card", "iban", "secret"]
KINDS: tuple[Kind, ...] = ("email", "phone", "ip", "card", "iban", "secret")
CONTEXT_CHARACTERS = 60  # characters of context shown on both sides
MAX_SAMPLES = 4  # samples of each kind from each part


class RedactConfig(Config):
    """Kinds of findings to detect, and the action taken."""

    kinds: list[Kind] = Field(
        default_factory=lambda: list(KINDS), min_length=1, description="kinds of PII and secrets to detect"
    )
    action: Literal["redact", "tag", "drop"] = Field(
        "redact",
        description="redact: replace by the placeholder; tag: only count in the metadata field `pii`; drop: drop the"
        " document",
    )
    drop_above: int = Field(0, ge=0, description="for action drop: drop documents with more findings than this")
    placeholder: str = Field("[{kind}]", description="replacement for a finding; {kind} is EMAIL, PHONE ...")
    include_reserved: bool = Field(
        False, description="also detect reserved example values: example.com, private networks, 555-01xx, placeholders"
    )


def redact(config: RedactConfig, data: Dataset, ctx: Context) -> Dataset:
    """Apply the detectors to every document; the metadata gets `pii`, the number of findings by kind.

    Errors: DataError when no document is left.
    """
    done = process_parts(ctx, "redact", partial(_redact_part, config), plan_spans(data))
    if not done.sum_values("kept"):
        raise DataError(f"{data.name}: every document has findings; no document is left")
    done.gather(ctx.out)
    found, touched = done.sum_counters("found"), done.sum_values("touched")
    every = done.sum_values("kept") + done.sum_values("dropped")
    report = ctx.report
    report.title = f"PII and secrets in {data.name}"
    what = {"redact": "replaced", "tag": "tagged", "drop": "dropped"}[config.action]
    report.subtitle = f"{touched:,} of {every:,} documents have {found.total():,} findings; they were {what}."
    report.data = {"documents": every, "touched": touched, "found": dict(found), "dropped": done.sum_values("dropped")}
    report.add_table("Findings", ("kind", "count"), found.most_common())
    samples = [
        {"finding": s["kind"], "text": s["text"]}
        for kind in config.kinds
        for s in [s for part in done.summaries for s in part["shown"] if s["kind"] == kind][:MAX_SAMPLES]
    ]
    report.add_samples("Context of findings", samples, note="A few of each kind, redacted, with the text around them.")
    metrics = {
        "documents": done.sum_values("kept"),
        "dropped": done.sum_values("dropped"),
        "touched": touched,
        **{f"found_{kind}": n for kind, n in sorted(found.items())},
    }
    dropped = {"personal data or secrets": done.sum_values("dropped")} if done.sum_values("dropped") else {}
    note = "; ".join(f"{kind} {n:,}" for kind, n in found.most_common())
    return finish_dataset(
        ctx, "data.redact", [data], dropped=dropped, metrics=metrics, note=f"{what}: {note}" if note else ""
    )


def detect_findings(text: str, kinds: list[Kind], examples: bool = False) -> list[SensitiveSpan]:
    """Detect findings of these kinds in a text; of overlapping ones a secret or a number with a checksum wins."""
    from llmworks.guard.pii import DETECTORS
    from llmworks.guard.secrets import find_secrets

    checks = {"secret": find_secrets, **DETECTORS}
    order: tuple[Kind, ...] = ("secret", "iban", "card", "email", "ip", "phone")
    return remove_overlaps([finding for kind in order if kind in kinds for finding in checks[kind](text, examples)])


def redact_text(text: str, findings: list[SensitiveSpan], placeholder: str) -> str:
    """Replace the findings in a text by the placeholder."""
    parts = []
    at = 0
    for finding in findings:
        parts += [text[at : finding.start], placeholder.replace("{kind}", finding.kind.upper())]
        at = finding.end
    return "".join([*parts, text[at:]])


def _redact_part(config: RedactConfig, part: Span, folder: Path) -> Json:
    counts: Counter[str] = Counter()
    shown: list[Json] = []
    touched = 0
    with DocumentWriter(folder) as writer, DocumentWriter(folder / "dropped", reasons=True) as dropped:
        for document in part.documents():
            found = detect_findings(document.text, config.kinds, config.include_reserved)
            if not found:
                writer.add(document)
                continue
            touched += 1
            own = Counter(finding.kind for finding in found)
            counts.update(own)
            shown += _collect_samples(document.text, found, shown)
            clean = redact_text(document.text, found, config.placeholder)
            marked = replace(document, metadata={**document.metadata, "pii": dict(sorted(own.items()))})
            if config.action == "drop" and len(found) > config.drop_above:
                dropped.add(
                    replace(marked, text=clean), "personal data or secrets"
                )  # dropped documents are redacted too
            else:
                writer.add(replace(marked, text=clean) if config.action == "redact" else marked)
    return {"kept": writer.documents, "dropped": dropped.documents, "touched": touched, "found": counts, "shown": shown}


def _collect_samples(text: str, found: list[SensitiveSpan], shown: list[Json]) -> list[Json]:
    """Return the redacted context of the first finding of each kind, up to MAX_SAMPLES per kind."""
    new = []
    for kind in {finding.kind for finding in found}:
        if sum(s["kind"] == kind for s in shown) < MAX_SAMPLES:
            first = next(f for f in found if f.kind == kind)
            start, end = max(0, first.start - CONTEXT_CHARACTERS), min(len(text), first.end + CONTEXT_CHARACTERS)
            inside = [
                replace(f, start=max(f.start, start) - start, end=min(f.end, end) - start)
                for f in found
                if f.end > start and f.start < end
            ]
            new.append({"kind": kind, "text": redact_text(text[start:end], inside, "[{kind}]")})
    return sorted(new, key=lambda s: s["kind"])
