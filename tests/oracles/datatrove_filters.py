"""Make tests/fixtures/datatrove_filters.json.gz and filter_cases.json.gz: what datatrove's filters decide about
documents.

In an environment of its own, with datatrove[processing]==0.10.1 and spacy==3.8.18:
    python -m tests.data.real_documents > real.jsonl                                  (in the project's environment)
    python -m tests.data.real_documents cases > cases.jsonl
    python tests/oracles/datatrove_filters.py real.jsonl datatrove_filters.json.gz    (in datatrove's)
    python tests/oracles/datatrove_filters.py cases.jsonl filter_cases.json.gz texts
"""

import gzip
import hashlib
import json
import sys
import time
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)

OUT = Path(__file__).parents[1] / "fixtures" / sys.argv[2]
TEXTS = sys.argv[3:] == ["texts"]
FILTERS = {
    "gopher_quality": GopherQualityFilter(),
    "gopher_repetition": GopherRepetitionFilter(),
    "c4": C4QualityFilter(),
    "c4_without_terminal_punctuation": C4QualityFilter(filter_no_terminal_punct=False),
    "fineweb": FineWebQualityFilter(),
}

rows = []
size = 0
began = time.process_time()
for line in Path(sys.argv[1]).read_text().splitlines():
    row = json.loads(line)
    size += len(row["text"].encode())
    decisions = {}
    for name, rule in FILTERS.items():
        document = Document(text=row["text"], id=row["id"])
        answer = rule.filter(document)
        kept, reason = answer if isinstance(answer, tuple) else (answer, "")
        decisions[name] = "" if kept else reason
        if kept and name.startswith("c4"):
            decisions[name] = hashlib.sha256(document.text.encode()).hexdigest()[:16]
    rows.append(
        [
            row["id"],
            row["text"] if TEXTS else hashlib.sha256(row["text"].encode()).hexdigest()[:16],
            *decisions.values(),
        ]
    )
seconds = time.process_time() - began
print(f"{len(rows)} documents, {size / 1e6:.1f} MB, {seconds:.0f} CPU-s, {size / 1e6 / seconds:.3f} MB/CPU-s")
with OUT.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as stream:
    stream.write(json.dumps({"filters": list(FILTERS), "rows": rows}).encode())
