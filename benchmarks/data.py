"""Compare the corpus stages with rensa, datasketch, datatrove and tokenizers on 390 MB of documents, in one run.

    python benchmarks/data.py [--datatrove PYTHON]      (about 12 minutes on two cores, 5 GB of disk)

The documents are manuals, man pages and kernel sources of Debian 12, downloaded with apt-get. rensa and datasketch must
be installed in the environment of llmworks. datatrove needs a separate environment; --datatrove names its Python. Each
measurement is a separate process, so that CPU seconds and peak memory are those of one tool. Throughput is megabytes of
UTF-8 text per CPU second.
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

PACKAGES = (
    "linux-source-6.1",
    "linux-doc-6.1",
    "rust-doc",
    "libboost1.74-doc",
    "postgresql-doc-15",
    "manpages-dev",
    "manpages",
    "perl-doc",
    "python3.11-doc",
    "cppreference-doc-en-html",
    "libreoffice-help-en-us",
    "qtbase5-doc-html",
    "openjdk-17-doc",
)
MANUALS_BYTES, SOURCES_BYTES = 110_000_000, 280_000_000
NATURAL = 0.2  # Jaccard similarity above which two original documents count as near-duplicates
COPIES = 2000  # edited copies of each kind
MB = 1e6


def fetch(folder: Path, packages: Sequence[str] = PACKAGES) -> Path:
    """Download and unpack the packages, once."""
    target = folder / "packages"
    if (folder / "complete").exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True, stderr=subprocess.DEVNULL)
    for deb in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", deb, target], check=True)
    (folder / "complete").touch()
    return target


def manuals(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of every page in a fixed shuffled order, without tags and macros."""
    files = sorted(
        p
        for p in root.rglob("*")
        if p.is_file() and not p.is_symlink() and p.name.endswith((".html", ".rst.txt", ".pod", ".gz"))
    )
    random.Random(0).shuffle(files)
    for path in files:
        try:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = raw.decode()
        except (UnicodeDecodeError, OSError, EOFError):
            continue
        if path.suffix == ".html" or text.lstrip()[:9].lower() == "<!doctype":
            text = re.sub(r"(?is)<(script|style|head|nav)\b.*?</\1>|<!--.*?-->", " ", text)
            text = html.unescape(re.sub(r"<[^>]+>", "", text))
        elif path.suffix == ".gz":
            text = re.sub(r"(?m)^\.[^\n]*$|\\f[A-Z]|\\&", "", text)
        yield path.relative_to(root).as_posix(), re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*\n\s*", "\n\n", text)).strip()


def sources(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, text) of the kernel's source files in the order of the archive."""
    with tarfile.open(next(root.rglob("linux-source-*.tar.xz"))) as archive:
        for member in archive:
            if member.isfile() and member.name.endswith((".c", ".h", ".rst", ".txt", ".S")):
                stream = archive.extractfile(member)
                assert stream is not None
                yield member.name, stream.read().decode("utf-8", "replace")


def taken(found: Iterator[tuple[str, str]], size: int) -> list[tuple[str, str]]:
    """Return documents of 500 to 40,000 characters, until their size reaches `size` bytes."""
    kept: list[tuple[str, str]] = []
    for name, text in found:
        if 500 <= len(text) <= 40_000:
            kept.append((name, text))
            size -= len(text.encode())
            if size <= 0:
                break
    return kept


def edited(text: str, share: float, rng: random.Random, words: list[str]) -> str:
    """Return the text with a fraction `share` of its words replaced, deleted, or followed by an inserted word."""
    out: list[str] = []
    for word in re.findall(r"\w+|\W+", text):
        kind = rng.random() / share if word[0].isalnum() else 1
        out.append(
            word
            if kind >= 1
            else rng.choice(words)
            if kind < 1 / 3
            else ""
            if kind < 2 / 3
            else f"{word} {rng.choice(words)}"
        )
    return "".join(out)


