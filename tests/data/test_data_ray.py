"""The same bytes from one process, two processes and a Ray cluster of two nodes."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmworks.cli import main

WORDS = [
    a + b
    for a in ("har", "tow", "rive", "sho", "win", "stor", "mou", "lan")
    for b in ("bour", "er", "ing", "ness", "line", "ward", "man", "side")
]


@pytest.fixture
def cluster() -> Iterator[str]:
    """A cluster of two nodes with one slot each; its address."""
    import ray
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes.add_node(num_cpus=1)
    yield nodes.address
    ray.shutdown()
    nodes.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_same_digest_on_every_engine(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    for i in range(600):
        draw = random.Random(i % 400)  # a third are copies
        lines = [
            " ".join(draw.sample(WORDS, 12)).capitalize() + " and the tide of the year was to be seen."
            for _ in range(9)
        ]
        (raw / f"{i:04d}.txt").write_text(f"Text {i}.\n" + "\n".join(lines))
    digests: dict[str, list[str]] = {}
    for name, words in (
        ("one", []),
        ("two", ["--workers", "2"]),
        ("ray", ["--workers", "2", "--engine", "ray", "--address", cluster]),
    ):
        monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / name))
        source = raw
        for stage, settings in (
            ("read", []),
            ("clean", ["--set", "gopher_repetition=null", "--set", "fineweb=null"]),
            ("dedup", ["--set", "lines={}"]),
            ("redact", []),
        ):
            out = tmp_path / name / f"{stage}-out"
            assert main(["data", stage, "--data", str(source), "--out", str(out), "--quiet", *settings, *words]) == 0
            digests.setdefault(stage, []).append(json.loads((out / "manifest.json").read_text())["digest"])
            source = out
    assert all(len(set(found)) == 1 for found in digests.values()), digests
    metrics = json.loads((tmp_path / "ray/dedup-out/manifest.json").read_text())["metrics"]
    assert (metrics["documents"], metrics["dropped"]) == (400, 200)


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("text")
    words = [
        "data",
        "read",
        "--data",
        str(tmp_path / "a.txt"),
        "--out",
        str(tmp_path / "o"),
        "--workspace",
        str(tmp_path / "ws"),
    ]
    assert main([*words, "--address", "x:1"]) == 2
    assert "add --engine ray" in capsys.readouterr().err
    assert main([*words, "--engine", "ray", "--address", "127.0.0.1:1"]) == 2
    assert "--address 127.0.0.1:1: cannot connect to a Ray cluster (" in capsys.readouterr().err
    assert main([*words, "--workers", "0"]) == 2
    assert "workers is 0" in capsys.readouterr().err
