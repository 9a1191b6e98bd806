"""Stage `train.distill`: a student learns from a teacher: from its chances of every token where both have one
vocabulary, else from what it writes.

Everything else is `train.sft`'s: what of the student is trained, batches, looks, reports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError, ModelError, UserError
from llmworks.core.types import Request, Sampling
from llmworks.data.conversations.training_rows import training_rows
from llmworks.data.store.rows import Row, flat_messages, write_chat
from llmworks.generate.remote.journal import Journal, Record
from llmworks.train.finetune.method import Material
from llmworks.train.sft import SftConfig, sft, tune

if TYPE_CHECKING:
    from llmworks.train.finetune.trainable import Tuned


class DistillConfig(SftConfig):
    """A fine-tuning whose answers, or whose chances of them, are a teacher's."""

    source: Literal["auto", "logits", "text"] = Field(
        "auto",
        description=(
            "what is learned: the teacher's chances of every token of the data's answers (logits), or answers that it"
            " writes (text); auto: logits where both have one vocabulary and the teacher is a directory"
        ),
    )
    divergence: Literal["forward_kl", "reverse_kl", "js_divergence"] = Field(
        "forward_kl",
        description=(
            "logits: KL(teacher || student), which covers all that the teacher may say; the reverse, which keeps to"
            " what it says most; or the Jensen-Shannon divergence between them"
        ),
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description=(
            "logits: both are divided by it, so that small chances count for more above 1; the loss is multiplied by"
            " its square"
        ),
    )
    ce_weight: float = Field(0.0, ge=0, lt=1, description="logits: share of the data's own answers in the loss")
    max_new_tokens: int = Field(512, gt=0, description="text: longest answer of the teacher")
    generation_temperature: float = Field(0.0, ge=0, description="text: 0: the most probable answer")

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.source == "text" and (self.ce_weight or self.divergence != "forward_kl" or self.temperature != 1.0):
            raise ValueError(
                "mix, direction and temperature are of logits; with source text the teacher's answers are learned as"
                " they are"
            )
        if self.method in ("prompt_tuning", "prefix_tuning"):
            raise ValueError("a soft prompt is not distilled; take method lora or full")
        return self


def distill(
    config: DistillConfig,
    teacher: Model | Adapter,
    student: Model,
    data: Dataset,
    ctx: Context,
    eval_data: Dataset | None = None,
) -> Adapter | Model:
    """Train the student on the rows of `data`: with the teacher's chances of their answers, or with answers that the
    teacher writes to their questions.

    Errors: as train.sft; UserError where logits are wanted of a teacher that cannot give them, or of another
    vocabulary.
    """
    from llmworks.train.distributed import world

    why = cannot_give_logits(teacher, student)
    of_logits = [
        name
        for name, value in (("temperature", 1.0), ("ce_weight", 0.0), ("divergence", "forward_kl"))
        if getattr(config, name) != value
    ]
    if why and (config.source == "logits" or of_logits):
        raise UserError(
            f"config.{'source is logits' if config.source == 'logits' else f'{of_logits[0]} is of logits'}, but {why};"
            f" set source to text{'' if config.source == 'logits' else ' and leave it out'}, or give such a teacher"
        )
    if config.source == "text" or why:
        if world.processes() > 1:
            raise UserError("a teacher's answers are written by one process; start one")
        ctx.progress.say(
            f"{teacher.name} writes the answers" + (f", since {why}" if why and config.source == "auto" else "")
        )
        made = sft(config, student, written(config, teacher, data, ctx), ctx, eval_data)
        ctx.report.lead = f"{teacher.name} wrote the answers{f', since {why}' if why else ''}. {ctx.report.lead}"
        return made
    with world.opened(config.spread) as here:
        if here.size > 1:
            raise UserError("a training with a teacher's logits runs in one process; set source to text, or start one")
        made = tune(
            config,
            student,
            data,
            ctx,
            eval_data,
            here,
            lambda tuned, material: _loss(config, teacher, tuned, material, ctx),
        )
        ctx.report.lead = (
            f"{teacher.name} taught by its chances of every token: the loss is what they differ by. {ctx.report.lead}"
        )
        return made


