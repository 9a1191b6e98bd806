"""The `key` score judges as a person would: numbers by value, formulas by meaning, text in any script, letters."""

from __future__ import annotations

import random
import time

import pytest

from llmworks.core.text.words import split_words
from llmworks.score import SCORES
from llmworks.score.math import equality
from llmworks.score.math.equality import is_equal_formula, is_formula
from llmworks.score.math.numbers import read_number

NUMBERS = [
    ("The answer is $29.00.", "29", True),
    ("$1,234.50", "1234.5", True),
    ("The answer is 12 (3 boxes of 4).", "12", True),
    ("The answer is 12 because 3 times 4 is 12 and 7 is not.", "12", True),
    ("Answer: \u22123", "-3", True),
    ("Answer: \u22123", "3", False),
    ("Answer: \u20133", "3", False),
    ("Answer: 1.0", "1", True),
    ("\\boxed{1{,}000}", "1000", True),
    ("\\boxed{1\\,000}", "1000", True),
    ("Answer: 1 000", "1000", True),
    ("Answer: 1\u202f000", "1000", True),
    ("Answer: 1,00,000", "100000", True),
    ("Answer: 1/2", "1/2", True),
    ("Answer: 2/4", "1/2", True),
    ("Answer: 0.5", "1/2", True),
    ("\\boxed{\\frac{1}{2}}", "0.5", True),
    ("Answer: 50", "50%", True),
    ("Answer: 42%", "42", True),
    ("x = 5 - 3", "-3", False),
    ("x = 5 - 3", "2", True),
    ("Answer: 3-5", "-5", False),
    ("Answer: 10-3", "-3", False),
    ("Answer: 10-3", "10", False),
    ("Answer: 1e3", "1000", True),
    ("Answer: 10^3", "1000", True),
    ("Answer: 2 \u00d7 10^3", "2000", True),
    ("Answer: \u0664\u0662", "42", True),
    ("Answer: \u096a\u0968", "42", True),
    ("Answer: \uff14\uff12", "42", True),
    ("Answer: 007", "7", True),
    ("Answer:\n42", "42", True),
    ("#### 42", "42", True),
    ("#### 42 apples, 7 pears", "42", True),
    ("In 2010 there were 5.", "5", True),
    ("Answer: 2010-05-01", "2004", False),
    ("Answer: 9^9^9^9", "9", False),
    ("Answer: 1e999999999", "1", False),
    ("Answer: 1/0", "1", False),
    ("", "0", False),
    ("none", "0", False),
]
OPTIONS = [
    ("The correct answer is \\boxed{B}.", "B", True),
    ("\\boxed{\\text{B}}", "B", True),
    ("The answer is B because it is green.", "B", True),
    ("**Answer: B**", "B", True),
    ("**Answer:** **B**", "B", True),
    ("Answer: option C", "C", True),
    ("Answer: (d) the last", "D", True),
    ("Answer: A \u2013 the first", "A", True),
    ("Answer: B and C", "B", False),
    ("Answer: C++", "C", False),
    ("Answer: C#", "C", False),
    ("A fern is a plant", "A", False),
    ("Answer: A fern", "A", False),
    ("Answer: I'm not sure", "I", False),
    ("no idea", "N", False),
    ("Answer: AB", "A", False),
]
TEXTS = [
    ("Answer: C", "C++", False),
    ("Answer: C++", "C++", True),
    ("Answer: C", "C#", False),
    ("Answer: c#", "C#", True),
    ("Answer: A+", "A", False),
    ("Answer: 2010-05-01", "2010-05-01", True),
    ("Answer: 2009-04-01", "2010-05-01", False),
    ("Answer: 5-15", "10-20", False),
    ("Answer: <", "<", True),
    ("Answer: >", "<", False),
    ("Answer: +", "-", False),
    ("Answer: -", "-", True),
    ("Answer: \U0001f600", "\U0001f600", True),
    ("Answer: \U0001f600", "\U0001f622", False),
    ("Answer: 是", "是", True),
    ("否", "是", False),
    ("答案：巴黎。", "巴黎", True),
    ("答案是否", "是", False),
    ("Answer: दिल्ली", "दिल्ली", True),
    ("उत्तर: दिल्ली।", "दिल्ली", True),
    ("Answer: की", "का", False),
    ("Answer: คำ", "คา", False),
    ("Answer: caf\u00e9", "cafe\u0301", True),
    ("Answer: caf\u00e9", "cafe", False),
    ("Answer: É", "É", True),
    ("Answer: Paris, France", "Paris", False),
    ("Answer: **Paris**.", "paris", True),
    ("Answer: `Paris`", "Paris", True),
    ("Answer: \u201cParis\u201d", '"Paris"', True),
    ("Answer: don\u2019t", "don't", True),
    ("Answer: Yes.", "yes", True),
    ("Answer: \u200eשלום", "שלום", True),
    ("Answer: ＮＡＳＡ", "nasa", True),
]
FORMULAS = [
    ("So it is $\\boxed{\\frac{\\sqrt{3}}{2}}$.", "\\frac{\\sqrt{3}}{2}", True),
    ("Answer: \\sqrt{3}/2", "\\frac{\\sqrt{3}}{2}", True),
    ("Answer: \\sqrt{3}/3", "\\frac{\\sqrt{3}}{2}", False),
    ("\\boxed{(x+1)^2}", "x^2+2x+1", True),
    ("\\boxed{(x+1)^2}", "x^2+2x+2", False),
    ("Answer: (1, 2)", "(1,2)", True),
    ("Answer: (2, 1)", "(1,2)", False),
    ("Answer: [0,1]", "[0,1)", False),
    ("Answer: 2\\pi", "\\pi \\cdot 2", True),
    ("Answer: 2 + x", "x+2", True),
    ("\\boxed{\\frac{a}{\\frac{b}{\\frac{c}{d}}}}", "\\frac{ac}{bd}", True),
    ("no formula", "x^2", False),
]


