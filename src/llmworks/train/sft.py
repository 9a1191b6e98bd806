"""Stage `train.sft`: supervised fine-tuning on conversations, completions or documents.

Trains an adapter on frozen weights, a soft prompt, or all or some of the weights. Only assistant turns and completions
are trained on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Adapter, Config, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError
from llmworks.data.conversations.training_rows import training_rows
from llmworks.data.doctor import require_template, uses_of
from llmworks.data.store.rows import Row
from llmworks.tokenize.chat.named import use_template
from llmworks.train.distributed.config import DataParallel
from llmworks.train.finetune.config import WriterConfig
from llmworks.train.finetune.method import Material, Way
from llmworks.train.finetune.run import check_golden, context_of, in_memory, require_directory, require_held_out
from llmworks.train.finetune.run import tune as tuned_by
from llmworks.train.loop.schedule import OptimizerConfig

if TYPE_CHECKING:
    from llmworks.train.distributed.world import World
    from llmworks.train.finetune.examples import Example
    from llmworks.train.finetune.trainable import Tuned

RATES = {
    "full": 5e-5,
    "prompt_tuning": 0.03,
    "prefix_tuning": 0.01,
}  # default learning rates: the one for adapters is too large for all weights and too small for a soft prompt


class SoftConfig(Config):
    """A soft prompt."""

    num_virtual_tokens: int = Field(
        16, gt=0, le=1024, description="number of virtual tokens prepended to every sequence"
    )
    prompt_tuning_init_text: str = Field(
        "",
        description=(
            "prompt: text that initializes the virtual tokens, cut or repeated to their number; empty = sampled tokens"
        ),
    )


class SftConfig(WriterConfig):
    """What is trained, and on how much data."""

    rates: ClassVar[Mapping[str, float]] = RATES

    method: Literal["lora", "full", "prompt_tuning", "prefix_tuning"] = Field(
        "lora",
        description=(
            "lora: train an adapter on frozen weights; full: train the weights themselves, except those that"
            " `freeze` matches; prompt, prefix: prompt tuning or prefix tuning (peft), a few thousand parameters"
        ),
    )  # type: ignore[assignment]
    soft_prompt: SoftConfig = Field(SoftConfig(), description="soft prompt settings of methods prompt and prefix")
    gradient_accumulation_steps: int = Field(
        1, gt=0, description="micro-batches per optimizer step; the loss is normalized over all their label tokens"
    )
    train_on: Literal["all", "last_assistant"] = Field(
        "all", description="which assistant turns of a conversation are trained on: all, or only the last"
    )
    overlong: Literal["drop", "truncate", "error"] = Field(
        "drop",
        description=(
            "rows longer than max_length: set-aside: drop and count them; cut: truncate them at the end, so that"
            " they lack the end token; refuse: do not start training"
        ),
    )
    neftune_noise_alpha: float = Field(
        0.0,
        ge=0,
        description="NEFTune: noise on input embeddings during training; 5 is usual; 0 = off (arXiv:2310.05914)",
    )
    optimizer: OptimizerConfig = Field(
        OptimizerConfig(),
        description=(
            "optimizer and learning rate schedule; the default learning rate is 0.001, for method"
            f" full {RATES['full']:g}, prompt {RATES['prompt_tuning']:g}, prefix {RATES['prefix_tuning']:g}"
        ),
    )
    parallel: DataParallel = Field(
        DataParallel(),
        description=(
            "parallelism across processes when several are started (--nproc, torchrun); a step is the same for any"
            " number of them"
        ),
    )
    eval_steps: int = Field(0, ge=0, description="steps between evaluations on the eval set; 0 = only at the end")
    metric_for_best_model: Literal["", "eval_loss", "accuracy"] = Field(
        "",
        description=(
            "save the weights of the evaluation with the lowest eval loss (held_out) or the highest token accuracy"
            " (accuracy); empty = the weights of the last step"
        ),
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.metric_for_best_model and self.parallel.data_parallel == "fsdp":
            raise ValueError("metric_for_best_model needs full weights; set parallel.data_parallel to replicate")
        if self.lora.load_in_4bit and self.parallel.data_parallel == "fsdp":
            raise ValueError("lora.load_in_4bit nf4 cannot be sharded; set parallel.data_parallel to replicate")
        if self.method not in ("prompt_tuning", "prefix_tuning") and self.soft_prompt != SoftConfig():
            raise ValueError(f"soft_prompt is for methods prompt and prefix, not for {self.method}")
        if self.method == "prefix_tuning" and self.soft_prompt.prompt_tuning_init_text:
            raise ValueError(
                "soft_prompt.prompt_tuning_init_text is for method prompt; a prefix is initialized randomly"
            )
        if self.method in ("prompt_tuning", "prefix_tuning") and (
            self.neftune_noise_alpha or self.gradient_checkpointing or self.parallel.data_parallel == "fsdp"
        ):
            raise ValueError(
                f"method {self.method} does not support neftune_noise_alpha, gradient_checkpointing, or sharding"
            )
        return self

    @property
    def spread(self) -> DataParallel:
        """How training is parallelized over processes."""
        return self.parallel


def sft(
    config: SftConfig, model: Model, data: Dataset, ctx: Context, eval_data: Dataset | None = None
) -> Adapter | Model:
    """Fine-tune on the rows of `data`: conversations (data.chat), documents, or rows of `prompt` and `completion`.

    Errors: DataError when no row can be trained on; GoldenMismatch when the template changes and golden is "keep";
    TrainingError when the loss is not finite.
    """
    from llmworks.train.distributed import world

    require_directory(model)
    require_held_out(config, given=eval_data is not None)
    with world.opened(config.spread) as here:
        try:
            return tune(config, model, data, ctx, eval_data, here)
        except RuntimeError as error:
            raise (in_memory(error) or error) from error


def read(config: SftConfig, model: Model, data: Dataset, held_out: Dataset | None) -> Material:
    """Tokenize the rows for training.

    Errors: DataError, GoldenMismatch, and ModelError for a chat template that would corrupt them.
    """
    from llmworks.tokenize.load import load_tokenizer, stop_ids
    from llmworks.train.finetune.generation_check import answerable

    tokenizer = load_tokenizer(model.path)
    stops = stop_ids(model.path, tokenizer)
    use_template(tokenizer, config.chat_template)
    check_golden(config, model, tokenizer, stops)
    rows = training_rows(data)
    if "messages" in rows[0]:
        require_template(model.name, tokenizer, stops, uses_of(rows))
    most = context_of(model) - (
        config.soft_prompt.num_virtual_tokens if config.method in ("prompt_tuning", "prefix_tuning") else 0
    )
    examples, set_aside = make_examples(tokenizer, rows, config, data.name, most)
    set_aside = [
        *((str(id), str(why)) for id, why in data.about.get("lost", [])),
        *set_aside,
    ]  # rows without a teacher's completion
    unseen = (
        make_examples(tokenizer, training_rows(held_out)[: config.eval_samples], config, held_out.name, most)[0]
        if held_out is not None
        else []
    )
    questions = answerable(held_out)[: config.num_sample_prompts] if held_out is not None else []
    return Material(tokenizer, stops, examples, set_aside, unseen, questions)


def tune(
    config: SftConfig,
    model: Model,
    data: Dataset,
    ctx: Context,
    held_out: Dataset | None,
    world: World,
    loss_of: Callable[[Tuned, Material], Any] | None = None,
) -> Adapter | Model:
    """Run `sft` in one of the processes. `create_loss`: makes the batch loss, if it is not the next-token loss."""
    from llmworks.train.finetune.examples import collate, joined
    from llmworks.train.finetune.generation_check import predicted, write_report
    from llmworks.train.loop.losses import Noise, next_token_loss
    from llmworks.train.loop.packed import packed_loss

    material = read(config, model, data, held_out)
    say(ctx, config, material)

    def way(tuned: Tuned, material: Material) -> Way:
        loss: Any = loss_of(tuned, material) if loss_of is not None else packed_loss if tuned.free else next_token_loss
        if config.neftune_noise_alpha:
            loss = Noise(tuned.network, config.neftune_noise_alpha).around(loss)
        return Way(
            loss,
            lambda some, _: joined(some, world.device) if tuned.free else collate(some).to(world.device),
            lambda network, unseen: predicted(
                network, unseen, free=tuned.free, size=config.batch_size, device=world.device
            ),
            lambda found: f"eval loss {found['eval_loss']:.4f} nats per token, token accuracy {found['accuracy']:.1%}",
        )

    return tuned_by(config, model, ctx, world, material, way, write_report)


def make_examples(
    tokenizer: Any, rows: Sequence[Row], config: SftConfig, name: str = "the data", most: int = 1 << 30
) -> tuple[list[Example], list[tuple[str, str]]]:
    """Tokenize rows; return (examples, (id, reason) of the dropped rows).

    `max_context`: the model's context length. DataError when no row is left, or for one that is too long where that is
    refused.
    """
    from llmworks.train.finetune.examples import make_example

    examples: list[Example] = []
    set_aside: list[tuple[str, str]] = []
    for row in rows:
        made = make_example(
            tokenizer,
            row,
            min(config.max_length, most),
            last=config.train_on == "last_assistant",
            cut=config.overlong == "truncate",
        )
        if isinstance(made, str):
            if config.overlong == "error" and "longer than max_length" in made:
                raise DataError(
                    f"{name}: row {row['id']!r}: {made}; raise max_length, or set overlong to set-aside or cut"
                )
            set_aside.append((str(row["id"]), made))
        else:
            examples.append(made)
    if not examples:
        raise DataError(
            f"{name}: none of {len(rows)} rows can be trained on; the"
            f" first: {set_aside[0][1] if set_aside else 'no rows'}"
        )
    return examples, set_aside


def say(ctx: Context, config: SftConfig, material: Material) -> None:
    """Log the numbers of rows, tokens and label tokens."""
    examples, set_aside = material.examples, material.set_aside
    tokens, learned = sum(len(e.ids) for e in examples), sum(e.labels for e in examples)
    cut = sum(len(e.ids) == config.max_length for e in examples) if config.overlong == "truncate" else 0
    ctx.progress.say(
        f"{len(examples)} rows, {tokens:,} tokens, {learned:,} label tokens"
        + (f"; {len(set_aside)} dropped" if set_aside else "")
        + (f"; up to {cut} truncated" if cut else "")
    )
