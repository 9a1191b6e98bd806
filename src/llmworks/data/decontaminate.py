"""Stage `data.decontaminate`: find training documents that overlap with evaluation sets, and drop or flag them.

Overlaps are shared word n-grams, 13 words as in GPT-3 (Brown et al. 2020, appendix C), fewer for short rows, and
near-duplicates by MinHash.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Config, Dataset
from llmworks.core.context import Context
from llmworks.core.documents import DocumentWriter, iterate_documents
from llmworks.core.errors import DataError
from llmworks.core.types import Document, Json
from llmworks.data.card import finish_dataset
from llmworks.data.duplicates.near import Near
from llmworks.data.store.parts import PartResults, Span, plan_spans, process_parts

if TYPE_CHECKING:
    from llmworks.data.text.hashing import Array, TextHashes

OVERLAPS, INDEX = "overlaps.jsonl", "index.npz"
MAX_SAMPLES = 40
LETTER = re.compile(r"[A-Za-z\x80-\U0010ffff]")


class DecontaminateConfig(Config):
    """Definition of an overlap, and the action taken."""

    ngram: int = Field(
        13,
        ge=3,
        le=50,
        description="n-gram size: words in a row shared by a document and a test row; 13 or 8 are usual",
    )
    short_ngram: int = Field(
        8, ge=3, description="n-gram size for test rows shorter than ngram; rows shorter than this are not compared"
    )
    min_share: float = Field(
        0.0, ge=0, le=1, description="fraction of a test row's n-grams that a document must contain; 0: one n-gram"
    )
    include_numeric_ngrams: bool = Field(
        False, description="also count n-grams in which at least half of the words are numbers, such as 1 2 3 4 ..."
    )
    near: Near | None = Field(
        default_factory=lambda: Near(threshold=0.5), description="also find near-duplicates of whole rows (MinHash)"
    )
    action: Literal["drop", "flag"] = Field(
        "drop", description="drop: drop the document; flag: keep it with `contaminated_by` in its metadata"
    )

    @model_validator(mode="after")
    def _shorter(self) -> Self:
        if self.short_ngram > self.ngram:
            raise ValueError(
                f"short_ngram is {self.short_ngram}, ngram is {self.ngram}: short_ngram must not be larger"
            )
        return self


def decontaminate(config: DecontaminateConfig, data: Dataset, tests: dict[str, Dataset], ctx: Context) -> Dataset:
    """Compare every document with every row of `tests`; write each overlap to overlaps.jsonl with both ids.

    Errors: DataError for a test set without rows that can be compared, or when no document is left.
    """
    rows = _build_index(config, tests, ctx.scratch / INDEX)
    done = process_parts(
        ctx, "compare", partial(_compare_part, config, ctx.scratch / INDEX, rows.names), plan_spans(data)
    )
    if not done.sum_values("kept"):
        raise DataError(f"{data.name}: every document overlaps with the test sets; no document is left")
    done.gather(ctx.out)
    touched = _report(config, ctx, data, rows, done)
    metrics = {
        "documents": done.sum_values("kept"),
        "dropped": done.sum_values("dropped"),
        "flagged": done.sum_values("flagged"),
        "contaminated_test_rows": touched,
        "test_rows": len(rows.names),
    }
    dropped = {"overlaps with a test": done.sum_values("dropped")} if done.sum_values("dropped") else {}
    return finish_dataset(
        ctx, "data.decontaminate", [data], dropped=dropped, metrics=metrics, note=f"against {', '.join(rows.sizes)}"
    )


@dataclass(frozen=True)
class TestSetRows:
    """The test rows: (test set, id) of each, and per test set the number of rows and of rows without n-grams."""

    names: list[tuple[str, str]]
    sizes: Counter[str]
    too_short: Counter[str]


def _build_index(config: DecontaminateConfig, tests: Mapping[str, Dataset], path: Path) -> TestSetRows:
    """Write the index of all test rows: sorted n-gram hashes with their rows, MinHash bands and shingle sets."""
    import numpy as np
    import pyarrow as pa

    from llmworks.data.duplicates import near
    from llmworks.data.store.eval_texts import read_eval_rows
    from llmworks.data.text.hashing import WORD, hash_shingles, hash_words, unique_hashes

    names: list[tuple[str, str]] = []
    texts: list[str] = []
    for name, dataset in tests.items():
        for id, text in read_eval_rows(dataset):
            names.append((name, id))
            texts.append(text)
    sizes = Counter(name for name, _ in names)
    runs: dict[int, list[tuple[Array, Array]]] = {config.ngram: [], config.short_ngram: []}
    totals = np.zeros(len(names), dtype=np.int64)
    bands: list[Array] = []
    values: list[Array] = []
    counts: list[Array] = []
    first = 0
    for words in hash_words(pa.array(texts, pa.string())):
        own = words.counts
        lettered = [
            bool(LETTER.search(word)) for text in texts[first : first + len(words)] for word in WORD.findall(text)
        ]
        telling = np.concatenate(([0], np.cumsum(lettered, dtype=np.int64)))
        for n in {config.ngram, config.short_ngram}:
            grams = hash_shingles(words, n)
            fits = own >= config.ngram if n == config.ngram else (own >= n) & (own < config.ngram)
            mask = fits[grams.owner]
            if not config.include_numeric_ngrams:
                begin = np.arange(len(grams.values)) + (words.starts - grams.starts)[grams.owner]
                mask &= (telling[np.minimum(begin + n, len(lettered))] - telling[begin]) * 2 > n
            runs[n].append((grams.values[mask], grams.owner[mask] + first))
        if config.near:
            sets = unique_hashes(hash_shingles(words, config.near.ngram_size))
            values.append(sets.values)
            counts.append(sets.counts)
            bands.append(
                near.hash_bands(near.minhash_signatures(sets, config.near.num_perm), config.near.rows_per_band)
            )
        first += len(words)
    arrays: dict[str, Any] = {}
    for n, found in runs.items():
        keys, owners = (np.concatenate(column) for column in zip(*found, strict=True))
        pairs = np.zeros(len(keys), dtype=[("key", np.uint64), ("owner", np.int64)])
        pairs["key"], pairs["owner"] = keys, owners
        pairs = np.unique(pairs)
        np.add.at(totals, pairs["owner"], 1)
        arrays[f"keys{n}"], arrays[f"owners{n}"] = pairs["key"], pairs["owner"]
    if config.near:
        arrays["bands"] = np.concatenate(bands, axis=1)
        arrays["values"], arrays["starts"] = (
            np.concatenate(values),
            np.concatenate(([0], np.cumsum(np.concatenate(counts)))),
        )
    np.savez(path, totals=totals, **arrays)
    return TestSetRows(names, sizes, Counter(names[i][0] for i in np.flatnonzero(totals == 0)))


@dataclass(frozen=True)
class Overlap:
    """An overlap of a document with a test row.

    `share` is the fraction of the row's n-grams or the Jaccard similarity, `place` the word in the document at which
    the first shared n-gram begins, `n` the n-gram size (0 for a near-duplicate).
    """

    row: int
    kind: str
    share: float
    word_index: int = 0
    ngram_size: int = 0


def find_overlaps(
    config: DecontaminateConfig, index: Mapping[str, Array], words: TextHashes
) -> dict[int, list[Overlap]]:
    """Find the overlaps of some documents; the keys are the documents' indices."""
    import numpy as np

    from llmworks.data.text.hashing import hash_shingles

    found: dict[int, list[Overlap]] = {}
    for n in sorted({config.ngram, config.short_ngram}, reverse=True):
        keys, owners = index[f"keys{n}"], index[f"owners{n}"]
        if not len(keys):
            continue
        grams = hash_shingles(words, n)
        fits = (words.counts >= n)[grams.owner]
        at = np.minimum(np.searchsorted(keys, grams.values), len(keys) - 1)
        hits = np.flatnonzero((keys[at] == grams.values) & fits)
        seen: dict[tuple[int, int], tuple[set[int], int]] = {}
        for hit in hits.tolist():
            document, key = int(grams.owner[hit]), int(grams.values[hit])
            place = int(np.searchsorted(keys, grams.values[hit], side="left"))
            while place < len(keys) and int(keys[place]) == key:
                runs, _ = seen.setdefault((document, int(owners[place])), (set(), int(hit - grams.starts[document])))
                runs.add(key)
                place += 1
        for (document, row), (runs, begin) in seen.items():
            share = len(runs) / int(index["totals"][row])
            if share >= config.min_share:
                found.setdefault(document, []).append(Overlap(row, f"{n} words in a row", round(share, 4), begin, n))
    if config.near:
        for document, row, similarity in _find_near_duplicates(config.near, index, words):
            found.setdefault(document, []).append(Overlap(row, "near-duplicate", round(similarity, 4)))
    return found


