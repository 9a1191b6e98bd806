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
from llmworks.data.conversations.training_rows import read_training_rows, warn_unread_fields
from llmworks.data.doctor import get_template_uses, require_template
from llmworks.data.store.rows import Row
from llmworks.tokenize.chat.named_templates import set_template
from llmworks.train.distributed.config import DataParallelConfig
from llmworks.train.finetune.config import GenerativeFinetuneConfig
from llmworks.train.finetune.method import TrainingData, TrainMethod
from llmworks.train.finetune.run import (
    check_golden,
    explain_out_of_memory,
    get_context_length,
    require_directory,
    require_eval_data,
)
from llmworks.train.finetune.run import run_training as tuned_by
from llmworks.train.loop.schedule import OptimizerConfig

if TYPE_CHECKING:
    from llmworks.train.distributed.world import World
    from llmworks.train.finetune.examples import Example
    from llmworks.train.finetune.trainable import TrainableModel

DEFAULT_LEARNING_RATES = {
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
            "prompt_tuning: text that initializes the virtual tokens, cut or repeated to their number; empty ="
            " sampled tokens"
        ),
    )


class SftConfig(GenerativeFinetuneConfig):
    """What is trained, and on how much data."""

    default_learning_rates: ClassVar[Mapping[str, float]] = DEFAULT_LEARNING_RATES

    method: Literal["lora", "full", "prompt_tuning", "prefix_tuning"] = Field(
        "lora",
        description=(
            "lora: train an adapter on frozen weights; full: train the weights themselves, except those that"
            " `freeze` matches; prompt_tuning, prefix_tuning (peft), a few thousand parameters"
        ),
    )  # type: ignore[assignment]
    soft_prompt: SoftConfig = Field(
        SoftConfig(), description="soft prompt settings of methods prompt_tuning and prefix_tuning"
    )
    gradient_accumulation_steps: int = Field(
        1, gt=0, description="micro-batches per optimizer step; the loss is normalized over all their label tokens"
    )
    train_on: Literal["all", "last_assistant"] = Field(
        "all",
        description=(
            "assistant turns of a conversation whose tokens are trained on (assistant-only loss): all, or the last"
        ),
    )
    overlong: Literal["drop", "truncate", "error"] = Field(
        "drop",
        description=(
            "rows longer than max_length. drop: drop and count them; truncate: truncate them at the end, so that"
            " they lack the end token; error: do not start training"
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
            f" full {DEFAULT_LEARNING_RATES['full']:g}, prompt_tuning {DEFAULT_LEARNING_RATES['prompt_tuning']:g},"
            " prefix_tuning"
            f" {DEFAULT_LEARNING_RATES['prefix_tuning']:g}"
        ),
    )
    parallel: DataParallelConfig = Field(
        DataParallelConfig(),
        description=(
            "parallelism across processes when several are started (--nproc, torchrun); a step is the same for any"
            " number of them"
        ),
    )
    eval_steps: int = Field(0, ge=0, description="steps between evaluations on the eval set; 0 = only at the end")
    metric_for_best_model: Literal["", "eval_loss", "accuracy"] = Field(
        "",
        description=(
            "save the weights of the evaluation with the lowest loss (eval_loss) or the highest token accuracy"
            " (accuracy); empty = the weights of the last step"
        ),
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.metric_for_best_model and self.parallel.data_parallel == "fsdp":
            raise ValueError("metric_for_best_model needs full weights; set parallel.data_parallel to ddp")
        if self.lora.load_in_4bit and self.parallel.data_parallel == "fsdp":
            raise ValueError("lora.load_in_4bit cannot be sharded; set parallel.data_parallel to ddp")
        if self.method not in ("prompt_tuning", "prefix_tuning") and self.soft_prompt != SoftConfig():
            raise ValueError(f"soft_prompt is for methods prompt_tuning and prefix_tuning, not for {self.method}")
        if self.method == "prefix_tuning" and self.soft_prompt.prompt_tuning_init_text:
            raise ValueError(
                "soft_prompt.prompt_tuning_init_text is for method prompt_tuning; a prefix is initialized randomly"
            )
        if self.method in ("prompt_tuning", "prefix_tuning") and (
            self.neftune_noise_alpha or self.gradient_checkpointing or self.parallel.data_parallel == "fsdp"
        ):
            raise ValueError(
                f"method {self.method} does not support neftune_noise_alpha, gradient_checkpointing, or sharding"
            )
        return self

    @property
    def parallelism(self) -> DataParallelConfig:
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
    require_eval_data(config, given=eval_data is not None)
    with world.init_world(config.parallelism) as here:
        try:
            return run_sft(config, model, data, ctx, eval_data, here)
        except RuntimeError as error:
            raise (explain_out_of_memory(error) or error) from error


def tokenize_data(
    config: SftConfig, model: Model, data: Dataset, held_out: Dataset | None, log: Callable[[str], None] | None = None
) -> TrainingData:
    """Tokenize the rows for training. `log`: is told about fields of turns that the template does not read.

    Errors: DataError, GoldenMismatch, and ModelError for a chat template that would corrupt them.
    """
    from llmworks.tokenize.load import get_stop_ids, load_tokenizer
    from llmworks.train.finetune.generation_check import select_prompt_rows

    tokenizer = load_tokenizer(model.path)
    stop_token_ids = get_stop_ids(model.path, tokenizer)
    set_template(tokenizer, config.chat_template, config.control_tokens)
    check_golden(config, model, tokenizer, stop_token_ids)
    rows = read_training_rows(data)
    if "messages" in rows[0]:
        require_template(model.name, tokenizer, stop_token_ids, get_template_uses(rows))
    if log is not None:
        warn_unread_fields(tokenizer, rows, log)
    max_context = get_context_length(model) - (
        config.soft_prompt.num_virtual_tokens if config.method in ("prompt_tuning", "prefix_tuning") else 0
    )
    examples, dropped = make_examples(tokenizer, rows, config, data.name, max_context)
    dropped = [
        *((str(id), str(why)) for id, why in data.about.get("lost", [])),
        *dropped,
    ]  # rows without a teacher's completion
    eval_examples = (
        make_examples(
            tokenizer, read_training_rows(held_out)[: config.eval_samples], config, held_out.name, max_context
        )[0]
        if held_out is not None
        else []
    )
    prompt_rows = select_prompt_rows(held_out)[: config.num_sample_prompts] if held_out is not None else []
    return TrainingData(tokenizer, stop_token_ids, examples, dropped, eval_examples, prompt_rows)


def run_sft(
    config: SftConfig,
    model: Model,
    data: Dataset,
    ctx: Context,
    held_out: Dataset | None,
    world: World,
    create_loss: Callable[[TrainableModel, TrainingData], Any] | None = None,
) -> Adapter | Model:
    """Run `sft` in one of the processes. `create_loss`: makes the batch loss, if it is not the next-token loss."""
    from llmworks.train.finetune.examples import collate, collate_padding_free
    from llmworks.train.finetune.generation_check import evaluate_examples, write_report
    from llmworks.train.loop.losses import NeftuneNoise, next_token_loss
    from llmworks.train.loop.packed_steps import packed_loss

    training_data = tokenize_data(config, model, data, held_out, ctx.progress.log)
    log_data_size(ctx, config, training_data)

    def create_method(tuned: TrainableModel, material: TrainingData) -> TrainMethod:
        loss: Any = (
            create_loss(tuned, material)
            if create_loss is not None
            else packed_loss
            if tuned.padding_free
            else next_token_loss
        )
        if config.neftune_noise_alpha:
            loss = NeftuneNoise(tuned.network, config.neftune_noise_alpha).wrap_loss(loss)
        return TrainMethod(
            loss,
            lambda some, _: (
                collate_padding_free(some, world.device) if tuned.padding_free else collate(some).to(world.device)
            ),
            lambda network, unseen: evaluate_examples(
                network, unseen, padding_free=tuned.padding_free, batch_size=config.batch_size, device=world.device
            ),
            lambda found: f"eval loss {found['eval_loss']:.4f} nats per token, token accuracy {found['accuracy']:.1%}",
        )

    return tuned_by(config, model, ctx, world, training_data, create_method, write_report)


def make_examples(
    tokenizer: Any, rows: Sequence[Row], config: SftConfig, name: str = "the data", max_context: int = 1 << 30
) -> tuple[list[Example], list[tuple[str, str]]]:
    """Tokenize rows; return (examples, (id, reason) of the dropped rows).

    `max_context`: the model's context length. DataError when no row is left, or for one that is too long where that is
    refused.
    """
    from llmworks.train.finetune import examples as tokenized

    examples: list[Example] = []
    dropped: list[tuple[str, str]] = []
    for row in rows:
        made = tokenized.make_examples(
            tokenizer,
            row,
            min(config.max_length, max_context),
            last=config.train_on == "last_assistant",
            truncate=config.overlong == "truncate",
        )
        if isinstance(made, str):
            if config.overlong == "error" and "longer than max_length" in made:
                raise DataError(
                    f"{name}: row {row['id']!r}: {made}; raise max_length, or set overlong to drop or truncate"
                )
            dropped.append((str(row["id"]), made))
        else:
            examples += made
    if not examples:
        raise DataError(
            f"{name}: none of {len(rows)} rows can be trained on; the first: {dropped[0][1] if dropped else 'no rows'}"
        )
    return examples, dropped


def log_data_size(ctx: Context, config: SftConfig, training_data: TrainingData) -> None:
    """Log the numbers of rows, tokens and label tokens."""
    examples, dropped = training_data.examples, training_data.dropped
    tokens, label_tokens = sum(len(e.ids) for e in examples), sum(e.labels for e in examples)
    cut = sum(len(e.ids) == config.max_length for e in examples) if config.overlong == "truncate" else 0
    if parts := sum(example.part > 1 for example in examples):
        ctx.progress.log(
            f"the chat template rewrites earlier turns: each answer is trained on after its own prompt, {parts:,} more"
            " examples than conversations"
        )
    ctx.progress.log(
        f"{len(examples)} rows, {tokens:,} tokens, {label_tokens:,} label tokens"
        + (f"; {len(dropped)} dropped" if dropped else "")
        + (f"; up to {cut} truncated" if cut else "")
    )
