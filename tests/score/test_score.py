"""Verifiers: right answers in the ways that models write them pass, wrong ones do not, code and queries can do no
harm.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from importlib import import_module
from typing import Any

import jsonschema
import pytest

from llmworks.core.errors import DataError, UserError
from llmworks.score import get_score_function
from llmworks.score.extract import extract_code_block, extract_final_answer, extract_json
from llmworks.score.sql import extract_query

SETUP = "CREATE TABLE t (a INTEGER, b TEXT); INSERT INTO t VALUES (1, 'x'), (2, 'y'), (3, 'y');"


def score(name: str, text: str, answer: Any, **row: Any) -> tuple[float, str]:
    found = get_score_function(name)((), text, {"id": "r", "answer": answer, **row})
    return found.value, found.reason


RIGHT = [
    ("So 3 * 4.\n#### 12", "12"),
    ("The answer is 1,234.00.", "1234"),
    ("It is $1,234", 1234),
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("I first thought the answer is 3. Answer: 4", "4"),
    ("Let's see. The answer is (B).", "B"),
    ("**Answer:** b) the second", "(B)"),
    ("Answer: B", "(B)"),
    ("answer = -2.5e3", -2500),
    ("Answer: Paris.", "paris"),
    ("Final answer: the  Red-Sea", ["blue", "The red sea"]),
    ("x\n\n12\n", "12"),
    ("Answer: 3 + 4 = 7", "7"),
]
WRONG = [
    ("The answer is 13", "12"),
    ("Answer: Bob", "B"),
    ("Answer: A man", "A"),
    ("", "12"),
    ("Answer: not Paris", "Paris"),
    ("The answer is (A), not (B)", "B"),
    ("12 is the number\nAnswer: none", "12"),
    ("Answer: 1.234", "1234"),
]


@pytest.mark.parametrize(("text", "answer"), RIGHT)
def test_right_answers(text: str, answer: Any) -> None:
    assert score("key", text, answer) == (1.0, "")
    assert score("verified", text, {"key": answer})[0] == 1.0


@pytest.mark.parametrize(("text", "answer"), WRONG)
def test_wrong_answers(text: str, answer: Any) -> None:
    value, reason = score("verified", text, answer)
    assert value == 0.0
    assert "expected" in reason


def test_parts_of_answers() -> None:
    assert extract_final_answer("a\n b \n\n") == "b"
    assert extract_code_block("x\n```python\na = 1\n```\ny\n```\nb\n```\n```js\nc\n```", "python") == "b\n"
    assert extract_code_block("plain") == "plain"
    assert extract_code_block("```python\ncut off", "python") == "cut off"
    assert extract_json('Here: {"a": [1, 2]} and more') == {"a": [1, 2]}
    assert extract_json('```json\n{"a": 1}\n```') == {"a": 1}
    assert extract_json("[1]") == [1]
    with pytest.raises(ValueError, match="no JSON"):
        extract_json("{a: 1}")


def test_shapes() -> None:
    assert score("verified", "  Yes\n", {"regex": r"^(Yes|No)$"})[0] == 1.0
    assert score("regex", "Yes, but", {"regex": r"^(Yes|No)$"}) == (0.0, "does not match '^(Yes|No)$'")
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    assert score("verified", '{"n": 1}', {"schema": schema})[0] == 1.0
    assert score("schema", '{"n": "1"}', {"schema": schema}) == (0.0, 'n: "1" is not of type "integer"')
    assert score("schema", "none", {"schema": schema}) == (0.0, "no JSON in the completion")


def test_patterns_that_never_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backtracking takes 2^40 steps here; the verifier says no instead."""
    monkeypatch.setattr(import_module("llmworks.score.shape"), "TIMEOUT", 0.5)
    began = time.monotonic()
    slow = "^(a|b|ab)*(?=d)$"
    assert score("regex", "ab" * 40 + "!", {"regex": slow}) == (0.0, f"takes longer than 0.5 s to match {slow!r}")
    value, reason = score("schema", json.dumps("ab" * 40 + "!"), {"schema": {"type": "string", "pattern": slow}})
    assert (value, "backtracking" in reason) == (0.0, True)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "schema",
    [
        {
            "type": "array",
            "items": {"anyOf": [{"type": "integer", "minimum": 3}, {"enum": ["a", None]}]},
            "uniqueItems": True,
        },
        {
            "type": "object",
            "patternProperties": {"^x_": {"type": "number"}},
            "additionalProperties": False,
            "minProperties": 1,
        },
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "definitions": {"p": {"type": "string", "pattern": "^[a-z]+$"}},
            "properties": {"p": {"$ref": "#/definitions/p"}},
        },
    ],
)
def test_schemas_agree_with_the_reference(schema: dict[str, Any]) -> None:
    values = [
        [],
        [3],
        [2],
        ["a", None, 4],
        [4, 4],
        {},
        {"x_a": 1},
        {"x_a": "1"},
        {"y": 1},
        {"p": "ab"},
        {"p": "AB"},
        None,
        "text",
        10**30,
        1.5,
    ]
    wanted = [jsonschema.validators.validator_for(schema)(schema).is_valid(value) for value in values]
    assert len(set(wanted)) == 2
    assert [score("schema", json.dumps(value), {"schema": schema})[0] == 1.0 for value in values] == wanted