def _find_near_duplicates(
    config: Near, index: Mapping[str, Array], words: TextHashes
) -> Iterator[tuple[int, int, float]]:
    """Yield (document, test row, Jaccard similarity) of near-duplicates."""
    import numpy as np

    from llmworks.data.duplicates import near
    from llmworks.data.text.hashing import hash_shingles, unique_hashes

    sets = unique_hashes(hash_shingles(words, config.ngram_size))
    bands = near.hash_bands(near.minhash_signatures(sets, config.num_perm), config.rows_per_band)
    candidates: set[tuple[int, int]] = set()
    for own, theirs in zip(bands, index["bands"], strict=True):
        order = np.argsort(theirs, kind="stable")
        ordered = theirs[order]
        begin, end = np.searchsorted(ordered, own, side="left"), np.searchsorted(ordered, own, side="right")
        for document in np.flatnonzero((end > begin) & (own != 0)).tolist():
            candidates.update((document, int(row)) for row in order[begin[document] : end[document]])
    values, starts = index["values"], index["starts"]
    for document, row in sorted(candidates):
        similarity = near.jaccard(sets[document], values[starts[row] : starts[row + 1]])
        if similarity >= config.threshold:
            yield document, row, similarity


def _compare_part(
    config: DecontaminateConfig, path: Path, names: list[tuple[str, str]], part: Span, folder: Path
) -> Json:
    import numpy as np

    from llmworks.data.text.hashing import hash_words

    index = dict(np.load(path))
    touched: dict[str, int] = {}
    flagged = 0
    kinds: Counter[str] = Counter()
    shown: list[Json] = []
    with (
        DocumentWriter(folder) as writer,
        DocumentWriter(folder / "dropped", reasons=True) as dropped,
        (folder / OVERLAPS).open("w", encoding="utf-8") as side,
    ):
        for table in part.tables():
            found: dict[int, list[Overlap]] = {}
            first = 0
            for words in hash_words(table["text"]):
                found |= {first + place: items for place, items in find_overlaps(config, index, words).items()}
                first += len(words)
            if not found:
                writer.add_table(table)
                continue
            for place, document in enumerate(iterate_documents(table)):
                items = found.get(place)
                if not items:
                    writer.add(document)
                    continue
                for item in items:
                    row = _build_row(names, item, document)
                    side.write(json.dumps(row, ensure_ascii=False) + "\n")
                    touched[str(item.row)] = touched.get(str(item.row), 0) + 1
                    kinds[item.kind] += 1
                    if len(shown) < MAX_SAMPLES:
                        shown.append(row)
                tests = sorted({"/".join(names[item.row]) for item in items})
                marked = replace(document, metadata={**document.metadata, "contaminated_by": tests[:20]})
                if config.action == "drop":
                    dropped.add(marked, "overlaps with a test")
                else:
                    writer.add(marked)
                    flagged += 1
    return {
        "kept": writer.documents,
        "dropped": dropped.documents,
        "flagged": flagged,
        "touched": touched,
        "kinds": kinds,
        "shown": shown,
    }


