"""The site loads nothing from elsewhere: vendored files are those that were published, and no page names a network."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
VENDORED = sorted((DOCS / "_static" / "vendor").iterdir())


@pytest.mark.parametrize("folder", VENDORED, ids=[folder.name for folder in VENDORED])
def test_vendored_files_are_those_that_were_published(folder: Path) -> None:
    facts = json.loads((folder / "vendor.json").read_text(encoding="utf-8"))
    assert folder.name == f"{facts['package']}-{facts['version']}"
    assert "LICENSE" in facts["files"]
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {"vendor.json"}
    assert present == set(facts["files"])
    for name, digest in facts["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name


def test_own_scripts_and_styles_load_nothing() -> None:
    for path in (*(DOCS / "_static").glob("*.js"), *(DOCS / "_static").glob("*.css"), DOCS / "conf.py"):
        assert not re.search(r"https?://|@import", path.read_text(encoding="utf-8")), path.name