TESTS = {"tests": "assert add(1, 2) == 3\nassert add(-1, 1) == 0"}


def test_code(monkeypatch: pytest.MonkeyPatch) -> None:
    code = import_module("llmworks.score.code")
    monkeypatch.setattr(code, "LIMITS", replace(code.LIMITS, seconds=2))
    good = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\n"
    assert score("verified", good, TESTS) == (1.0, "")
    assert score("code", good.replace("+", "-"), TESTS)[0] == 0.0
    assert score("code", good.replace("+", "-"), TESTS)[1] == "AssertionError"
    assert score("code", "def add(a, b):\n    return OFFSET + a + b", {**TESTS, "setup": "OFFSET = 0"})[0] == 1.0
    for cheat in ("import sys\nsys.exit(0)", "import os\nos._exit(0)", "raise SystemExit", "def add(a, b): exit(0)"):
        assert score("code", cheat, TESTS) == (0.0, "exited before the tests finished")
    assert score("code", "while True: pass", {**TESTS, "tests": TESTS["tests"]})[1] == "reached the limit of time"


def test_sql(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("llmworks.score.sql"), "TIMEOUT", 1.0)
    answer = {"sql": "SELECT b, count(*) FROM t GROUP BY b", "setup": SETUP}
    assert score("verified", "```sql\nSELECT b, COUNT(a) AS n FROM t GROUP BY 1 ORDER BY n DESC;\n```", answer) == (
        1.0,
        "",
    )
    assert score("sql", "SELECT b, 1 FROM t GROUP BY b", answer) == (0.0, "different rows: 2 returned, 2 expected")
    ordered = {"sql": "SELECT a FROM t ORDER BY a DESC", "setup": SETUP}
    assert score("sql", "select a from t order by a", ordered)[0] == 0.0
    assert score("sql", "select a from t order by -a", ordered)[0] == 1.0
    assert (
        extract_query("The query is: WITH x AS (SELECT 1) SELECT * FROM x; done")
        == "WITH x AS (SELECT 1) SELECT * FROM x"
    )
    for harmful in (
        "DELETE FROM t",
        "SELECT a FROM t; DROP TABLE t",
        "ATTACH '/tmp/x.db' AS x",
        "PRAGMA writable_schema=1",
        "CREATE TABLE u (a)",
        "SELECT load_extension('x')",
        "WITH x AS (SELECT 1) DELETE FROM t",
    ):
        assert score("sql", harmful, answer)[0] == 0.0
    began = time.monotonic()
    endless = "WITH RECURSIVE x(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM x) SELECT max(n) FROM x"
    assert "interrupted" in score("sql", endless, answer)[1]
    assert "more than" in score("sql", endless.replace("max(n)", "n"), answer)[1]
    assert "too big" in score("sql", "SELECT length(zeroblob(900000000) || 'x')", answer)[1]
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("name", "answer", "match"),
    [
        ("key", None, "must be the key"),
        ("key", [], "must be the key"),
        ("key", True, "must be the key"),
        ("regex", "x", "regex"),
        ("regex", {"regex": "("}, "not a valid regular expression"),
        ("schema", {"schema": {"type": "wrong"}}, "not a valid JSON schema"),
        ("schema", {"schema": {"$ref": "http://127.0.0.1/s"}}, "not a valid JSON schema"),
        ("code", {"tests": "assert f(1) =="}, "answer.tests is not valid Python"),
        ("code", {"tests": "assert f", "setup": "def"}, "answer.setup is not valid Python"),
        ("code", {"tests": " "}, "tests"),
        ("sql", {"sql": "SELECT 1"}, "setup"),
        ("sql", {"sql": "SELECT x", "setup": SETUP}, "its own setup or query fails"),
        ("verified", None, "has no verifiable `answer`"),
        ("verified", {"odd": 1}, "has no verifiable `answer`"),
    ],
)
def test_rows_that_cannot_be_checked(name: str, answer: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        score(name, "x", answer)


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="unknown score function 'keys'; known: code"):
        get_score_function("keys")
