"""Explain why two runs of a task differ on a sample: the first cause, in the order from prompt to score.

Pure functions on what evaluations store: `definition` and `protocol` of the runs, and their samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

RunData = Mapping[str, Any]
IGNORED = {"what", "data", "examples"}  # fields of a task that affect neither prompts nor scores
CLOSE_CALL_NATS = 0.1  # nats between the best two options, below which rounding may decide

CAUSES = {
    "few-shot examples": "the few-shot examples or their number differ",
    "prompt style": "one uses the model's chat template, the other plain text",
    "prompt text": "question, description or delimiters differ",
    "BOS token": "the same text; one starts with a BOS token, the other does not",
    "template": "the same turns, rendered by another chat template",
    "truncation": "the prompt was truncated because the engine's context length is shorter",
    "tokenizer": "the same text, tokenized differently",
    "refused": "one request was rejected",
    "answer extraction": "the same text was generated, but extracted or scored differently",
    "max_tokens reached": "one answer reached max_tokens and is a prefix of the other",
    "stop string": "one answer ended at a stop string that the other run does not have",
    "stop token": "one answer ended at a stop token that the other run does not have",
    "sampling": "answers are sampled, not greedy",
    "close call": f"the best two options are less than {CLOSE_CALL_NATS:g} nats apart: rounding may decide",
    "numbers": "the same prompt tokens, but the model's logits differ: other weights or precision",
}


def find_cause(a: RunData, b: RunData, left: Mapping[str, Any], right: Mapping[str, Any]) -> str:
    """Return the first cause found for a sample on which two runs differ."""
    one, other = a["definition"], b["definition"]
    if left.get("prompt_digest") != right.get("prompt_digest"):
        if one["shots"] != other["shots"]:
            return "few-shot examples"
        return "prompt style" if one["prompt"] != other["prompt"] else "prompt text"
    if left.get("read") and right.get("read") and left["read"] != right["read"]:
        return _explain_tokens(a["protocol"], b["protocol"], left, right)
    if "refused" in (left.get("finish"), right.get("finish")):
        return "refused"
    if one["kind"] == "choice":
        return _explain_choice(left, right)
    if one["kind"] != "generate":
        return "numbers"
    if left["text"] == right["text"]:
        return "answer extraction"
    if one["temperature"] or other["temperature"]:
        return "sampling"
    return _explain_text(a, b, left, right)


def _explain_tokens(a: RunData, b: RunData, left: Mapping[str, Any], right: Mapping[str, Any]) -> str:
    """Explain why the same text was tokenized differently."""
    if a.get("bos") != b.get("bos") or a.get("beginning") != b.get("beginning"):
        return "BOS token"
    if a.get("template") != b.get("template") and a.get("prompt") == "chat":
        return "template"
    return "truncation" if left.get("cut") != right.get("cut") or a.get("window") != b.get("window") else "tokenizer"


def _explain_choice(left: Mapping[str, Any], right: Mapping[str, Any]) -> str:
    """Explain why another option was chosen."""
    if left.get("chosen") == right.get("chosen"):
        return "answer extraction"
    return (
        "close call"
        if min(compute_margin(left["logprobs"]), compute_margin(right["logprobs"])) < CLOSE_CALL_NATS
        else "numbers"
    )


def _explain_text(a: RunData, b: RunData, left: Mapping[str, Any], right: Mapping[str, Any]) -> str:
    """Explain why another text was generated."""
    (short, _), (long, _) = sorted(((left, a), (right, b)), key=lambda pair: len(pair[0]["text"]))
    if long["text"].startswith(short["text"].rstrip()):
        if short["finish"] == "length":
            return "max_tokens reached"
        if a["definition"]["stop"] != b["definition"]["stop"]:
            return "stop string"
        if a["protocol"].get("stops") != b["protocol"].get("stops"):
            return "stop token"
    return "numbers"


def compute_margin(logprobs: Sequence[float]) -> float:
    """Compute the margin between the best two, in nats."""
    best = sorted(logprobs, reverse=True)
    return best[0] - best[1] if len(best) > 1 else float("inf")


def list_setting_differences(a: RunData, b: RunData) -> list[tuple[str, str, str]]:
    """List (setting, before, after) for all differing settings that affect prompts or scores."""
    out: list[tuple[str, str, str]] = []
    for part, skip in (("definition", IGNORED), ("protocol", {"rows", "num_samples"})):
        for key in sorted({*a[part], *b[part]} - skip):
            before, after = a[part].get(key), b[part].get(key)
            if before != after:
                out.append((key, str(before)[:160], str(after)[:160]))
    return list(dict.fromkeys(out))


def list_changes(a: RunData, b: RunData) -> list[str]:
    """List what a person changed between two runs: the model, the engine and its precision, fields of the task.

    Consequences of those, such as the chat template, are not counted.
    """
    out = ["model"] if a.get("model") != b.get("model") else []
    out += ["engine"] if any(a["protocol"].get(key) != b["protocol"].get(key) for key in ("engine", "dtype")) else []
    return out + [
        key
        for key in sorted({*a["definition"], *b["definition"]} - IGNORED)
        if a["definition"].get(key) != b["definition"].get(key)
    ]
