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
from llmworks.core.progress import write_atomic
from llmworks.core.report import ReportBlock, ReportBuilder
from llmworks.core.types import Engine, Message, Request, Sampling
from llmworks.data.conversations.training_rows import read_training_rows
from llmworks.data.store.rows import Row, flatten_messages
from llmworks.score.degeneration import MAX_REPETITION, compute_repetition
from llmworks.tokenize.chat.templates import parse_tool_calls
from llmworks.train.loop.report import build_plots

if TYPE_CHECKING:
    from llmworks.train.finetune.examples import Example

MAX_NEW_TOKENS = 96  # max_tokens of a completion


def select_prompt_rows(held_out: Dataset) -> list[Row]:
    """Return the conversations that end with an assistant turn after another turn."""
    return [
        row
        for row in read_training_rows(held_out)
        if "messages" in row and row["messages"][-1]["role"] == "assistant" and len(row["messages"]) > 1
    ]


def generate_completions(engine: Engine, prompt_rows: Sequence[Row], cache: Path | None) -> list[str]:
    """Generate greedy completions of held-out prompts.

    `cache`: a file with the completions of the initial model, which a resumed run no longer has.
    """
    if cache is not None and cache.exists():
        return list(json.loads(cache.read_text(encoding="utf-8")))
    completions = engine.generate(
        [Request(_get_prompt(row), sampling=Sampling(max_tokens=MAX_NEW_TOKENS)) for row in prompt_rows]
    )
    texts = [completion.text for completion in completions]
    if cache is not None:
        write_atomic(cache, json.dumps(texts))
    return texts


def _get_prompt(row: Row) -> tuple[Message, ...]:
    return flatten_messages(row)[:-1]


def evaluate_examples(
    network: Any, examples: Sequence[Example], *, padding_free: bool, batch_size: int, device: Any
) -> dict[str, float]:
    """Evaluate on the labels of examples: `eval_loss` (mean cross-entropy in nats), `perplexity`, `accuracy`.

    Accuracy is the share of label tokens that are the most probable token.
    """
    import torch

    from llmworks.train.finetune.examples import collate, collate_padding_free
    from llmworks.train.loop.losses import iter_label_logits

    training = network.training
    network.train(False)
    nats, num_correct, count = 0.0, 0, 0
    with torch.no_grad():
        for start in range(0, len(examples), batch_size):
            some = examples[start : start + batch_size]
            for logits, labels in iter_label_logits(
                network, collate_padding_free(some, device) if padding_free else collate(some).to(device)
            ):
                nats += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
                num_correct += int((logits.argmax(-1) == labels).sum())
                count += len(labels)
    network.train(training)
    mean = nats / max(1, count)
    return {"eval_loss": mean, "perplexity": math.exp(min(700.0, mean)), "accuracy": num_correct / max(1, count)}


def find_warnings(prompt_rows: Sequence[Row], before: Sequence[str], after: Sequence[str]) -> list[str]:
    """Return warnings about the completions of a fine-tuned model."""
    found: list[str] = []
    if prompt_rows and list(before) == list(after):
        found.append("nothing changed: every held-out completion is the same as before training")
    if after and all(not text.strip() for text in after):
        found.append("every held-out completion is empty")
    if any(compute_repetition(text) > MAX_REPETITION for text in after):
        found.append("a held-out completion repeats itself")
    for what, parses in (("a function call", _has_tool_calls), ("JSON", _is_json)):
        if (
            prompt_rows
            and all(parses(flatten_messages(row)[-1].content) for row in prompt_rows)
            and not any(parses(text) for text in after)
        ):
            found.append(f"the reference completions are all {what}, but none of the model's is")
    return found


def _has_tool_calls(text: str) -> bool:
    return bool(parse_tool_calls(text)[1])


def _is_json(text: str) -> bool:
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
    dropped: Sequence[tuple[str, str]],
) -> None:
    """Write curves and metrics to the report; `write_samples` adds the completions."""
    steps, evaluations = [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]
    report.title = f"Fine-tuning of {title}"
    report.subtitle = (
        f"{len(steps):,} steps, {metrics['tokens']:,} tokens; mean loss went from {metrics['initial_loss']:.3f}"
        f" (first tenth of the steps) to {metrics['loss']:.3f} nats per label token (last tenth)."
        if steps
        else ""
    )
    if evaluations:
        last = evaluations[-1]
        chosen = next((row for row in evaluations if row["step"] + 1 == metrics.get("best_step")), last)
        report.subtitle += (
            f" Eval set: loss {chosen['eval_loss']:.3f} nats per token, token accuracy {chosen['accuracy']:.1%}"
            + (f"; the saved weights are those of step {chosen['step'] + 1}." if chosen is not last else ".")
        )
    report.data = {
        "warnings": [],
        "config": dict(config),
        "steps": len(steps),
        "evaluations": [{key: row[key] for key in ("step", "eval_loss", "accuracy")} for row in evaluations],
    }
    for heading, series, y in build_plots(steps, rows) if steps else ():
        report.add_curves(heading, series, x="step", y=y)
    if dropped:
        report.add_table(
            "Dropped rows",
            ("id", "reason"),
            dropped[:50],
            f"{len(dropped)} rows; all are in set_aside.jsonl." if len(dropped) > 50 else "",
        )


def write_samples(
    report: ReportBuilder, prompt_rows: Sequence[Row], before: Sequence[str], after: Sequence[str]
) -> list[str]:
    """Add held-out prompts and completions to the report; return warnings, which are put first."""
    warnings = find_warnings(prompt_rows, before, after)
    report.data["warnings"] = warnings
    if warnings:
        report.blocks.insert(0, ReportBlock("text", "Warnings", "\n\n".join(warnings)))
    items = [
        {
            "": str(row["messages"][-2].get("content") or "")[:110],
            "before": b,
            "after": a,
            "reference": flatten_messages(row)[-1].content,
        }
        for row, b, a in zip(prompt_rows, before, after, strict=True)
    ]
    if items:
        report.add_samples("Held-out prompts: completions before and after training", items)
    return warnings
