"""Counting packed tokens: a model like others, measured on what it did not see."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from llmworks.cli import main
from llmworks.core.artifact import Dataset
from llmworks.core.types import Request, Sampling
from llmworks.data.store.packed_tokens import PackedDataset
from llmworks.generate.engines.torch import TorchEngine
from llmworks.model.io.load import load_model
from llmworks.tokenize.load import load_tokenizer
from llmworks.train.loop.eval_loss import evaluate_loss


@pytest.fixture
def packed(pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """(training rows, held-out rows, the held-out text)."""
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    text = (Path(__file__).parents[2] / "LICENSE").read_text()
    for name, part in (("train", text[:9000]), ("test", text[9000:])):
        (tmp_path / f"{name}.txt").write_text(part)
        assert (
            main(["data", "read", str(tmp_path / f"{name}.txt"), "--out", str(tmp_path / f"{name}-read"), "--quiet"])
            == 0
        )
        assert (
            main(
                [
                    "data",
                    "pack",
                    str(pico),
                    str(tmp_path / f"{name}-read"),
                    "--set",
                    "max_length=64",
                    "--out",
                    str(tmp_path / f"{name}-packed"),
                    "--quiet",
                ]
            )
            == 0
        )
    return tmp_path / "train-packed", tmp_path / "test-packed", tmp_path / "test.txt"


def test_the_stage(packed: tuple[Path, Path, Path], pico: Path, tmp_path: Path) -> None:
    train, test, text = packed
    found = {}
    for order in (1, 4):
        out = tmp_path / f"n{order}"
        assert (
            main(
                [
                    "train",
                    "ngram",
                    str(pico),
                    str(train),
                    "--eval-data",
                    str(test),
                    "--set",
                    f"order={order}",
                    "--out",
                    str(out),
                    "--quiet",
                ]
            )
            == 0
        )
        found[order] = json.loads((out / "manifest.json").read_text())["metrics"]
        assert main(["verify", str(out)]) == 0
        assert main(["verify", "--golden", str(out)]) == 0
    assert found[4]["bits_per_byte"] < found[1]["bits_per_byte"] - 1
    # measured again, token by token by the engine, piece by piece as they were packed
    engine = TorchEngine.open(tmp_path / "n4")
    rows = PackedDataset(Dataset(test))
    nats, tokens = 0.0, 0
    for number in range(len(rows)):
        row = rows[number]
        for piece in range(int(row.segment_ids.max()) + 1):
            (scored,) = engine.score([row.ids[row.segment_ids == piece].tolist()])
            nats, tokens = nats - sum(scored.logprobs), tokens + len(scored.logprobs)
    assert found[4]["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-4)
    first = len(load_tokenizer(pico).decode(rows[0].ids[:1]))
    assert found[4]["bits_per_byte"] == pytest.approx(nats / math.log(2) / (len(text.read_bytes()) - first), rel=1e-3)
    (one,) = engine.generate(
        [Request(ids=tuple(rows[0].ids[:8].tolist()), sampling=Sampling(max_tokens=20, temperature=1.0, seed=1))]
    )
    assert one.ids


def test_one_measure_for_every_model(packed: tuple[Path, Path, Path], pico: Path) -> None:
    """A transformers Llama, padded and packed, gives the surprise that it gives piece by piece."""
    rows = PackedDataset(Dataset(packed[1]))
    model = load_model(pico)
    found = evaluate_loss(model, rows, load_tokenizer(pico), max_rows=5, batch_size=2)
    nats, tokens = 0.0, 0
    for number in range(5):
        row = rows[number]
        for piece in range(int(row.segment_ids.max()) + 1):
            ids = torch.tensor(row.ids[row.segment_ids == piece])[None]
            with torch.no_grad():
                nats += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            tokens += ids.shape[1] - 1
    assert found.num_tokens == tokens
    assert found.loss == pytest.approx(nats / tokens, rel=1e-4)


def test_mistakes(
    packed: tuple[Path, Path, Path], pico: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = tmp_path / "small"
    large = tmp_path / "large"
    assert (
        main(
            [
                "tokenize",
                "train",
                str(tmp_path / "train-read"),
                "--set",
                "vocab_size=400",
                "--out",
                str(large),
                "--quiet",
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "data",
                "pack",
                str(large),
                str(tmp_path / "test-read"),
                "--set",
                "max_length=64",
                "--out",
                str(tmp_path / "others"),
                "--quiet",
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "tokenize",
                "train",
                str(tmp_path / "train-read"),
                "--set",
                "vocab_size=280",
                "--out",
                str(small),
                "--quiet",
            ]
        )
        == 0
    )
    capsys.readouterr()
    for words, says in (
        ([str(pico), str(packed[0]), "--set", "discount=1e-323"], "set 0, or at least 0.001"),
        ([str(pico), str(tmp_path / "train-read")], "no shards of packed tokens"),
        ([str(small), str(packed[0])], "packed with another tokenizer than"),
        (
            [str(pico), str(packed[0]), "--eval-data", str(tmp_path / "others")],
            "others: packed with another tokenizer",
        ),
        ([str(pico), str(packed[0]), "--set", "order=9"], "less than or equal to 8"),
    ):
        assert main(["train", "ngram", *words, "--out", str(tmp_path / "o"), "--quiet"]) == 2
        told = capsys.readouterr().err.strip()
        assert says in told
        assert len(told.splitlines()) == 1
