"""No row, field or argument of raw conversations is dropped, cut or changed without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import TEMPLATE, make_pico, make_tokenizer

from llmworks.core.artifact import Dataset
from llmworks.core.errors import DataError, RequestError
from llmworks.core.types import messages_from_json, messages_to_json
from llmworks.data import chat_formats
from llmworks.data.chat import ChatConfig, convert_row
from llmworks.data.conversations.training_rows import tokenize_row
from llmworks.data.readers.csv_rows import detect_delimiter
from llmworks.data.store.rows import read_chat
from llmworks.runtime.session import Session
from llmworks.tokenize.chat.templates import adapt_tools
from llmworks.tokenize.chat.tool_schemas import normalize_tool

THINKING = "(('<think>' + message['reasoning_content'] + '</think>') if message['reasoning_content'] else '')"
READS = TEMPLATE.replace("message['content']", f"{THINKING} + message['content']")
Json = dict[str, Any]


def pair(question: str, answer: str, **more: Any) -> Json:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


def chats(tmp_path: Path, data: Path, **config: Any) -> tuple[list[Json], list[Json], Session]:
    """(rows, rejected rows, the session) of data.chat."""
    session = Session(tmp_path / "workspace", quiet=True)
    made = session.make("data.chat", data=data, config=config)
    rejected = made.path / "rejected.jsonl"
    lines = rejected.read_text("utf-8").splitlines() if rejected.exists() else []
    return read_chat(Dataset(made.path)), [json.loads(line) for line in lines], session


def write_lines(file: Path, rows: list[Json]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


# files of one stem, ids that are no keys


def test_files_of_one_stem_keep_their_rows(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    for folder in ("a", "b"):
        write_lines(raw / folder / "train.jsonl", [pair(f"{folder}{i}", "x") for i in range(3)])
    for part in range(3):
        write_lines(raw / f"part.0000{part}.jsonl", [pair(f"p{part}{i}", "x") for i in range(3)])
    rows, rejected, _ = chats(tmp_path, raw)
    assert len(rows) == 15
    assert rejected == []
    assert {"a/train-1", "b/train-1", "part.00000-1", "part.00002-3"} <= {row["id"] for row in rows}


def test_ids_that_are_no_keys(tmp_path: Path) -> None:
    same = {"id": "cats", **pair("1", "x")}
    data = write_lines(
        tmp_path / "a.jsonl", [same, {"id": "cats", **pair("2", "x")}, {"id": "cats", **pair("3", "x")}, same]
    )
    rows, rejected, _ = chats(tmp_path, data)
    assert [row["id"] for row in rows] == ["cats", "cats~2", "cats~3"]
    assert [row["reason"] for row in rejected] == ["duplicate id 'cats'"]


# tables


TABLE = "prompt,completion\nWhere is Oslo?,It is in Norway, in the north.\nok,fine\n"


@pytest.mark.parametrize(
    ("text", "encoding", "answers"),
    [
        ("prompt;completion\nhi;there, you\n", "utf-8", ["there, you"]),
        ("sep=;\nprompt;completion\nhi;there\n", "utf-8", ["there"]),
        ("prompt\tcompletion\nhi\tthere\n", "utf-16", ["there"]),
        ("prompt,completion\nhi,ä\n", "latin-1", ["ä"]),
        ("prompt,completion\nhi,schön für Jürgen\n", "cp1252", ["schön für Jürgen"]),
        ("prompt,completion\r\nhi,नमस्ते\r\n", "utf-8-sig", ["नमस्ते"]),
        ('prompt,completion\nhi,"two\nlines, ""quoted"""\n', "utf-8", ['two\nlines, "quoted"']),
        (f"prompt,completion\nhi,{'x' * 200_000}\n", "utf-8", ["x" * 200_000]),
        ("prompt|completion\nhi|there\n", "utf-8", ["there"]),
    ],
)
def test_tables_as_spreadsheets_write_them(tmp_path: Path, text: str, encoding: str, answers: list[str]) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(text.encode(encoding))
    rows, rejected, session = chats(tmp_path, file)
    assert [row["messages"][1]["content"] for row in rows] == answers
    assert rejected == []
    read = session.make("data.read", data=file, config={"text_field": "completion"})
    assert read.metrics["documents"] == len(answers)


