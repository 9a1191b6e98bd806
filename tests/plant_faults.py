"""Plant each fault of tests/faults.md in a copy of the source, and see that its test fails: `make faults`.

    python tests/plant_faults.py [--only WORD] [--discover]

`--discover` runs the whole file of a test and prints the tests that fail.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENTRY = re.compile(r"^## (.+?)\n+```\n(\S+)\n- (.*)\n\+ (.*)\n```\n+`(.+?)`$", re.MULTILINE)


@dataclass(frozen=True)
class Fault:
    """One line of a file, what it becomes, and the test that has to fail."""

    what: str
    file: str
    line: str
    becomes: str
    test: str


def read_faults(page: Path) -> list[Fault]:
    """All faults of the page."""
    return [Fault(*match.groups()) for match in ENTRY.finditer(page.read_text(encoding="utf-8"))]


def plant(fault: Fault, source: Path) -> None:
    """Change the line, which must stand once in its file."""
    file = source / fault.file
    text = file.read_text(encoding="utf-8")
    found = [line for line in text.splitlines() if line.strip() == fault.line]
    if len(found) != 1:
        raise SystemExit(f"{fault.file}: the line stands {len(found)} times: {fault.line}")
    indent = found[0][: len(found[0]) - len(found[0].lstrip())]
    file.write_text(text.replace(f"{found[0]}\n", f"{indent}{fault.becomes}\n"), encoding="utf-8")


def main() -> int:
    """Run all; the exit code is 1 when a fault is not found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="faults whose heading or file holds it")
    parser.add_argument("--discover", action="store_true")
    args = parser.parse_args()
    missed = 0
    faults = [f for f in read_faults(ROOT / "tests" / "faults.md") if args.only in f.what + f.file]
    for fault in faults:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "src" / "llmworks"
            shutil.copytree(ROOT / "src" / "llmworks", source, ignore=shutil.ignore_patterns("__pycache__"))
            plant(fault, source)
            test = fault.test.partition("::")[0] if args.discover else fault.test
            words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
            environment = {**os.environ, "PYTHONPATH": str(source.parent), "OMP_NUM_THREADS": "1"}
            done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        caught = done.returncode == 1
        missed += not caught
        print(f"{'✓' if caught else '✗'} {fault.what}: {fault.file} ({fault.test})", flush=True)
        if args.discover or not caught:
            print("\n".join(line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR")))[:2000])
    print(f"{len(faults) - missed} of {len(faults)} faults are found")
    return int(missed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
