"""References to what comes from outside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def test_a_folder_of_a_data_set_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the Hub for each form of the reference; nothing is fetched here."""
    import huggingface_hub

    from llmworks.runtime import references

    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **more: (asked.append((name, more)), str(tmp_path))[1]
    )
    assert (
        references._download_from_hub("datasets/HuggingFaceFW/fineweb-edu/sample/10BT") == tmp_path / "sample" / "10BT"
    )
    assert references._download_from_hub("datasets/stanfordnlp/imdb") == tmp_path
    assert asked == [
        ("HuggingFaceFW/fineweb-edu", {"repo_type": "dataset", "allow_patterns": "sample/10BT/*"}),
        ("stanfordnlp/imdb", {"repo_type": "dataset", "allow_patterns": None}),
    ]
    references._download_from_hub("ORG/MODEL")
    assert asked[-1][0] == "ORG/MODEL"
    assert "repo_type" not in asked[-1][1]
