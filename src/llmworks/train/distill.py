"""Stage `train.distill`: knowledge distillation from a teacher's logits or from its completions.

Logits need a shared vocabulary. Everything else is as in `train.sft`: trainable parameters, batches, evaluation,
reports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError, ModelError, UserError
from llmworks.core.types import Request, Sampling
from llmworks.data.conversations.training_rows import read_training_rows
from llmworks.data.store.rows import Row, flatten_messages, write_chat
from llmworks.generate.remote.journal import Journal, JournalRecord
from llmworks.train.finetune.method import TrainingData
from llmworks.train.sft import SftConfig, run_sft, sft

if TYPE_CHECKING:
    from llmworks.train.finetune.trainable import TrainableModel


class DistillConfig(SftConfig):
    """A fine-tuning on a teacher's logits or completions."""

    source: Literal["auto", "logits", "text"] = Field(
        "auto",
        description=(
            "what to train on: the teacher's logits on the data's completions (logits), or completions that the"
            " teacher generates (text); auto: logits if both share a vocabulary and the teacher is a Hugging Face"
            " directory"
        ),
    )
    divergence: Literal["forward_kl", "reverse_kl", "js_divergence"] = Field(
        "forward_kl",
        description=(
            "logits: forward KL(teacher || student), mode-covering; reverse KL(student || teacher), mode-seeking;"
            " js_divergence: generalized Jensen-Shannon divergence"
        ),
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description=(
            "logits: distillation temperature that divides both logits; above 1 small probabilities count for"
            " more; the loss is multiplied by its square"
        ),
    )
    ce_weight: float = Field(
        0.0, ge=0, lt=1, description="logits: weight of the cross-entropy on the data's own completions in the loss"
    )
    max_new_tokens: int = Field(512, gt=0, description="text: maximum length of a teacher's completion in tokens")
    generation_temperature: float = Field(
        0.0, ge=0, description="text: sampling temperature of the teacher; 0 = greedy"
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.source == "text" and (self.ce_weight or self.divergence != "forward_kl" or self.temperature != 1.0):
            raise ValueError(
                "ce_weight, divergence and temperature apply to logits only; with source text the student is"
                " trained on the teacher's completions as they are"
            )
        if self.method in ("prompt_tuning", "prefix_tuning"):
            raise ValueError("a soft prompt cannot be distilled; use method lora or full")
        return self


def distill(
    config: DistillConfig,
    teacher: Model | Adapter,
    student: Model,
    data: Dataset,
    ctx: Context,
    eval_data: Dataset | None = None,
) -> Adapter | Model:
    """Train the student on the rows of `data`: on the teacher's logits, or on completions that the teacher generates.

    Errors: as train.sft; UserError if logits are requested from a teacher that cannot provide them, or has another
    vocabulary.
    """
    from llmworks.train.distributed import world

    why = explain_missing_logits(teacher, student)
    logit_fields = [
        name
        for name, value in (("temperature", 1.0), ("ce_weight", 0.0), ("divergence", "forward_kl"))
        if getattr(config, name) != value
    ]
    if why and (config.source == "logits" or logit_fields):
        raise UserError(
            f"config.{'source is logits' if config.source == 'logits' else f'{logit_fields[0]} applies to logits'},"
            f" but {why}; set source to text{'' if config.source == 'logits' else ' and leave it out'}, or use a"
            " teacher with logits"
        )
    if config.source == "text" or why:
        if world.get_world_size() > 1:
            raise UserError("source text: a teacher's completions are generated in one process; start only one")
        ctx.progress.log(
            f"{teacher.name} generates the completions" + (f", since {why}" if why and config.source == "auto" else "")
        )
        made = sft(config, student, write_teacher_completions(config, teacher, data, ctx), ctx, eval_data)
        ctx.report.subtitle = (
            f"{teacher.name} generated the completions{f', since {why}' if why else ''}. {ctx.report.subtitle}"
        )
        return made
    with world.init_world(config.parallelism) as here:
        if here.size > 1:
            raise UserError("training on a teacher's logits runs in one process; set source to text, or start only one")
        made = run_sft(
            config,
            student,
            data,
            ctx,
            eval_data,
            here,
            lambda tuned, material: _create_loss(config, teacher, tuned, material, ctx),
        )
        ctx.report.subtitle = (
            f"Distilled from the logits of {teacher.name}: the loss is the divergence. {ctx.report.subtitle}"
        )
        return made


def explain_missing_logits(teacher: Model | Adapter, student: Model) -> str:
    """Return why a teacher cannot provide logits for the student; empty if it can."""
    if isinstance(teacher, Adapter) or teacher.format != "hf":
        adapter = isinstance(teacher, Adapter)
        wrong = "an adapter, which has to be merged first" if adapter else "not a Hugging Face directory"
        return f"{teacher.name} is {wrong}"
    from llmworks.tokenize.load import load_tokenizer

    one, other = (load_tokenizer(m.path).get_vocab() for m in (teacher, student))
    if one != other:
        return f"{teacher.name} has another vocabulary than {student.name} ({len(one):,} and {len(other):,} tokens)"
    return ""


def _create_loss(
    config: DistillConfig,
    teacher: Model | Adapter,
    trainable: TrainableModel,
    training_data: TrainingData,
    ctx: Context,
) -> Any:
    """Create the distillation loss; the teacher reads the same batches."""
    from llmworks.train.finetune.distillation_loss import BETAS, create_distillation_loss
    from llmworks.train.finetune.trainable import open_trainable_model
    from llmworks.train.loop.losses import needs_full_logits

    teacher_model = open_trainable_model(teacher.path)
    if teacher_model.padding_free != trainable.padding_free:
        raise ModelError(
            f"{teacher.name} and the student need different batch formats (padded and padding-free); set source to text"
        )
    for model in (teacher_model.network, trainable.network):
        if needs_full_logits(model):
            raise ModelError(
                "logits that are transformed after the LM head (soft-capping, scaling) cannot be distilled; set"
                " source to text"
            )
    if teacher_model.network.config.vocab_size != trainable.network.config.vocab_size:
        raise ModelError(
            f"the teacher has {teacher_model.network.config.vocab_size:,} logits, the"
            f" student {trainable.network.config.vocab_size:,}; set source to text"
        )
    ctx.progress.log(
        f"training on logits of {teacher.name} at {sum(e.labels for e in training_data.examples):,} label tokens"
    )
    teacher_model.network.to(next(trainable.network.parameters()).device)
    return create_distillation_loss(
        teacher_model.network.requires_grad_(False).eval(),
        beta=BETAS.get(config.divergence, 0.5),
        temperature=config.temperature,
        ce_weight=config.ce_weight,
    )


def write_teacher_completions(config: DistillConfig, teacher: Model | Adapter, data: Dataset, ctx: Context) -> Dataset:
    """Return the conversations of `data` with the teacher's completion at the end.

    Empty and unfinished completions are dropped. DataError when none is left.
    """
    rows = [
        row
        for row in read_training_rows(data)
        if "messages" in row and row["messages"][-1]["role"] == "assistant" and len(row["messages"]) > 1
    ]
    if not rows:
        raise DataError(f"{data.name}: has no conversations that end with an assistant turn")
    sampling = Sampling(
        max_tokens=config.max_new_tokens,
        temperature=config.generation_temperature,
        seed=ctx.seed if config.generation_temperature else None,
    )
    requests = {str(row["id"]): Request(flatten_messages(row)[:-1], sampling=sampling) for row in rows}
    with (
        Journal(ctx.scratch / "answers.jsonl", lambda: ctx.open_engine(teacher)) as journal,
        ctx.progress.bar("teacher completions", len(requests), "answers") as bar,
    ):
        replies = journal.generate(requests, bar)
    made: list[Row] = []
    dropped: list[tuple[str, str]] = []
    for row in rows:
        reply = replies[str(row["id"])]
        if isinstance(reply, JournalRecord) and reply.finish == "stop" and reply.text.strip():
            made.append(
                {**row, "messages": [*row["messages"][:-1], {"role": "assistant", "content": reply.text.strip()}]}
            )
        else:
            why = (
                "failed"
                if not isinstance(reply, JournalRecord)
                else "is empty"
                if not reply.text.strip()
                else f"is not finished within {config.max_new_tokens} tokens"
            )
            dropped.append((str(row["id"]), f"the teacher's completion {why}"))
    ctx.progress.log(f"{len(made)} of {len(rows)} completions are finished and not empty")
    if not made:
        raise DataError(
            f"{teacher.name} finished none of {len(rows)} completions within {config.max_new_tokens} tokens; raise"
            " max_new_tokens"
        )
    write_chat(ctx.scratch / "written", made)
    return Dataset(
        ctx.scratch / "written", name=f"{data.name} by {teacher.name}", about={"schema": "chat", "lost": dropped}
    )