@pytest.mark.parametrize(("text", "key", "right"), [*NUMBERS, *OPTIONS, *TEXTS, *FORMULAS])
def test_judged_as_by_a_person(text: str, key: str, right: bool) -> None:
    found = SCORES["key"]((), text, {"id": 1, "answer": key})
    assert (found.value == 1.0) is right, found.reason


def test_numbers_in_any_writing_are_one_number() -> None:
    draw = random.Random(0)
    for _ in range(300):
        number = draw.randrange(-(10**7), 10**7)
        written = f"{number:,}"
        for text in (
            written,
            written.replace(",", "\u202f"),
            written.replace(",", "{,}").replace("-", "\u2212"),
            f"${number}.00$" if number >= 0 else f"{number}.00",
            f"{2 * number}/2",
            "".join(chr(0x0660 + int(c)) if c.isdigit() else c for c in str(number)),
        ):
            assert read_number(text) == number, text
        assert SCORES["key"]((), f"Answer: {written}", {"id": 1, "answer": number}).value == 1
        assert SCORES["key"]((), f"Answer: {written}", {"id": 1, "answer": -number or 1}).value == 0


def test_a_formula_that_takes_for_ever_is_wrong_and_the_next_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_equal_formula("x+1", "1+x")
    monkeypatch.setattr(equality, "SECONDS", 0.5)
    began = time.monotonic()
    assert not is_equal_formula("9^{9^{9^{9^{9}}}}+x", "9^{9^{9^{9^{8}}}}+x")
    assert time.monotonic() - began < 20
    monkeypatch.setattr(equality, "SECONDS", 20.0)
    assert is_equal_formula("y+1", "1+y")


def test_what_is_a_formula() -> None:
    assert all(map(is_formula, ["\\frac{a}{b}", "x^2", "2x+1", "(1, 2)", "\\sqrt{2}", "x=5", "2π"]))
    assert not any(map(is_formula, ["Paris", "C++", "the red sea", "TCP/IP", "yes", "巴黎", "Smith, Jr.", "x" * 500]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The café, don\u2019t", ["the", "café", "don", "t"]),
        ("cafe\u0301", ["café"]),
        ("मुझे हिन्दी पसंद है।", ["मुझे", "हिन्दी", "पसंद", "है"]),
        ("我喜欢Python3", ["我", "喜", "欢", "python3"]),
        ("カタ", ["カ", "タ"]),
        ("ดี", ["ดี"]),
        ("a\u00a0b", ["a", "b"]),
        ("العربية لغة", ["العربية", "لغة"]),
    ],
)
def test_words_of_every_script(text: str, words: list[str]) -> None:
    assert split_words(text) == words
