"""Sample completions of held-out prompts before and after fine-tuning, evaluate on held-out rows, and report.

Does not depend on the training method.
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

TOKENS = 96  # max_tokens of a completion


def answerable(held_out: Dataset) -> list[Row]:
    """Return the conversations that end with an assistant turn after another turn."""
    return [
        row
        for row in training_rows(held_out)
        if "messages" in row and row["messages"][-1]["role"] == "assistant" and len(row["messages"]) > 1
    ]


def answers(engine: Engine, questions: Sequence[Row], kept: Path | None) -> list[str]:
    """Generate greedy completions of held-out prompts.

    `cache`: a file with the completions of the initial model, which a resumed run no longer has.
    """
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
    """Evaluate on the labels of examples: `held_out` (mean cross-entropy in nats), `perplexity`, `accuracy`.

    Accuracy is the share of label tokens that are the most probable token.
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
    """Return warnings about the completions of a fine-tuned model."""
    found: list[str] = []
    if questions and list(before) == list(after):
        found.append("nothing changed: every held-out completion is the same as before training")
    if after and all(not text.strip() for text in after):
        found.append("every held-out completion is empty")
    if after and any(len(text.split()) > 20 and len(set(text.split())) < len(text.split()) / 5 for text in after):
        found.append("a held-out completion repeats itself")
    for what, parses in (("a function call", _calls), ("JSON", _json)):
        if (
            questions
            and all(parses(flat_messages(row)[-1].content) for row in questions)
            and not any(parses(text) for text in after)
        ):
            found.append(f"the reference completions are all {what}, but none of the model's is")
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
    """Write curves and metrics to the report; `write_samples` adds the completions."""
    steps, looks = [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]
    report.title = f"Fine-tuning of {title}"
    report.lead = (
        f"{len(steps):,} steps, {metrics['tokens']:,} tokens; mean loss went from {metrics['loss_first']:.3f}"
        f" (first tenth of the steps) to {metrics['loss']:.3f} nats per label token (last tenth)."
        if steps
        else ""
    )
    if looks:
        last = looks[-1]
        chosen = next((row for row in looks if row["step"] == metrics.get("best_step", -1)), last)
        report.lead += (
            f" Eval set: loss {chosen['eval_loss']:.3f} nats per token, token accuracy {chosen['accuracy']:.1%}"
            + (f"; the saved weights are those of step {chosen['step'] + 1}." if chosen is not last else ".")
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
            "Dropped rows",
            ("id", "reason"),
            set_aside[:50],
            f"{len(set_aside)} rows; all are in set_aside.jsonl." if len(set_aside) > 50 else "",
        )


def write_samples(
    report: ReportBuilder, questions: Sequence[Row], before: Sequence[str], after: Sequence[str]
) -> list[str]:
    """Add held-out prompts and completions to the report; return warnings, which are put first."""
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
        report.samples("Held-out prompts: completions before and after training", items)
    return warnings
