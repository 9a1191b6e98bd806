"""Shared parts of offline alignment methods: config fields, tokenization of rows, and the training run.

The policy is a model, or a model with an adapter to continue. The reference is the initial policy, unless another
model is given. The loss is each method's own. Torch-free.
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

HELD = " (held out)"  # id suffix of held-out examples, whose ids may equal those of training examples


class GivenConfig(TuneConfig):
    """Training fields of alignment on given completions."""

    rates: ClassVar[Mapping[str, float]] = {"lora": 1e-4, "full": 5e-6}

    num_train_epochs: float = Field(1.0, gt=0, description="passes over the data; may be a fraction")
    batch_size: int = Field(8, gt=0, description="pairs, or single completions, per micro-batch")
    overlong: Literal["drop", "truncate", "error"] = Field(
        "drop",
        description=(
            "rows whose prompt and completion exceed max_length: set-aside: rejected and counted; cut: truncated"
            " at the end; refuse: the run stops before training"
        ),
    )

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        if self.lora.lora_dropout:
            raise ValueError(
                "lora.lora_dropout: dropout would change the log-probabilities of the two models that are"
                " compared; leave it 0"
            )
        return self


class PreferenceConfig(GivenConfig, WriterConfig):
    """Fields of offline alignment of a model that generates text."""


@dataclass(frozen=True)
class Policy:
    """The model that is aligned, and the adapter that training continues, if there is one."""

    model: Model
    adapter: Adapter | None = None

    @property
    def name(self) -> str:
        """The name in messages."""
        return self.model.name if self.adapter is None else self.adapter.name

    def open(self, config: TuneConfig, stage: str) -> tuple[Any, list[int]]:
        """Return the tokenizer, with the configured chat template, and the stop token ids.

        Errors: ModelError, ArtifactError, GoldenMismatch, UserError.
        """
        from llmworks.tokenize.load import load_tokenizer, stop_ids

        require_directory(self.model)
        if self.adapter is not None:
            require_base(self.adapter, self.model)
            if config.method != "lora":
                raise UserError(
                    "method full cannot continue an adapter; use method lora, or merge it first (llmworks merge"
                    " adapter) to train all weights"
                )
            if config.lora != type(config.lora)():
                raise UserError("config.lora: training continues the given adapter, whose shape is fixed; remove lora")
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
    """Return preference pairs, or with `singles` conversations too.

    Errors: DataError for any other schema.
    """
    kind = schema_of(data)
    if kind == "preference":
        return read_preference(data)
    if kind == "chat" and singles:
        return read_chat(data)
    raise DataError(
        f"{data.name}: has no preference pairs{' and no conversations with a `label`' if singles else ''}; create"
        " them with synthesize.pairs, or from rows of prompt, chosen and rejected with data.chat"
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
    """Return the tokenized rows.

    Errors: as `Policy.open`; DataError where no row can be used.
    """
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
    """Return (examples, rejected rows with the reason).

    Errors: DataError when none is left, or one is too long and overlong is refuse.
    """
    made: list[tuple[str, Answered | str]] = []
    for row in rows:
        some: Sequence[Answered | str] = (
            singles_of(tokenizer, row, most, cut=config.overlong == "truncate")
            if singles
            else [pair_of(tokenizer, row, most, cut=config.overlong == "truncate")]
        )
        for one in some:
            if config.overlong == "error" and isinstance(one, str) and "longer than max_length" in one:
                raise DataError(
                    f"{name}: row {row['id']!r}: {one}; raise max_length, or set overlong to set-aside or cut"
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
    """Train a policy on given completions.

    `way_of` builds the training method once the policy is loaded. Errors: as `read`; TrainingError when the loss is
    not finite.
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
        f"{len(material.examples)} {'completions' if singles else 'pairs'}, {weighed:,} label tokens"
        + (f"; {len(material.set_aside)} rows rejected" if material.set_aside else "")
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
    """Check what every alignment needs before a model is opened. `held_out`: whether an eval set is given.

    Errors: UserError.
    """
    from llmworks.train.distributed import world

    require_held_out(config, given=held_out)
    if world.processes() > 1:
        raise UserError("alignment runs in one process; start a single process")


def shared_prompts(
    learned: Sequence[Any], unseen: Sequence[Any], prompt_of: Callable[[Any], Any], say: Callable[[str], None]
) -> None:
    """Warn about held-out prompts that are in the training set, since they do not measure generalization."""
    known = {prompt_of(one) for one in learned}
    shared = sum(prompt_of(one) in known for one in unseen)
    if shared:
        say(
            f"warning: {shared} of {len(unseen)} held-out prompts are in the training set too; their metrics do"
            " not measure generalization"
        )


def same_vocabulary(reference: Model, policy: Policy) -> None:
    """Check that a reference has the policy's vocabulary.

    Errors: ModelError for a model that is not a directory, UserError for another vocabulary.
    """
    from llmworks.tokenize.load import load_tokenizer

    require_directory(reference)
    one, other = (load_tokenizer(model.path).get_vocab() for model in (reference, policy.model))
    if one != other:
        raise UserError(
            f"the reference {reference.name} has another vocabulary than {policy.name} ({len(one):,} and"
            f" {len(other):,} tokens), so their log-probabilities cannot be compared; remove the input `ref_model`"
            " to use the initial policy"
        )
