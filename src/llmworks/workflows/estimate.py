"""Describe the training runs of a recipe: shape, rows and tokens of each, from artifacts or the recipe's steps.

Runs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmworks.core.artifact import Artifact, Dataset, Model
from llmworks.core.errors import DataError, LlmworksError, UserError
from llmworks.data.pack import PackConfig
from llmworks.model.io.untrained import VOCAB_MULTIPLE
from llmworks.model.new import NewConfig
from llmworks.model.recurrent import RecurrentConfig
from llmworks.model.shape import RecurrentShape, Shape
from llmworks.runtime.recipe import Recipe, StageStep
from llmworks.tokenize.bpe.config import TrainConfig
from llmworks.tokenize.load import read_json
from llmworks.train.distill import DistillConfig, explain_missing_logits
from llmworks.train.estimate.finetune import FinetuneEstimate, measure_dataset
from llmworks.train.estimate.pretrain import PretrainEstimate
from llmworks.train.pretrain import PretrainConfig
from llmworks.train.sft import SftConfig


def estimate_step(
    recipe: Recipe, found: Mapping[str, Artifact], name: str, processes: int = 1
) -> PretrainEstimate | FinetuneEstimate | None:
    """Return the checked training estimate of a step; None where it is not a training or its model is not known yet.

    Errors: UserError for a number of processes that the training cannot be split over.
    """
    training = get_training(recipe, found, name, processes)
    if training is None:
        return None
    training.config.parallel.get_data_parallel_size(processes)
    try:
        training.check()
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return training


def get_training(
    recipe: Recipe, found: Mapping[str, Artifact], name: str, processes: int = 1
) -> PretrainEstimate | FinetuneEstimate | None:
    """Return the unchecked training estimate of a step; None where there is none."""
    step = recipe.steps[name]
    if not isinstance(step, StageStep) or not step.stage.stage.estimate:
        return None
    training: PretrainEstimate | FinetuneEstimate | None = step.stage.load_attribute(step.stage.stage.estimate)(
        recipe, found, step, processes
    )
    return training


def describe_finetuning(
    recipe: Recipe, found: Mapping[str, Artifact], step: StageStep, processes: int
) -> FinetuneEstimate | None:
    """Describe the fine-tuning of a step; None where its model does not exist yet.

    Errors: DataError for data without conversations.
    """
    assert isinstance(step.config, SftConfig)
    model_role = "student" if isinstance(step.config, DistillConfig) else "model"
    model, data, held_out, teacher = (
        found.get(str(step.inputs.get(role))) for role in (model_role, "data", "eval_data", "teacher")
    )
    shape = get_step_shape(recipe, found, step.inputs[model_role])
    if not isinstance(model, Model) or model.format != "hf" or not isinstance(shape, Shape):
        return None
    known = data if isinstance(data, Dataset) else None
    guide = (
        get_step_shape(recipe, found, step.inputs["teacher"])
        if isinstance(teacher, Model)
        and getattr(step.config, "source", "") != "text"
        and not explain_missing_logits(teacher, model)
        else None
    )
    return FinetuneEstimate(
        step.config,
        model.path,
        shape,
        measure_dataset(known) if known else None,
        known.path if known else None,
        held_out.path if isinstance(held_out, Dataset) else None,
        *((teacher.path, guide) if isinstance(teacher, Model) and isinstance(guide, Shape) else ()),
    )


def describe_pretraining(
    recipe: Recipe, found: Mapping[str, Artifact], step: StageStep, processes: int
) -> PretrainEstimate | None:
    """Describe the pretraining of a step, as far as known; None where its model's shape is not known yet."""
    assert isinstance(step.config, PretrainConfig)
    shape = get_step_shape(recipe, found, step.inputs["model"])
    if shape is None:
        return None
    length, rows, tokens = get_step_data(recipe, found, step.inputs["data"])
    held_out = get_step_data(recipe, found, step.inputs["eval_data"])[1] if "eval_data" in step.inputs else 0
    made = found.get(str(step.inputs["data"]))
    return PretrainEstimate(
        step.config,
        shape,
        length or shape.max_position_embeddings,
        rows,
        tokens,
        held_out,
        processes,
        made.path if made is not None else None,
    )


def get_step_shape(recipe: Recipe, found: Mapping[str, Artifact], name: Any) -> Shape | RecurrentShape | None:
    """Return the model shape of a step or artifact; None where not known yet."""
    made = found.get(name)
    if isinstance(made, Model):
        from llmworks.model.show import read_model_shape

        try:
            return read_model_shape(made)
        except LlmworksError:
            return None
    step = recipe.steps.get(name)
    if not isinstance(step, StageStep):
        return None
    if isinstance(step.config, (NewConfig, RecurrentConfig)):
        vocabulary = step.config.vocab_size or get_step_vocab_size(recipe, found, step.inputs["tokenizer"])
        kind = Shape if isinstance(step.config, NewConfig) else RecurrentShape
        return kind.model_validate(step.config.model_dump() | {"vocab_size": vocabulary}) if vocabulary else None
    return get_step_shape(recipe, found, step.inputs["model"]) if isinstance(step.config, PretrainConfig) else None


def get_step_vocab_size(recipe: Recipe, found: Mapping[str, Artifact], name: Any) -> int:
    """Return the embedding rows for a step's tokenizer (vocabulary size, rounded up); 0 where not known yet."""
    made, step = found.get(name), recipe.steps.get(name)
    if made is not None and (made.path / "tokenizer.json").exists():
        tokens = read_json(made.path / "tokenizer.json")
        known = (
            {*tokens["model"]["vocab"].values()}
            if isinstance(tokens["model"].get("vocab"), dict)
            else set(range(len(tokens["model"].get("vocab", []))))
        )
        return (
            -(-(max(known | {t["id"] for t in tokens.get("added_tokens", [])}) + 1) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        )
    if isinstance(step, StageStep) and isinstance(step.config, TrainConfig):
        return -(-step.config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    return 0


def get_step_data(recipe: Recipe, found: Mapping[str, Artifact], name: Any) -> tuple[int, int, int]:
    """Return (sequence length, rows, tokens) of a step's packed tokens; 0 for what is not known yet."""
    made, step = found.get(name), recipe.steps.get(name)
    if isinstance(made, Dataset):
        about = made.about
        if about.get("schema") not in (None, "tokens"):
            raise DataError(
                f"{made.name}: holds {about['schema']}, not packed tokens; pack it with the stage data.pack"
            )
        return int(about.get("length") or 0), int(about.get("rows") or 0), int(about.get("tokens") or 0)
    if isinstance(step, StageStep) and isinstance(step.config, PackConfig):
        return step.config.max_length, 0, 0
    return 0, 0, 0