def test_a_row_with_an_unquoted_comma_is_rejected_not_cut(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(TABLE)
    rows, rejected, _ = chats(tmp_path, tmp_path / "a.csv")
    assert [row["messages"][1]["content"] for row in rows] == ["fine"]
    assert [(row["line"], row["reason"].split(";")[0]) for row in rejected] == [(1, "has 3 fields, the header 2")]
    assert "in the north" in rejected[0]["text"]


def test_delimiters() -> None:
    assert detect_delimiter("a;b;c\n1,2;3;4") == ";"
    assert detect_delimiter("text\nhello, world; you") == ","
    assert detect_delimiter("a\tb", tab=True) == "\t"
    assert detect_delimiter('"a;b",c') == ","


# JSON under other names


def test_json_lines_and_wrapped_lists_under_json(tmp_path: Path) -> None:
    rows = [{"instruction": f"say {i}", "context": "", "response": str(i), "category": "open_qa"} for i in range(3)]
    write_lines(tmp_path / "lines" / "a.json", rows)
    (tmp_path / "wrapped").mkdir()
    (tmp_path / "wrapped" / "a.json").write_text(json.dumps({"version": 1, "data": rows}, indent=1))
    for folder in ("lines", "wrapped"):
        found, rejected, session = chats(tmp_path, tmp_path / folder)
        assert [row["messages"][1]["content"] for row in found] == ["0", "1", "2"]
        assert rejected == []
        read = session.make("data.read", data=tmp_path / folder, config={"text_field": "response"})
        assert read.metrics["documents"] == 3


def test_one_conversation_in_a_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(pair("a", "b"), indent=1))
    assert len(chats(tmp_path, tmp_path / "a.json")[0]) == 1


def test_parallel_calls_of_sharegpt() -> None:
    calls = [{"from": "function_call", "value": json.dumps({"name": "f", "arguments": {"x": i}})} for i in (1, 2)]
    turns = [
        {"from": "human", "value": "both"},
        *calls,
        *({"from": "observation", "value": str(i)} for i in (1, 2)),
        {"from": "gpt", "value": "done"},
    ]
    row = convert_row(ChatConfig(), {"conversations": turns}, "r")
    assert [turn["role"] for turn in row["messages"]] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [json.loads(c["function"]["arguments"])["x"] for c in row["messages"][1]["tool_calls"]] == [1, 2]
    assert chat_formats.write(row) == {"conversations": turns}


# fields of turns


def test_reasoning_is_kept_and_given_to_templates_that_read_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = {"reasoning_content": "hm, 嗯", "mood": ["calm"]}
    data = write_lines(tmp_path / "a.jsonl", [pair(f"q{i}", "yes", **fields) for i in range(4)])
    rows, _, _ = chats(tmp_path, data)
    session = Session(tmp_path / "workspace")
    made = session.make("data.chat", data=data, config={"turns": "any"})
    assert "reasoning_content (4 rows)" in capsys.readouterr().err
    assert rows[0]["messages"][1] == {"role": "assistant", "content": "yes", **fields}
    again = messages_to_json(messages_from_json(rows[0]["messages"]))
    assert again == rows[0]["messages"]
    ids, mask = tokenize_row(make_tokenizer(READS), rows[0])
    learned = [i for i, m in zip(ids, mask, strict=True) if m]
    assert "<think>hm, 嗯</think>yes" in make_tokenizer(READS).decode(learned)
    for template, unread in ((TEMPLATE, ["mood", "reasoning_content"]), (READS, ["mood"])):
        model = make_pico(tmp_path / f"model-{len(unread)}", template=template)
        doctor = session.make("data.doctor", model=model, data=made)
        page = json.loads((doctor.path / "report.json").read_text()) if (doctor.path / "report.json").exists() else {}
        text = json.dumps(page) + "".join(p.read_text("utf-8") for p in doctor.path.rglob("*.md"))
        assert [name for name in sorted(fields) if f"'{name}' of turns" in text] == unread
        capsys.readouterr()
        session.make("train.sft", model=model, data=made, config={"num_train_epochs": 0.5, "num_general_prompts": 0})
        err = capsys.readouterr().err
        assert [
            n for n in ("mood", "reasoning_content") if f"does not read the field '{n}' of turns in 4 rows" in err
        ] == unread


