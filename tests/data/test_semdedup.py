"""Documents of like meaning: cells find what comparing everything finds, and the stage keeps one of each cluster."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from llmworks.cli import main
from llmworks.core.artifact import Dataset
from llmworks.core.documents import DocumentWriter, read_documents
from llmworks.core.types import Document
from llmworks.data.duplicates.clusters import Clusters
from llmworks.data.duplicates.semantic import cluster_similar


def test_cells_find_what_all_pairs_show() -> None:
    random = np.random.default_rng(0)
    topics = random.normal(size=(40, 32))
    vectors = topics[random.integers(40, size=6000)] + random.normal(size=(6000, 32))
    vectors[3000:4000] = vectors[:1000] + 0.1 * random.normal(size=(1000, 32))  # pairs of like meaning
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[17] = 0
    every, some = Clusters(6000), Clusters(6000)
    compared, joined = cluster_similar(vectors, 0.95, every)
    fewer, found = cluster_similar(vectors, 0.95, some, max_exact=100, cell_size=300)
    assert joined >= 950
    assert compared == 5999 * 5998 // 2
    assert fewer < compared
    assert found >= 0.97 * joined
    assert all(every.find(row) == every.find(some.find(row)) for row in range(6000))  # nothing that is not similar


def test_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.conftest import make_tokenizer

    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    tokenizer = make_tokenizer()
    (tmp_path / "static").mkdir()
    tokenizer.backend_tokenizer.save(str(tmp_path / "static/tokenizer.json"))
    save_file(
        {"table": np.random.default_rng(0).normal(size=(len(tokenizer), 64)).astype(np.float32)},
        tmp_path / "static/model.safetensors",
    )
    fox = "the quick brown fox"
    texts = {"a": fox, "b": f"{fox} and {fox}", "c": "what is the weather in", "d": f"{fox} fox", "e": ""}
    with DocumentWriter(tmp_path / "docs") as writer:
        for id, text in texts.items():
            writer.add(Document(id, text, "s"))
    words = [
        "data",
        "semdedup",
        "--data",
        str(tmp_path / "docs"),
        "--quiet",
        "--out",
        str(tmp_path / "out"),
        "--embedder",
    ]
    assert main([*words, str(tmp_path / "static"), "--set", "threshold=0.8"]) == 0
    assert [d.id for d in read_documents(Dataset(tmp_path / "out"))] == ["b", "c", "e"]
    assert {
        r["id"]: json.loads(r["metadata"])["duplicate_of"] for r in pq.read_table(tmp_path / "out/dropped").to_pylist()
    } == {"a": "b", "d": "b"}
    (tmp_path / "static/model.safetensors").write_bytes(b"broken")
    assert main([*words, str(tmp_path / "static"), "--set", "threshold=0.7"]) == 2
    assert "the static embeddings cannot be read" in capsys.readouterr().err