def distinct(folder: Path, documents: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return documents without near-duplicates among them.

    Uses far more candidates and a much lower threshold than the measurement.
    """
    import numpy as np

    from llmworks.core.artifact import Dataset
    from llmworks.data.dedup import DedupConfig, hash_part
    from llmworks.data.duplicates import near
    from llmworks.data.duplicates.clusters import Clusters
    from llmworks.data.store.parts import plan_spans

    config = DedupConfig(exact=None, near=near.Near(threshold=NATURAL, hashes_per_bucket=2))
    clusters = Clusters(len(documents))
    with tempfile.TemporaryDirectory() as scratch:
        places = []
        for number, part in enumerate(plan_spans(Dataset(folder))):
            places.append(Path(scratch) / str(number))
            places[-1].mkdir()
            hash_part(config, part, places[-1])
        assert config.near is not None
        near.cluster_near_duplicates(config.near, places, clusters, np.arange(len(documents)))
    return [document for row, document in enumerate(documents) if clusters.find(row) == row]


def write(folder: Path, name: str, rows: list[tuple[str, str]]) -> None:
    """Write documents as Parquet and as JSONL."""
    from llmworks.core.documents import DocumentWriter
    from llmworks.core.types import Document

    with DocumentWriter(folder / name) as writer, (folder / f"{name}.draft").open("w") as stream:
        for id, text in rows:
            writer.add(Document(id, text, id))
            stream.write(json.dumps({"id": id, "text": text}) + "\n")
    (folder / f"{name}.draft").rename(folder / f"{name}.jsonl")


def prepare(folder: Path) -> None:
    """Write `manuals`, `corpus` (manuals and sources, shuffled) and `labelled` (the corpus without near-duplicates,
    with edited copies).
    """
    if (folder / "labelled.jsonl").exists():
        return
    rng = random.Random(1)
    root = fetch(folder)
    pages = taken(manuals(root), MANUALS_BYTES)
    write(folder, "manuals", pages)
    every = pages + taken(sources(root), SOURCES_BYTES)
    rng.shuffle(every)
    write(folder, "corpus", every)
    base = distinct(folder / "corpus", every)
    words = [w for _, text in rng.sample(base, 500) for w in re.findall(r"\w+", text)]
    long = [item for item in base if len(item[1].split()) >= 60]
    for kind, share in (("e05", 0.05), ("e10", 0.10)):
        base += [(f"{kind}:{name}", edited(text, share, rng, words)) for name, text in rng.sample(long, COPIES)]
    rng.shuffle(base)
    write(folder, "labelled", base)


def peak_of(process: int) -> int:
    """Return the peak resident memory of a process in kB; 0 if it has ended."""
    try:
        return int(
            next(
                line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM")
            ).split()[1]
        )
    except (OSError, StopIteration):
        return 0


def peaks_below(parent: int, stop: threading.Event, found: dict[int, int]) -> None:
    """Record the peak memory of all descendants of a process until `stop` is set."""
    while not stop.wait(0.1):
        parents = {}
        for place in Path("/proc").glob("[0-9]*"):
            try:
                parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
        for process in parents:
            above = process
            while above in parents and above != parent:
                above = parents[above]
            if above == parent and process != parent:
                found[process] = max(found.get(process, 0), peak_of(process))


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of a JSONL file."""
    with path.open() as stream:
        return [json.loads(line) for line in stream]


def pair_scores(pairs: set[tuple[str, str]]) -> dict[str, float]:
    """Return the recall for each kind of edit, and the precision, of pairs of ids."""

    def original(id: str) -> str:
        return id[4:] if id[:4] in ("e05:", "e10:") else id

    right = {pair for pair in pairs if original(pair[0]) == original(pair[1])}
    out = {"precision": len(right) / max(1, len(pairs))}
    for kind in ("e05", "e10"):
        out[f"recall {kind[1:]}%"] = (
            len(
                {
                    id
                    for pair in right
                    for id in pair
                    if id.startswith(kind) and any(not other.startswith("e") for other in pair)
                }
            )
            / COPIES
        )
    return out

    # each measurement below runs in a separate process


def near_llmworks(folder: Path) -> dict[str, Any]:
    """Near-duplicates by `data.dedup`, from Parquet."""
    import numpy as np

    from llmworks.core.artifact import Dataset
    from llmworks.data.dedup import DedupConfig, hash_part
    from llmworks.data.duplicates import near
    from llmworks.data.duplicates.clusters import Clusters
    from llmworks.data.duplicates.dropping import read_ids
    from llmworks.data.store.parts import plan_spans

    config = DedupConfig(exact=None)
    parts = plan_spans(Dataset(folder / "labelled"))
    rows = sum(part.rows for part in parts)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / str(i) for i in range(len(parts))]
        for part, place in zip(parts, folders, strict=True):
            place.mkdir()
            hash_part(config, part, place)
        clusters = Clusters(rows)
        assert config.near is not None
        near.cluster_near_duplicates(config.near, folders, clusters, np.arange(rows))
    seconds = time.process_time() - began
    peak = peak_of(os.getpid())
    ids = read_ids(parts, set(range(rows)))
    groups = list(clusters.members())
    pairs = {(ids[a], ids[b]) for group in groups for i, a in enumerate(group) for b in group[i + 1 :]}
    return {"seconds": seconds, "peak": peak, **pair_scores(pairs)}