def cannot_give_logits(teacher: Model | Adapter, student: Model) -> str:
    """Why a teacher cannot teach by its chances; empty where it can."""
    if isinstance(teacher, Adapter) or teacher.format != "hf":
        adapter = isinstance(teacher, Adapter)
        wrong = "an adapter, which is to be merged first" if adapter else "no Hugging Face directory"
        return f"{teacher.name} is {wrong}"
    from llmworks.tokenize.load import load_tokenizer

    one, other = (load_tokenizer(m.path).get_vocab() for m in (teacher, student))
    if one != other:
        return f"{teacher.name} has another vocabulary than {student.name} ({len(one):,} and {len(other):,} tokens)"
    return ""


def _loss(config: DistillConfig, teacher: Model | Adapter, tuned: Tuned, material: Material, ctx: Context) -> Any:
    """The loss under the teacher, who reads the same batches."""
    from llmworks.train.finetune.distillation_loss import DIRECTIONS, taught
    from llmworks.train.finetune.trainable import open_tuned
    from llmworks.train.loop.losses import whole_logits

    guide = open_tuned(teacher.path)
    if guide.free != tuned.free:
        raise ModelError(
            f"{teacher.name} and the student are of architectures that read batches in two ways; set source to text"
        )
    for model in (guide.network, tuned.network):
        if whole_logits(model):
            raise ModelError(
                "a model whose logits are shaped after its head (soft caps, scales) teaches by its text only; set"
                " source to text"
            )
    if guide.network.config.vocab_size != tuned.network.config.vocab_size:
        raise ModelError(
            f"the teacher has {guide.network.config.vocab_size:,} rows of logits, the student"
            f" {tuned.network.config.vocab_size:,}; set source to text"
        )
    ctx.progress.say(f"{teacher.name} teaches by its chances of {sum(e.labels for e in material.examples):,} tokens")
    guide.network.to(next(tuned.network.parameters()).device)
    return taught(
        guide.network.requires_grad_(False).eval(),
        beta=DIRECTIONS.get(config.divergence, 0.5),
        temperature=config.temperature,
        mix=config.ce_weight,
    )


def written(config: DistillConfig, teacher: Model | Adapter, data: Dataset, ctx: Context) -> Dataset:
    """The conversations of `data` with the teacher's answer at their end; those that it does not finish, or leaves
    empty, are left out.

    DataError when none is left.
    """
    rows = [
        row
        for row in training_rows(data)
        if "messages" in row and row["messages"][-1]["role"] == "assistant" and len(row["messages"]) > 1
    ]
    if not rows:
        raise DataError(f"{data.name}: has no conversations that a teacher could answer")
    sampling = Sampling(
        max_tokens=config.max_new_tokens,
        temperature=config.generation_temperature,
        seed=ctx.seed if config.generation_temperature else None,
    )
    requests = {str(row["id"]): Request(flat_messages(row)[:-1], sampling=sampling) for row in rows}
    with (
        Journal(ctx.scratch / "answers.jsonl", lambda: ctx.open_engine(teacher)) as journal,
        ctx.progress.bar("the teacher answers", len(requests), "answers") as bar,
    ):
        replies = journal.ask(requests, bar)
    made: list[Row] = []
    lost: list[tuple[str, str]] = []
    for row in rows:
        reply = replies[str(row["id"])]
        if isinstance(reply, Record) and reply.finish == "stop" and reply.text.strip():
            made.append(
                {**row, "messages": [*row["messages"][:-1], {"role": "assistant", "content": reply.text.strip()}]}
            )
        else:
            why = (
                "failed"
                if not isinstance(reply, Record)
                else "is empty"
                if not reply.text.strip()
                else f"is not finished within {config.max_new_tokens} tokens"
            )
            lost.append((str(row["id"]), f"the teacher's answer {why}"))
    ctx.progress.say(f"{len(made)} of {len(rows)} answers are whole and not empty")
    if not made:
        raise DataError(
            f"{teacher.name} finished none of {len(rows)} answers within {config.max_new_tokens} tokens; set"
            " max_new_tokens higher"
        )
    write_chat(ctx.scratch / "written", made)
    return Dataset(
        ctx.scratch / "written", name=f"{data.name} by {teacher.name}", about={"schema": "chat", "lost": lost}
    )
