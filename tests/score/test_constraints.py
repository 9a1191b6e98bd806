"""Verifiable instructions: verdicts of the published checkers of IFEval and IFBench (tests/oracles/constraints.py), and
what they could not be asked.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.oracles.constraints import ANSWERS, CASES

from llmworks.core.errors import DataError
from llmworks.score import get_score_function, score_verified
from llmworks.score.constraints import CHECKS, UNSUPPORTED, check_instructions
from llmworks.score.constraints.text import split_sentences

VERDICTS = json.loads((Path(__file__).parent.parent / "fixtures" / "constraints.json").read_text())["verdicts"]
# sentences and words are divided otherwise there: at no mark but a full stop with a space, at no backtick
OTHERWISE = {
    ("words:last_first", "Same.\n******\nSame."): True,
    ("sentence:increment", "Text. p.s. lower"): False,
    ("format:title_case", '```json\n{"a": 1}\n```'): False,
}


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=[f"{name} {list(given.values())[:3]}" for name, given in CASES]
)
def test_verdicts_are_those_of_the_published_checkers(number: int) -> None:
    name, arguments = CASES[number]
    for answer, verdict in zip(ANSWERS, VERDICTS[number], strict=True):
        ours = check_instructions(answer, [name], [arguments])[0]
        assert ours == OTHERWISE.get((name, answer), verdict == "T"), answer


def test_the_cases_tell_followed_from_not() -> None:
    for (name, _), line in zip(CASES, VERDICTS, strict=True):
        assert "F" in line, name
    followed_somewhere = {name for (name, _), line in zip(CASES, VERDICTS, strict=True) if "T" in line}
    assert {name for name, _ in CASES} - followed_somewhere == set()


def test_every_check_is_compared_or_named_here() -> None:
    by_hand = {
        "language:response_language",
        "length_constraints:number_sentences",
        "change_case:english_capital",
        "change_case:english_lowercase",
        "custom:csv_special_character",
        "custom:csv_quotes",
    }
    assert set(CHECKS) - {name for name, _ in CASES} == by_hand
    assert not set(CHECKS) & set(UNSUPPORTED)


def test_languages_and_sentences() -> None:
    english, german = (
        "The weather is fine today and we all go for a walk.",
        "Das Wetter ist heute schön und wir gehen alle spazieren.",
    )
    assert check_instructions(german, ["language:response_language"], [{"language": "de"}]) == [True]
    assert check_instructions(english, ["language:response_language"], [{"language": "de"}]) == [False]
    assert check_instructions(english.upper(), ["change_case:english_capital"], [{}]) == [True]
    assert check_instructions(english.lower(), ["change_case:english_lowercase"], [{}]) == [True]
    assert check_instructions(german.lower(), ["change_case:english_lowercase"], [{}]) == [False]
    assert check_instructions(
        "One. Two. Three.", ["length_constraints:number_sentences"], [{"num_sentences": 3, "relation": "at least"}]
    ) == [True]
    assert split_sentences('Dr. Who said "Go!" to J. Smith. Really? Yes, e.g. now... and 3.5 more. The end') == [
        'Dr. Who said "Go!"',
        "to J. Smith.",
        "Really?",
        "Yes, e.g. now...",
        "and 3.5 more.",
        "The end",
    ]


def test_tables() -> None:
    products = "ProductID,Category,Brand,Price,Stock\n" + "\n".join(
        f"{i},Tea,{chr(34) + 'A&B' + chr(34) if i == 3 else 'Ann'},{i},9" for i in range(14)
    )
    assert check_instructions(products, ["custom:csv_special_character"], [{}]) == [True]
    assert check_instructions(products.replace("&", ""), ["custom:csv_special_character"], [{}]) == [False]
    line = "\t".join(f'"{x}"' for x in "abcde")
    grades = '"StudentID"\t"Subject"\t"Grade"\t"Semester"\t"Score"\n' + "\n".join([line] * 3)
    assert check_instructions(grades, ["custom:csv_quotes"], [{}]) == [True]
    assert check_instructions(grades.replace('"a"', "a"), ["custom:csv_quotes"], [{}]) == [False]


def row(*names: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "r", "answer": {"constraints": list(names), "arguments": [arguments] * len(names)}}


def test_strict_loose_and_by_instruction() -> None:
    strict, loose, share = (get_score_function(f"constraints{kind}") for kind in ("", "_loose", "_share"))
    given = row("punctuation:no_comma", "startend:quotation")
    answer = 'Sure, here it is:\n"*all of it*"'
    assert strict((), answer, given).reason == "not followed: punctuation:no_comma, startend:quotation"
    assert (strict((), answer, given).value, loose((), answer, given).value, share((), answer, given).value) == (
        0.0,
        1.0,
        0.0,
    )
    assert share((), "no quotation", given).value == 0.5
    assert score_verified((), '"so"', given).value == 1.0
    assert strict((), " \n", row("punctuation:no_comma")).value == 0.0  # an empty answer follows nothing


def test_rows_that_cannot_be_checked() -> None:
    for bad, message in (
        ({"id": "r"}, "`answer` must be"),
        (row("keywords:nothing"), "'keywords:nothing' is unknown"),
        (row("words:start_verb"), "'words:start_verb' is not supported"),
        ({"id": "r", "answer": {"constraints": ["punctuation:no_comma"], "arguments": []}}, "`answer` must be"),
    ):
        with pytest.raises(DataError, match=message):
            get_score_function("constraints")((), "x", bad)
