"""Build the labs: `python -m labs.tools.build [F01 ...]`; `--help` lists the options.

Each lab runs in a fresh process without network, with one thread (`execute.py`). The result is cached in `labs/build/`
by the lab's text, the files of llmworks that it used, its assets and the libraries' versions. The site's notebooks are
written to `docs/labs/`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llmworks
from labs.tools.contract import find_violations
from labs.tools.lab import LABS, Lab, LabError, list_labs
from labs.tools.notebooks import write_executed, write_learner, write_page
from llmworks.assets import cache_path, fetch, get_asset

ROOT = LABS.parent
BUILD = LABS / "build"
PAGES = ROOT / "docs" / "labs"
PACKAGE = Path(llmworks.__file__).parent
OFFLINE = ("--dev-bind", "/", "/", "--unshare-net", "--die-with-parent")
ONE_THREAD = dict.fromkeys(
    (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "LOKY_MAX_CPU_COUNT",
        "LLMWORKS_THREADS",
    ),
    "1",
)


def digest_files(paths: list[Path]) -> str:
    """Return one sha256 over files, by name and content; a missing file counts as such."""
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes() if path.exists() else b"missing"
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


def compute_key(lab: Lab, used: list[str]) -> str:
    """Return the cache key of a lab's run: its text, how it is run, libraries, assets, and the code that it used."""
    tools = [LABS / "tools" / name for name in ("execute.py", "lab.py")]
    code = [PACKAGE / name for name in sorted(used)]
    assets = [cache_path(get_asset(name)).name for name in lab.header.assets]
    parts = (
        digest_files([lab.path, *tools, ROOT / "constraints.txt", *code]),
        *assets,
        sys.version,
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def read_record(lab: Lab) -> dict[str, Any] | None:
    """Return the record of an earlier run that is still valid, else None."""
    path = BUILD / lab.path.stem / "record.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        valid = record["key"] == compute_key(lab, list(record["llmworks"]))
    except (OSError, ValueError, KeyError):
        return None
    return record if valid and (path.parent / f"{lab.path.stem}.ipynb").exists() else None


def run_lab(lab: Lab) -> dict[str, Any]:
    """Run a lab in a fresh process without network; LabError in one line when it fails."""
    for name in lab.header.assets:
        fetch(name)
    out = BUILD / lab.path.stem
    shutil.rmtree(out, ignore_errors=True)
    command = [
        "bwrap",
        *OFFLINE,
        sys.executable,
        "-m",
        "labs.tools.execute",
        str(lab.path),
        str(out),
    ]
    environment = {
        **os.environ,
        **ONE_THREAD,
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(PACKAGE.parent)))
    limit = 2 * lab.header.budget_seconds + 60
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=environment,
            cwd=ROOT,
            timeout=limit,
        )
    except FileNotFoundError:
        raise LabError("labs run without network in bubblewrap; install it with: apt-get install bubblewrap") from None
    except subprocess.TimeoutExpired:
        raise LabError(f"{lab.id}: did not end within {limit} s") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise LabError(lines[-1])
    record: dict[str, Any] = json.loads((out / "record.json").read_text(encoding="utf-8"))
    record["key"] = compute_key(lab, list(record["llmworks"]))
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def build_lab(lab: Lab, force: bool = False) -> tuple[dict[str, Any], bool]:
    """Bring a lab up to date and write its notebooks; return its record and whether it ran."""
    if violations := find_violations(lab):
        raise LabError("\n".join(violations))
    record = None if force else read_record(lab)
    ran = record is None
    record = record or run_lab(lab)
    executed = BUILD / lab.path.stem / f"{lab.path.stem}.ipynb"
    write_learner(lab, PAGES / "learner" / executed.name)
    write_executed(executed, PAGES / "executed" / executed.name)
    write_page(lab, executed, PAGES / executed.name)
    return record, ran


def write_pages(labs: list[Lab]) -> None:
    """Write pages without results for labs that are not built, so that the site has all of them."""
    for lab in labs:
        if not (PAGES / "executed" / f"{lab.path.stem}.ipynb").exists():
            write_learner(lab, PAGES / "learner" / f"{lab.path.stem}.ipynb")
            write_page(lab, None, PAGES / f"{lab.path.stem}.ipynb")


def select(labs: list[Lab], names: list[str], changed: int, rotate: int) -> list[Lab]:
    """Choose labs by name, by change within the last commits, and some more in turn; all when nothing is said."""
    if unknown := sorted(set(names) - {lab.id for lab in labs} - {lab.path.stem for lab in labs}):
        raise LabError(f"no lab {unknown[0]!r}; there are {', '.join(lab.id for lab in labs)}")
    if not names and not changed and not rotate:
        return labs
    chosen = {lab.id for lab in labs if {lab.id, lab.path.stem} & set(names)}
    if changed:
        log = _git("log", f"-{changed}", "--name-only", "--format=", "--", "labs").split()
        touched = {Path(name).stem for name in (*log, *_git("diff", "--name-only", "HEAD", "--", "labs").split())}
        chosen |= {lab.id for lab in labs if lab.path.stem in touched}
    others = [lab for lab in labs if lab.id not in chosen]
    if rotate and others:
        turn = int(_git("rev-list", "--count", "HEAD") or 0) * rotate
        chosen |= {others[(turn + step) % len(others)].id for step in range(rotate)}
    return [lab for lab in labs if lab.id in chosen]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def main(arguments: list[str]) -> int:
    """Build labs; print one line each; exit code 1 when one fails."""
    parser = argparse.ArgumentParser(prog="python -m labs.tools.build", description="Execute labs and write notebooks.")
    parser.add_argument("labs", nargs="*", metavar="LAB", help="F01 or F01_linear_algebra; default: all")
    parser.add_argument(
        "--changed",
        type=int,
        default=0,
        metavar="N",
        help="labs that the last N commits changed",
    )
    parser.add_argument(
        "--rotate",
        type=int,
        default=0,
        metavar="N",
        help="N more labs, others after each commit",
    )
    parser.add_argument("--force", action="store_true", help="execute labs that are up to date, too")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="labs at a time (default 2)")
    parser.add_argument("--pages", action="store_true", help="write pages without results for labs that are not built")
    options = parser.parse_args(arguments)
    if options.pages:
        write_pages(list_labs())
        return 0
    failed = 0

    def build(lab: Lab) -> str:
        try:
            record, ran = build_lab(lab, options.force)
        except (LabError, llmworks.LlmworksError) as error:
            nonlocal failed
            failed += 1
            return f"✗ {error}"
        took = f"{record['seconds']:.0f} s" if ran else "up to date"
        return f"✓ {lab.path.stem:<32} {took:>10}  {record['peak_mb']} MB"

    try:
        labs = select(list_labs(), options.labs, options.changed, options.rotate)
    except LabError as error:
        print(error, file=sys.stderr)
        return 2
    with ThreadPoolExecutor(options.workers) as pool:
        for line in pool.map(build, labs):
            print(line, flush=True)
    print(f"{len(labs) - failed} labs built" + (f", {failed} failed" if failed else ""))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
