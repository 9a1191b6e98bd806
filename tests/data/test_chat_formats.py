"""Every usual shape of conversations and preferences is recognised, read into one schema, and written back as it
was.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from llmworks.cli import main
from llmworks.core.artifact import Dataset
from llmworks.core.types import Message, ToolCall
from llmworks.data import chat_formats as shapes
from llmworks.data.chat import generalize_reasons
from llmworks.data.conversations.turns import find_problems, merge_consecutive_turns
from llmworks.data.store.rows import read_chat, read_preference, write_chat, write_preference

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {
    "name": "f",
    "description": "d",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}
U, A, S = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "Hello."), ("system", "Be kind."))
)
WRAPPED = {"type": "function", "function": TOOL}

# name of the shape: raw rows as published data sets have them
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": [S, U, A]},
        {"id": 7, "group": "g", "messages": [U, A], "source": "web", "score": 0.5, "answer": {"x": [1]}},
        {
            "id": None,
            "messages": [
                U,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "5", "tool_call_id": "c1", "name": "f"},
                A,
            ],
            "tools": [WRAPPED],
        },
        {"messages": [U, {**A, "weight": 0}, U, {**A, "weight": 1}], "tools": []},
        {
            "messages": [
                {"role": "developer", "content": "x"},
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                {**A, "refusal": None},
            ]
        },
        {"conversations": [U, A], "tools": "[]"},
        {"messages": [U, A], "tools": json.dumps([TOOL]), "parallel_tool_calls": False},
        {
            "messages": [
                U,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
                },
            ],
            "tools": [{**WRAPPED, "strict": True}],
        },
    ],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        {
            "id": "x",
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello.", "weight": 0},
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
            ],
        },
        {
            "system": "Be kind.",
            "tools": json.dumps([TOOL]),
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "5"},
                {"from": "gpt", "value": "Five."},
            ],
        },
        {
            "conversations": [
                {"from": "user", "value": "Hi", "lang": "en"},
                {"from": "assistant", "value": "Hello.", "score": 3},
            ],
            "system": "",
        },
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "chatgpt", "value": "Hello.", "weight": None}],
            "tools": "  ",
        },
    ],
    "alpaca": [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Say hi.", "input": "", "output": "hi", "text": "Below is ..."},
        {"instruction": "Say hi.", "output": "hi"},
        {"instruction": "", "input": "1 2", "output": "3"},
        {
            "instruction": "Go on.",
            "input": None,
            "output": "ok",
            "system": "Be kind.",
            "history": [["a", "b"], ["c", "d"]],
        },
        {"instruction": "x\n\ny", "input": "z\n\nw", "output": "", "history": []},
    ],
    "chatml": [
        {
            "text": (
                "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nHi\n<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
            )
        },
        {"text": "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\nHello.<|im_end|>", "n": 1},
        {"text": "\n<|im_start|>user \nHi<|im_end|>\n\n<|im_start|>assistant\nHello.<|im_end|>\n"},
    ],
    "evals": [
        {"input": [S, U], "ideal": "Hello."},
        {"input": [S], "ideal": ["Hello.", "Hi."], "id": "e"},
        {"input": [{**U, "name": "example_user"}], "ideal": "1"},
    ],
    "completion": [
        {"prompt": "The sky is", "completion": " blue."},
        {"prompt": [S, U], "completion": [A]},
        {"prompt": [U], "completion": "Hello.", "label": True},
        {"question": "1 + 1?", "answer": "2", "id": "q"},
        {"query": "1 + 1?", "response": "2"},
        {"input": "1 + 1?", "output": "2"},
    ],
    "preference": [
        {"prompt": "Hi", "chosen": "Hello.", "rejected": "Go away."},
        {"prompt": [S, U], "chosen": [A], "rejected": [{**A, "content": "Go away."}], "score_chosen": 9.0},
        {"chosen": [S, U, A], "rejected": [S, U, {**A, "content": "Go away."}]},
        {"prompt": "Hi", "chosen": [U, A], "rejected": [U, {**A, "content": "Go away."}], "prompt_id": "p"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: Go\n\naway."},
        {"chosen": "\n\nHuman:Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman:Hi\n\nAssistant:Go."},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Hello."},
            "rejected": {"from": "gpt", "value": "Go."},
        },
        {"question": "Hi", "chosen": "Hello.", "rejected": "Go.", "system": "s"},
    ],
}
EVERY = [(name, row) for name, rows in ROWS.items() for row in rows]


@pytest.mark.parametrize(("name", "raw"), EVERY)
def test_rows_are_recognised_and_written_back_as_they_were(name: str, raw: dict[str, Any], tmp_path: Path) -> None:
    assert shapes.detect_format(raw) == name
    row = {**shapes.read(raw), "id": "r", "group": "r"}
    (write_preference if name == "preference" else write_chat)(tmp_path, [row])
    kept = (read_preference if name == "preference" else read_chat)(Dataset(tmp_path))[0]
    back = shapes.write({**kept, "id": shapes.read(raw)["id"], "group": shapes.read(raw)["group"]})
    assert back == raw


def said(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in row["messages"]]


def test_what_is_understood() -> None:
    row = shapes.read(ROWS["sharegpt"][2])
    assert said(row) == [
        ("system", "Be kind."),
        ("user", "Hi"),
        ("assistant", ""),
        ("tool", "5"),
        ("assistant", "Five."),
    ]
    assert row["messages"][2]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}
    assert row["tools"] == [TOOL] == shapes.read(ROWS["messages"][2])["tools"]
    assert said(shapes.read(ROWS["alpaca"][0])) == [("user", "Add.\n\n1 2"), ("assistant", "3")]
    assert [t for _, t in said(shapes.read(ROWS["alpaca"][4]))] == ["Be kind.", "a", "b", "c", "d", "Go on.", "ok"]
    assert said(shapes.read(ROWS["chatml"][0])) == [("system", "s"), ("user", "Hi\n"), ("assistant", "Hello.")]
    for raw in ROWS["preference"]:
        row = shapes.read(raw)
        assert row["prompt"][-1]["content"] == "Hi"
        assert [m["content"] for m in row["chosen"]] == ["Hello."]
        assert row["rejected"][0]["content"].startswith("Go")


def test_a_changed_row_is_written_as_it_is_now() -> None:
    row = shapes.read(ROWS["sharegpt"][3])  # carries itself along
    row["messages"][1]["content"] = "Goodbye."
    assert shapes.write(row)["conversations"] == [
        {"from": "human", "value": "Hi", "lang": "en"},
        {"from": "gpt", "value": "Goodbye.", "score": 3},
    ]


PLAIN = {
    "id": "1",
    "group": "1",
    "tools": [],
    "answer": None,
    "extra": {},
    "messages": [U, A, {**U, "content": "Why?"}, {**A, "content": "So."}],
}


@pytest.mark.parametrize("name", ["messages", "sharegpt", "alpaca", "chatml", "completion"])
def test_one_conversation_in_every_shape(name: str) -> None:
    raw = shapes.write(PLAIN, name)
    assert shapes.detect_format(raw) == name
    assert shapes.read(raw)["messages"] == PLAIN["messages"]


@pytest.mark.parametrize(
    ("name", "messages", "why"),
    [
        ("alpaca", [U, {**A, "tool_calls": [CALL]}], "without tools"),
        ("alpaca", [A, U], "only alternating user"),
        ("chatml", [U, {**A, "content": "<|im_end|>"}], "content contains"),
        ("chatml", [U, {**A, "tool_calls": [CALL]}], "cannot hold tools"),
        ("sharegpt", [U, {**A, "tool_calls": [CALL]}], "cannot hold both"),
        ("completion", [U], "no completion"),
        ("preference", [U, A], "cannot be written as 'preference'"),
    ],
)
def test_what_a_shape_cannot_hold(name: str, messages: list[Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        shapes.write({**PLAIN, "messages": messages}, name)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ({"a": 1, "b": 2}, r"has no known format \(keys: a, b\)"),
        ({}, "none"),
        ({"text": "plain"}, "no known format"),
        ({"messages": []}, "must be a list of turns"),
        ({"messages": ["x"]}, "must be a list of turns"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role 'robot'"),
        ({"messages": [{"role": "user", "content": 7}]}, "must be a string"),
        ({"messages": [U, {**A, "weight": 2}]}, "weight is 2"),
        ({"messages": [U, A], "tools": "{"}, "`tools` is not JSON"),
        ({"messages": [U, A], "tools": "7"}, "list of functions"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "turn 1 is from 'alien'"),
        ({"conversations": [{"from": "human", "value": None}]}, "turn 1: `value` must be a string"),
        ({"conversations": [{"from": "function_call", "value": "f(1)"}]}, "not a JSON object with name"),
        ({"instruction": 1, "output": "x"}, "`instruction` must be a string"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, "pair of strings"),
        ({"text": "<|im_start|>user\nHi"}, "a turn is not terminated"),
        ({"text": "<|im_start|>user\nHi<|im_start|>assistant\nx<|im_end|>"}, "is not terminated"),
        ({"text": "<|im_start|>user\nHi<|im_end|>stray"}, "outside of turns"),
        ({"text": "<|im_start|>robot\nHi<|im_end|>"}, "unknown role 'robot'"),
        ({"prompt": 1, "completion": "x"}, "a string or a list of turns"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"chosen": [U, A], "rejected": [{**U, "content": "other"}, A]}, "have no common first turns"),
        ({"prompt": "x", "chosen": None, "rejected": "b"}, "a string or a list"),
        (
            {"messages": [U, {**A, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "arguments of a tool call are not JSON",
        ),
    ],
)
def test_what_is_no_row(raw: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        shapes.read(raw)

        # turns


def turns(spoken: str) -> tuple[Message, ...]:
    """s, u, a, t (tool), c (assistant with a call), - (an empty user turn), = (an empty assistant turn), 0 (an
    assistant turn not learned).
    """
    call = (ToolCall("f", {"a": 1}, "c1"),)
    made = {
        "s": Message("system", "x"),
        "u": Message("user", "x"),
        "a": Message("assistant", "x"),
        "t": Message("tool", "x", tool_call_id="c1"),
        "c": Message("assistant", "", call),
        "-": Message("user", " "),
        "=": Message("assistant", ""),
        "0": Message("assistant", "x", weight=0),
        "T": Message("tool", "x", tool_call_id="c9"),
        "C": Message("assistant", "", call * 2),
    }
    return tuple(made[c] for c in spoken)


@pytest.mark.parametrize("spoken", ["ua", "sua", "uaua", "uc", "ucta", "uctcta", "uCtta", "u0ua", "uctua"])
def test_good_turns(spoken: str) -> None:
    assert find_problems(turns(spoken), [TOOL]) == []


@pytest.mark.parametrize(
    ("spoken", "why"),
    [
        ("", "has no turns"),
        ("u", "has no assistant turn"),
        ("uau", "ends with a user turn"),
        ("au", "before any user turn"),
        ("saua", "before any user turn"),
        ("usa", "turn 2 is a system turn"),
        ("uua", "turns 1 and 2 are both user turns"),
        ("uaa", "turns 2 and 3 are both assistant turns"),
        ("-a", r"turn 1 \(user\) is empty"),
        ("u=", r"turn 2 \(assistant\) is empty"),
        ("uta", "turn 2 is a tool result without a call"),
        ("uctta", "turn 4 is a tool result without a call"),
        ("ucTa", "is the result of 'c9', which no turn called"),
        ("ucua", r"turn 3 \(user\) comes before the result of 1 call"),
        ("uCta", "before the result of 1 call"),
        ("u0", "every assistant turn has weight 0"),
    ],
)
def test_bad_turns(spoken: str, why: str) -> None:
    import re

    found = find_problems(turns(spoken), [TOOL])
    assert any(re.search(why, line) for line in found), found


def test_calls_are_checked_against_the_tools() -> None:
    good = (Message("user", "x"), Message("assistant", "", (ToolCall("f", {"a": 1}),)))
    assert find_problems(good, [WRAPPED]) == []
    assert find_problems(good, [{"name": "g"}]) == ["turn 2 calls 'f', which is not among the tools"]
    assert find_problems((good[0], Message("assistant", "", (ToolCall("f", {}),))), [TOOL]) == [
        "turn 2 calls 'f' without the required argument 'a'"
    ]


def test_neighbours_can_be_joined() -> None:
    assert [m.role for m in merge_consecutive_turns(turns("uuaaua"))] == ["user", "assistant", "user", "assistant"]
    assert merge_consecutive_turns(turns("uua"))[0].content == "x\n\nx"
    assert [len(m.tool_calls) for m in merge_consecutive_turns(turns("uac"))] == [0, 1]
    assert find_problems(merge_consecutive_turns(turns("uctaa"))) == []

    # the stages


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with conversations in five shapes and four kinds of files, some rows of no use."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    folder = tmp_path / "raw"
    folder.mkdir()
    good = {name: [row for row in rows if name != "messages" or "tools" not in row] for name, rows in ROWS.items()}
    (folder / "a.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in good["messages"]) + '{"messages": [\n{"x": 1}\n\n'
    )
    (folder / "b.json").write_text(json.dumps(good["sharegpt"]))
    pq.write_table(
        pa.Table.from_pylist(
            [{"instruction": "a", "input": None, "output": "b"}, {"instruction": "c", "input": "d", "output": "e"}]
        ),
        folder / "c.parquet",
    )
    (folder / "d.csv").write_text('prompt,completion\n"Hi, you",Hello.\n')
    (folder / "e.jsonl").write_text(
        json.dumps({"messages": [U, U, A]})
        + "\n"
        + json.dumps(ROWS["preference"][0])
        + "\n"
        + json.dumps({**ROWS["messages"][1]})
        + "\n"
    )
    return folder


def run(stage: str, data: Path, out: Path, *words: str) -> int:
    return main(["data", stage, "--data", str(data), "--out", str(out), "--quiet", *words])


def test_many_shapes_become_one_data_set_and_go_back(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("chat", files, tmp_path / "chat") == 0
    rows = read_chat(Dataset(tmp_path / "chat"))
    rejected = [json.loads(line) for line in (tmp_path / "chat/rejected.jsonl").read_text().splitlines()]
    assert [(r["file"], r["line"], r["reason"].split(" (")[0]) for r in rejected if "JSON" not in r["reason"]] == [
        ("a.jsonl", 5, "has no known format"),
        ("e.jsonl", 1, "turns 1 and 2 are both user turns"),
        ("e.jsonl", 2, "a preference pair among conversations"),
        ("e.jsonl", 3, "duplicate id '7'"),
    ]
    shapes_found = json.loads((tmp_path / "chat/report/report.json").read_text())["shapes"]
    assert shapes_found == {"messages": 3, "sharegpt": 5, "alpaca": 2, "completion": 1}
    assert run("export", tmp_path / "chat", tmp_path / "back") == 0
    back = [json.loads(line) for line in (tmp_path / "back/data.jsonl").read_text().splitlines()]
    originals = [*(r for r in ROWS["messages"] if "tools" not in r), *ROWS["sharegpt"]]
    assert [
        {k: v for k, v in row.items() if k not in ("id", "group") or k in raw}
        for row, raw in zip(back, originals, strict=False)
    ] == originals
    assert len(back) == len(rows) == 11
    assert run("export", tmp_path / "chat", tmp_path / "alpaca", "--set", "format=alpaca") == 0
    assert run("chat", tmp_path / "alpaca", tmp_path / "again") == 0
    holds = [
        r
        for r in rows
        if [m["role"] for m in r["messages"]][-2:] == ["user", "assistant"]
        and not any("tool_calls" in m or "weight" in m for m in r["messages"])
        and not any(m.keys() - {"role", "content"} for m in r["messages"])
    ]
    aside = [json.loads(line) for line in (tmp_path / "alpaca/rejected.jsonl").read_text().splitlines()]
    lost = next(r for r in aside if "weight 0" in r["reason"])
    assert lost["row"]["messages"] == next(r for r in rows if any("weight" in m for m in r["messages"]))["messages"]
    assert len(aside) + len(holds) == len(rows)
    assert (
        run(
            "export",
            tmp_path / "chat",
            tmp_path / "dropped",
            "--set",
            "format=alpaca",
            "--set",
            "extra_turn_fields=drop_fields",
        )
        == 0
    )
    assert len((tmp_path / "dropped/data.jsonl").read_text().splitlines()) == len(holds) + sum(
        any(m.keys() - {"role", "content", "tool_calls", "weight", "tool_call_id", "name"} for m in r["messages"])
        for r in rows
    )
    assert [said(r) for r in read_chat(Dataset(tmp_path / "again"))] == [said(r) for r in holds]
    assert run("chat", files, tmp_path / "joined", "--set", "merge_turns=true") == 0
    assert len(read_chat(Dataset(tmp_path / "joined"))) == 12


def test_preference_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    raw = tmp_path / "pairs.jsonl"
    raw.write_text("".join(json.dumps(row) + "\n" for row in ROWS["preference"]))
    assert run("chat", raw, tmp_path / "pairs") == 0
    manifest = json.loads((tmp_path / "pairs/manifest.json").read_text())
    assert manifest["about"]["schema"] == "preference"
    assert len(read_preference(Dataset(tmp_path / "pairs"))) == len(ROWS["preference"])
    assert run("export", tmp_path / "pairs", tmp_path / "back") == 0
    assert [json.loads(line) for line in (tmp_path / "back/data.jsonl").read_text().splitlines()] == ROWS["preference"]
    assert run("export", tmp_path / "pairs", tmp_path / "same", "--set", "format=preference") == 0
    alike = [json.loads(line) for line in (tmp_path / "same/data.jsonl").read_text().splitlines()]
    assert {type(row[side]) for row in alike for side in ("prompt", "chosen", "rejected")} == {list}
    assert run("chat", tmp_path / "same/data.jsonl", tmp_path / "again") == 0
    sides = [
        [row[side] for side in ("prompt", "chosen", "rejected")] for row in read_preference(Dataset(tmp_path / "pairs"))
    ]
    assert [
        [row[side] for side in ("prompt", "chosen", "rejected")] for row in read_preference(Dataset(tmp_path / "again"))
    ] == sides


@pytest.mark.parametrize(
    ("content", "name", "words", "says"),
    [
        (b"", "x.jsonl", [], "is empty"),
        (b"{}", "x.txt", [], "supported are .jsonl"),
        (b"[", "x.json", [], "cannot be read"),
        (b"PAR1", "x.parquet", [], "cannot be read"),
        (
            b'{"a": 1}\n',
            "x.jsonl",
            [],
            "no row could be read as a conversation: x.jsonl line 1: has no known format (keys: a)",
        ),
        (b'{"a": 1}\n', "x.jsonl", ["--set", "format=alpaca"], "is not in the format 'alpaca'"),
        (b'{"a": 1}\n', "x.jsonl", ["--set", "format=yaml"], "format"),
        (b"\xff\xfe\n", "x.jsonl", [], "not UTF-8"),
    ],
)
def test_mistakes(
    content: bytes,
    name: str,
    words: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    (tmp_path / name).write_bytes(content)
    assert run("chat", tmp_path / name, tmp_path / "out", *words) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["alpaca", "chatml", "completion", "sharegpt"])
def test_what_a_shape_cannot_say_is_refused(name: str) -> None:
    turns = [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(ValueError, match="turn 1 has the name 'Ann'"):
        shapes.write({"id": "r", "group": "r", "messages": turns, "tools": [], "answer": None, "extra": {}}, name)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    row = {"id": "r", "group": "r", "messages": turns, "tools": [], "answer": None, "extra": {}}
    if name == "sharegpt":
        assert shapes.write(row, name)["conversations"][1] == {"from": "gpt", "value": "b", "weight": 0}
    else:
        with pytest.raises(ValueError, match="turn 2 has weight 0"):
            shapes.write(row, name)


def test_reasons_on_the_card() -> None:
    counted = generalize_reasons(
        {
            "turn 2 (user) is empty": 1,
            "turn 4 (assistant) is empty": 2,
            "turns 1 and 2 are both user turns": 1,
            "has no known format (keys: a, b); known: messages": 3,
            "not JSON (Expecting value: line 1 column 1 (char 0))": 1,
            "message 3 has the unknown role 'x'; known: user": 1,
            "duplicate of another row (r1)": 5,
            "duplicate id '7'": 1,
        }
    )
    assert counted == {
        "a turn is empty": 3,
        "turns are both user turns": 1,
        "has no known format": 3,
        "not JSON": 1,
        "a turn has the unknown role ...": 1,
        "duplicate of another row": 5,
        "duplicate id ...": 1,
    }


def test_rows_without_turns_and_converted_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    raw = tmp_path / "raw.jsonl"
    good: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    raw.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in (
                {"conversations": []},
                {"messages": None},
                {"messages": [{"role": "user", "content": "\ud800"}]},
                good,
            )
        )
    )
    assert run("chat", raw, tmp_path / "chat") == 0
    rejected = [json.loads(line) for line in (tmp_path / "chat/rejected.jsonl").read_text().splitlines()]
    assert [(r["reason"], r["row"]) for r in rejected] == [
        ("has no turns: `conversations` is empty", {"conversations": []}),
        ("has no turns: `messages` is empty", {"messages": None}),
        ("a lone surrogate, which is not valid Unicode text", {"messages": [{"role": "user", "content": "\ud800"}]}),
    ]
    assert run("chat", tmp_path / "chat", tmp_path / "twice") == 2
    assert "already holds conversations in this schema" in capsys.readouterr().err
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "foreign").mkdir()
    pq.write_table(pa.Table.from_pylist([good]), tmp_path / "foreign" / "train.parquet")
    assert run("chat", tmp_path / "foreign", tmp_path / "converted") == 0


BESIDE: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    ({"system": "S", "prompt": "Q", "completion": "A"}, [("system", "S"), ("user", "Q"), ("assistant", "A")]),
    ({"system_prompt": "S", "question": "Q", "response": "A"}, [("system", "S"), ("user", "Q"), ("assistant", "A")]),
    ({"question": "Q", "context": "C", "answer": "A"}, [("user", "C\n\nQ"), ("assistant", "A")]),
    ({"prompt": "Q", "input": "I", "response": "A"}, [("user", "Q\n\nI"), ("assistant", "A")]),
    (
        {"prompt": "Q", "history": [["a", "b"]], "response": "A"},
        [("user", "a"), ("assistant", "b"), ("user", "Q"), ("assistant", "A")],
    ),
    ({"question": "Q", "response": "R", "answer": "42"}, [("user", "Q"), ("assistant", "R")]),
    (
        {"system": "S", "prompt": [{"role": "user", "content": "Q"}], "completion": "A"},
        [("system", "S"), ("user", "Q"), ("assistant", "A")],
    ),
]


@pytest.mark.parametrize(("raw", "turns"), BESIDE)
def test_what_stands_beside_a_prompt_is_part_of_it(raw: dict[str, Any], turns: list[tuple[str, str]]) -> None:
    row = shapes.read(raw)
    assert [(m["role"], m["content"]) for m in row["messages"]] == turns
    assert shapes.write(row) == raw
    assert [(m["role"], m["content"]) for m in shapes.read(shapes.write(row, "messages"))["messages"]] == turns
    assert row["answer"] == (raw["answer"] if "response" in raw and "answer" in raw else None)


def test_what_stands_beside_the_prompt_of_a_pair() -> None:
    raw = {"system": "S", "question": "Q", "chosen": "a", "rejected": "b", "source": "x"}
    row = shapes.read(raw)
    assert [(m["role"], m["content"]) for m in row["prompt"]] == [("system", "S"), ("user", "Q")]
    assert row["extra"]["fields"] == {"source": "x"}
    assert shapes.write(row) == raw
    raw = {"instruction": "Fix", "input": "teh", "chosen": "the", "rejected": "teh"}
    assert shapes.read(raw)["prompt"] == [{"role": "user", "content": "Fix\n\nteh"}]
    for wrong in (
        {"system": 3, "prompt": "Q", "completion": "A"},
        {"history": "x", "prompt": "Q", "completion": "A"},
        {"context": "C", "prompt": [{"role": "user", "content": "Q"}], "completion": "A"},
    ):
        with pytest.raises(ValueError, match=r"must be|cannot be combined"):
            shapes.read(wrong)


def test_weights_and_marks_of_other_trainers() -> None:
    def weights(**turn: Any) -> list[int]:
        row = shapes.read({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", **turn}]})
        same = shapes.read(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **turn}]}
        )
        assert row["messages"] == same["messages"]
        return [m.get("weight", 1) for m in row["messages"]]

    assert weights(weight=0) == weights(train=False) == weights(loss=False) == [1, 0]
    assert weights(weight=1) == weights(train=True) == [1, 1]
    for wrong in (0.5, 2, "1", "0"):
        with pytest.raises(ValueError, match="must be 0 or 1"):
            weights(weight=wrong)


def test_older_function_calls_and_keys_that_are_lost() -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "1"},
        {"role": "assistant", "content": "b"},
    ]
    row = shapes.read({"messages": turns})
    assert [m["role"] for m in row["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert row["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert shapes.write(row) == {"messages": turns}
    with pytest.raises(ValueError, match=r"`refusal` is not supported"):
        shapes.read(
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "refusal": "no"}]}
        )
    odd = shapes.read(
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "reasoning_content": "hm"},
            ]
        }
    )
    assert "reasoning_content" in shapes.write(odd)["messages"][1]
    assert shapes.write(odd, "messages")["messages"][1]["reasoning_content"] == "hm"
    assert shapes.write(odd, "sharegpt")["conversations"][1]["reasoning_content"] == "hm"
    for name in ("alpaca", "chatml", "completion"):
        with pytest.raises(ValueError, match=r"'reasoning_content', which .* cannot hold"):
            shapes.write(odd, name)
    tools = [{"name": "f", "description": "", "parameters": {}}]
    assert shapes.write(
        {
            **shapes.read({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}),
            "tools": tools,
        },
        "messages",
    )["tools"] == [{"type": "function", "function": tools[0]}]


def test_questions_stay_together_and_pairs_are_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    for name, sides in (("chats", {"completion": "A{}"}), ("pairs", {"chosen": "A{}", "rejected": "B{}"})):
        raw = tmp_path / f"{name}.jsonl"
        raw.write_text(
            "".join(
                json.dumps({"prompt": f"Question {i // 4}?", **{k: v.format(i) for k, v in sides.items()}}) + "\n"
                for i in range(40)
            )
        )
        assert run("chat", raw, tmp_path / name) == 0
        asked = {}
        for part in ("train", "test"):
            assert run("split", tmp_path / name, tmp_path / f"{name}-{part}", "--set", f"split={part}") == 0
            data = Dataset(tmp_path / f"{name}-{part}")
            rows = read_preference(data) if name == "pairs" else read_chat(data)
            asked[part] = {(row.get("prompt") or row["messages"])[0]["content"] for row in rows}
        assert len(asked["train"]) == 8
        assert len(asked["test"]) == 2
        assert not asked["train"] & asked["test"]
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(raw.read_bytes() * 50)[:-40])
    assert run("chat", cut, tmp_path / "o") == 2
    told = capsys.readouterr().err.strip()
    assert "cut.jsonl" in told
    assert len(told.splitlines()) == 1
