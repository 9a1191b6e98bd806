"""Stage `train.sft`: supervised fine-tuning of a LoRA adapter on conversations; loss on assistant turns only.

Ends by answering held-out questions as before and after, and says so when nothing changed or answers degenerate.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from llmworks.artifact import Adapter, Config, Dataset, Model
from llmworks.context import Context
from llmworks.data.doctor import require_template, uses_of
from llmworks.data.rows import Row, flat_messages, read_chat
from llmworks.errors import DataError, ModelError
from llmworks.progress import write_whole
from llmworks.tokenize.named import CHOICES, Template, use_template
from llmworks.train.curves import smooth
from llmworks.train.schedule import OptimizerConfig
from llmworks.types import Engine, Request, Sampling

if TYPE_CHECKING:
    from llmworks.train.examples import Batch, Example


class LoraConfig(Config):
    """The shape of the adapter."""

    rank: int = Field(16, gt=0, description="rank of the added matrices")
    alpha: float = Field(32.0, gt=0, description="the addition is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="linear layers to adapt: all but the output head, or their last names"
    )


class SftConfig(Config):
    """What is trained, on how much, and what the tuned model's template can do."""

    epochs: float = Field(2.0, gt=0, description="passes over the data; may be a fraction")
    batch_size: int = Field(4, gt=0, description="conversations per part of a step")
    accumulation: int = Field(1, gt=0, description="parts per step; the step's loss is normalised over all their label tokens")
    max_tokens: int = Field(2048, gt=1, description="longer conversations are set aside, never cut")
    template: Template = Field("keep", description=f"the chat template that is trained with and saved. {CHOICES}")
    golden: str = Field(
        "keep",
        pattern=r"^(keep|renew: .+)$",
        description="keep: the base's golden tokens must replay; 'renew: REASON' when the template or vocabulary changes",
    )
    lora: LoraConfig = Field(LoraConfig(), description="the adapter")
    checkpoint_every: int = Field(20, gt=0, description="steps between two checkpoints")
    samples: int = Field(4, ge=0, description="held-out questions answered before and after")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="learning rate schedule and AdamW")


def sft(config: SftConfig, model: Model, data: Dataset, ctx: Context, held_out: Dataset | None = None) -> Adapter:
    """Train an adapter on the conversations of `data`.

    Errors: DataError when no conversation can be trained on; GoldenMismatch when the template changes and golden is "keep";
    TrainingError when the loss stops being a number.
    """
    import torch

    from llmworks.generate.engines.torch import TorchEngine
    from llmworks.model import lora
    from llmworks.model.load import load_model
    from llmworks.tokenize.load import load_tokenizer, stop_ids
    from llmworks.train.loop import Habits, train
    from llmworks.train.loss import next_token_loss

    if model.format != "hf":
        raise ModelError(
            f"{model.name}: training needs a Hugging Face directory, this is {model.format}; convert it with the stage model.from_gguf"
        )
    tokenizer = load_tokenizer(model.path)
    stops = stop_ids(model.path, tokenizer)
    use_template(tokenizer, config.template)
    _check_golden(config, model, tokenizer, stops)
    rows = read_chat(data)
    require_template(model.name, tokenizer, stops, uses_of(rows))
    examples, set_aside = make_examples(tokenizer, rows, config.max_tokens)
    tokens, learned = sum(len(e.ids) for e in examples), sum(e.labels for e in examples)
    ctx.progress.say(
        f"{len(examples)} conversations, {tokens} tokens, {learned} of them learned"
        + (f"; {len(set_aside)} set aside" if set_aside else "")
    )
    network = load_model(model.path)
    engine = TorchEngine(network, tokenizer, stops, model.name)
    questions = answerable(held_out)[: config.samples] if held_out else []
    before = answers(engine, questions, ctx.scratch / "before.json")
    torch.manual_seed(ctx.seed)
    lora.attach(network, config.lora.targets, config.lora.rank, config.lora.alpha, config.lora.dropout)
    steps = plan(examples, config, ctx.seed)
    metrics: dict[str, Any] = dict(
        train(
            network,
            steps,
            next_token_loss,
            config.optimizer,
            Habits(config.checkpoint_every),
            scratch=ctx.scratch,
            progress=ctx.progress,
        )
    )
    metrics |= {
        "conversations": len(examples),
        "set_aside": len(set_aside),
        "trained_parameters": sum(p.numel() for p in network.parameters() if p.requires_grad),
    }
    lora.save_adapter(
        network, ctx.out, rank=config.lora.rank, alpha=config.lora.alpha, dropout=config.lora.dropout, base_name=model.ref or model.name
    )
    tokenizer.save_pretrained(ctx.out)
    if ctx.progress.metrics is not None:
        shutil.copyfile(ctx.progress.metrics, ctx.out / "metrics.jsonl")
    metrics |= _report(ctx, config, model, questions, before, answers(engine, questions, None), set_aside)
    return Adapter(
        ctx.out,
        metrics=metrics,
        golden=_record_golden(network, tokenizer, stops),
        about={"base": model.digest, "rank": config.lora.rank, "template": config.template},
    )


