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
from llmworks.data.card import finish
from llmworks.data.store.parts import Span, spans, work
from llmworks.guard import Finding, apart

Kind = Literal["email", "phone", "ip", "card", "iban", "secret"]
KINDS: tuple[Kind, ...] = ("email", "phone", "ip", "card", "iban", "secret")
AROUND = 60  # characters of context shown on both sides
SHOWN = 4  # samples of each kind from each part


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
    done = work(ctx, "redact", partial(_redact_part, config), spans(data))
    if not done.sum("kept"):
        raise DataError(f"{data.name}: every document has findings; no document is left")
    done.gather(ctx.out)
    found, touched = done.total("found"), done.sum("touched")
    every = done.sum("kept") + done.sum("dropped")
    report = ctx.report
    report.title = f"PII and secrets in {data.name}"
    what = {"redact": "replaced", "tag": "tagged", "drop": "dropped"}[config.action]
    report.lead = f"{touched:,} of {every:,} documents have {found.total():,} findings; they were {what}."
    report.data = {"documents": every, "touched": touched, "found": dict(found), "dropped": done.sum("dropped")}
    report.table("Findings", ("kind", "count"), found.most_common())
    samples = [
        {"finding": s["kind"], "text": s["text"]}
        for kind in config.kinds
        for s in [s for part in done.summaries for s in part["shown"] if s["kind"] == kind][:SHOWN]
    ]
    report.samples("Context of findings", samples, note="A few of each kind, redacted, with the text around them.")
    metrics = {
        "documents": done.sum("kept"),
        "dropped": done.sum("dropped"),
        "touched": touched,
        **{f"found_{kind}": n for kind, n in sorted(found.items())},
    }
    dropped = {"personal data or secrets": done.sum("dropped")} if done.sum("dropped") else {}
    note = "; ".join(f"{kind} {n:,}" for kind, n in found.most_common())
    return finish(ctx, "data.redact", [data], dropped=dropped, metrics=metrics, note=f"{what}: {note}" if note else "")


def findings(text: str, kinds: list[Kind], examples: bool = False) -> list[Finding]:
    """Detect findings of these kinds in a text; of overlapping ones a secret or a number with a checksum wins."""
    from llmworks.guard.pii import CHECKS
    from llmworks.guard.secrets import secrets

    checks = {"secret": secrets, **CHECKS}
    order: tuple[Kind, ...] = ("secret", "iban", "card", "email", "ip", "phone")
    return apart([finding for kind in order if kind in kinds for finding in checks[kind](text, examples)])


def redacted(text: str, found: list[Finding], placeholder: str) -> str:
    """Replace the findings in a text by the placeholder."""
    parts = []
    at = 0
    for finding in found:
        parts += [text[at : finding.start], placeholder.replace("{kind}", finding.kind.upper())]
        at = finding.end
    return "".join([*parts, text[at:]])


def _redact_part(config: RedactConfig, part: Span, folder: Path) -> Json:
    counts: Counter[str] = Counter()
    shown: list[Json] = []
    touched = 0
    with DocumentWriter(folder) as writer, DocumentWriter(folder / "dropped", reasons=True) as dropped:
        for document in part.documents():
            found = findings(document.text, config.kinds, config.include_reserved)
            if not found:
                writer.add(document)
                continue
            touched += 1
            own = Counter(finding.kind for finding in found)
            counts.update(own)
            shown += _samples(document.text, found, shown)
            clean = redacted(document.text, found, config.placeholder)
            marked = replace(document, metadata={**document.metadata, "pii": dict(sorted(own.items()))})
            if config.action == "drop" and len(found) > config.drop_above:
                dropped.add(
                    replace(marked, text=clean), "personal data or secrets"
                )  # dropped documents are redacted too
            else:
                writer.add(replace(marked, text=clean) if config.action == "redact" else marked)
    return {"kept": writer.documents, "dropped": dropped.documents, "touched": touched, "found": counts, "shown": shown}


def _samples(text: str, found: list[Finding], shown: list[Json]) -> list[Json]:
    """Return the redacted context of the first finding of each kind, up to MAX_SAMPLES per kind."""
    new = []
    for kind in {finding.kind for finding in found}:
        if sum(s["kind"] == kind for s in shown) < SHOWN:
            first = next(f for f in found if f.kind == kind)
            start, end = max(0, first.start - AROUND), min(len(text), first.end + AROUND)
            inside = [
                replace(f, start=max(f.start, start) - start, end=min(f.end, end) - start)
                for f in found
                if f.end > start and f.start < end
            ]
            new.append({"kind": kind, "text": redacted(text[start:end], inside, "[{kind}]")})
    return sorted(new, key=lambda s: s["kind"])
