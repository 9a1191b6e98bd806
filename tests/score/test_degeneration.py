"""Degenerate completions are found in any script; ordinary lists, poems and code are not taken for them."""

from __future__ import annotations

import pytest

from llmworks.core.types import Message
from llmworks.score import SCORES
from llmworks.score.degeneration import compute_repetition, find_degeneration, has_same_start

CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\t",
        "<html><body>" * 30,
        "The capital of France is Paris. " * 6,
        "我不知道。" * 12,
        "मुझे नहीं पता कि यह क्या है। " * 8,
        "لا أعرف ما هذا. " * 8,
        "🙂🙃" * 20,
        "ha " * 60,
        "ฉันไม่รู้" * 12,
        "Paris \N{REPLACEMENT CHARACTER}",
        CALL,
        "Rooms:\n" + "".join(f"{n}. Kitchen\n" for n in range(1, 22)),
        "1. **10% OFF**\n2. **10% OFF**\n3. **10% OFF**",
        "A hobby is something that people do in their free time, such as reading, and there are many of them: "
        + "movies, music, books, " * 8,
        "1. **1" + "0" * 80,
    ],
)
def test_degenerate(text: str) -> None:
    assert find_degeneration(text)
    score = SCORES["not_degenerate"]([Message("user", "hi")], text, {})
    assert score.value == 0
    assert score.reason == find_degeneration(text)


@pytest.mark.parametrize(
    "text",
    [
        "Paris.",
        "7 plus 5 is 12.",
        "Ha, ha, ha!",
        "January, February, March, April, May, June, July, August, September, October, November, December",
        "1. Eat well.\n2. Sleep well.\n3. Walk well.",
        "def add(a, b):\n    return a + b\n\nprint(add(1, 2))\nprint(add(3, 4))",
        "巴黎是法国的首都，也是法国最大的城市。它位于塞纳河畔，有许多著名的博物馆和教堂。",
        "पेरिस फ्रांस की राजधानी है और सीन नदी के किनारे बसा हुआ है।",
        "Row, row, row your boat, gently down the stream, merrily, merrily, merrily, merrily, life is but a dream.",
        "| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |",
        "1. Anna\n2. Ben\n3. Carl\n4. Dora\n5. Emil\n6. Fritz\n7. Gerda\n8. Hans\n9. Ida\n10. Kurt\n11. Lea",
        "\n".join(f"2 x {n} = {2 * n}" for n in range(1, 11)),
        "---\nTotal: 10000000000\n---",
    ],
)
def test_not_degenerate(text: str) -> None:
    assert find_degeneration(text) == ""


def test_offered_functions_may_be_called() -> None:
    assert SCORES["not_degenerate"]([], CALL, {"tools": [{"name": "get_weather"}]}).value == 1


def test_repetition_is_the_share_of_repeated_4_grams() -> None:
    """Welleck et al. 2020: 1 - unique n-grams / n-grams. 24 words of period 6 have 21 4-grams, 6 of them unique."""
    assert compute_repetition("a b c d e f " * 4) == pytest.approx(1 - 6 / 21)
    assert compute_repetition(" ".join(map(str, range(50)))) == 0
    assert compute_repetition("a a a a a") == 0  # too short to tell


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("The capital of France is Paris.", "the CAPITAL, of Spain", True),
        ("The capital of France", "A capital of France", False),
        ("Paris", "Paris.", True),
        ("Paris", "Paris is big", False),
        ("", "", True),
        ("巴黎是首都", "巴黎是城市", True),
        ("巴黎是首都", "伦敦是首都", False),
        ("यह एक किताब है", "यह एक क़लम है", False),
    ],
)
def test_same_start(answer: str, reference: str, same: bool) -> None:
    assert has_same_start(answer, reference) is same
