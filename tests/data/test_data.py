"""Reading, splitting and comparing conversations: nothing is lost silently, no group stands on both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmworks.core.artifact import Dataset
from llmworks.core.errors import DataError
from llmworks.data.overlap import get_user_messages
from llmworks.data.published.bfcl import choose_call, to_json_schema
from llmworks.data.split import SplitConfig
from llmworks.data.split import select_test_groups as held_out
from llmworks.data.store.jsonl import RejectedRows, read_jsonl
from llmworks.data.store.rows import read_chat, write_chat


def test_broken_lines_are_set_aside_with_number_and_reason(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": \n\n[1]\n\xff\xfe\n{"a": 2}\n{"a": 3')
    rejected = RejectedRows()
    assert [(n, r["a"]) for n, r in read_jsonl(file, rejected)] == [(1, 1), (6, 2)]
    assert [(r["line"], r["reason"].split(" (")[0]) for r in rejected.rows] == [
        (2, "not JSON"),
        (4, "not a JSON object"),
        (5, "not UTF-8"),
        (7, "not JSON"),
    ]
    said: list[str] = []
    rejected.write(tmp_path, said.append)
    assert "4 rows rejected" in said[0]
    assert "line 2" in said[0]
    assert len((tmp_path / "rejected.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize(("content", "words"), [(None, "no such file"), (b"", "is empty")])
def test_missing_and_empty_files(tmp_path: Path, content: bytes | None, words: str) -> None:
    file = tmp_path / "x.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(read_jsonl(file, RejectedRows()))


def test_chat_rows_survive_parquet(tmp_path: Path, bfcl_rows: list[dict[str, Any]]) -> None:
    write_chat(tmp_path, bfcl_rows)
    assert read_chat(Dataset(tmp_path)) == bfcl_rows


def test_parquet_of_another_schema(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"x": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no column 'id'"):
        read_chat(Dataset(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_chat(Dataset(tmp_path))


def test_folds_partition_the_groups(bfcl_rows: list[dict[str, Any]]) -> None:
    groups = [r["group"] for r in bfcl_rows]
    folds = [held_out(groups, SplitConfig(split="test", n_splits=5, fold=i, seed=7)) for i in range(5)]  # type: ignore[call-arg]
    assert set().union(*folds) == set(groups)
    assert sum(map(len, folds)) == len(set(groups)) == 370
    assert max(map(len, folds)) - min(map(len, folds)) <= 1
    sizes = [sum(g in f for g in groups) for f in folds]
    assert min(sizes) > 70


def test_a_byte_order_mark_loses_no_row(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n')
    rejected = RejectedRows()
    assert [row["a"] for _, row in read_jsonl(tmp_path / "x.jsonl", rejected)] == [1, 2]
    assert not rejected.rows


def test_texts_are_normalised() -> None:
    row = {"messages": [{"role": "user", "content": " Hi  THERE\n"}, {"role": "assistant", "content": "x"}]}
    assert get_user_messages([row]) == {"hi there"}


def test_bfcl_types_become_json_schema() -> None:
    spec = {"type": "dict", "properties": {"type": {"type": "float"}, "t": {"type": "tuple", "items": {"type": "any"}}}}
    assert to_json_schema(spec) == {
        "type": "object",
        "properties": {"type": {"type": "number"}, "t": {"type": "array", "items": {}}},
    }


def test_right_call_leaves_optional_arguments_out() -> None:
    call = choose_call(
        {"f": {"a": [1, 2], "b": ["x", ""], "c": [{"k": [5], "o": ["y", ""]}]}}, {"parameters": {"required": ["a"]}}
    )
    assert call.arguments == {"a": 1, "c": {"k": 5}}


@pytest.mark.parametrize(
    ("question", "values", "given"),
    [
        ("the area in CM of a square", ["cm", ""], "cm"),  # stated, in another case
        ("a king from 52 cards", [2, ""], None),  # a part of a number states nothing
        ("at 2.5 percent", [5, ""], None),
        ("over 5 years.", ["", 5], 5),
        ("is it true?", [True, ""], None),
        ("two values", [["two"], ""], None),
    ],
)
def test_right_call_gives_an_optional_argument_that_the_question_states(
    question: str, values: list[Any], given: Any
) -> None:
    call = choose_call({"f": {"a": values}}, {"parameters": {"required": []}}, question)
    assert call.arguments == ({} if given is None else {"a": given})
