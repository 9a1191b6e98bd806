"""Held-out questions answered before and after a fine-tuning, how well held-out answers are predicted on the way, and
the report of it all.

Knows no method of training.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmworks.core.artifact import Dataset
from llmworks.core.progress import write_whole
from llmworks.core.report import Block, ReportBuilder
from llmworks.core.types import Engine, Message, Request, Sampling
from llmworks.data.conversations.training_rows import training_rows
from llmworks.data.store.rows import Row, flat_messages
from llmworks.tokenize.chat.templates import parse_calls
from llmworks.train.loop.report import plots

if TYPE_CHECKING:
    from llmworks.train.finetune.examples import Example

TOKENS = 96  # of an answer


def answerable(held_out: Dataset) -> list[Row]:
    """Conversations that end with an answer to something."""
    return [
        row
        for row in training_rows(held_out)
        if "messages" in row and row["messages"][-1]["role"] == "assistant" and len(row["messages"]) > 1
    ]


def answers(engine: Engine, questions: Sequence[Row], kept: Path | None) -> list[str]:
    """Greedy answers to held-out questions; kept in a file where a resumed run would find a changed model."""
    if kept is not None and kept.exists():
        return list(json.loads(kept.read_text(encoding="utf-8")))
    done = engine.generate([Request(_asked(row), sampling=Sampling(max_tokens=TOKENS)) for row in questions])
    texts = [completion.text for completion in done]
    if kept is not None:
        write_whole(kept, json.dumps(texts))
    return texts


def _asked(row: Row) -> tuple[Message, ...]:
    return flat_messages(row)[:-1]


def predicted(network: Any, examples: Sequence[Example], *, free: bool, size: int, device: Any) -> dict[str, float]:
    """How well the labels of examples are predicted: `held_out`, their mean cross-entropy in nats, `perplexity`, and
    `accuracy`, the share that is the most probable token.
    """
    import torch

    from llmworks.train.finetune.examples import collate, joined
    from llmworks.train.loop.losses import label_logits

    training = network.training
    network.train(False)
    nats, right, count = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, len(examples), size):
            some = examples[start : start + size]
            for logits, labels in label_logits(network, joined(some, device) if free else collate(some).to(device)):
                nats += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
                right += int((logits.argmax(-1) == labels).sum())
                count += len(labels)
    network.train(training)
    mean = nats / max(1, count)
    return {"eval_loss": mean, "perplexity": math.exp(min(700.0, mean)), "accuracy": right / max(1, count)}


def warnings_of(questions: Sequence[Row], before: Sequence[str], after: Sequence[str]) -> list[str]:
    """What looks wrong with the answers of a tuned model."""
    found: list[str] = []
    if questions and list(before) == list(after):
        found.append("nothing changed: every held-out answer is the same as before training")
    if after and all(not text.strip() for text in after):
        found.append("every held-out answer is empty")
    if after and any(len(text.split()) > 20 and len(set(text.split())) < len(text.split()) / 5 for text in after):
        found.append("a held-out answer repeats itself")
    for what, parses in (("a function call", _calls), ("JSON", _json)):
        if (
            questions
            and all(parses(flat_messages(row)[-1].content) for row in questions)
            and not any(parses(text) for text in after)
        ):
            found.append(f"the data's answers are all {what}, and none of the model's is")
    return found


def _calls(text: str) -> bool:
    return bool(parse_calls(text)[1])


def _json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), (dict, list))
    except ValueError:
        return False


def write_report(
    report: ReportBuilder,
    title: str,
    rows: Sequence[dict[str, Any]],
    metrics: Mapping[str, Any],
    config: Mapping[str, Any],
    set_aside: Sequence[tuple[str, str]],
) -> None:
    """Curves and figures; what was asked and answered is added by `write_samples`."""
    steps, looks = [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]
    report.title = f"Fine-tuning of {title}"
    report.lead = (
        f"{len(steps):,} steps, {metrics['tokens']:,} tokens; from the first tenth of the steps to the last the loss"
        f" went from {metrics['loss_first']:.3f} to {metrics['loss']:.3f} nats a learned token."
        if steps
        else ""
    )
    if looks:
        last = looks[-1]
        chosen = next((row for row in looks if row["step"] == metrics.get("best_step", -1)), last)
        report.lead += (
            f" Held-out answers: {chosen['eval_loss']:.3f} nats a token, {chosen['accuracy']:.1%} of their tokens"
            " foreseen" + (f" after step {chosen['step'] + 1}, whose weights these are." if chosen is not last else ".")
        )
    report.data = {
        "warnings": [],
        "config": dict(config),
        "steps": len(steps),
        "evaluations": [{key: row[key] for key in ("step", "eval_loss", "accuracy")} for row in looks],
    }
    for heading, series, y in plots(steps, rows) if steps else ():
        report.curves(heading, series, x="step", y=y)
    if set_aside:
        report.table(
            "Rows set aside",
            ("id", "reason"),
            set_aside[:50],
            f"{len(set_aside)} of them; all are in set_aside.jsonl." if len(set_aside) > 50 else "",
        )


def write_samples(
    report: ReportBuilder, questions: Sequence[Row], before: Sequence[str], after: Sequence[str]
) -> list[str]:
    """What was asked and answered; returns warnings, which stand first."""
    warnings = warnings_of(questions, before, after)
    report.data["warnings"] = warnings
    if warnings:
        report.blocks.insert(0, Block("text", "Warnings", "\n\n".join(warnings)))
    items = [
        {
            "": str(row["messages"][-2].get("content") or "")[:110],
            "before": b,
            "after": a,
            "reference": flat_messages(row)[-1].content,
        }
        for row, b, a in zip(questions, before, after, strict=True)
    ]
    if items:
        report.samples("Held-out questions, before and after", items)
    return warnings
