"""Stage `train.sft`: supervised fine-tuning on conversations, completions or texts: an adapter beside frozen weights,
or all weights, or some.

Only answers are learned.
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
}  # where none is given: an adapter's would break all weights, and move a soft prompt too slowly


class SoftConfig(Config):
    """A soft prompt."""

    num_virtual_tokens: int = Field(16, gt=0, le=1024, description="vectors that stand before every text")
    prompt_tuning_init_text: str = Field(
        "", description="prompt: what they begin as, cut or repeated to their number; empty: tokens that are drawn"
    )


class SftConfig(WriterConfig):
    """What is trained, on how much, and what the tuned model's template can do."""

    rates: ClassVar[Mapping[str, float]] = RATES

    method: Literal["lora", "full", "prompt_tuning", "prefix_tuning"] = Field(
        "lora",
        description=(
            "lora: an adapter, all else is frozen; full: the weights themselves, those that `freeze` leaves; prompt,"
            " prefix: vectors before every text (peft), a few thousand numbers"
        ),
    )  # type: ignore[assignment]
    soft_prompt: SoftConfig = Field(SoftConfig(), description="the vectors of prompt and prefix")
    gradient_accumulation_steps: int = Field(
        1, gt=0, description="parts per step; the step's loss is normalised over all their label tokens"
    )
    train_on: Literal["all", "last_assistant"] = Field("all", description="which answers of a conversation are learned")
    overlong: Literal["drop", "truncate", "error"] = Field(
        "drop",
        description=(
            "rows longer than max_tokens: set aside and counted; cut at the end, so that a cut answer teaches no end;"
            " or the training does not begin"
        ),
    )
    neftune_noise_alpha: float = Field(
        0.0, ge=0, description="noise on embedded tokens while training, 5 is usual; 0: none (arXiv:2310.05914)"
    )
    optimizer: OptimizerConfig = Field(
        OptimizerConfig(),
        description=(
            "learning rate schedule and optimizer; the learning rate, if not given, is 0.001, of method full"
            f" {RATES['full']:g}, prompt_tuning {RATES['prompt_tuning']:g}, prefix_tuning {RATES['prefix_tuning']:g}"
        ),
    )
    parallel: DataParallel = Field(
        DataParallel(),
        description=(
            "what processes share, where several are started (--nproc, torchrun); a step is the same whatever their"
            " number"
        ),
    )
    eval_steps: int = Field(
        0, ge=0, description="steps between two looks at how well held-out answers are predicted; 0: at the end only"
    )
    metric_for_best_model: Literal["", "eval_loss", "accuracy"] = Field(
        "",
        description=(
            "which look's weights are saved: the one with the lowest loss (held_out), or with the most tokens foreseen"
            " (accuracy); empty: the last step's"
        ),
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.metric_for_best_model and self.parallel.data_parallel == "fsdp":
            raise ValueError("best keeps whole weights; set parallel.data to replicate")
        if self.lora.load_in_4bit and self.parallel.data_parallel == "fsdp":
            raise ValueError("lora.base nf4 cannot be sharded; set parallel.data to replicate")
        if self.method not in ("prompt_tuning", "prefix_tuning") and self.soft_prompt != SoftConfig():
            raise ValueError(f"soft is for methods prompt and prefix, not for {self.method}")
        if self.method == "prefix_tuning" and self.soft_prompt.prompt_tuning_init_text:
            raise ValueError("soft.text is what a prompt begins as; a prefix begins at random")
        if self.method in ("prompt_tuning", "prefix_tuning") and (
            self.neftune_noise_alpha or self.gradient_checkpointing or self.parallel.data_parallel == "fsdp"
        ):
            raise ValueError(f"method {self.method} has no neftune, no recompute, and is not sharded")
        return self

    @property
    def spread(self) -> DataParallel:
        """How the training is spread over processes."""
        return self.parallel


def sft(
    config: SftConfig, model: Model, data: Dataset, ctx: Context, eval_data: Dataset | None = None
) -> Adapter | Model:
    """Train on the rows of `data`: conversations (data.chat), documents, or rows of `prompt` and `completion`.

    Errors: DataError when no row can be trained on; GoldenMismatch when the template changes and golden is "keep";
    TrainingError when the loss stops being a number.
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
    """Rows as the model is given them.

    Errors: DataError, GoldenMismatch, and ModelError for a template that would damage them.
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
    ]  # those that a teacher did not answer
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
    """`sft` in one of the processes. `loss_of`: makes the loss of a batch, where it is not that of next tokens."""
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
            lambda found: f"held-out answers {found['eval_loss']:.4f} nats a token, {found['accuracy']:.1%} foreseen",
        )

    return tuned_by(config, model, ctx, world, material, way, write_report)


def make_examples(
    tokenizer: Any, rows: Sequence[Row], config: SftConfig, name: str = "the data", most: int = 1 << 30
) -> tuple[list[Example], list[tuple[str, str]]]:
    """(examples, (id, reason) of the rows set aside).

    `most`: tokens that the model reads. DataError when none is left, or for one that is too long where that is refused.
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
            if config.overlong == "error" and "longer than max_tokens" in made:
                raise DataError(
                    f"{name}: row {row['id']!r}: {made}; set max_tokens higher, or longer to set-aside or cut"
                )
            set_aside.append((str(row["id"]), made))
        else:
            examples.append(made)
    if not examples:
        raise DataError(
            f"{name}: none of {len(rows)} rows can be learned; the first: {set_aside[0][1] if set_aside else 'no rows'}"
        )
    return examples, set_aside


def say(ctx: Context, config: SftConfig, material: Material) -> None:
    """What is about to be learned."""
    examples, set_aside = material.examples, material.set_aside
    tokens, learned = sum(len(e.ids) for e in examples), sum(e.labels for e in examples)
    cut = sum(len(e.ids) == config.max_length for e in examples) if config.overlong == "truncate" else 0
    ctx.progress.say(
        f"{len(examples)} rows, {tokens:,} tokens, {learned:,} of them learned"
        + (f"; {len(set_aside)} set aside" if set_aside else "")
        + (f"; up to {cut} cut" if cut else "")
    )
