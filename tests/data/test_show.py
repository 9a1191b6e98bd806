"""The page shows every row as it is, the statistics are those of all rows, and nothing in a text can break out of the
page.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import TEMPLATE, make_pico, make_tokenizer

from llmworks.cli import main
from llmworks.core.types import messages_from_json
from llmworks.data.store.rows import write_chat
from llmworks.tokenize.chat.templates import render_masked

EVIL = "</script><script>alert(1)</script> <b>bold</b> \u2028 &amp; <!--"
ROWS: list[dict[str, Any]] = [
    {
        "id": "a",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Wie geht es dir heute, mein lieber Freund?"},
            {"role": "assistant", "content": "Sehr gut, vielen Dank."},
        ],
        "topic": "talk",
    },
    {
        "id": "b",
        "messages": [
            {"role": "user", "content": EVIL},
            {"role": "assistant", "content": "No.", "weight": 0},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "So."},
        ],
        "topic": "odd",
    },
    {
        "id": "c",
        "messages": [{"role": "user", "content": "same  QUESTION"}, {"role": "assistant", "content": "one"}],
        "answer": "one",
    },
    {"id": "d", "messages": [{"role": "user", "content": "Same question"}, {"role": "assistant", "content": "two"}]},
    {"id": "e", "messages": [{"role": "user", "content": "Same question"}, {"role": "assistant", "content": "two"}]},
]


@pytest.fixture
def chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    return made(tmp_path, "chats", ROWS)


def made(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "chat", str(folder / f"{name}.jsonl"), "--out", str(folder / name), "--quiet"]) == 0
    return folder / name


def items(report: Path) -> tuple[list[dict[str, Any]], str]:
    """(the rows that the page holds, the page)."""
    page = (report / "report.html").read_text(encoding="utf-8")
    return json.loads(re.findall(r'<script type="application/json" id="dsd">(.*?)</script>', page, re.DOTALL)[0]), page


def test_rows_and_statistics(chats: Path, tmp_path: Path, pico: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "show", str(chats), "--model", str(pico), "--out", str(tmp_path / "r"), "--quiet"]) == 0
    shown, page = items(tmp_path / "r")
    assert [[(t["role"], t["text"]) for t in item["turns"]] for item in shown] == [
        [(m["role"], m["content"]) for m in row["messages"]] for row in ROWS
    ]
    assert page.count("<script") == 2
    assert "alert(1)" not in re.sub(r'<script type="application/json".*?</script>', "", page, flags=re.DOTALL)
    assert [item["marks"] for item in shown] == [
        [],
        [],
        ["same question"],
        ["same row", "same question"],
        ["same row", "same question"],
    ]
    assert (shown[0]["tags"], shown[1]["turns"][1]["off"], shown[2]["answer"]) == (
        {"shape": "messages", "topic": "talk"},
        True,
        '"one"',
    )
    tokenizer = make_tokenizer(TEMPLATE)
    for item, row in zip(shown, ROWS, strict=True):
        (tokens,) = item["tokens"]
        expected = render_masked(tokenizer, messages_from_json(row["messages"]))
        assert tokens["ids"] == list(expected.ids)
        assert [int(f) & 1 for f in tokens["flags"]] == list(expected.mask)
        assert [int(f) >> 1 for f in tokens["flags"]] == [int(i < 3) for i in expected.ids]
        assert "".join(tokens["pieces"]) == tokenizer.decode(expected.ids)
    facts = json.loads((tmp_path / "r" / "report.json").read_text())
    assert facts["turns"] == {"2": 3, "3": 1, "4": 1}
    assert facts["roles"] == {"user": 6, "assistant": 6, "system": 1}
    assert (facts["duplicate_rows"], facts["duplicate_questions"], facts["with_system"]) == (1, 2, 1)
    assert facts["languages"]["de"] == 1
    assert facts["lengths"]["assistant"]["100%"] == len("Sehr gut, vielen Dank.")
    said = capsys.readouterr().out
    assert "1 duplicates; 2 with a duplicate question" in said
    assert "<|im_start|>assistant⏎\n«So.<|im_end|>»" in said


def test_choosing_rows(chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "data",
                "show",
                str(chats),
                "--out",
                str(tmp_path / "r"),
                "--set",
                "contains=SAME QUESTION",
                "--set",
                "offset=1",
            ]
        )
        == 0
    )
    shown, _ = items(tmp_path / "r")
    assert [item["id"] for item in shown] == ["e"]
    assert all(not item["tokens"] for item in shown)
    assert "user\n  Same question" in capsys.readouterr().out
    for words, says in (
        (["--set", "contains=nowhere"], "no row contains 'nowhere'"),
        (["--set", "offset=9"], "no row comes after the first 9"),
    ):
        assert main(["data", "show", str(chats), *words]) == 2
        assert says in capsys.readouterr().err


def test_pairs(chats: Path, tmp_path: Path, pico: Path) -> None:
    pairs = made(tmp_path, "pairs", [{"prompt": "Why?", "chosen": "So.", "rejected": "No."}])
    assert main(["data", "show", str(pairs), "--model", str(pico), "--out", str(tmp_path / "r"), "--quiet"]) == 0
    (item,), page = items(tmp_path / "r")
    assert [(t["role"], t["text"]) for t in item["turns"]] == [("user", "Why?"), ("chosen", "So."), ("rejected", "No.")]
    assert [t["side"] for t in item["tokens"]] == ["chosen", "rejected"]
    assert "1 preference pairs" in html.unescape(page)


def test_packed_tokens(chats: Path, tmp_path: Path, pico: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "data",
                "pack",
                str(pico),
                str(chats),
                "--out",
                str(tmp_path / "packed"),
                "--quiet",
                "--set",
                "max_length=300",
            ]
        )
        == 0
    )
    assert main(["data", "show", str(tmp_path / "packed"), "--quiet"]) == 2
    assert "give --model" in capsys.readouterr().err
    assert (
        main(["data", "show", str(tmp_path / "packed"), "--model", str(pico), "--out", str(tmp_path / "r"), "--quiet"])
        == 0
    )
    shown, _ = items(tmp_path / "r")
    tokenizer = make_tokenizer(TEMPLATE)
    texts = {"".join(piece["pieces"]) for item in shown for piece in item["tokens"]}
    assert texts == {
        tokenizer.decode(render_masked(tokenizer, messages_from_json(row["messages"])).ids) for row in ROWS
    }
    facts = json.loads((tmp_path / "r" / "report.json").read_text())
    assert (facts["pieces"], facts["num_label_tokens"]) == (
        5,
        sum(sum(map(int, (f in "13" for f in piece["flags"]))) for item in shown for piece in item["tokens"]),
    )


def test_documents_are_shown_elsewhere(chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("some text")
    assert main(["data", "read", str(tmp_path / "t.txt"), "--out", str(tmp_path / "docs"), "--quiet"]) == 0
    assert main(["data", "show", str(tmp_path / "docs"), "--quiet"]) == 2
    assert "use data.map for documents" in capsys.readouterr().err


def test_long_rows_and_models_without_a_template(
    tmp_path: Path, pico: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    turns = [{"role": "user", "content": "first " + "12 " * 2000}, {"role": "assistant", "content": "at last"}]
    write_chat(
        tmp_path / "long", [{"id": "r", "group": "r", "messages": turns, "tools": [], "answer": None, "extra": {}}]
    )
    assert main(["data", "show", str(tmp_path / "long"), "--model", str(pico), "--quiet"]) == 0
    shown = capsys.readouterr().out
    assert len(shown) < 5000
    assert "first" in shown
    assert "more tokens on the page" in shown
    assert "at last" in shown
    bare = make_pico(tmp_path / "bare", template=None)
    assert main(["data", "show", str(tmp_path / "long"), "--model", str(bare), "--quiet"]) == 2
    assert "has no chat template" in capsys.readouterr().err
    (tmp_path / "raw.jsonl").write_text("{}\n")
    (tmp_path / "empty.jsonl").touch()
    for name, says in (
        ("raw.jsonl", "convert them to conversations with the stage data.chat"),
        ("empty.jsonl", "is empty"),
    ):
        assert main(["data", "show", str(tmp_path / name), "--quiet"]) == 2
        assert says in capsys.readouterr().err
