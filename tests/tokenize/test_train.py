"""Tokenizers that are trained: what they give back, their control tokens and templates, the same bytes in every run;
and comparing them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.tokenize.test_bpe_fast import TEXTS

from llmworks.cli import main
from llmworks.core.artifact import Dataset
from llmworks.core.documents import DocumentWriter, count_characters
from llmworks.core.types import Document
from llmworks.tokenize.bpe.bulk_encoder import build_bulk_encoder
from llmworks.tokenize.bpe.config import TrainConfig
from llmworks.tokenize.chat.named_templates import NAMED_TEMPLATES
from llmworks.tokenize.chat.template_faults import TemplateUses, find_template_faults
from llmworks.tokenize.load import load_tokenizer
from llmworks.tokenize.statistics import detect_script, find_unused_ids, measure_usage
from llmworks.tokenize.train import collect_special_tokens
from llmworks.tokenize.view import strip_colors

MORE = [
    "Grüße aus Köln – übermorgen um 7:45.",
    "日本語のテキストと漢字",
    "Съешь же ещё этих мягких булок",
    "    def f(x):\n        return x ** 2\t# a\r\n\n\n",
    "12345 👩‍💻 \u0301 x",
]
ODD = [*MORE, "", " ", "  two  spaces ", "\n\n", "never seen: Ω≈ç√ 한국어 \U0001f9ff", "a <|im_end|> b"]


@pytest.fixture
def documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    with DocumentWriter(tmp_path / "texts") as writer:
        for i, text in enumerate([*TEXTS[:300], *MORE * 20]):
            writer.add(Document(f"d{i}", text, "s", {"language": "en"} if i % 3 == 0 else {}))
    return tmp_path / "texts"


@pytest.fixture
def few(documents: Path) -> Path:
    """Fewer documents: their tokens do not matter."""
    with DocumentWriter(documents.parent / "few") as writer:
        for i, text in enumerate([*TEXTS[:60], *MORE * 4]):
            writer.add(Document(f"d{i}", text, "s", {}))
    return documents.parent / "few"


def trained(documents: Path, name: str, **config: object) -> Path:
    out = documents.parent / name
    sets = [word for key, value in config.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    assert main(["tokenize", "train", str(documents), *sets, "--out", str(out), "--quiet"]) == 0
    return out


@pytest.mark.parametrize("divide", ["gpt2", "digits", "llama-3"])
def test_bpe_gives_every_text_back(documents: Path, divide: str) -> None:
    tokenizer = load_tokenizer(
        trained(documents, "t", vocab_size=1200, pre_tokenizer=divide, special_tokens=["<|tool|>"])
    )
    assert len(tokenizer) == 1200
    for text in [*TEXTS[300:330], *ODD]:
        ids = tokenizer(text, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|pad|>", "<|tool|>"]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    if divide == "digits":
        assert len(tokenizer("2026")["input_ids"]) == 4
    assert build_bulk_encoder(tokenizer._tokenizer) is not None  # the fast encoder knows it


def test_unigram_gives_every_text_back_by_bytes(documents: Path) -> None:
    tokenizer = load_tokenizer(trained(documents, "t", vocab_size=900, algorithm="unigram"))
    assert len(tokenizer) == 900
    for text in [*TEXTS[300:330], *ODD]:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(tokenizer("a <0x41> <0xFF>", add_special_tokens=False)["input_ids"]) == "a <0x41> <0xFF>"


def test_wordpiece_is_that_of_bert(documents: Path) -> None:
    tokenizer = load_tokenizer(trained(documents, "t", vocab_size=900, algorithm="wordpiece", lowercase=True))
    assert tokenizer.convert_ids_to_tokens(tokenizer("The THE")["input_ids"]) == ["[CLS]", "the", "the", "[SEP]"]
    assert tokenizer.tokenize("\U0001f9ff") == ["[UNK]"]
    assert {token.content for token in tokenizer.added_tokens_decoder.values()} == {
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
    }
    assert (tokenizer.mask_token, tokenizer.cls_token, tokenizer.sep_token, tokenizer.pad_token_id) == (
        "[MASK]",
        "[CLS]",
        "[SEP]",
        0,
    )


@pytest.mark.parametrize("algorithm", ["bpe", pytest.param("unigram", marks=pytest.mark.slow), "wordpiece"])
def test_the_bytes_are_the_same_in_every_run(documents: Path, algorithm: str) -> None:
    found = set()
    for run in range(2):
        variables = {
            **os.environ,
            "LLMWORKS_WORKSPACE": str(documents.parent / f"ws{run}"),
            "RAYON_NUM_THREADS": str(run + 1),
            "PYTHONHASHSEED": str(run),
        }
        words = [
            "tokenize",
            "train",
            str(documents),
            "--set",
            f"algorithm={algorithm}",
            "--set",
            "vocab_size=900",
            "--out",
            str(documents.parent / f"r{run}"),
            "--quiet",
        ]
        subprocess.run([sys.executable, "-m", "llmworks.cli", *words], check=True, capture_output=True, env=variables)
        found.add((documents.parent / f"r{run}" / "tokenizer.json").read_bytes())
    assert len(found) == 1


@pytest.mark.parametrize("template", NAMED_TEMPLATES)
@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_templates_come_with_their_tokens(few: Path, template: str, algorithm: str) -> None:
    """The doctor of templates finds no error and no split mark in what was made."""
    tokenizer = load_tokenizer(trained(few, "t", vocab_size=600, algorithm=algorithm, chat_template=template))
    found = {
        f.code: f
        for f in find_template_faults(
            tokenizer, [tokenizer.eos_token_id], TemplateUses(system=True, turns=True), len(tokenizer)
        )
    }
    assert not [f for f in found.values() if f.level == "error"]
    assert "split-mark" not in found or template in ("alpaca", "llama-2", "mistral")  # whose marks are text


def test_control_tokens() -> None:
    assert collect_special_tokens(TrainConfig(chat_template="chatml")) == (
        {"eos_token": "<|im_end|>", "pad_token": "<|pad|>"},
        ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"],
    )
    assert collect_special_tokens(TrainConfig(chat_template="llama-2")) == (
        {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "bos_token": "<s>"},
        ["<|endoftext|>", "<|pad|>", "<s>"],
    )
    assert collect_special_tokens(TrainConfig(end="<end>", special_tokens=["<a>", "<end>"]))[1] == [
        "<|endoftext|>",
        "<|pad|>",
        "<end>",
        "<a>",
    ]


def test_the_report_counts(documents: Path, tmp_path: Path) -> None:
    out = trained(documents, "t", vocab_size=700)
    report = json.loads((out / "report/report.json").read_text())
    tokenizer = load_tokenizer(out)
    texts = [*TEXTS[:300], *MORE * 20]
    usage = measure_usage(tokenizer, [("x", text) for text in texts])
    size = sum(len(text.encode()) for text in texts)
    assert (report["bytes"], report["tokens"]) == (
        size,
        sum(len(tokenizer(t, split_special_tokens=True)["input_ids"]) for t in texts),
    )
    assert report["bytes_per_token"] == round(size / report["tokens"], 4)
    assert report["unused_tokens"] == len(find_unused_ids(tokenizer, usage.id_counts)) == 700 - 2 - len(usage.id_counts)
    assert set(report["groups"]) >= {"en", "Cyrillic"}
    assert [detect_script(t) for t in ("hello", "привет", "人工", "كلمة", "123")] == [
        "Latin",
        "Cyrillic",
        "Cjk",
        "Arabic",
        "none",
    ]
    assert count_characters(Dataset(documents)) == (len(texts), sum(map(len, texts)))
    held = tmp_path / "held"
    with DocumentWriter(held) as writer:
        writer.add(Document("h", "abc " * 50, "s"))
    assert (
        main(
            [
                "tokenize",
                "train",
                str(documents),
                "--eval-data",
                str(held),
                "--set",
                "vocab_size=700",
                "--out",
                str(tmp_path / "h"),
                "--quiet",
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "h/report/report.json").read_text())["texts"] == 1


@pytest.mark.slow
def test_compare(documents: Path, tmp_path: Path, pico: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large, lossy = (
        trained(documents, name, vocab_size=n, algorithm=a)
        for name, n, a in (("s", 400, "bpe"), ("l", 1500, "bpe"), ("w", 1500, "wordpiece"))
    )
    capsys.readouterr()
    words = [
        word
        for name, path in (("small", small), ("large", large), ("lossy", lossy), ("model", pico))
        for word in ("--tokenizers", f"{name}={path}")
    ]
    assert main(["tokenize", "compare", *words, "--data", str(documents), "--json", "--quiet"]) == 0
    done = json.loads(capsys.readouterr().out)
    metrics = done["metrics"]
    assert metrics["large_bytes_per_token"] > metrics["small_bytes_per_token"]
    assert metrics["lossy_lost"] > metrics["large_lost"] == 0
    page = (Path(done["path"]) / "report.html").read_text()
    assert "large compresses best" in page
    assert main(["tokenize", "compare", *words[:4], "--set", 'text="Grüße <b>"', "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert "|" in shown
    assert "Grüße <b>" in shown.replace("|", "").replace("·", "")
    assert any("&lt;" in file.read_text() for file in tmp_path.glob("ws/store/report-*/report.html"))
    assert strip_colors("\x1b[44;30ma\x1b[0m\x1b[43;30mb\x1b[0m\n") == "a|b\n"


def bad(documents: Path) -> Iterator[tuple[list[str], str]]:
    yield ["--set", "vocab_size=258"], "special tokens and bytes alone take 258"
    yield ["--set", "vocab_size=90000"], "give more text or lower vocab_size"
    yield ["--set", "algorithm=unigram", "--set", "vocab_size=90000"], "give more text or lower vocab_size"
    yield ["--set", "vocabulry=9"], "did you mean 'vocab_size'"


def test_mistakes_are_told(documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in bad(documents):
        assert main(["tokenize", "train", str(documents), *words, "--out", str(tmp_path / "o"), "--quiet"]) == 2
        told = capsys.readouterr().err.strip()
        assert says in told
        assert len(told.splitlines()) == 1
    assert not (tmp_path / "o").exists()
    assert main(["tokenize", "train", str(tmp_path), "--out", str(tmp_path / "o"), "--quiet"]) == 2
    assert main(["tokenize", "compare", "--quiet"]) == 2
