"""Why two runs of a task say different things of one sample: the first cause, in the order in which a prompt becomes a
score.

Pure functions on what evaluations store: `definition` and `protocol` of the runs, and their samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Run = Mapping[str, Any]
IGNORED = {"what", "data", "examples"}  # of a task: they decide no prompt and no score
CLOSE = 0.1  # nats between the best two options, below which rounding may choose

CAUSES = {
    "worked examples": "other examples stand in the prompt, or another number of them",
    "prompt style": "one asks in turns of the model's template, the other in plain text",
    "prompt text": "question, description or what stands between differ",
    "beginning token": "the same text; one begins with a beginning-of-text token, the other does not",
    "template": "the same turns, written by another chat template",
    "truncation": "a part of the prompt was left out because the engine reads fewer tokens",
    "tokenizer": "the same text, divided into other tokens",
    "refused": "one was not answered",
    "normalisation": "the same text was said, and read or scored otherwise",
    "answer cut off": "one answer reached its limit of tokens and is the beginning of the other",
    "stop string": "one answer ended at a string that does not end the other",
    "end token": "one answer ended at a token that does not end the other",
    "sampling": "answers are drawn, not the most probable",
    "close call": f"the best two options are less than {CLOSE:g} nats apart: rounding may choose",
    "numbers": "the same tokens were read, and the model's numbers differ: other weights, or another precision",
}


def cause(a: Run, b: Run, left: Mapping[str, Any], right: Mapping[str, Any]) -> str:
    """The first cause that is seen for a sample on which two runs differ."""
    one, other = a["definition"], b["definition"]
    if left.get("asked") != right.get("asked"):
        if one["shots"] != other["shots"]:
            return "worked examples"
        return "prompt style" if one["prompt"] != other["prompt"] else "prompt text"
    if left.get("read") and right.get("read") and left["read"] != right["read"]:
        return _reading(a["protocol"], b["protocol"], left, right)
    if "refused" in (left.get("finish"), right.get("finish")):
        return "refused"
    if one["kind"] == "choice":
        return _choosing(left, right)
    if one["kind"] != "generate":
        return "numbers"
    if left["text"] == right["text"]:
        return "normalisation"
    if one["temperature"] or other["temperature"]:
        return "sampling"
    return _ending(a, b, left, right)


def _reading(a: Run, b: Run, left: Mapping[str, Any], right: Mapping[str, Any]) -> str:
    """Why the same text became other tokens."""
    if a.get("bos") != b.get("bos") or a.get("beginning") != b.get("beginning"):
        return "beginning token"
    if a.get("template") != b.get("template") and a.get("prompt") == "chat":
        return "template"
    return "truncation" if left.get("cut") != right.get("cut") or a.get("window") != b.get("window") else "tokenizer"


def _choosing(left: Mapping[str, Any], right: Mapping[str, Any]) -> str:
    """Why another option was chosen."""
    if left.get("chosen") == right.get("chosen"):
        return "normalisation"
    return "close call" if min(margin(left["logprobs"]), margin(right["logprobs"])) < CLOSE else "numbers"


def _ending(a: Run, b: Run, left: Mapping[str, Any], right: Mapping[str, Any]) -> str:
    """Why another text was written."""
    (short, _), (long, _) = sorted(((left, a), (right, b)), key=lambda pair: len(pair[0]["text"]))
    if long["text"].startswith(short["text"].rstrip()):
        if short["finish"] == "length":
            return "answer cut off"
        if a["definition"]["stop"] != b["definition"]["stop"]:
            return "stop string"
        if a["protocol"].get("stops") != b["protocol"].get("stops"):
            return "end token"
    return "numbers"


def margin(logprobs: Sequence[float]) -> float:
    """Nats between the best two."""
    best = sorted(logprobs, reverse=True)
    return best[0] - best[1] if len(best) > 1 else float("inf")


def settings(a: Run, b: Run) -> list[tuple[str, str, str]]:
    """(what, before, after) for everything that decided prompts and scores and is not the same in both runs."""
    out: list[tuple[str, str, str]] = []
    for part, skip in (("definition", IGNORED), ("protocol", {"rows", "asked"})):
        for key in sorted({*a[part], *b[part]} - skip):
            before, after = a[part].get(key), b[part].get(key)
            if before != after:
                out.append((key, str(before)[:160], str(after)[:160]))
    return list(dict.fromkeys(out))


def changes(a: Run, b: Run) -> list[str]:
    """What a person changed between two runs: the model, the engine and its precision, fields of the task.

    What follows from those, as a template, is not counted.
    """
    out = ["model"] if a.get("model") != b.get("model") else []
    out += ["engine"] if any(a["protocol"].get(key) != b["protocol"].get(key) for key in ("engine", "dtype")) else []
    return out + [
        key
        for key in sorted({*a["definition"], *b["definition"]} - IGNORED)
        if a["definition"].get(key) != b["definition"].get(key)
    ]