def _runs(text: str) -> list[str]:
    words = re.findall(r"\w+", text.lower())
    return [" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))]


def near_rensa(folder: Path) -> dict[str, Any]:
    """Candidate pairs of R-MinHash with 32 bands, threshold 0.5."""
    from rensa import RMinHash, RMinHashLSH

    began = time.process_time()
    index = RMinHashLSH(threshold=0.5, num_perm=128, num_bands=32)
    ids: list[str] = []
    pairs: set[tuple[str, str]] = set()
    with (folder / "labelled.jsonl").open() as stream:
        for number, line in enumerate(stream):
            row = json.loads(line)
            ids.append(row["id"])
            sketch = RMinHash(num_perm=128, seed=42)
            sketch.update(_runs(row["text"]))
            pairs.update((ids[other], row["id"]) for other in index.query(sketch))
            index.insert(number, sketch)
    return {"seconds": time.process_time() - began, "peak": peak_of(os.getpid()), **pair_scores(pairs)}


def near_datasketch(folder: Path) -> dict[str, Any]:
    """Candidate pairs of MinHash LSH with 128 permutations, threshold 0.5."""
    from datasketch import MinHash, MinHashLSH

    began = time.process_time()
    index = MinHashLSH(threshold=0.5, num_perm=128)
    pairs: set[tuple[str, str]] = set()
    with (folder / "labelled.jsonl").open() as stream:
        for line in stream:
            row = json.loads(line)
            sketch = MinHash(num_perm=128)
            sketch.update_batch([run.encode() for run in set(_runs(row["text"]))])
            pairs.update((other, row["id"]) for other in index.query(sketch))
            index.insert(row["id"], sketch)
    return {"seconds": time.process_time() - began, "peak": peak_of(os.getpid()), **pair_scores(pairs)}


FILTER_ROWS = 2500


def filters_llmworks(folder: Path) -> dict[str, Any]:
    """Apply four filters to the first documents, then to all."""
    from llmworks.data.filters import c4, fineweb, gopher
    from llmworks.data.filters.words import WordVocabulary

    every = [row["text"] for row in rows_of(folder / "manuals.jsonl")]

    def run(some: list[str]) -> float:
        began = time.process_time()
        words = WordVocabulary()
        for at in range(0, len(some), 250):
            batch = words.encode(some[at : at + 250])
            gopher.filter_gopher_quality(gopher.GopherQuality(), batch, words)
            gopher.filter_gopher_repetition(gopher.GopherRepetition(), batch, words)
            c4.filter_c4(c4.C4(), batch.texts, words)
            fineweb.filter_fineweb(fineweb.FineWeb(), batch.texts, batch.counts)
        return time.process_time() - began

    size = sum(len(text.encode()) for text in every[:FILTER_ROWS])
    whole = sum(len(text.encode()) for text in every)
    return {"seconds": run(every[:FILTER_ROWS]), "bytes": size, "whole MB/CPU-s": round(whole / MB / run(every), 2)}


DATATROVE = """
import json, sys, time
from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
rows = [json.loads(line) for _, line in zip(range(int(sys.argv[2])), open(sys.argv[1]))]
filters = [GopherQualityFilter(), GopherRepetitionFilter(), C4QualityFilter(), FineWebQualityFilter()]
filters[0].filter(Document(text="warm up. " * 20, id="0"))
began = time.process_time()
for row in rows:
    for rule in filters:
        rule.filter(Document(text=row["text"], id=row["id"]))
print(json.dumps({"seconds": time.process_time() - began, "bytes": sum(len(row["text"].encode()) for row in rows)}))
"""


def exact(folder: Path) -> dict[str, Any]:
    """Exact duplicates, compared with only hashing the same bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from xxhash import xxh3_64_intdigest

    from llmworks.data.duplicates.clusters import group_equal_values
    from llmworks.data.duplicates.exact import hash_texts

    column = pa.concat_tables(
        [pq.read_table(p, columns=["text"]) for p in sorted((folder / "corpus").glob("*.parquet"))]
    )["text"]
    flat = [text.encode() for text in column.to_pylist()]
    began = time.process_time()
    for _ in range(20):
        for text in flat:
            xxh3_64_intdigest(text)
    bare = (time.process_time() - began) / 20
    began = time.process_time()
    for _ in range(20):
        list(group_equal_values(hash_texts(column)))
    return {"seconds": (time.process_time() - began) / 20, "xxh3 seconds": bare, "bytes": sum(map(len, flat))}


def encode(folder: Path) -> dict[str, Any]:
    """Encode the same documents with both encoders."""
    from tokenizers import Tokenizer

    from llmworks.runtime.session import load
    from llmworks.tokenize.bpe.bulk_encoder import build_bulk_encoder

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(str(load("asset:smollm2-135m-instruct").path / "tokenizer.json"))
    encoder = build_bulk_encoder(tokenizer)
    assert encoder is not None
    some = [row["text"] for row in rows_of(folder / "corpus.jsonl")[:5000]]
    size = sum(len(text.encode()) for text in some)
    began = time.process_time()
    theirs: list[Any] = []
    for at in range(0, len(some), 500):
        theirs += [e.ids for e in tokenizer.encode_batch(some[at : at + 500], add_special_tokens=False)]
    slow = time.process_time() - began
    began = time.process_time()
    ours = encoder.encode_batch(some)
    fast = time.process_time() - began
    same = ours == theirs
    return {"seconds": fast, "tokenizers seconds": slow, "bytes": size, "identical": same}


def language(folder: Path) -> dict[str, Any]:
    """Identify the language of every document."""
    from llmworks.data.filters.language import identify_language

    every = [row["text"] for row in rows_of(folder / "corpus.jsonl")]
    identify_language("warm up")
    began = time.process_time()
    for text in every:
        identify_language(text)
    return {"seconds": time.process_time() - began, "documents": len(every)}


CHAIN = (
    ("read", "data", []),
    ("clean", "read", []),
    ("redact", "clean", []),
    ("dedup", "redact", ["--set", "lines={}"]),
    ("decontaminate", "dedup", []),
    ("split", "decontaminate", ["--set", "split=train", "--set", "n_splits=50"]),
)


def chain(folder: Path, share: float) -> dict[str, Any]:
    """Run stages of recipes/corpus.yaml in sequence on a fraction of the corpus, with two workers.

    The peak memory is that of the largest process.
    """
    lines = (folder / "corpus.jsonl").read_bytes().splitlines(keepends=True)
    chosen = lines[: int(len(lines) * share)]
    out: dict[str, Any] = {
        "documents": len(chosen),
        "bytes": sum(len(json.loads(line)["text"].encode()) for line in chosen),
    }
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw"
        raw.mkdir()
        for number in range(0, len(chosen), 2000):
            (raw / f"{number:06d}.jsonl").write_bytes(b"".join(chosen[number : number + 2000]))
        del lines, chosen
        config = Path(scratch) / "clean.yaml"
        config.write_text(
            "gopher_quality: {min_alpha_words_ratio: 0.5}\nc4: {filter_no_terminal_punct: false, min_num_sentences: 2,"
            " filter_curly_bracket: false}\n"
        )
        stop, peaks = threading.Event(), dict[int, int]()
        watch = threading.Thread(target=peaks_below, args=(os.getpid(), stop, peaks), daemon=True)
        watch.start()
        began = time.monotonic()
        for stage, source, settings in CHAIN:
            words = [
                "data",
                stage,
                "--data",
                str(raw if source == "data" else Path(scratch) / source),
                "--out",
                str(Path(scratch) / stage),
                "--workers",
                "2",
                "--quiet",
            ]
            if stage == "decontaminate":
                words += ["--tests", "humaneval=asset:humaneval", "--tests", "ifbench=asset:ifbench"]
            if stage == "clean":
                words += ["--config", str(config)]
            at = time.monotonic()
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "llmworks.cli",
                    *words,
                    *settings,
                    "--workspace",
                    str(Path(scratch) / "ws"),
                    "--json",
                ],
                capture_output=True,
                text=True,
                check=True,
            )
            out[stage] = round(time.monotonic() - at, 1)
            out[f"{stage} documents"] = json.loads(done.stdout)["metrics"]["documents"]
        out["seconds"] = time.monotonic() - began
        stop.set()
        watch.join()
    out["peak"] = max(peaks.values())
    return out


MEASURES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "near_llmworks": near_llmworks,
    "near_rensa": near_rensa,
    "near_datasketch": near_datasketch,
    "filters_llmworks": filters_llmworks,
    "exact": exact,
    "encode": encode,
    "language": language,
    "chain_half": partial(chain, share=0.5),
    "chain_whole": partial(chain, share=1.0),
}


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Run one measurement in a separate process."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", name, "--folder", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def report(folder: Path, datatrove: str) -> None:
    """Measure everything and print the tables."""
    rows = rows_of(folder / "labelled.jsonl")
    size = sum(len(row["text"].encode()) for row in rows) / MB
    corpus = rows_of(folder / "corpus.jsonl")
    print(
        f"corpus: {len(corpus):,} documents, {sum(len(row['text'].encode()) for row in corpus) / MB:.0f} MB; labeled:"
        f" {len(rows):,} documents, {size:.0f} MB\n\n| near-duplicates | MB/CPU-s | recall 5 % | recall 10 % |"
        " precision | peak GB |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for name in ("near_llmworks", "near_rensa", "near_datasketch"):
        m = measured(name, folder)
        print(
            f"| {name[5:]} | {size / m['seconds']:.1f} | {m['recall 05%']:.3f} | {m['recall 10%']:.3f} |"
            f" {m['precision']:.3f} | {m['peak'] / 1e6:.2f} |",
            flush=True,
        )
    print("\n| task | llmworks | other tool | ratio |\n|---|---|---|---|")
    ours = measured("filters_llmworks", folder)
    own = ours["bytes"] / MB / ours["seconds"]
    if datatrove:
        done = subprocess.run(
            [datatrove, "-c", DATATROVE, str(folder / "manuals.jsonl"), str(FILTER_ROWS)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        theirs = json.loads(done.stdout.splitlines()[-1])
        other = theirs["bytes"] / MB / theirs["seconds"]
        print(
            f"| four filters, {FILTER_ROWS:,} manuals | {own:.2f} MB/CPU-s | datatrove {other:.3f} MB/CPU-s |"
            f" {own / other:.1f} |"
        )
    print(f"| four filters, all manuals | {ours['whole MB/CPU-s']} MB/CPU-s | | |", flush=True)
    m = measured("exact", folder)
    print(
        f"| exact duplicates (match: bytes) | {m['seconds']:.3f} CPU-s for {m['bytes'] / MB:.0f} MB | xxh3 alone"
        f" {m['xxh3 seconds']:.3f} | {m['seconds'] / m['xxh3 seconds']:.2f} times its CPU-s |",
        flush=True,
    )
    m = measured("encode", folder)
    print(
        f"| bulk encoding, ids identical: {m['identical']} | {m['bytes'] / MB / m['seconds']:.1f} MB/CPU-s | tokenizers"
        f" {m['bytes'] / MB / m['tokenizers seconds']:.1f} MB/CPU-s | {m['tokenizers seconds'] / m['seconds']:.1f} |",
        flush=True,
    )
    m = measured("language", folder)
    print(f"| language identification | {m['documents'] / m['seconds']:,.0f} documents/CPU-s | | |", flush=True)
    print(
        "\n| pipeline, two workers | documents | MB | s | MB/s | peak GB of a process | seconds by stage"
        " |\n|---|---|---|---|---|---|---|"
    )
    for name in ("chain_half", "chain_whole"):
        m = measured(name, folder)
        stages = ", ".join(f"{stage} {m[stage]}" for stage, _, _ in CHAIN)
        print(
            f"| {name[6:]} | {m['documents']:,} | {m['bytes'] / MB:.0f} | {m['seconds']:.0f} |"
            f" {m['bytes'] / MB / m['seconds']:.2f} | {m['peak'] / 1e6:.2f} | {stages} |",
            flush=True,
        )


if __name__ == "__main__":
    from llmworks.core.workspace import cache_directory

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datatrove", default="", metavar="PYTHON")
    parser.add_argument("--folder", type=Path, default=cache_directory() / "benchmarks" / "data")
    parser.add_argument("--measure", choices=MEASURES)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(MEASURES[given.measure](given.folder)))
    else:
        prepare(given.folder)
        report(given.folder, given.datatrove)