def test_datasets_without_the_column_are_read(tmp_path: Path) -> None:
    """Written before turns had further fields."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {"id": "a", "group": "", **pair("q", "x"), "tools": "[]", "answer": "null", "extra": "{}"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "part-00000.parquet")
    assert read_chat(Dataset(tmp_path))[0]["messages"][1] == {"role": "assistant", "content": "x"}


# tools


PROPERTY = {"type": "string"}


def tool(properties: Any, **more: Any) -> Json:
    return {"name": "f", "description": "d", "parameters": {"type": "object", "properties": properties, **more}}


LEGAL: dict[str, tuple[Any, Json]] = {
    "any": (tool({"x": True}), tool({"x": {}})),
    "null": (tool({"x": PROPERTY, "y": None}), tool({"x": PROPERTY})),
    "several types": (tool({"x": {"type": ["string", "null"], "default": None}}),) * 2,
    "required in the property": (tool({"x": {**PROPERTY, "required": True}}), tool({"x": PROPERTY}, required=["x"])),
    "no list of required": (tool({"x": PROPERTY}, required=None), tool({"x": PROPERTY})),
    "no parameters": ({"name": "f", "parameters": None}, {"name": "f"}),
    "parameters as text": (
        {"name": "f", "parameters": json.dumps({"type": "object"})},
        {"name": "f", "parameters": {"type": "object"}},
    ),
    "Anthropic": ({"name": "f", "input_schema": {"type": "object"}}, {"name": "f", "parameters": {"type": "object"}}),
    "wrapped": ({"type": "function", "function": tool({"x": PROPERTY})}, tool({"x": PROPERTY})),
    "wrapped twice": ({"type": "function", "function": {"type": "function", "function": {"name": "f"}}}, {"name": "f"}),
    "plain": (tool({"x": {"type": "integer", "enum": [1, 2], "description": "n"}}, required=["x"]),) * 2,
}
ILLEGAL = {
    "a property as text": tool({"x": "string"}),
    "required as text": tool({"x": PROPERTY}, required="x"),
    "a list of properties": tool([{"name": "x"}]),
    "a list of parameters": {"name": "f", "parameters": [{"name": "x"}]},
    "no name": {"description": "d"},
    "a name that is null": {"name": None},
    "a name that is a number": {"name": 5},
    "a function that is null": {"type": "function", "function": None},
    "another kind of tool": {"type": "code_interpreter"},
    "a list as description": {"name": "f", "description": ["a"]},
    "a number as description": tool({"x": {"description": 5}}),
    "text": "f",
}


@pytest.mark.parametrize("what", LEGAL)
def test_legal_tools_are_rendered(what: str, tmp_path: Path) -> None:
    given, normal = LEGAL[what]
    assert normalize_tool(given) == normal
    row = convert_row(ChatConfig(), {**pair("a", "b"), "tools": [given]}, "r")
    assert row["tools"] == [normal]
    for tokenizer in (make_tokenizer(), make_tokenizer("{{ tools | tojson if tools }}" + TEMPLATE)):
        ids, _ = tokenize_row(tokenizer, row)
        assert "f(" in tokenizer.decode(ids) or '"f"' in tokenizer.decode(ids)


@pytest.mark.parametrize("what", ILLEGAL)
def test_other_tools_are_rejected_by_name(what: str, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "a.jsonl", [{**pair("a", "b"), "tools": [ILLEGAL[what]]}, pair("c", "d")])
    rows, rejected, _ = chats(tmp_path, data)
    assert len(rows) == 1
    assert "tool" in rejected[0]["reason"]
    assert "Error:" not in rejected[0]["reason"]
    with pytest.raises(RequestError):
        adapt_tools(make_tokenizer(), messages_from_json(pair("a", "b")["messages"]), [ILLEGAL[what]])


def test_arguments_that_only_another_function_has(tmp_path: Path) -> None:
    tools = [
        tool({"x": {"type": "integer"}, "colour": None}),
        {**tool({"colour": PROPERTY, "x": None}), "name": "paint"},
    ]
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"x": None, "colour": None}}}
    turns = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "ok", "tool_call_id": "c"},
        {"role": "assistant", "content": "done"},
    ]
    row = convert_row(ChatConfig(), {"messages": turns, "tools": tools}, "r")
    assert json.loads(row["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"x": None}


@pytest.mark.parametrize(
    "call",
    [
        {"function": {"name": "f", "arguments": [1]}},
        {"function": {"name": "f", "arguments": '{"x": NaN}'}},
        {"function": {"arguments": {}}},
        {"function": None},
        "f()",
        None,
    ],
)
def test_calls_that_are_none_are_rejected_with_a_reason(tmp_path: Path, call: Any) -> None:
    data = write_lines(tmp_path / "a.jsonl", [pair("a", "", tool_calls=[call])])
    with pytest.raises(DataError, match=r"message 2: (a tool call must be|the arguments of a tool call)"):
        chats(tmp_path, data)