def _build_row(names: list[tuple[str, str]], item: Overlap, document: Document) -> dict[str, object]:
    """Return the row of overlaps.jsonl for one overlap."""
    name, id = names[item.row]
    row = {
        "test": name,
        "row": id,
        "document": document.id,
        "kind": item.kind,
        "share": item.share,
        "text": extract_excerpt(document, item),
    }
    return row


def extract_excerpt(document: Document, item: Overlap) -> str:
    """Return the first shared n-gram, or the beginning of a near-duplicate."""
    if not item.ngram_size:
        return document.text[:200]
    from llmworks.data.text.hashing import WORD

    words = list(WORD.finditer(document.text))[item.word_index : item.word_index + item.ngram_size]
    return document.text[words[0].start() : words[-1].end()] if words else ""


def _report(config: DecontaminateConfig, ctx: Context, data: Dataset, rows: TestSetRows, done: PartResults) -> int:
    """Report the overlaps; returns the number of contaminated test rows."""
    touched = done.sum_counters("touched")
    by_test = Counter(rows.names[int(row)][0] for row in touched)
    report = ctx.report
    changed = done.sum_values("dropped") or done.sum_values("flagged")
    report.title = f"{data.name} against {', '.join(rows.sizes)}"
    report.subtitle = (
        f"{changed:,} of {done.sum_values('kept') + done.sum_values('dropped'):,} documents overlap with a test row"
        " and were"
        f" {'dropped' if config.action == 'drop' else 'flagged'}; {len(touched):,} of {len(rows.names):,} test rows are"
        " contaminated."
    )
    report.data = {
        "dropped": done.sum_values("dropped"),
        "flagged": done.sum_values("flagged"),
        "touched": dict(by_test),
        "test_rows": dict(rows.sizes),
        "kinds": dict(done.sum_counters("kinds")),
    }
    report.add_table(
        "Test sets",
        ("test set", "rows", "contaminated", "share", "too short to compare"),
        [
            (name, size, by_test[name], f"{by_test[name] / size:.1%}", rows.too_short[name])
            for name, size in rows.sizes.items()
        ],
        note=(
            f"Contaminated: a document shares a {config.ngram}-gram with the test row ({config.short_ngram} for"
            " shorter rows;"
            f" n-grams of {'numbers count too' if config.include_numeric_ngrams else 'mostly numbers do not count'})"
        )
        + (f", or is a near-duplicate of it (Jaccard at least {config.near.threshold})." if config.near else "."),
    )
    if touched:
        report.add_table("Overlaps by type", ("type", "pairs"), done.sum_counters("kinds").most_common())
        report.add_table(
            "Most contaminated rows",
            ("test row", "documents"),
            [("/".join(rows.names[int(row)]), n) for row, n in touched.most_common(20)],
        )
    shown = [s for summary in done.summaries for s in summary["shown"]][:MAX_SAMPLES]
    report.add_samples(
        "Samples of overlaps",
        [
            {"pair": f"{s['test']}/{s['row']} · {s['document']} · {s['kind']}, {s['share']:.0%}", "text": s["text"]}
            for s in shown
        ],
        note="All overlaps are in overlaps.jsonl.",
    )
    return len(touched)
