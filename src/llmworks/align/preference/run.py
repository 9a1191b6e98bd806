"""What all alignments by given answers share: their fields, what they read, and the run.

Which loss the answers have is each method's own. Knows no tensor.

The policy is a model, or a model with an adapter that it goes on from. The reference is the policy as it begins, unless
another model is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmworks.align.preference.examples import Answered, apart, kept, label_of, pair_of, singles_of
from llmworks.core.artifact import Adapter, Dataset, Model, require_base
from llmworks.core.context import Context
from llmworks.core.errors import DataError, UserError
from llmworks.data.store.rows import Row, read_chat, read_preference, schema_of
from llmworks.tokenize.chat.named import use_template
from llmworks.train.finetune.config import TuneConfig, WriterConfig
from llmworks.train.finetune.method import Material, Way
from llmworks.train.finetune.run import check_golden, context_of, in_memory, require_directory, require_held_out, tune

if TYPE_CHECKING:
    from llmworks.align.preference.objective import Given
    from llmworks.train.finetune.trainable import Tuned

HELD = " (held out)"  # behind the ids of held-out examples, which may be those of others


class GivenConfig(TuneConfig):
    """What is trained by given answers."""

    rates: ClassVar[Mapping[str, float]] = {"lora": 1e-4, "full": 5e-6}

    num_train_epochs: float = Field(1.0, gt=0, description="passes over the data; may be a fraction")
    batch_size: int = Field(8, gt=0, description="pairs, or single answers, per part of a step")
    overlong: Literal["drop", "truncate", "error"] = Field(
        "drop",
        description=(
            "rows of which prompt and answer are longer than max_tokens: set aside and counted; cut at the end; or the"
            " training does not begin"
        ),
    )

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        if self.lora.lora_dropout:
            raise ValueError(
                "lora.dropout: chances of two models are compared here, and dropout would be a difference; leave it 0"
            )
        return self


class PreferenceConfig(GivenConfig, WriterConfig):
    """Fields of alignments by given answers, of a model that writes."""


@dataclass(frozen=True)
class Policy:
    """Who is aligned: a model, and the adapter that it goes on from, if there is one."""

    model: Model
    adapter: Adapter | None = None

    @property
    def name(self) -> str:
        """As it is called in messages."""
        return self.model.name if self.adapter is None else self.adapter.name

    def open(self, config: TuneConfig, stage: str) -> tuple[Any, list[int]]:
        """Its tokenizer, with the template of the configuration, and stop tokens.

        Errors: ModelError, ArtifactError, GoldenMismatch, UserError.
        """
        from llmworks.tokenize.load import load_tokenizer, stop_ids

        require_directory(self.model)
        if self.adapter is not None:
            require_base(self.adapter, self.model)
            if config.method != "lora":
                raise UserError(
                    "an adapter is gone on with by method lora; merge it first (llmworks merge adapter) to train all"
                    " weights"
                )
            if config.lora != type(config.lora)():
                raise UserError(
                    "config.lora: the policy goes on with the adapter it is given, whose shape is not changed; leave"
                    " lora out"
                )
        source = (
            self.adapter.path
            if self.adapter is not None and (self.adapter.path / "tokenizer.json").exists()
            else self.model.path
        )
        tokenizer = load_tokenizer(source)
        stops = list(stop_ids(self.model.path, tokenizer))
        use_template(tokenizer, config.chat_template)
        check_golden(config, self.adapter if self.adapter is not None else self.model, tokenizer, stops, stage)
        return tokenizer, stops


def rows_of(data: Dataset, *, singles: bool) -> list[Row]:
    """Preference pairs, or, for who learns from single answers, conversations too. DataError for anything else."""
    kind = schema_of(data)
    if kind == "preference":
        return read_preference(data)
    if kind == "chat" and singles:
        return read_chat(data)
    raise DataError(
        f"{data.name}: holds no preference pairs{' and no conversations with a `label`' if singles else ''}; make them"
        " with synthesize.pairs, or of rows of prompt, chosen and rejected with data.chat"
    )


def read(
    config: PreferenceConfig,
    policy: Policy,
    data: Dataset,
    held_out: Dataset | None,
    stage: str,
    *,
    singles: bool = False,
) -> Material:
    """Rows as the model is given them. Errors: as `Policy.open`; DataError where no row can be used."""
    tokenizer, stops = policy.open(config, stage)
    most = min(config.max_length, context_of(policy.model))
    examples, lost = examples_of(config, tokenizer, rows_of(data, singles=singles), data.name, most, singles=singles)
    unseen: list[Answered] = []
    questions: list[Row] = []
    if held_out is not None:
        rows = rows_of(held_out, singles=singles)
        unseen = apart(
            examples_of(config, tokenizer, rows[: config.eval_samples], held_out.name, most, singles=singles)[0], HELD
        )
        questions = [
            {**row, "messages": row["messages"] if "messages" in row else [*row["prompt"], *row["chosen"]]}
            for row in [row for row in rows if not singles or label_of(row) is not False][: config.num_sample_prompts]
        ]
    return Material(tokenizer, stops, examples, lost, unseen, questions)


def examples_of(
    config: GivenConfig, tokenizer: Any, rows: Sequence[Row], name: str, most: int, *, singles: bool
) -> tuple[list[Answered], list[tuple[str, str]]]:
    """(examples, rows set aside with the reason).

    DataError when none is left, or one is too long where that is refused.
    """
    made: list[tuple[str, Answered | str]] = []
    for row in rows:
        some: Sequence[Answered | str] = (
            singles_of(tokenizer, row, most, cut=config.overlong == "truncate")
            if singles
            else [pair_of(tokenizer, row, most, cut=config.overlong == "truncate")]
        )
        for one in some:
            if config.overlong == "error" and isinstance(one, str) and "longer than max_tokens" in one:
                raise DataError(
                    f"{name}: row {row['id']!r}: {one}; set max_tokens higher, or longer to set-aside or cut"
                )
            made.append((str(row["id"]), one))
    return kept(made, name)


def prefer(
    config: PreferenceConfig,
    policy: Policy,
    data: Dataset,
    ctx: Context,
    held_out: Dataset | None,
    way_of: Callable[[Given], Way],
    stage: str,
    *,
    reference: Model | None = None,
    singles: bool = False,
) -> Adapter | Model:
    """Train by given answers.

    `way_of` makes the loss, of what is known when the policy is there. Errors: as `read`; TrainingError when the loss
    stops being a number.
    """
    from llmworks.align.report import describe
    from llmworks.train.distributed import world

    check_run(config, held_out=held_out is not None)
    material = read(config, policy, data, held_out, stage, singles=singles)
    if reference is not None:
        same_vocabulary(reference, policy)
    weighed = sum(example.labels for example in material.examples)
    shared_prompts(material.examples, material.unseen, lambda example: example.prompt, ctx.progress.say)
    ctx.progress.say(
        f"{len(material.examples)} {'answers' if singles else 'pairs'}, {weighed:,} tokens of answers"
        + (f"; {len(material.set_aside)} rows set aside" if material.set_aside else "")
    )
    with world.opened(config.spread) as here:
        from llmworks.align.preference.objective import Given

        def way(tuned: Tuned, _: Material) -> Way:
            return way_of(Given(config, tuned, material, ctx, here.device, reference))

        try:
            return tune(config, policy.model, ctx, here, material, way, describe, adapter=policy.adapter)
        except RuntimeError as error:
            raise (in_memory(error) or error) from error


def check_run(config: TuneConfig, *, held_out: bool) -> None:
    """What every alignment needs before it opens a model. `held_out`: whether rows for it are given. UserError."""
    from llmworks.train.distributed import world

    require_held_out(config, given=held_out)
    if world.processes() > 1:
        raise UserError("an alignment runs in one process; start one")


def shared_prompts(
    learned: Sequence[Any], unseen: Sequence[Any], prompt_of: Callable[[Any], Any], say: Callable[[str], None]
) -> None:
    """Say how many held-out prompts are among those that are learned from: what is seen there is no measure then."""
    known = {prompt_of(one) for one in learned}
    shared = sum(prompt_of(one) in known for one in unseen)
    if shared:
        say(
            f"warning: {shared} of {len(unseen)} held-out prompts are learned from, too; what they show says nothing of"
            " others"
        )


def same_vocabulary(reference: Model, policy: Policy) -> None:
    """Whether a reference's chances are of the policy's tokens.

    Errors: ModelError for no directory, UserError for another vocabulary.
    """
    from llmworks.tokenize.load import load_tokenizer

    require_directory(reference)
    one, other = (load_tokenizer(model.path).get_vocab() for model in (reference, policy.model))
    if one != other:
        raise UserError(
            f"the reference {reference.name} has another vocabulary than {policy.name} ({len(one):,} and {len(other):,}"
            " tokens), so that its chances are of other tokens; leave the input `reference` out, and the policy's own"
            " beginning is it"
        )
