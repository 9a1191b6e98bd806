"""Make tests/fixtures/kenlm_ngrams.json.gz: what KenLM's modified Kneser-Ney models of a text say of another, word by
word.

Needs `lmplz` and `query` of kenlm 0.3.0 (LGPL-2.1; its source package builds with cmake and boost):
    python tests/oracles/kenlm_ngrams.py DIRECTORY_OF_BINARIES
The text is this project's licence, a sentence being what ends with a full stop, every seventh kept apart.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BINARIES = Path(sys.argv[1])
WORD = re.compile(r"(\S+)=\d+ (\d+) (-?[\d.e+-]+)")

words = re.findall(r"\w+|[.;,()]", (ROOT / "LICENSE").read_text().lower())
sentences = [s.split() for s in " ".join(words).replace(" . ", " .\n").split("\n") if s.split()]
test = sentences[3::7]
train = [s for i, s in enumerate(sentences) if i % 7 != 3]
found = {}
with tempfile.TemporaryDirectory() as scratch:
    for order in (2, 3, 5):
        arpa = Path(scratch) / f"{order}.arpa"
        made = subprocess.run(
            [str(BINARIES / "lmplz"), "-o", str(order), "-S", "1G", "-T", scratch, "--discount_fallback"],
            input="\n".join(map(" ".join, train)) + "\n",
            text=True,
            capture_output=True,
            check=True,
        )
        arpa.write_text(made.stdout)
        discounts = {
            int(n): tuple(map(float, values))
            for n, *values in re.findall(r"^(\d) \d+ D1=(\S+) D2=(\S+) D3\+=(\S+)", made.stderr, re.MULTILINE)
        }
        asked = subprocess.run(
            [str(BINARIES / "query"), str(arpa)],
            input="\n".join(map(" ".join, test)) + "\n",
            text=True,
            capture_output=True,
            check=True,
        )
        scores = [
            [float(score) for _, _, score in WORD.findall(line)]
            for line in asked.stdout.splitlines()
            if "</s>=" in line
        ]
        assert [len(s) for s in scores] == [len(t) + 1 for t in test]
        found[order] = {"discounts": [discounts.get(n) for n in range(1, order + 1)], "log10": scores}
with gzip.GzipFile(ROOT / "tests" / "fixtures" / "kenlm_ngrams.json.gz", "wb", mtime=0) as out:
    out.write(json.dumps({"train": train, "test": test, "orders": found}).encode())
