"""The card of a dataset tells Hugging Face datasets which files are rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmworks.runtime.session import Session


@pytest.mark.filterwarnings("ignore")
def test_artifacts_are_loaded_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset

    rows = [{"prompt": f"q{i}", "completion": "a", "id": str(i)} for i in range(6)]
    bad = {"prompt": "", "completion": ""}
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, bad]))
    session = Session(tmp_path / "workspace", quiet=True)
    chats = session.make("data.chat", data=tmp_path / "a.jsonl")
    assert (chats.path / "rejected.jsonl").exists()
    pairs = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(4)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (tmp_path / "c.txt").write_text("One document.\n")
    made = {
        "chat": (chats, 6),
        "split": (session.make("data.split", data=chats, config={"n_splits": 2, "split": "test"}), 3),
        "pairs": (session.make("data.chat", data=tmp_path / "b.jsonl"), 4),
        "documents": (session.make("data.read", data=tmp_path / "c.txt"), 1),
    }
    for name, (artifact, count) in made.items():
        loaded = load_dataset(str(artifact.path), cache_dir=str(tmp_path / "cache" / name))
        assert list(loaded) == ["train"], name
        assert len(loaded["train"]) == count, name
