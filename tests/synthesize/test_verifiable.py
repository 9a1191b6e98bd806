"""Verifiable instructions: every answer passes the published checks, the plain text does not, and a split keeps a
text's rows together.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError

from llmworks.core.artifact import Dataset
from llmworks.core.context import Context
from llmworks.core.errors import DataError, LlmworksError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.data.store.rows import read_chat, write_chat
from llmworks.score import get_score_function
from llmworks.score.constraints import CHECKS, check_instructions
from llmworks.synthesize import instruction_rules
from llmworks.synthesize.verifiable import VerifiableConfig, verifiable

WORDS = [
    "council",
    "approves",
    "budget",
    "after",
    "long",
    "debate",
    "over,",
    "parks",
    "and",
    "schools",
    "while",
    "Mayor",
    "Lindgren",
    "calls",
    "the",
    "vote",
    "historic,",
    "not",
    "final",
]
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 6 + i % 9]) + f" {i}" for i in range(120)]


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """Rows of the texts."""

    def run(name: str = "out", texts: list[str] = TEXTS, **config: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        source, out = tmp_path / f"{name}-in", tmp_path / name
        write_chat(
            source,
            [
                {
                    "id": f"t{i}",
                    "group": "",
                    "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "1"}],
                    "tools": [],
                    "answer": None,
                }
                for i, text in enumerate(texts)
            ],
        )
        out.mkdir()

        def engine(artifact: object) -> Any:
            raise LlmworksError("none is needed")

        page = ReportBuilder()
        result = verifiable(
            VerifiableConfig.model_validate(config),
            Dataset(source, name="texts", about={"schema": "chat"}),
            Context(out, tmp_path, 0, Progress(quiet=True), page, engine),
        )
        return read_chat(Dataset(out, about=result.about)), page.data

    return run


def test_every_answer_passes_its_checks(made: Any) -> None:
    rows, data = made(max_instructions=3)
    score = get_score_function("verified")
    for row in rows:
        assert score([], row["messages"][-1]["content"], row).value == 1.0, row
        assert row["extra"]["text"] in row["messages"][0]["content"]
    assert set(data["kinds"]) == {rule.name for rule in instruction_rules.RULES}
    assert {1, 2, 3} == {len(row["answer"]["constraints"]) for row in rows}


def test_a_text_that_follows_nothing_fails(made: Any) -> None:
    """An instruction that is followed by the text itself would teach and measure nothing: of each kind the text alone
    passes next to never, and no answer never.
    """
    rows, _ = made(min_instructions=1, max_instructions=1)
    passed, asked = Counter(), Counter()
    for row in rows:
        name = row["answer"]["constraints"][0]
        asked[name] += 1
        passed[name] += check_instructions(row["extra"]["text"], [name], row["answer"]["arguments"])[0]
        assert check_instructions("", [name], row["answer"]["arguments"]) == [False]
    for name in asked:
        if name != "combination:repeat_prompt":  # whose answer begins with the text
            assert passed[name] <= 0.1 * asked[name], name


@pytest.mark.parametrize("rule", instruction_rules.RULES, ids=lambda rule: rule.name)
def test_a_rule_makes_what_its_check_wants(rule: instruction_rules.InstructionRule) -> None:
    checked = 0
    for number, text in enumerate(TEXTS):
        given = rule.sample_arguments(text, Random(number))
        if given is not None:
            checked += 1
            answer = rule.apply(text, text, given)
            assert CHECKS[rule.name](answer, given), (text, answer, given)
            assert "{" not in instruction_rules.format_instruction(rule, given, Random(number))
    assert checked > 20


def test_the_seed_says_which_rows(made: Any) -> None:
    one, again, other = (made(name, seed=seed, num_rows=40)[0] for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert one == again
    assert one != other
    assert len(one) == 40
    assert len({row["group"] for row in one}) == 40


def test_only_some_kinds(made: Any) -> None:
    rows, _ = made(instruction_ids=["startend:quotation", "punctuation:no_comma"], max_instructions=2)
    assert {name for row in rows for name in row["answer"]["constraints"]} == {
        "startend:quotation",
        "punctuation:no_comma",
    }


def test_what_is_refused(made: Any) -> None:
    with pytest.raises(DataError, match="none of 3 texts is 6 to 24 words long"):
        made(texts=["too short", "this, too", ""])
    for wrong, words in (
        ({"instruction_ids": ["startend:quote"]}, "is unknown"),
        ({"min_instructions": 3, "max_instructions": 2}, "larger than max_instructions"),
        ({"word_range": (9, 3)}, "the smaller first"),
    ):
        with pytest.raises(ValidationError, match=words):
            VerifiableConfig.model_validate(wrong)


def test_texts_that_do_not_fit_are_kept_aside(made: Any, tmp_path: Path) -> None:
    rows, _ = made("kept", texts=[*TEXTS[:10], "short one", TEXTS[0]])
    aside = [json.loads(line)["reason"] for line in (tmp_path / "kept" / "rejected.jsonl").read_text().splitlines()]
    assert len(rows) + len(aside) == 12
    assert sorted(aside) == ["duplicate", "not 6 to 24 words long"]


def test_answers_are_what_is_said_not_only_what_is_checked() -> None:
    """The checks count; the words that are capitalised, highlighted or said again are to be those of the
    instruction.
    """
    by_name = {rule.name: rule for rule in instruction_rules.RULES}
    seen: Counter[str] = Counter()
    for number, text in enumerate(
        [*TEXTS, "oops: hot mic catches senator praising rival", "what i learned at 40 from my old dog and a cat"]
    ):
        for name in (
            "change_case:capital_word_frequency",
            "detectable_format:number_highlighted_sections",
            "keywords:frequency",
        ):
            rule, random = by_name[name], Random(number)
            given = rule.sample_arguments(text, random)
            if given is None:
                continue
            seen[name] += 1
            answer, asked, words = (
                rule.apply(text, text, given),
                instruction_rules.format_instruction(rule, given, random),
                text.split(),
            )
            count = instruction_rules.NUMBERS.index(instruction_rules.number_word(given))
            assert f" {instruction_rules.number_word(given)} " in asked
            assert ("one longest words" in asked, "one placeholders" in asked) == (False, False)
            if name.startswith("change_case"):
                assert answer.split() == [word.upper() if place < count else word for place, word in enumerate(words)]
                assert all(word.isalpha() for word in words[:count])
            elif name.startswith("detectable"):
                starred = [word.strip("*") for word in answer.split() if word.startswith("*")]
                assert len(starred) == count
                assert min(map(len, starred)) > max(len(word) for word in words if word not in starred)
            else:
                assert answer == f"{text}\n{' '.join([given['keyword']] * count)}"
                assert not CHECKS[name](f"{text}\n{' '.join([given['keyword']] * (count - 1))}", given)
    assert min(seen.values()) > 15
