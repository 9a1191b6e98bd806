"""Blind pairwise voting in the terminal: a question and two anonymous answers.

Every vote is written immediately. Does not load a model.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from llmworks.core.artifact import Report
from llmworks.core.errors import DataError, UserError
from llmworks.evaluate.statistics.read_evaluation import read_evaluation

KEYS = {"a": "A", "b": "B", "t": "C"}
HELP = "a or b: the better answer, t: tie, s: skip, q: quit"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def read_answers(reports: Sequence[Report]) -> dict[str, dict[str, dict[str, Any]]]:
    """Map model -> sample id -> sample, of evaluations with generated answers.

    Errors: DataError for evaluations without generated answers; UserError for fewer than two evaluations.
    """
    out: dict[str, dict[str, dict[str, Any]]] = {}
    for report in reports:
        data = read_evaluation(report, "model", of_samples=("question",))
        samples = data["samples"]
        if "text" not in samples[0] or "logprobs" in samples[0]:
            raise DataError(
                f"{report.name}: has no generated answers; an arena needs evaluations of tasks of kind generate"
            )
        name = (
            data["model"] if data["model"] not in out else f"{data['model']}: {report.name}"
        )  # one model with two settings
        if name in out:
            raise DataError(f"{report.name}: is given twice")
        out[name] = {s["id"]: s for s in samples}
    if len(out) < 2:
        raise UserError("an arena needs evaluations of at least two models")
    return out


def list_matches(
    answers: dict[str, dict[str, dict[str, Any]]], done: set[tuple[str, str, str]], seed: int
) -> list[tuple[str, str, str]]:
    """List the open matches (sample, model, model) in random order with random sides: every question of every pair of
    models once, without identical answers.
    """
    names = sorted(answers)
    pairs = [
        (i, a, b)
        for place, a in enumerate(names)
        for b in names[place + 1 :]
        for i in answers[a]
        if i in answers[b]
        and answers[a][i]["question"] == answers[b][i]["question"]
        and answers[a][i]["text"] != answers[b][i]["text"]
    ]
    draw = random.Random(seed)
    draw.shuffle(pairs)
    return [
        (i, a, b) if draw.random() < 0.5 else (i, b, a)
        for i, a, b in pairs
        if (i, a, b) not in done and (i, b, a) not in done
    ]


def collect_votes(reports: Sequence[Report], file: Path, voter: str, seed: int, source: TextIO, target: TextIO) -> int:
    """Ask for votes until all pairs are done or the voter quits; return the number of votes written to `file`."""
    answers = read_answers(reports)
    done = {(v["sample"], v["a"], v["b"]) for v in _read_votes(file) if v.get("voter") == voter and "sample" in v}
    todo = list_matches(answers, done, seed)
    if not todo:
        raise UserError(
            f"{voter} has already voted on all pairs of different answers"
            if done
            else "no two models answered the same question differently"
        )
    print(f"{len(todo)} pairs. {HELP}.", file=target)
    count = 0
    for id, a, b in todo:
        sample = answers[a][id]
        print(
            f"\n{'=' * 72}\n{_strip_control_characters(sample['question'])}\n\n--- A"
            f" ---\n{_strip_control_characters(sample['text'])}\n\n--- B"
            f" ---\n{_strip_control_characters(answers[b][id]['text'])}\n",
            file=target,
        )
        key = _read_key(source, target)
        if key == "q":
            break
        if key == "s":
            continue
        ballot = {
            "question": sample["question"],
            "sample": id,
            "a": a,
            "b": b,
            "vote": KEYS[key],
            "voter": voter,
            "lengths": [len(sample["text"]), len(answers[b][id]["text"])],
        }
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(ballot, ensure_ascii=False) + "\n")
        count += 1
    return count


def _read_key(source: TextIO, target: TextIO) -> str:
    while True:
        print("> ", end="", file=target, flush=True)
        line = source.readline()
        if not line:
            return "q"
        word = line.strip().lower()
        if word in (*KEYS, "s", "q"):
            return word
        print(HELP, file=target)


def _strip_control_characters(text: str) -> str:
    """Strip control characters: answers are untrusted and must not send terminal escapes."""
    return CONTROL.sub("", text)


def _read_votes(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: is not a votes file ({str(error).splitlines()[0]})") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file}: is not a votes file")
    return rows
