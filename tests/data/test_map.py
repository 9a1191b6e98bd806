"""A map puts alike documents together, names its clusters by their words, and its page needs nothing from outside."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from llmworks.cli import main
from llmworks.core.documents import DocumentWriter
from llmworks.core.types import Document

TOPICS = {
    "sea": ["harbour", "tide", "ship", "sailor", "anchor", "wave", "port", "captain"],
    "kitchen": ["butter", "flour", "oven", "recipe", "dough", "sugar", "yeast", "bread"],
    "code": ["function", "variable", "compiler", "pointer", "module", "loop", "integer", "array"],
}


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    draw = random.Random(0)
    with DocumentWriter(tmp_path / "docs") as writer:
        for i in range(150):
            topic = list(TOPICS)[i % 3]
            text = " ".join(
                (
                    draw.choice(TOPICS[topic])
                    if draw.random() < 0.7
                    else draw.choice(["the", "and", "with", "of", "old", "new"])
                )
                for _ in range(60)
            )
            writer.add(Document(f"{topic}{i}", text + ' </script><b>"&', "s.txt", {"mix": topic}))
    return [
        "data",
        "map",
        "--data",
        str(tmp_path / "docs"),
        "--out",
        str(tmp_path / "out"),
        "--quiet",
        "--set",
        "n_clusters=3",
    ]


@pytest.mark.parametrize("layout", ["tsne", "pca"])
def test_alike_documents_are_together(words: list[str], tmp_path: Path, layout: str) -> None:
    assert main([*words, "--set", f"layout={layout}"]) == 0
    rows = json.loads((tmp_path / "out/points.json").read_text())
    assert len(rows) == 150
    by_topic = {topic: {row["cluster"] for row in rows if row["mix"] == topic} for topic in TOPICS}
    assert all(len(clusters) == 1 for clusters in by_topic.values())
    for topic, (cluster,) in ((t, tuple(c)) for t, c in by_topic.items()):
        assert set(cluster.partition(": ")[2].split(", ")) <= set(TOPICS[topic])
    points = np.array([(row["x"], row["y"]) for row in rows])
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + np.eye(150) * 1e9
    nearest = distances.argmin(axis=1)
    assert np.mean([rows[i]["mix"] == rows[int(nearest[i])]["mix"] for i in range(150)]) > 0.95
    page = (tmp_path / "out/map.html").read_text()
    assert not re.search(r"(?:src|href)=[\"']?(?!data:)|https?://|@import", page.replace("&quot;", ""))
    embedded = page[page.index('type="application/json">') + 24 :]
    assert json.loads(embedded[: embedded.index("</script>")])["rows"] == rows
    assert (tmp_path / "out/map.png").read_bytes()[:4] == b"\x89PNG"
    assert "data:image/png" in (tmp_path / "out/report.html").read_text()


def test_a_sample_and_the_same_again(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for name in ("a", "b"):
        monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / name))
        assert main([*words, "--set", "max_documents=60", "--set", "perplexity=5"]) == 0
        digests.append(
            {k: v["sha256"] for k, v in json.loads((tmp_path / "out/manifest.json").read_text())["files"].items()}
        )
        (tmp_path / "out").unlink()
    assert digests[0] == digests[1]
    assert (
        len(
            json.loads(
                (tmp_path / "b/store").joinpath(next((tmp_path / "b/store").iterdir()).name, "points.json").read_text()
            )
        )
        == 60
    )


def test_too_few(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with DocumentWriter(tmp_path / "few") as writer:
        writer.add(Document("1", "one", "s"))
    words[words.index("--data") + 1] = str(tmp_path / "few")
    assert main(words) == 2
    assert "1 documents are too few for a map" in capsys.readouterr().err