def make_examples(tokenizer: Any, rows: Sequence[Row], max_tokens: int) -> tuple[list[Example], list[tuple[str, str]]]:
    """(examples, (id, reason) of the conversations set aside). DataError when none is left."""
    from llmworks.train.examples import make_example

    examples: list[Example] = []
    set_aside: list[tuple[str, str]] = []
    for row in rows:
        made = make_example(tokenizer, row, max_tokens)
        if isinstance(made, str):
            set_aside.append((row["id"], made))
        else:
            examples.append(made)
    if not examples:
        raise DataError(f"none of {len(rows)} conversations can be trained on; the first: {set_aside[0][1] if set_aside else 'no rows'}")
    return examples, set_aside


def plan(examples: Sequence[Example], config: SftConfig, seed: int) -> list[list[Callable[[], Batch]]]:
    """All steps as lists of batch makers, the same for the same seed."""
    from llmworks.train.examples import collate, plan_epoch

    lengths = [len(e.ids) for e in examples]
    per_epoch = -(-len(examples) // config.batch_size)
    wanted = max(1, round(config.epochs * per_epoch))
    parts: list[list[int]] = []
    epoch = 0
    while len(parts) < wanted:
        parts += plan_epoch(lengths, config.batch_size, seed * 1000 + epoch)
        epoch += 1
    makers: list[Callable[[], Batch]] = [lambda part=part: collate([examples[i] for i in part]) for part in parts[:wanted]]  # type: ignore[misc]
    return [makers[i : i + config.accumulation] for i in range(0, len(makers), config.accumulation)]


def _check_golden(config: SftConfig, model: Model, tokenizer: Any, stops: Sequence[int]) -> None:
    from llmworks.tokenize.golden import require

    if model.golden is not None and config.golden == "keep":
        require(model.golden, tokenizer, stops, step="train.sft (golden: keep)")


def answerable(held_out: Dataset) -> list[Row]:
    """Conversations that end with an answer to something."""
    return [row for row in read_chat(held_out) if row["messages"][-1]["role"] == "assistant" and len(row["messages"]) > 1]


def _record_golden(network: Any, tokenizer: Any, stops: Sequence[int]) -> Any:
    from llmworks.model.golden import torch_logits
    from llmworks.tokenize.golden import record

    return record(tokenizer, stops, torch_logits(network))


def answers(engine: Engine, questions: Sequence[Row], kept: Path | None) -> list[str]:
    """Greedy answers to held-out questions; kept in a file where a resumed run would find a changed model."""
    import json

    if kept is not None and kept.exists():
        return list(json.loads(kept.read_text(encoding="utf-8")))
    done = engine.generate([Request(flat_messages(row)[:-1], sampling=Sampling(max_tokens=96)) for row in questions])
    texts = [completion.text for completion in done]
    if kept is not None:
        write_whole(kept, json.dumps(texts))
    return texts


def _report(
    ctx: Context,
    config: SftConfig,
    model: Model,
    questions: Sequence[Row],
    before: Sequence[str],
    after: Sequence[str],
    set_aside: Sequence[tuple[str, str]],
) -> dict[str, Any]:
    """Fill the report with curves and samples; warn about what went wrong. Returns the warnings as a metric."""
    rows = ctx.progress.read_metrics()
    warnings: list[str] = []
    if questions and list(before) == list(after):
        warnings.append("nothing changed: every held-out answer is the same as before training")
    if after and all(not text.strip() for text in after):
        warnings.append("every held-out answer is empty")
    if after and any(len(text.split()) > 20 and len(set(text.split())) < len(text.split()) / 5 for text in after):
        warnings.append("a held-out answer repeats itself")
    for warning in warnings:
        ctx.progress.say(f"warning: {warning}")
    report = ctx.report
    report.title = f"Fine-tuning of {model.name}"
    report.data = {"warnings": warnings, "config": config.model_dump(), "steps": len(rows)}
    if warnings:
        report.text("Warnings", "\n\n".join(warnings))
    report.curves(
        "Loss",
        {"loss": [(r["step"] + 1, r["loss"]) for r in rows], "mean of 10": smooth([(r["step"] + 1, r["loss"]) for r in rows])},
        x="step",
        y="nats per learned token",
    )
    report.curves("Gradient norm", {"gradient norm": [(r["step"] + 1, r["gradient_norm"]) for r in rows]}, x="step", y="before clipping")
    report.curves("Learning rate", {"learning rate": [(r["step"] + 1, r["learning_rate"]) for r in rows]}, x="step", y="")
    if set_aside:
        report.table("Conversations set aside", ("id", "reason"), set_aside[:50])
    items = [
        {"": row["messages"][-2]["content"][:110], "before": b, "after": a, "reference": flat_messages(row)[-1].content}
        for row, b, a in zip(questions, before, after, strict=True)
    ]
    if items:
        report.samples("Held-out questions, before and after", items)
    return {"warnings": len(warnings)}
