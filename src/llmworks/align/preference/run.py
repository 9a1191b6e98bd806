"""Shared parts of offline alignment methods: config fields, tokenization of rows, and the training run.

The policy is a model, or a model with an adapter to continue. The reference is the initial policy, unless another
model is given. The loss is each method's own. Torch-free.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmworks.align.preference.examples import (
    PromptCompletions,
    get_label,
    make_ids_unique,
    split_rejected,
    tokenize_pair,
    tokenize_singles,
)
from llmworks.core.artifact import Adapter, Dataset, Model, check_base
from llmworks.core.context import Context
from llmworks.core.errors import DataError, UserError
from llmworks.data.conversations.training_rows import warn_unread_fields
from llmworks.data.store.rows import Row, detect_schema, read_chat, read_preference
from llmworks.tokenize.chat.named_templates import set_template
from llmworks.train.finetune.config import FinetuneConfig, GenerativeFinetuneConfig
from llmworks.train.finetune.method import TrainingData, TrainMethod
from llmworks.train.finetune.run import (
    check_golden,
    explain_out_of_memory,
    get_context_length,
    require_directory,
    require_eval_data,
    run_training,
)

if TYPE_CHECKING:
    from llmworks.align.preference.objective import MethodContext
    from llmworks.train.finetune.trainable import TrainableModel

EVAL_ID_SUFFIX = " (held out)"  # id suffix of held-out examples, whose ids may equal those of training examples


class OfflineAlignmentConfig(FinetuneConfig):
    """Training fields of alignment on given completions."""

    default_learning_rates: ClassVar[Mapping[str, float]] = {"lora": 1e-4, "full": 5e-6}

    num_train_epochs: float = Field(1.0, gt=0, description="passes over the data; may be a fraction")
    batch_size: int = Field(8, gt=0, description="pairs, or single completions, per micro-batch")
    overlong: Literal["drop", "truncate", "error"] = Field(
        "drop",
        description=(
            "rows whose prompt and completion exceed max_length. drop: drop and count them; truncate: truncate them"
            " at the end; error: do not start training"
        ),
    )

    @model_validator(mode="after")
    def _check_dropout(self) -> Self:
        if self.lora.lora_dropout:
            raise ValueError(
                "lora.lora_dropout: dropout would change the log-probabilities of the two models that are"
                " compared; leave it 0"
            )
        return self


class PreferenceConfig(OfflineAlignmentConfig, GenerativeFinetuneConfig):
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

    def open_tokenizer(self, config: FinetuneConfig, stage: str) -> tuple[Any, list[int]]:
        """Return the tokenizer, with the configured chat template, and the stop token ids.

        Errors: ModelError, ArtifactError, GoldenMismatch, UserError.
        """
        from llmworks.tokenize.load import get_stop_ids, load_tokenizer

        require_directory(self.model)
        if self.adapter is not None:
            check_base(self.adapter, self.model)
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
        stops = list(get_stop_ids(self.model.path, tokenizer))
        set_template(tokenizer, config.chat_template, config.control_tokens)
        check_golden(config, self.adapter if self.adapter is not None else self.model, tokenizer, stops, stage)
        return tokenizer, stops


def read_rows(data: Dataset, *, single_completions: bool) -> list[Row]:
    """Return preference pairs, or with `single_completions` conversations too.

    Errors: DataError for any other schema.
    """
    kind = detect_schema(data)
    if kind == "preference":
        return read_preference(data)
    if kind == "chat" and single_completions:
        return read_chat(data)
    raise DataError(
        f"{data.name}: has no preference"
        f" pairs{' and no conversations with a `label`' if single_completions else ''}; create"
        " them with synthesize.pairs, or from rows of prompt, chosen and rejected with data.chat"
    )


def read_material(
    config: PreferenceConfig,
    policy: Policy,
    data: Dataset,
    eval_data: Dataset | None,
    stage: str,
    *,
    single_completions: bool = False,
) -> TrainingData:
    """Return the tokenized rows.

    Errors: as `Policy.open`; DataError where no row can be used.
    """
    tokenizer, stops = policy.open_tokenizer(config, stage)
    max_length = min(config.max_length, get_context_length(policy.model))
    examples, rejected = tokenize_rows(
        config,
        tokenizer,
        read_rows(data, single_completions=single_completions),
        data.name,
        max_length,
        single_completions=single_completions,
    )
    eval_examples: list[PromptCompletions] = []
    questions: list[Row] = []
    if eval_data is not None:
        rows = read_rows(eval_data, single_completions=single_completions)
        eval_examples = make_ids_unique(
            tokenize_rows(
                config,
                tokenizer,
                rows[: config.eval_samples],
                eval_data.name,
                max_length,
                single_completions=single_completions,
            )[0],
            EVAL_ID_SUFFIX,
        )
        questions = [
            {**row, "messages": row["messages"] if "messages" in row else [*row["prompt"], *row["chosen"]]}
            for row in [row for row in rows if not single_completions or get_label(row) is not False][
                : config.num_sample_prompts
            ]
        ]
    return TrainingData(tokenizer, stops, examples, rejected, eval_examples, questions)


def tokenize_rows(
    config: OfflineAlignmentConfig,
    tokenizer: Any,
    rows: Sequence[Row],
    name: str,
    max_length: int,
    *,
    single_completions: bool,
) -> tuple[list[PromptCompletions], list[tuple[str, str]]]:
    """Return (examples, rejected rows with the reason).

    Errors: DataError when none is left, or one is too long and overlong is refuse.
    """
    results: list[tuple[str, PromptCompletions | str]] = []
    for row in rows:
        some: Sequence[PromptCompletions | str] = (
            tokenize_singles(tokenizer, row, max_length, truncate=config.overlong == "truncate")
            if single_completions
            else [tokenize_pair(tokenizer, row, max_length, truncate=config.overlong == "truncate")]
        )
        for one in some:
            if config.overlong == "error" and isinstance(one, str) and "longer than max_length" in one:
                raise DataError(
                    f"{name}: row {row['id']!r}: {one}; raise max_length, or set overlong to drop or truncate"
                )
            results.append((str(row["id"]), one))
    return split_rejected(results, name)


def run_preference(
    config: PreferenceConfig,
    policy: Policy,
    data: Dataset,
    ctx: Context,
    eval_data: Dataset | None,
    build_method: Callable[[MethodContext], TrainMethod],
    stage: str,
    *,
    ref_model: Model | None = None,
    single_completions: bool = False,
) -> Adapter | Model:
    """Train a policy on given completions.

    `build_method` builds the training method once the policy is loaded.

    Errors: as `read_material`; TrainingError when the loss is not finite.
    """
    from llmworks.align.report import describe_preference
    from llmworks.train.distributed import world

    check_run(config, has_eval_data=eval_data is not None)
    material = read_material(config, policy, data, eval_data, stage, single_completions=single_completions)
    if ref_model is not None:
        check_same_vocabulary(ref_model, policy)
    num_label_tokens = sum(example.labels for example in material.examples)
    rows = read_rows(data, single_completions=single_completions)
    warn_unread_fields(material.tokenizer, rows, ctx.progress.log)
    warn_shared_prompts(material.examples, material.eval_examples, lambda example: example.prompt, ctx.progress.log)
    ctx.progress.log(
        f"{len(material.examples)} {'completions' if single_completions else 'pairs'}, {num_label_tokens:,} label"
        " tokens" + (f"; {len(material.dropped)} rows rejected" if material.dropped else "")
    )
    with world.init_world(config.parallelism) as here:
        from llmworks.align.preference.objective import MethodContext

        def make_method(tuned: TrainableModel, _: TrainingData) -> TrainMethod:
            return build_method(MethodContext(config, tuned, material, ctx, here.device, ref_model))

        try:
            return run_training(
                config, policy.model, ctx, here, material, make_method, describe_preference, adapter=policy.adapter
            )
        except RuntimeError as error:
            raise (explain_out_of_memory(error) or error) from error


def check_run(config: FinetuneConfig, *, has_eval_data: bool) -> None:
    """Check what every alignment needs before a model is opened. `has_eval_data`: whether an eval set is given.

    Errors: UserError.
    """
    from llmworks.train.distributed import world

    require_eval_data(config, given=has_eval_data)
    if world.get_world_size() > 1:
        raise UserError("alignment runs in one process; start a single process")


def warn_shared_prompts(
    train_examples: Sequence[Any],
    eval_examples: Sequence[Any],
    get_prompt: Callable[[Any], Any],
    log: Callable[[str], None],
) -> None:
    """Warn about held-out prompts that are in the training set, since they do not measure generalization."""
    known = {get_prompt(one) for one in train_examples}
    shared = sum(get_prompt(one) in known for one in eval_examples)
    if shared:
        log(
            f"warning: {shared} of {len(eval_examples)} held-out prompts are in the training set too; their metrics do"
            " not measure generalization"
        )


def check_same_vocabulary(ref_model: Model, policy: Policy) -> None:
    """Check that a reference has the policy's vocabulary.

    Errors: ModelError for a model that is not a directory, UserError for another vocabulary.
    """
    from llmworks.tokenize.load import load_tokenizer

    require_directory(ref_model)
    one, other = (load_tokenizer(model.path).get_vocab() for model in (ref_model, policy.model))
    if one != other:
        raise UserError(
            f"the reference {ref_model.name} has another vocabulary than {policy.name} ({len(one):,} and"
            f" {len(other):,} tokens), so their log-probabilities cannot be compared; remove the input `ref_model`"
            " to use the initial policy"
        )
