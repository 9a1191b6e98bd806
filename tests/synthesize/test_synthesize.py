"""Recipes of synthesis keep what they should, set the rest aside with a reason, remember where every row came from, and
pay once.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.synthesize.engine import Scripted, chats, context, documents, foreign, rejected

from llmworks.core.artifact import Dataset
from llmworks.core.errors import DataError, EngineError, RequestError
from llmworks.core.types import Completion, Document
from llmworks.data.store.rows import read_chat
from llmworks.synthesize.branch import BranchConfig, branch
from llmworks.synthesize.evolve import EvolveConfig, evolve
from llmworks.synthesize.grounded import GroundedConfig, compute_support, find_topic_problem, grounded, split_passages
from llmworks.synthesize.instruct import InstructConfig, instruct
from llmworks.synthesize.personas import PersonasConfig, personas
from llmworks.synthesize.reason import ReasonConfig, reason
from llmworks.synthesize.sample import SampleConfig, sample

REFUSED = RequestError("too long")
CUT = Completion("cut in the mid", "length")


def said(result: Dataset) -> list[tuple[str, str]]:
    """(question, answer) of every row."""
    return [(row["messages"][-2]["content"], row["messages"][-1]["content"]) for row in read_chat(result)]


def made_by(result: Dataset) -> list[dict[str, Any]]:
    return [row["extra"]["fields"]["made_by"] for row in read_chat(result)]


def test_instruct(tmp_path: Path) -> None:
    lists = [
        (
            "Sure!\n1. Name three rivers of Asia and where they end.\n2. Summarize the attached file.\n3. **Explain why"
            " bread rises in the oven.**\n4) Do it\n5. Name the three rivers of Asia and where they end."
        ),
        "no list here",
        (
            "- Write a poem of four lines about rain.\n- Refuse to answer this one please now.\n- Tell a joke about a"
            " fish and a bicycle."
        ),
    ]

    def answer(text: str, before: int) -> str | Completion:
        if "more tasks" in text:
            turn = sum("more tasks" in r.messages[-1].content for r in engine.asked)
            return lists[turn % 3]
        return (
            "I'm sorry, but I cannot." if text.startswith("Refuse") else CUT if "joke" in text else f"Answer to {text}"
        )

    engine = Scripted(answer)
    seeds = chats(
        tmp_path / "seeds",
        *({"asks": f"seed {w} task about {w} things", "says": "x"} for w in ("red", "green", "blue")),
    )
    result = instruct(
        InstructConfig(num_rows=20, max_rounds=1, requests_per_round=3), foreign(), seeds, context(tmp_path, engine)
    )
    tasks = [
        "Name three rivers of Asia and where they end.",
        "Explain why bread rises in the oven.",
        "Write a poem of four lines about rain.",
    ]
    assert sorted(said(result)) == sorted((t, f"Answer to {t}") for t in tasks)
    reasons = [r for _, r in rejected(tmp_path)]
    assert sorted(reasons) == sorted(
        [
            "needs more than text",
            "too short",
            "too similar to another task",
            "no list of tasks",
            "refuses to answer",
            "cut off at max_tokens",
        ]
    )
    for made in made_by(result):
        assert made["stage"] == "synthesize.instruct"
        assert made["model"] == "http://127.0.0.1:1/v1#m"
        assert "seed" in made["prompts"][0][0]["content"]
    assert result.metrics["requests"] == len(engine.asked) == 8
    assert result.metrics["prompt_tokens"] == 10 * 7
    assert result.about["history"][-1]["dropped"]["no list of tasks"] == 1
    assert "| synthesize.instruct |" in (tmp_path / "out" / "README.md").read_text()
    prompt = next(r.messages[-1].content for r in engine.asked)
    assert prompt.count("seed ") == 3


def test_evolve(tmp_path: Path) -> None:
    def answer(text: str, before: int) -> str | Completion:
        if "Are these two instructions the same" in text:
            return "Yes." if "Say hello to Ann" in text else "No"
        if "Read this instruction" in text:
            source = text.split("\n\n")[1]
            if source.startswith("Say hello"):
                return "New instruction: Say hello to Ann"
            if source.startswith("Count"):
                return "New instruction: The rewritten prompt asks to count"
            if source.startswith("Long"):
                return "New instruction: " + "very " * 80 + "long"
            return f"**New Instruction:** {source} Then explain number {len(engine.asked)}."
        return "..." if "sea" in text and "explain" in text else f"Done: {text[:20]}"

    engine = Scripted(answer)
    data = chats(
        tmp_path / "d",
        *(
            {"asks": a, "says": "x"}
            for a in (
                "Say hello to Bob",
                "Count to three now",
                "Long story about a",
                "Tell of mountains",
                "Tell of the sea",
            )
        ),
    )
    result = evolve(EvolveConfig(num_evolutions=2, operators=("deepen",)), foreign(), data, context(tmp_path, engine))
    rows = {row["id"]: row for row in read_chat(result)}
    assert set(rows) == {"r0", "r1", "r2", "r3", "r4", "r3~1", "r3~2"}
    assert rows["r3~2"]["messages"][0]["content"].count("Then explain number") == 2
    assert rows["r3~2"]["group"] == "g3"
    made = rows["r3~2"]["extra"]["fields"]["made_by"]
    assert (made["operator"], made["step"], made["evolved_from"]) == (
        "deepen",
        2,
        rows["r3~1"]["messages"][0]["content"],
    )
    reasons = dict(rejected(tmp_path))
    assert {reasons[f"r{i}~1"] for i in (0, 1, 2, 4)} == {
        "unchanged",
        "mentions the prompt",
        "too long",
        "answer without words",
    }


def test_personas(tmp_path: Path) -> None:
    def answer(text: str, before: int) -> str:
        if "likely to read" in text:
            return (
                "A gardener who grows roses in Kent."
                if "roses" in text
                else "A nurse."
                if "pills" in text
                else "An engineer who builds bridges of steel."
            )
        if "often deals with" in text:
            return "1. A florist who buys the gardener's roses.\n2. A gardener who grows roses in Kent."
        if "Imagine" in text:
            return "Question: How do I " + (
                "prune old roses?" if "gardener" in text.split("\n\n")[1] else "sell what is in my shop?"
            )
        return f"So: {text}"

    data = documents(tmp_path / "d", "Of roses", "Of pills", "Of bridges")
    result = personas(
        PersonasConfig(max_documents=2, num_related=2, persona_in_system=True),
        foreign(),
        data,
        context(tmp_path, Scripted(answer)),
    )
    rows = read_chat(result)
    assert [row["id"] for row in rows] == ["d0?1"]
    assert rows[0]["messages"][0] == {
        "role": "system",
        "content": "You are talking with this person: A gardener who grows roses in Kent.",
    }
    assert rows[0]["messages"][1]["content"] == "How do I prune old roses?"
    assert [r for _, r in rejected(tmp_path)] == [
        "not a persona",
        "too similar to another persona",
        "too similar to another question",
    ]


PASSAGE = (
    "The function parse_line(text, strict=False) returns a list of fields. It raises ValueError when a quote is left"
    " open.\n\nSince version 3.2 the strict flag also refuses empty fields. Fields are divided by commas."
)


def test_grounded(tmp_path: Path) -> None:
    answers = {
        "What does parse_line return?": "It returns a list of fields.",
        "When does parse_line raise ValueError?": "parse_line raises ValueError when a quote is left open.",
        "Since which version are empty fields refused?": "Since version 4.7.",
        "Which sign divides fields in parse_line?": (
            "The semicolon character separates everything, as Wikipedia explains."
        ),
        "Who wrote the function parse_line?": "Not stated.",
        "How fast is the function parse_line?": "According to the passage it returns fields.",
    }

    def answer(text: str, before: int) -> str:
        if "Write a numbered list of questions" in text:
            return "\n".join(
                f"{i}. {q}"
                for i, q in enumerate(
                    [
                        *answers,
                        "What does the passage say about fields?",
                        "Why?",
                        "Tell me more about fields",
                        "What does parse_line return",
                    ],
                    1,
                )
            )
        return answers[text.rpartition("Question: ")[2]]

    data = documents(tmp_path / "d", PASSAGE, "too short")
    result = grounded(
        GroundedConfig(questions_per_passage=10, min_characters=100),
        foreign(),
        data,
        context(tmp_path, Scripted(answer)),
    )
    assert [q for q, _ in said(result)] == ["What does parse_line return?", "When does parse_line raise ValueError?"]
    where = made_by(result)[0]["passage"]
    assert (where["document"], PASSAGE[where["start"] : where["end"]]) == ("d0", PASSAGE)
    assert read_chat(result)[0]["group"] == "d0"
    reasons = [r for _, r in rejected(tmp_path)]
    assert reasons[:4] == ["refers to the passage", "too short", "no question", "no question"]
    assert reasons[4:] == [
        "not in the passage (4)",
        "not in the passage (content words: 0%)",
        "not stated",
        "refers to the passage",
    ]


def test_passages_are_whole_paragraphs() -> None:
    text = "\n\na " + "x" * 100 + "\n\n\n" + "b\nb " + "y" * 100 + "\n \n" + "c" * 90 + "\n\n" + "d" * 500
    found = split_passages(Document("d", text, "s"), GroundedConfig(max_characters=230, min_characters=50))
    assert [text[p.start : p.start + len(p.text)] == p.text for p in found] == [True] * len(found)
    assert [p.text[0] for p in found] == ["a", "c"]
    assert found[0].text.endswith("y")


def test_support() -> None:
    assert compute_support("It returns the fields.", PASSAGE, "What is returned?") == (1.0, "")
    assert compute_support("In version 3.2 it is refused.", PASSAGE, "When?") == (1.0, "")
    assert compute_support("In version 3.7 it is refused.", PASSAGE, "When?")[1] == "7"
    assert compute_support("Bananas are yellow.", PASSAGE, "What?")[0] == 0.0
    assert compute_support("It calls parse_all.", PASSAGE, "What?")[1] == "parse_all"
    assert compute_support("The parse_line function is parse_line.", PASSAGE, "What is the function parse_line?") == (
        0.0,
        "",
    )
    assert find_topic_problem("What does the function parse_line return?", PASSAGE) == ""
    assert find_topic_problem("What does the function parse_all return?", PASSAGE) == "off-topic (parse_all)"
    assert find_topic_problem("Why do bananas and universes exist?", PASSAGE) == "off-topic (content words: 0%)"


def test_reason(tmp_path: Path) -> None:
    def answer(text: str, before: int) -> str:
        number = re.search(r"\d", text)
        assert number is not None
        if number[0] == "1":
            return "We think about this for quite a while, one step and then another step.\nAnswer: 10"
        if number[0] == "2":
            right = "hint" if "right answer is" in text else "wrong"
            return (
                "We think about this for quite a while, one step and then another step.\nAnswer:"
                f" {20 if right == 'hint' else 3}"
            )
        if number[0] == "3":
            return "As given by the hint we think about this for quite a while, step by step.\nAnswer: 30"
        return "Answer: 40"

    data = chats(
        tmp_path / "d",
        *({"asks": f"Ten times {n}?", "answer": str(10 * n), "fields": {"subject": "sums"}} for n in (1, 2, 3, 4)),
    )
    engine = Scripted(
        lambda text, before: "Answer: 30" if "3?" in text and "right answer" not in text else answer(text, before)
    )
    result = reason(ReasonConfig(max_attempts=2), foreign(), data, context(tmp_path, engine))
    rows = {row["id"]: row for row in read_chat(result)}
    assert set(rows) == {"r0", "r1"}
    assert rows["r0"]["messages"][0]["content"] == "Ten times 1?"
    assert rows["r0"]["extra"]["fields"]["subject"] == "sums"
    assert (rows["r0"]["extra"]["fields"]["made_by"]["tries"], rows["r1"]["extra"]["fields"]["made_by"]["hinted"]) == (
        1,
        True,
    )
    assert dict(rejected(tmp_path)) == {"r2": "mentions the hint", "r3": "no reasoning"}
    assert result.metrics["hinted"] == 1
    with pytest.raises(DataError, match="row 'r0': `answer` must be the key"):
        reason(
            ReasonConfig(),
            foreign(),
            chats(tmp_path / "e", {"asks": "x y z", "says": "y"}),
            context(tmp_path / "f", engine),
        )


def test_sample(tmp_path: Path) -> None:
    tests = {"tests": "assert f(2) == 4"}

    def answer(text: str, before: int) -> str:
        if "square" in text:
            return (
                "def f(x):\n    return x + x + 1"
                if before == 0
                else "def f(x): return x * x"
                if before == 1
                else "```python\ndef f(x):\n    return x ** 2\n```"
            )
        return "def f(x): pass"

    data = chats(tmp_path / "d", {"asks": "square it", "answer": tests}, {"asks": "never", "answer": tests})
    engine = Scripted(answer)
    result = sample(SampleConfig(num_generations=3), foreign(), data, context(tmp_path, engine))
    assert said(result) == [("square it", "def f(x): return x * x")]
    assert (made_by(result)[0]["drawn"], result.metrics["solved"], len(engine.asked)) == (2, 1, 5)
    assert rejected(tmp_path) == [("r1", "no completion accepted (AssertionError)")]
    every = sample(
        SampleConfig(num_generations=4, keep="all"), foreign(), data, context(tmp_path / "all", Scripted(answer))
    )
    assert [row["id"] for row in read_chat(every)] == ["r0~1", "r0~2"]
    shortest = sample(
        SampleConfig(num_generations=4, keep="shortest"), foreign(), data, context(tmp_path / "short", Scripted(answer))
    )
    assert said(shortest)[0][1] == "def f(x): return x * x"


def test_sample_calls(tmp_path: Path) -> None:
    tool = {
        "name": "f",
        "description": "",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    }
    data = chats(tmp_path / "d", {"asks": "call f with 5", "answer": {"f": {"a": [5]}}, "tools": [tool]})
    result = sample(
        SampleConfig(num_generations=2),
        foreign(),
        data,
        context(
            tmp_path,
            Scripted(
                lambda text, before: f'<tool_call>{{"name": "f", "arguments": {{"a": {4 + before}}}}}</tool_call>'
            ),
        ),
    )
    (row,) = read_chat(result)
    assert row["messages"][-1]["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 5}'}
    assert row["tools"] == [tool]


def test_branch(tmp_path: Path) -> None:
    def answer(text: str, before: int) -> str | RequestError:
        if "Which parts" in text:
            return "1. Where\n2. When" if "trip" in text else "1. One only" if "small" in text else "1. Bad\n2. Good"
        if "Write part" in text:
            return REFUSED if "only: Bad" in text else f"<{text.rpartition('only: ')[2]}>"
        return f"merged {' '.join(re.findall('<.*?>', text))}"

    data = chats(tmp_path / "d", {"asks": "Plan a trip"}, {"asks": "A small thing"}, {"asks": "Third thing"})
    result = branch(BranchConfig(), foreign(), data, context(tmp_path, Scripted(answer)))
    assert said(result) == [("Plan a trip", "merged <Where> <When>")]
    assert made_by(result)[0]["parts"] == [{"part": "Where", "answer": "<Where>"}, {"part": "When", "answer": "<When>"}]
    assert rejected(tmp_path) == [
        ("r1", "not divided"),
        ("r2", "a part was not solved (refused by the server (too long))"),
    ]


def test_a_break_costs_nothing_twice(tmp_path: Path) -> None:
    data = documents(tmp_path / "d", *(f"{PASSAGE}\n\nNumber {i}." for i in range(80)))
    config = GroundedConfig(questions_per_passage=1, min_characters=100, max_similarity=1)

    def answer(text: str, before: int) -> str:
        number = re.search(r"Number (\d+)", text)
        assert number is not None
        return (
            f"1. What raises ValueError in the case of {'ab' * int(number[1])} fields?"
            if "Write a numbered list of questions" in text
            else "An open quote."
        )

    whole = Scripted(answer)
    expected = read_chat(grounded(config, foreign(), data, context(tmp_path / "whole", whole)))
    for stop in (1, 70, 100):
        first, second = Scripted(answer, break_after=stop), Scripted(answer)
        with pytest.raises(EngineError, match="gone"):
            grounded(config, foreign(), data, context(tmp_path / str(stop), first))
        journal = tmp_path / str(stop) / "scratch" / "answers.jsonl"
        journal.write_text(journal.read_text() + '{"id": "cut sho')  # as a kill leaves it
        result = grounded(config, foreign(), data, context(tmp_path / str(stop), second))
        assert len(first.asked) + len(second.asked) == len(whole.asked)
        assert read_chat(result) == expected
        assert result.metrics["requests"] == len(whole.asked)
    assert len(expected) == 80


def test_nothing_kept_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no completion by m could be kept \(no question 1\)"):
        grounded(
            GroundedConfig(min_characters=100),
            foreign(),
            documents(tmp_path / "d", PASSAGE),
            context(tmp_path, Scripted(lambda text, before: "none")),
        )
    with pytest.raises(DataError, match="has no passage of 300 to 1500 characters"):
        grounded(
            GroundedConfig(),
            foreign(),
            documents(tmp_path / "e", "short"),
            context(tmp_path, Scripted(lambda text, before: "none")),
        )
    assert json.dumps(rejected(tmp_path)) == "[]"
