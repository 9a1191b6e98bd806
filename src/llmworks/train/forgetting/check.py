"""Measure what a training changes beside its task: answers to everyday questions, and divergence on general text.

The divergence is KL(before || after) per token, where the tokens beyond the 128 most probable ones are one event: a
lower bound of the divergence over the whole vocabulary, which needs no second model in memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmworks import assets
from llmworks.core.context import Context
from llmworks.core.progress import write_atomic
from llmworks.core.report import ReportBlock, ReportBuilder
from llmworks.core.types import Message, Request, Sampling
from llmworks.score.degeneration import find_degeneration, has_same_start

TOP_K = 128
MAX_NEW_TOKENS = 48
MAX_KL = 0.5  # nats per token of general text above which a training warns
UNTRAINED = 0.95  # a model whose loss on general text is this share of a uniform distribution's has learned nothing
MAX_CHANGED = 0.5  # share of questions answered with other first words above which it warns
FIELD_DESCRIPTION = (
    "everyday questions answered before and after training, to measure what the model forgets; 0 = measure nothing"
)


@dataclass(frozen=True)
class GeneralReference:
    """A model before training: questions and greedy answers; of general texts ids, and top log-probabilities.

    `top_ids`, `top_logprobs`: [text][position][rank], in nats.
    """

    questions: list[str]
    answers: list[str]
    ids: list[list[int]]
    top_ids: list[list[list[int]]]
    top_logprobs: list[list[list[float]]]


@dataclass(frozen=True)
class Forgetting:
    """What a training changed: answers, KL divergence in nats per token, top-1 agreement, shares of the questions."""

    answers: list[str]
    kl: float
    top1_agreement: float
    same_start: float
    degenerate: float
    degenerate_before: float

    def to_metrics(self) -> dict[str, float]:
        """Return the metrics of an artifact; those of answers only if there are any."""
        found = {"general_kl": round(self.kl, 5), "general_top1_agreement": round(self.top1_agreement, 5)}
        if self.answers:
            found |= {
                "general_same_start": round(self.same_start, 5),
                "general_degenerate": round(self.degenerate, 5),
                "general_degenerate_before": round(self.degenerate_before, 5),
            }
        return found


def read_general_questions(count: int) -> list[str]:
    """Return the first everyday questions of asset:everyday-prompts-test."""
    lines = (assets.fetch("everyday-prompts-test") / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines[:count]]


def record_reference(engine: Any, count: int, cache: Path | None) -> GeneralReference | None:
    """Record a model before training, on an engine with logits; None for an untrained model, which forgets nothing.

    `count`: number of questions; none are asked where the tokenizer has no chat template. `cache`: file with the
    reference of the initial model, which a resumed run no longer has.
    """
    if cache is not None and cache.exists():
        saved = json.loads(cache.read_text(encoding="utf-8"))
        return GeneralReference(**saved) if saved else None
    reference = _record(engine, count)
    if cache is not None:
        write_atomic(cache, json.dumps(asdict(reference) if reference else None))
    return reference


def _record(engine: Any, count: int) -> GeneralReference | None:
    ids, top_ids, top_logprobs = [], [], []
    nats, uniform = 0.0, 0.0
    for text in (Path(__file__).parent / "general_texts.txt").read_text(encoding="utf-8").split("\n\n"):
        tokens = engine.tokenizer(text.strip())["input_ids"][: engine.context]
        if len(tokens) < 2:
            continue
        logits = engine.logits(tokens)
        nats -= float(_log_softmax(logits[:-1])[range(len(tokens) - 1), tokens[1:]].sum())
        uniform += (len(tokens) - 1) * math.log(logits.shape[1])
        chosen, logprobs = _get_top(logits)
        ids.append(tokens)
        top_ids.append(chosen)
        top_logprobs.append(logprobs)
    if nats >= UNTRAINED * uniform:
        return None
    questions = read_general_questions(count) if engine.tokenizer.chat_template else []
    return GeneralReference(questions, _answer(engine, questions), ids, top_ids, top_logprobs)


def _answer(engine: Any, questions: Sequence[str]) -> list[str]:
    requests = [Request((Message("user", one),), sampling=Sampling(max_tokens=MAX_NEW_TOKENS)) for one in questions]
    return [completion.text for completion in engine.generate(requests)]


def _get_top(logits: Any) -> tuple[list[list[int]], list[list[float]]]:
    """Return the ids and log-probabilities of the most probable tokens, most probable first."""
    import numpy as np

    logprobs = _log_softmax(logits)
    chosen = np.argsort(-logprobs, axis=1, kind="stable")[:, :TOP_K]
    return chosen.tolist(), np.round(np.take_along_axis(logprobs, chosen, 1), 5).tolist()


def _log_softmax(logits: Any) -> Any:
    import numpy as np

    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(1, keepdims=True))


def compute_kl(top_ids: Sequence[Sequence[int]], top_logprobs: Sequence[Sequence[float]], logits: Any) -> list[float]:
    """Compute KL(before || after) in nats at each position, with all other tokens as one event."""
    import numpy as np

    before = np.asarray(top_logprobs)
    after = np.take_along_axis(_log_softmax(logits), np.asarray(top_ids), 1)
    kl = (np.exp(before) * (before - after)).sum(1)
    rest, other = (np.clip(1 - np.exp(one).sum(1), 1e-9, 1) for one in (before, after))
    return [float(value) for value in kl + rest * np.log(rest / other)]


def measure_forgetting(engine: Any, reference: GeneralReference) -> Forgetting:
    """Compare a trained model with its reference."""
    kl: list[float] = []
    same = 0
    for ids, top_ids, top_logprobs in zip(reference.ids, reference.top_ids, reference.top_logprobs, strict=True):
        logits = engine.logits(ids)
        kl += compute_kl(top_ids, top_logprobs, logits)
        same += sum(int(row.argmax()) == top[0] for row, top in zip(logits, top_ids, strict=True))
    answers = _answer(engine, reference.questions)
    count = max(1, len(answers))
    return Forgetting(
        answers,
        sum(kl) / max(1, len(kl)),
        same / max(1, len(kl)),
        sum(map(has_same_start, answers, reference.answers)) / count,
        sum(bool(find_degeneration(answer)) for answer in answers) / count,
        sum(bool(find_degeneration(answer)) for answer in reference.answers) / count,
    )


def find_warnings(found: Forgetting) -> list[str]:
    """Return warnings about a model that a training damaged beside its task."""
    warnings, count = [], len(found.answers)
    if not math.isfinite(found.kl) or found.kl > MAX_KL:
        warnings.append(
            f"the model's predictions of general text changed by {found.kl:.2f} nats per token (KL divergence); it may"
            " have forgotten what it could do before: mix in general data (asset:everyday-prompts), or train less"
        )
    if found.degenerate > found.degenerate_before:
        warnings.append(
            f"{found.degenerate * count:.0f} of {count} everyday questions get degenerate answers, before training"
            f" {found.degenerate_before * count:.0f}"
        )
    if found.answers and 1 - found.same_start > MAX_CHANGED:
        warnings.append(
            f"{(1 - found.same_start) * count:.0f} of {count} everyday questions are answered with other first words"
            " than before training"
        )
    return warnings


def write_forgetting(report: ReportBuilder, reference: GeneralReference, found: Forgetting) -> list[str]:
    """Add everyday answers and divergence to a report; return the warnings, which are put first."""
    warnings = find_warnings(found)
    report.data["warnings"] = [*report.data.get("warnings", []), *warnings]
    report.data["forgetting"] = found.to_metrics()
    if warnings:
        report.blocks.insert(0, ReportBlock("text", "Forgetting", "\n\n".join(warnings)))
    texts = f"{sum(map(len, reference.ids)):,} tokens of general text"
    note = f"KL divergence {found.kl:.3f} nats per token, top-1 agreement {found.top1_agreement:.1%}, on {texts}."
    if not found.answers:
        report.add_text("General text before and after training", note)
        return warnings
    items = [
        {"": question, "before": before, "after": after}
        | ({"problem": problem} if (problem := find_degeneration(after)) else {})
        for question, before, after in zip(reference.questions, reference.answers, found.answers, strict=True)
    ]
    report.add_samples("Everyday questions: answers before and after training", items, note)
    return warnings


def report_forgetting(engine: Any, reference: GeneralReference, ctx: Context, metrics: dict[str, Any]) -> None:
    """Measure a trained model; add to the log, the report and an artifact's metrics, whose `warnings` are counted."""
    found = measure_forgetting(engine, reference)
    ctx.progress.log(format_forgetting(found))
    warnings = write_forgetting(ctx.report, reference, found)
    for warning in warnings:
        ctx.progress.log(f"warning: {warning}")
    metrics |= found.to_metrics()
    metrics["warnings"] = int(metrics.get("warnings", 0)) + len(warnings)


def format_forgetting(found: Forgetting) -> str:
    """Return one line for the log."""
    answers = len(found.answers)
    return f"general text: KL divergence {found.kl:.3f} nats per token" + (
        f"; everyday questions: {found.same_start * answers:.0f} of {answers} answers begin as before,"
        f" {found.degenerate * answers:.0f} degenerate (before training {found.degenerate_before * answers:.0f})"
        if answers
        else ""
    )
