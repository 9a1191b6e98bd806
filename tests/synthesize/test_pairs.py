"""Preference pairs: by verifier, by judge, by ratings; the text tools of synthesis against plain reference
implementations.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.generate.loopback import Loopback, openai_reply
from tests.synthesize.engine import Scripted, chats, context, foreign, rejected

from llmworks.core.artifact import Dataset
from llmworks.core.errors import DataError, UserError
from llmworks.core.text.words import split_words
from llmworks.core.types import Completion, Message
from llmworks.data.store.rows import read_preference
from llmworks.score.judge import comparison_prompt, grading_prompt, parse_choice, parse_grade
from llmworks.score.rouge import lcs_length, rouge_l
from llmworks.synthesize.pairs import PairsConfig, pairs
from llmworks.synthesize.text.diversity import DiversityPool
from llmworks.synthesize.text.parse import is_refusal, parse_labeled, parse_list, strip_markup

SCHEMA = {"schema": {"type": "object", "required": ["a"]}}


def sides(result: Dataset) -> list[tuple[str, str, str]]:
    return [
        (row["prompt"][-1]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"])
        for row in read_preference(result)
    ]


def test_by_verifier(tmp_path: Path) -> None:
    drawn = {
        "first": ['{"b": 1}', '{"a": 1}', '{"a": 1, "c": 2}', "no"],
        "second": ["no", "none", "no", "x"],
        "third": ["same"] * 4,
    }
    data = chats(
        tmp_path / "d", *({"asks": q, "says": "old", "answer": SCHEMA, "fields": {"subject": q}} for q in drawn)
    )
    engine = Scripted(lambda text, before: drawn[text][before])
    result = pairs(PairsConfig(), data, context(tmp_path, engine), foreign())
    assert sides(result) == [("first", '{"a": 1}', '{"b": 1}')]
    (row,) = read_preference(result)
    made = row["extra"]["fields"]["made_by"]
    assert (made["by"], made["scores"], made["why"], made["answers"]) == (
        "verifier",
        [1.0, 0.0],
        'value: "a" is a required property',
        4,
    )
    assert row["extra"]["fields"]["subject"] == "first"
    assert row["answer"] == SCHEMA
    assert dict(rejected(tmp_path)) == {"r1": "no margin (best score 0)", "r2": "fewer than two different completions"}
    every = pairs(
        PairsConfig(pairing="all"),
        data,
        context(tmp_path / "all", Scripted(lambda text, before: drawn[text][before])),
        foreign(),
    )
    assert len(sides(every)) == 4
    short = pairs(
        PairsConfig(pairing="all", max_length_ratio=1.0),
        data,
        context(tmp_path / "short", Scripted(lambda text, before: drawn[text][before])),
        foreign(),
    )
    assert sides(short) == [("first", '{"a": 1}', '{"b": 1}')]
    assert result.metrics["chosen_longer"] == 0.0
    assert "the chosen completion is longer in 0%" in json.dumps(result.about) or result.about["schema"] == "preference"


def test_by_judge(tmp_path: Path) -> None:
    writer = Scripted(lambda text, before: ["good", "bad", "middling", "odd"][before])
    judge = Scripted(
        lambda text, before: next(
            f"Because. [[{g}]]"
            for a, g in (("good", 10), ("bad", 1), ("middling", 4), ("odd", 40))
            if f"begins]\n{a}\n" in text
        )
    )
    writer.name, judge.name = "writer", "judge"
    data = chats(tmp_path / "d", {"asks": "q", "says": "old"})
    result = pairs(
        PairsConfig(scorer="judge"),
        data,
        context(tmp_path, writer, judge),
        foreign(name="writer"),
        foreign(name="judge"),
    )
    assert sides(result) == [("q", "good", "bad")]
    assert read_preference(result)[0]["extra"]["fields"]["made_by"]["scores"] == [1.0, 0.0]
    assert rejected(tmp_path) == [("r0", "the judge gave no grade")]
    assert result.metrics["requests"] == 8
    with pytest.raises(UserError, match="scorer judge needs the input `judge`"):
        pairs(PairsConfig(scorer="judge"), data, context(tmp_path / "x", writer), foreign())
    with pytest.raises(UserError, match="scorer verifier needs the input `model`"):
        pairs(PairsConfig(), data, context(tmp_path / "y", writer))


def test_by_ratings(tmp_path: Path) -> None:
    fields: list[dict[str, Any]] = [
        {"ratings": [{"text": "a", "rating": 1}, {"text": "b", "rating": 5}, {"text": "c", "rating": 4}]},
        {"answers": ["a", "b"], "ratings": [2.0, 2.0]},
        {"answers": ["x", "y"], "ratings": [7, 3]},
    ]
    data = chats(tmp_path / "d", *({"asks": f"q{i}", "fields": f} for i, f in enumerate(fields)))
    result = pairs(PairsConfig(scorer="ratings"), data, context(tmp_path, Scripted(lambda text, before: "")))
    assert sides(result) == [("q0", "b", "a"), ("q2", "x", "y")]
    assert read_preference(result)[0]["extra"]["fields"]["made_by"]["why"] == "rated 1 of 1 to 5"
    assert "model" not in read_preference(result)[0]["extra"]["fields"]["made_by"]
    with pytest.raises(DataError, match="row 'r0': `ratings` must be a list"):
        pairs(
            PairsConfig(scorer="ratings"),
            chats(tmp_path / "e", {"asks": "q", "fields": {"ratings": [1]}}),
            context(tmp_path / "f", Scripted(lambda text, before: "")),
        )


def test_verdicts() -> None:
    assert parse_grade("It is fine. [[7]]") == pytest.approx(6 / 9)
    assert parse_grade("[[3]] no, rather [[10]]") == 1.0
    assert parse_grade("Rating: 5.5") == 0.5
    assert parse_grade("I give it 1/10.") == 0.0
    assert [parse_grade(t) for t in ("[[0]]", "[[11]]", "good", "[[A]]", "")] == [None] * 5
    assert [parse_choice(t) for t in ("[[A]]", "so [[b]]", "[[tie]]", "[[C]]", "A is better", "[[5]]")] == [
        "A",
        "B",
        "C",
        "C",
        "",
        "",
    ]
    prompt = (Message("user", "Why?"),)
    assert "User: Why?" in grading_prompt(prompt, "So.")
    assert comparison_prompt(prompt, "uno", "due").index("uno") < comparison_prompt(prompt, "uno", "due").index("due")


def plain_lcs(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_is_what_the_plain_algorithm_gives() -> None:
    draw = random.Random(0)
    for _ in range(300):
        a, b = ([draw.choice("abcdef") for _ in range(draw.randint(0, 12))] for _ in range(2))
        assert lcs_length(a, b) == plain_lcs(a, b)
        # Lin (2004), section 3: "police killed the gunman", "police kill the gunman": 3 of 4 words in sequence
    assert rouge_l(split_words("police killed the gunman"), split_words("Police kill the gunman.")) == 0.75


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 1.0])
def test_a_pool_refuses_what_comparing_with_all_refuses(threshold: float) -> None:
    draw = random.Random(2)
    vocabulary = ["a", "of", "the", "rain", "write", "poem", "mountain", "river", "seventeen"]
    texts = [" ".join(draw.choices(vocabulary, k=draw.randint(1, 9))) for _ in range(400)]
    pool, kept = DiversityPool(threshold), []
    for text in texts:
        own = split_words(text)
        expected = all(2 * plain_lcs(own, other) / (len(own) + len(other)) < threshold for other in kept)
        assert pool.add(text) == expected
        if expected:
            kept.append(own)
    assert len(pool) == len(kept)
    assert not pool.add("...")


def test_lists_and_labels() -> None:
    assert parse_list("Here:\n1. a\nb\n2) **c**\n 3: 'd'\n") == ["a\nb", "c", "d"]
    assert parse_list("Task 1: a\nTask 2: b") == ["a", "b"]
    assert parse_list("- a\n* b\n• c") == ["a", "b", "c"]
    assert parse_list("nothing") == []
    assert (
        parse_labeled("Sure.\n**New Instruction:** Do this\nand that.\nNote: x", "new instruction")
        == "Do this\nand that."
    )
    assert parse_labeled("none", "question") == ""
    assert strip_markup(' **"a"** ') == "a"
    assert is_refusal("I'm sorry, but as an AI I cannot.")
    assert not is_refusal("He said that he was sorry. " * 3 + "I am sorry, he said." + " word" * 100)


def test_a_killed_run_pays_nothing_twice(tmp_path: Path) -> None:
    """The command line over HTTP, killed without mercy in the middle; the server counts."""
    server = Loopback()
    slow = 0.02

    def said(handler: Any, body: dict[str, Any]) -> None:
        time.sleep(slow)
        handler.say(
            200,
            json.dumps(
                openai_reply(Completion(f"answer {body['seed']}", "stop", prompt_tokens=10, completion_tokens=5))
            ).encode(),
        )

    server.behaviours = [said] * 1000
    try:
        rows = [
            {"id": str(i), "messages": [{"role": "user", "content": f"say {i}"}], "answer": {"regex": "answer"}}
            for i in range(60)
        ]
        (tmp_path / "raw.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        environment = {**os.environ, "LLMWORKS_WORKSPACE": str(tmp_path / "ws")}
        program = [sys.executable, "-c", "from llmworks.cli import main; raise SystemExit(main())"]
        subprocess.run(
            [
                *program,
                "data",
                "chat",
                str(tmp_path / "raw.jsonl"),
                "--out",
                str(tmp_path / "chats"),
                "--set",
                "turns=any",
            ],
            env=environment,
            check=True,
            capture_output=True,
        )
        command = [
            *program,
            "synthesize",
            "sample",
            f"{server.url}#m?concurrency=2&input_price=1&output_price=2",
            str(tmp_path / "chats"),
            "--out",
            str(tmp_path / "made"),
        ]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(server.seen) < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(3 * slow)
        before = len(server.seen)
        assert 20 <= before < 60
        assert not (tmp_path / "made").exists()
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        assert len(server.seen) <= 60 + 2  # the two that were on the way when it was killed
        counts = [sum(body["messages"][0]["content"] == f"say {i}" for _, body, _ in server.seen) for i in range(60)]
        assert min(counts) == 1
        metrics = json.loads((tmp_path / "made" / "manifest.json").read_text())["metrics"]
        assert (metrics["rows"], metrics["requests"], metrics["prompt_tokens"], metrics["cost"]) == (
            60,
            60,
            600,
            pytest.approx(0.0012),
        )
        assert "made" in done.stdout
    finally:
        server.stop()


@pytest.mark.slow
def test_recipes_with_a_real_model(tmp_path: Path) -> None:
    """Every recipe runs on SmolLM2 from the command line; a model so small keeps little, but what it keeps is whole."""
    from llmworks.core.artifact import load
    from llmworks.data.store.rows import read_chat

    environment = {**os.environ, "LLMWORKS_WORKSPACE": str(tmp_path / "ws")}
    seeds = [
        "Write a short poem about the sea.",
        "Explain what a compiler does.",
        "List three uses of a hammer.",
        "What is the capital of France?",
    ]
    (tmp_path / "seeds.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "messages": [{"role": "user", "content": s}, {"role": "assistant", "content": "x"}],
                    "answer": {"regex": "(?i)paris|sea|nail"},
                }
            )
            + "\n"
            for s in seeds
        )
    )
    program = [sys.executable, "-c", "from llmworks.cli import main; raise SystemExit(main())"]
    subprocess.run(
        [*program, "data", "chat", str(tmp_path / "seeds.jsonl"), "--out", str(tmp_path / "chats")],
        env=environment,
        check=True,
        capture_output=True,
    )
    for stage, options in {
        "instruct": ["num_rows=4", "max_rounds=2", "requests_per_round=2", "decoding.max_tokens=200"],
        "evolve": ["num_evolutions=1"],
        "branch": [],
        "sample": ["num_generations=3"],
        "pairs": ["num_generations=4"],
    }.items():
        command = [
            *program,
            "synthesize",
            stage,
            "--model",
            "asset:smollm2-135m-instruct",
            "--data",
            str(tmp_path / "chats"),
            "--out",
            str(tmp_path / stage),
            *(w for o in options for w in ("--set", o)),
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or (done.returncode == 2 and "could be kept" in done.stderr), done.stderr
        if done.returncode == 0:
            made = load(tmp_path / stage)
            assert isinstance(made, Dataset)
            rows = read_preference(made) if stage == "pairs" else read_chat(made)
            assert all(m["content"].strip() for row in rows for m in row.get("messages") or row["chosen"])
