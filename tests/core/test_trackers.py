"""Metrics sent to trackers are read back by each tool's own reader; a tracker that fails does not stop a run."""

from __future__ import annotations

import json
import sqlite3
import struct
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmworks.cli import main
from llmworks.core import trackers as track
from llmworks.core.progress import Progress
from llmworks.core.trackers import MetricTracking, Tracker

ROWS = [
    {"step": 0, "loss": 2.5, "seconds": 1},
    {"step": 1, "loss": 1.5, "seconds": 2},
    {"step": 1, "bits_per_byte": 3.25},
]


def read_tensorboard(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / "run-a"))
    events.Reload()
    assert [e.value for e in events.Scalars("bits_per_byte")] == [3.25]
    return [(e.step, e.value) for e in events.Scalars("loss")]


def read_mlflow(folder: Path) -> list[tuple[int, float]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"file:{folder / 'mlflow'}")
    experiment = client.get_experiment_by_name("llmworks")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.params == {"width": "8"}
    assert run.info.status == "FINISHED"
    assert run.data.metrics["bits_per_byte"] == 3.25
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")]


def read_trackio(folder: Path) -> list[tuple[int, float]]:
    with sqlite3.connect(next((folder / "trackio").glob("*.db"))) as base:
        rows = [
            (step, json.loads(values))
            for step, values in base.execute("select step, metrics from metrics where run_name = 'run-a' order by id")
        ]
    assert any(values.get("bits_per_byte") == 3.25 for _, values in rows)
    return [(step, values["loss"]) for step, values in rows if "loss" in values]


def read_wandb(folder: Path) -> list[tuple[int, float]]:
    """The offline file: 7 bytes of head, then LevelDB's log format: checksum (4), length (2), kind (1), and a protocol
    buffer.
    """
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.rglob("run-run-a.wandb")
    for _ in range(100):  # its own process writes the file, and may end after the run does
        found = histories(file.read_bytes(), wandb_internal_pb2.Record)
        if any("bits_per_byte" in row for row in found):
            break
        time.sleep(0.1)
    assert any(row.get("bits_per_byte") == 3.25 for row in found)
    return [(row["step"], row["loss"]) for row in found if "loss" in row]


def histories(data: bytes, kind_of: Any) -> list[dict[str, Any]]:
    at, found = 7, []
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        length, kind = struct.unpack_from("<HB", data, at + 4)
        assert kind == 1  # whole, not in pieces
        record = kind_of()
        record.ParseFromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        if record.HasField("history"):
            found.append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            )
    return found


@pytest.mark.parametrize("tool", ["tensorboard", "wandb", "mlflow", "trackio"])
@pytest.mark.filterwarnings("ignore")
def test_each_tool_reads_what_was_sent(tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:  # it reads TRACKIO_DIR once
        monkeypatch.delitem(sys.modules, name)
    said: list[str] = []
    tracking = MetricTracking([tool], tmp_path, "run-a", {"width": 8}, said.append)
    progress = Progress(tmp_path / "metrics.jsonl", quiet=True, listener=tracking.log)
    for row in ROWS:
        progress.log_metrics(**row)
    progress.log_metrics(note="no step")
    tracking.close()
    assert said == []
    read = {"tensorboard": read_tensorboard, "wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}[tool]
    assert read(tmp_path) == [(0, 2.5), (1, 1.5)]


def test_one_that_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[int] = []

    def full(step: int, values: Any) -> None:
        heard.append(step)
        raise OSError("no route to host")

    monkeypatch.setitem(
        track.TRACKERS, "tensorboard", ("json", lambda folder, run, config: Tracker(full, lambda: None))
    )
    said: list[str] = []
    tracking = MetricTracking(["tensorboard"], tmp_path, "run", {}, said.append)
    for row in ROWS:
        tracking.log(row)
    tracking.close()
    assert heard == [0]
    assert said == ["tensorboard: failed (OSError: no route to host); the run continues without it"]


def test_mistakes(
    chat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "data",
        "chat",
        str(chat_file),
        "--out",
        str(tmp_path / "o"),
        "--workspace",
        str(tmp_path / "ws"),
        "--quiet",
    ]
    assert main([*words, "--track", "tensorbord"]) == 2
    assert (
        "--track tensorbord: unknown tool; choose from tensorboard, wandb, mlflow, trackio" in capsys.readouterr().err
    )
    monkeypatch.setitem(track.TRACKERS, "trackio", ("no_such_package", track.TRACKERS["trackio"][1]))
    assert main([*words, "--track", "trackio"]) == 3
    assert "pip install 'llmworks[track]'" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
