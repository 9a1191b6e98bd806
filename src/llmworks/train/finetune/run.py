"""Train a model by any method and save an artifact. What differs between methods is a `TrainMethod`.

Ends by generating completions of held-out prompts as before training, and warns when nothing changed or completions
degenerate.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmworks.core.artifact import Adapter, Model
from llmworks.core.context import Context
from llmworks.core.errors import GoldenMismatch, ModelError, TrainingError, UserError
from llmworks.core.report import ReportBuilder
from llmworks.train.distributed.config import get_micro_batch_rows
from llmworks.train.finetune.config import FinetuneConfig
from llmworks.train.finetune.method import TrainingData, TrainMethod

if TYPE_CHECKING:
    from llmworks.generate.engines.torch import TorchEngine
    from llmworks.train.distributed.world import World
    from llmworks.train.finetune.examples import ExampleSteps
    from llmworks.train.finetune.trainable import TrainableModel
    from llmworks.train.forgetting.check import GeneralReference
    from llmworks.train.loop.early_stopping import EarlyStopping
    from llmworks.train.loop.loop import LoopConfig


Describe = Callable[
    [ReportBuilder, str, Sequence[dict[str, Any]], Mapping[str, Any], Mapping[str, Any], Sequence[tuple[str, str]]],
    None,
]

Finish = Callable[["TrainableModel", dict[str, Any]], Adapter | Model]


def require_eval_data(config: FinetuneConfig, *, given: bool) -> None:
    """Raise UserError if a config evaluates on an eval set that is not given."""
    if (config.metric_for_best_model or config.eval_steps) and not given:
        field = "metric_for_best_model" if config.metric_for_best_model else "eval_steps"
        raise UserError(f"config.{field} needs held-out rows; give them as the input eval_data (--eval-data)")


def run_training(
    config: FinetuneConfig,
    model: Model,
    ctx: Context,
    world: World,
    training_data: TrainingData,
    create_method: Callable[[TrainableModel, TrainingData], TrainMethod],
    describe: Describe,
    *,
    adapter: Adapter | None = None,
    finish: Finish | None = None,
) -> Adapter | Model:
    """Train in one of the processes; the first one evaluates, generates completions and saves.

    `create_method`: called once the trainable parameters are set up. `adapter`: continued. `finish`: saves the result.
    """
    import torch

    from llmworks.train.distributed.sharding import autocast, distribute_model
    from llmworks.train.finetune.trainable import open_trainable_model
    from llmworks.train.loop.loop import train

    trainable = open_trainable_model(model.path)
    before, reference = _generate_before(config, training_data, world, adapter, trainable, model, ctx)
    torch.manual_seed(ctx.seed)
    precision, network = _prepare_network(trainable, config, adapter, world)
    with autocast(world.device, precision):  # so that reference log-probabilities use the policy's precision
        method = create_method(trainable, training_data)
    steps = _create_steps(config, world, method, training_data, ctx, trainable)
    distributed = distribute_model(network, config.parallelism, world, precision=precision)
    full_model = _open_full_model(trainable, config, world, model, adapter)

    def evaluate(step: int) -> dict[str, float]:
        distributed.gather_weights(full_model.network if world.is_main else None)
        if not world.is_main:
            return {}
        with autocast(world.device, precision):
            found = method.evaluate(full_model.network, training_data.eval_examples)
        ctx.progress.log(f"step {step + 1}: {method.format_metrics(found)}")
        return found

    early_stopping, loop_config = _create_loop_config(config, ctx, precision, training_data, evaluate, method)
    keep: dict[str, Any] = {"scratch": ctx.scratch, "progress": ctx.progress}
    metrics: dict[str, Any] = dict(train(distributed, steps, method.loss, config.optimizer, loop_config, **keep))
    distributed.gather_weights(full_model.network if world.is_main else None)
    needs_evaluation = method.needs_final_evaluation is not None and method.needs_final_evaluation()
    if world.is_main and training_data.eval_examples and needs_evaluation:
        with autocast(world.device, precision):
            method.evaluate(full_model.network, training_data.eval_examples)
    if method.on_train_end is not None:
        method.on_train_end()
    if not world.is_main:
        return config.artifact_type(ctx.out)
    full_model.network.to("cpu").eval()
    best_step = None if early_stopping is None else early_stopping.best_step
    metrics |= get_eval_metrics(ctx.progress.read_metrics(), best_step)
    if finish is not None:
        return finish(full_model, metrics)
    return _save_result(config, model, training_data, ctx, full_model, before, reference, metrics, describe)


def _generate_before(
    config: FinetuneConfig,
    training_data: TrainingData,
    world: World,
    adapter: Adapter | None,
    trainable: TrainableModel,
    model: Model,
    ctx: Context,
) -> tuple[list[str], GeneralReference | None]:
    """Generate completions of the held-out prompts, and record general answers, before training."""
    from llmworks.generate.engines.torch import TorchEngine
    from llmworks.train.finetune.generation_check import generate_completions
    from llmworks.train.forgetting.check import record_reference

    before: list[str] = []
    reference: GeneralReference | None = None
    count = getattr(config, "num_general_prompts", 0)
    if (training_data.prompt_rows or count) and world.is_main:  # on the CPU, before the model moves to its device
        engine = (
            TorchEngine(trainable.network, training_data.tokenizer, training_data.stop_ids, model.name)
            if adapter is None
            else TorchEngine.open(model.path, adapter=adapter.path)
        )
        if training_data.prompt_rows:
            before = generate_completions(engine, training_data.prompt_rows, ctx.scratch / "before.json")
        if count:
            reference = record_reference(engine, count, ctx.scratch / "general.json")
    return before, reference


def _prepare_network(
    trainable: TrainableModel, config: FinetuneConfig, adapter: Adapter | None, world: World
) -> tuple[str, Any]:
    """Select the trainable parameters, precision and device."""
    from llmworks.train.distributed.sharding import resolve_precision

    prepare_trainable(trainable, config, adapter)
    precision = resolve_precision(config.precision, world.device, sharded=config.parallelism.data_parallel == "fsdp")
    if (
        precision != "fp32" and config.method == "lora" and config.parallelism.data_parallel != "fsdp"
    ):  # FSDP shards need one dtype
        trainable.cast_frozen_weights(precision)
    network = trainable.network.to(world.device)
    if config.gradient_checkpointing:
        if not network.supports_gradient_checkpointing:
            raise UserError("config.gradient_checkpointing: this architecture does not support it")
        network.activation_checkpointing_enable({"use_reentrant": False})
    return precision, network


def _create_steps(
    config: FinetuneConfig,
    world: World,
    method: TrainMethod,
    training_data: TrainingData,
    ctx: Context,
    trainable: TrainableModel,
) -> Sequence[Any] | ExampleSteps:
    """Return the steps: those of the method, else batches of the examples."""
    from llmworks.train.finetune.examples import ExampleSteps

    each, shares = config.batch_size * config.gradient_accumulation_steps, world.get_axis_size("data")
    size = get_micro_batch_rows(each, shares, config.batch_size)
    steps = (
        method.steps
        if method.steps is not None
        else ExampleSteps(
            training_data.examples,
            epochs=config.num_train_epochs,
            batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            seed=ctx.seed,
            padding_free=trainable.padding_free,
            collate_fn=method.collate,
            shard=(world.get_axis_rank("data"), shares),
            micro_batch_size=size,
        )
    )
    return steps


def _open_full_model(
    trainable: TrainableModel, config: FinetuneConfig, world: World, model: Model, adapter: Adapter | None
) -> TrainableModel:
    """Return the full model that the first process evaluates and saves: a second copy if weights are sharded."""
    from llmworks.train.finetune.trainable import open_trainable_model
    from llmworks.train.pretrain import holds_all_weights

    whole = trainable
    if not holds_all_weights(config.parallelism, world.size) and world.is_main:
        whole = open_trainable_model(model.path)
        prepare_trainable(whole, config, adapter)
        whole.network.to(world.device)
    return whole


def _create_loop_config(
    config: FinetuneConfig,
    ctx: Context,
    precision: str,
    training_data: TrainingData,
    evaluate: Callable[[int], dict[str, float]],
    method: TrainMethod,
) -> tuple[EarlyStopping | None, LoopConfig]:
    """Create early stopping, if configured, and the loop settings."""
    from llmworks.train.loop.early_stopping import EarlyStopping
    from llmworks.train.loop.loop import LoopConfig

    early_stopping = (
        EarlyStopping(config.metric_for_best_model, ctx.scratch, config.early_stopping_patience)
        if config.metric_for_best_model
        else None
    )
    loop_config = LoopConfig(
        config.save_steps,
        precision=precision,
        evaluate=evaluate if training_data.eval_examples else None,
        eval_steps=config.eval_steps,
        early_stopping=early_stopping,
        lr_multipliers={"b": config.lora.loraplus_lr_ratio} if config.lora.loraplus_lr_ratio > 1 else {},
        step_metrics=method.step_metrics,
    )
    return early_stopping, loop_config


def get_eval_metrics(rows: Sequence[Mapping[str, Any]], best_step: int | None) -> dict[str, Any]:
    """Return the metrics of the evaluation of the saved weights; best_step counts from 1, as the progress lines do."""
    evaluations = [row for row in rows if "eval_loss" in row]
    if not evaluations:
        return {}
    evaluation = next((row for row in evaluations if row["step"] == best_step), evaluations[-1])
    return {
        "eval_loss": round(evaluation["eval_loss"], 5),
        **({"accuracy": round(evaluation["accuracy"], 5)} if "accuracy" in evaluation else {}),
        "best_step": evaluation["step"] + 1,
    }


def save_records(ctx: Context, dropped: Sequence[tuple[str, str]]) -> None:
    """Save step metrics and dropped rows with their reasons beside the result."""
    if ctx.progress.metrics is not None:
        shutil.copyfile(ctx.progress.metrics, ctx.out / "metrics.jsonl")
    if dropped:
        lines = [json.dumps({"id": id, "reason": reason}, ensure_ascii=False) + "\n" for id, reason in dropped]
        (ctx.out / "set_aside.jsonl").write_text("".join(lines), encoding="utf-8")


def _save_result(
    config: FinetuneConfig,
    model: Model,
    training_data: TrainingData,
    ctx: Context,
    trainable: TrainableModel,
    before: list[str],
    reference: GeneralReference | None,
    metrics: dict[str, Any],
    describe: Describe,
) -> Adapter | Model:
    """Save the model, generate completions again, write the report, and record golden tokens."""
    from llmworks.generate.engines.torch import TorchEngine
    from llmworks.model.golden import make_logits_function
    from llmworks.model.golden import record_golden as recorded
    from llmworks.tokenize.chat.golden import record_golden

    rows = ctx.progress.read_metrics()
    metrics |= {
        "rows": len(training_data.examples),
        "dropped": len(training_data.dropped),
        "trainable_parameters": trainable.num_trainable_parameters,
    }
    trainable.save(ctx.out, model.ref or model.name)
    training_data.tokenizer.save_pretrained(ctx.out)
    save_records(ctx, training_data.dropped)
    engine = (
        TorchEngine.open(model.path, adapter=ctx.out)
        if trainable.is_soft_prompt or trainable.is_cast
        else TorchEngine(trainable.network, training_data.tokenizer, training_data.stop_ids, model.name)
    )
    describe(ctx.report, model.name, rows, metrics, config.model_dump(), training_data.dropped)
    _report_changes(engine, training_data, ctx, before, reference, metrics)
    if config.method == "full":  # from the files that were written, in their dtype
        return Model(
            ctx.out,
            metrics=metrics,
            golden=recorded(ctx.out),
            about={"format": "hf", "architecture": str(model.about.get("architecture", ""))},
        )
    golden = record_golden(training_data.tokenizer, training_data.stop_ids, make_logits_function(engine.model))
    return Adapter(
        ctx.out,
        metrics=metrics,
        golden=golden,
        about={
            "base": model.digest,
            "method": config.method,
            **({"rank": trainable.lora.rank} if trainable.lora is not None else {}),
            "template": config.chat_template,
            "base_kept": "nf4" if trainable.quantization else "as-is",
        },
    )


def _report_changes(
    engine: TorchEngine,
    training_data: TrainingData,
    ctx: Context,
    before: list[str],
    reference: GeneralReference | None,
    metrics: dict[str, Any],
) -> None:
    """Compare completions of held-out prompts and general answers with those before training; count the warnings."""
    from llmworks.train.finetune.generation_check import generate_completions, write_samples
    from llmworks.train.forgetting.check import report_forgetting

    after = generate_completions(engine, training_data.prompt_rows, None) if training_data.prompt_rows else []
    warnings = write_samples(ctx.report, training_data.prompt_rows, before, after)
    for warning in warnings:
        ctx.progress.log(f"warning: {warning}")
    metrics["warnings"] = len(warnings)
    if reference is not None:
        report_forgetting(engine, reference, ctx, metrics)


def prepare_trainable(trainable: Any, config: Any, adapter: Adapter | None = None) -> None:
    """Set up the trainable parameters. Seed torch before: a new adapter is initialized randomly."""
    if adapter is not None:
        trainable.load_adapter(adapter.path)
    elif config.method == "lora":
        trainable.add_adapter(config.lora)
    elif config.method in ("prompt_tuning", "prefix_tuning"):
        trainable.add_soft_prompt(
            config.method, config.soft_prompt.num_virtual_tokens, config.soft_prompt.prompt_tuning_init_text
        )
    else:
        trainable.freeze(config.freeze)


def explain_out_of_memory(error: RuntimeError) -> TrainingError | None:
    """Return the error to raise when a step ran out of memory; None for any other error."""
    if "allocate memory" not in str(error) and "out of memory" not in str(error):
        return None
    return TrainingError(
        "out of memory; reduce batch_size and raise gradient_accumulation_steps, set gradient_checkpointing, or"
        " quantize the base model (lora.load_in_4bit)"
    )


def require_directory(model: Model) -> None:
    """Check that a model can be trained. ModelError for a single file or a server."""
    if model.format != "hf":
        raise ModelError(
            f"{model.name}: training needs a Hugging Face directory, but this is {model.format}; convert it with"
            " the stage model.from_gguf"
        )


def get_context_length(model: Model) -> int:
    """Return a model's maximum context length in tokens."""
    from llmworks.tokenize.load import read_json

    config = read_json(model.path / "config.json")
    found = (
        config.get("max_position_embeddings") or config.get("n_positions") or (config.get("shape") or {}).get("context")
    )
    return int(found) if isinstance(found, int) and found > 0 else 1 << 30


def check_golden(
    config: FinetuneConfig, model: Model | Adapter, tokenizer: Any, stop_ids: Sequence[int], stage: str = "train.sft"
) -> None:
    """Check that the model's golden tokens replay, or may change. GoldenMismatch, with what to do, otherwise."""
    from llmworks.tokenize.chat.golden import require_replay

    if model.golden is not None and config.golden == "keep":
        try:
            require_replay(model.golden, tokenizer, stop_ids, step=f"{stage} (golden: keep)")
        except GoldenMismatch as error:
            raise GoldenMismatch(
                f"{error}; if the template is meant to change (chat_template: {config.chat_template}), set golden to"
                " 'renew: REASON'"
            ) from None
