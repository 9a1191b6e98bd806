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
from llmworks.train.distributed.config import share_of
from llmworks.train.finetune.config import TuneConfig
from llmworks.train.finetune.method import Material, Way

if TYPE_CHECKING:
    from llmworks.train.distributed.world import World
    from llmworks.train.finetune.examples import Steps
    from llmworks.train.finetune.trainable import Tuned
    from llmworks.train.loop.early_stopping import Best
    from llmworks.train.loop.loop import Habits


Describe = Callable[
    [ReportBuilder, str, Sequence[dict[str, Any]], Mapping[str, Any], Mapping[str, Any], Sequence[tuple[str, str]]],
    None,
]

Finish = Callable[["Tuned", dict[str, Any]], Adapter | Model]


def require_held_out(config: TuneConfig, *, given: bool) -> None:
    """Raise UserError if a config evaluates on an eval set that is not given."""
    if (config.metric_for_best_model or config.eval_steps) and not given:
        field = "metric_for_best_model" if config.metric_for_best_model else "eval_steps"
        raise UserError(f"config.{field} needs held-out rows; provide them as eval_data")


def tune(
    config: TuneConfig,
    model: Model,
    ctx: Context,
    world: World,
    material: Material,
    way_of: Callable[[Tuned, Material], Way],
    describe: Describe,
    *,
    adapter: Adapter | None = None,
    finish: Finish | None = None,
) -> Adapter | Model:
    """Train in one of the processes; the first one evaluates, generates completions and saves.

    `create_method` is called after the trainable parameters are set up; `adapter`: an adapter to continue training;
    `finish`: saves something else than the model.
    """
    import torch

    from llmworks.train.distributed.sharding import cast, place
    from llmworks.train.finetune.trainable import open_tuned
    from llmworks.train.loop.loop import train

    tuned = open_tuned(model.path)
    before = _answers_before(material, world, adapter, tuned, model, ctx)
    torch.manual_seed(ctx.seed)
    precision, network = _prepare_network(tuned, config, adapter, world)
    with cast(world.device, precision):  # so that reference log-probabilities use the policy's precision
        way = way_of(tuned, material)
    steps = _steps_of(config, world, way, material, ctx, tuned)
    placed = place(network, config.spread, world, precision=precision)
    whole = _whole_of(tuned, config, world, model, adapter)

    def look(step: int) -> dict[str, float]:
        placed.gather(whole.network if world.first else None)
        if not world.first:
            return {}
        with cast(world.device, precision):
            found = way.look(whole.network, material.unseen)
        ctx.progress.say(f"step {step + 1}: {way.said(found)}")
        return found

    best, habits = _habits_of(config, ctx, precision, material, look, way)
    metrics: dict[str, Any] = dict(
        train(placed, steps, way.loss, config.optimizer, habits, scratch=ctx.scratch, progress=ctx.progress)
    )
    placed.gather(whole.network if world.first else None)
    if world.first and material.unseen and way.again is not None and way.again():
        with cast(world.device, precision):
            way.look(whole.network, material.unseen)
    if way.done is not None:
        way.done()
    if not world.first:
        made: Adapter | Model = config.makes(ctx.out)
        return made
    whole.network.to("cpu").eval()
    metrics |= looked(ctx.progress.read_metrics(), None if best is None else best.step)
    if finish is not None:
        return finish(whole, metrics)
    return _finish(config, model, material, ctx, whole, before, metrics, describe)


def _answers_before(
    material: Material, world: World, adapter: Adapter | None, tuned: Tuned, model: Model, ctx: Context
) -> list[str]:
    """Generate completions of the held-out prompts before training."""
    from llmworks.generate.engines.torch import TorchEngine
    from llmworks.train.finetune.generation_check import answers

    before: list[str] = []
    if material.questions and world.first:  # on the CPU, before the model moves to its device
        engine = (
            TorchEngine(tuned.network, material.tokenizer, material.stops, model.name)
            if adapter is None
            else TorchEngine.open(model.path, adapter=adapter.path)
        )
        before = answers(engine, material.questions, ctx.scratch / "before.json")
    return before


def _prepare_network(tuned: Tuned, config: TuneConfig, adapter: Adapter | None, world: World) -> tuple[str, Any]:
    """Select the trainable parameters, precision and device."""
    from llmworks.train.distributed.sharding import resolved

    prepare(tuned, config, adapter)
    precision = resolved(config.precision, world.device, spread=config.spread.data_parallel == "fsdp")
    if (
        precision != "fp32" and config.method == "lora" and config.spread.data_parallel != "fsdp"
    ):  # FSDP shards need one dtype
        tuned.narrow(precision)
    network = tuned.network.to(world.device)
    if config.gradient_checkpointing:
        if not network.supports_gradient_checkpointing:
            raise UserError("config.gradient_checkpointing: this architecture does not support it")
        network.activation_checkpointing_enable({"use_reentrant": False})
    return precision, network


def _steps_of(
    config: TuneConfig, world: World, way: Way, material: Material, ctx: Context, tuned: Tuned
) -> Sequence[Any] | Steps:
    """Return the steps: those of the method, else batches of the examples."""
    from llmworks.train.finetune.examples import Steps

    each, shares = config.batch_size * config.gradient_accumulation_steps, world.count("data")
    size = share_of(each, shares, config.batch_size)
    steps = (
        way.steps
        if way.steps is not None
        else Steps(
            material.examples,
            epochs=config.num_train_epochs,
            size=config.batch_size,
            accumulation=config.gradient_accumulation_steps,
            seed=ctx.seed,
            free=tuned.free,
            join=way.join,
            share=(world.at("data"), shares),
            cut=size,
        )
    )
    return steps


def _whole_of(tuned: Tuned, config: TuneConfig, world: World, model: Model, adapter: Adapter | None) -> Tuned:
    """Return the full model that the first process evaluates and saves: a second copy if weights are sharded."""
    from llmworks.train.finetune.trainable import open_tuned
    from llmworks.train.pretrain import parallel_whole

    whole = tuned
    if not parallel_whole(config.spread, world.size) and world.first:
        whole = open_tuned(model.path)
        prepare(whole, config, adapter)
        whole.network.to(world.device)
    return whole


def _habits_of(
    config: TuneConfig,
    ctx: Context,
    precision: str,
    material: Material,
    look: Callable[[int], dict[str, float]],
    way: Way,
) -> tuple[Best | None, Habits]:
    """Create early stopping, if configured, and the loop settings."""
    from llmworks.train.loop.early_stopping import Best
    from llmworks.train.loop.loop import Habits

    best = (
        Best(config.metric_for_best_model, ctx.scratch, config.early_stopping_patience)
        if config.metric_for_best_model
        else None
    )
    habits = Habits(
        config.save_steps,
        precision=precision,
        look=look if material.unseen else None,
        look_every=config.eval_steps,
        best=best,
        faster={"b": config.lora.loraplus_lr_ratio} if config.lora.loraplus_lr_ratio > 1 else {},
        told=way.told,
    )
    return best, habits


def looked(rows: Sequence[Mapping[str, Any]], best: int | None) -> dict[str, Any]:
    """Return the metrics of the evaluation of the saved weights."""
    looks = [row for row in rows if "eval_loss" in row]
    if not looks:
        return {}
    chosen = next((row for row in looks if row["step"] == best), looks[-1])
    return {
        "eval_loss": round(chosen["eval_loss"], 5),
        **({"accuracy": round(chosen["accuracy"], 5)} if "accuracy" in chosen else {}),
        "best_step": chosen["step"],
    }


def save_records(ctx: Context, set_aside: Sequence[tuple[str, str]]) -> None:
    """Save step metrics and dropped rows with their reasons beside the result."""
    if ctx.progress.metrics is not None:
        shutil.copyfile(ctx.progress.metrics, ctx.out / "metrics.jsonl")
    if set_aside:
        lines = [json.dumps({"id": id, "reason": reason}, ensure_ascii=False) + "\n" for id, reason in set_aside]
        (ctx.out / "set_aside.jsonl").write_text("".join(lines), encoding="utf-8")


def _finish(
    config: TuneConfig,
    model: Model,
    material: Material,
    ctx: Context,
    tuned: Tuned,
    before: list[str],
    metrics: dict[str, Any],
    describe: Describe,
) -> Adapter | Model:
    """Save the model, generate completions again, write the report, and record golden tokens."""
    from llmworks.generate.engines.torch import TorchEngine
    from llmworks.model.golden import record as recorded
    from llmworks.model.golden import torch_logits
    from llmworks.tokenize.chat.golden import record
    from llmworks.train.finetune.generation_check import answers, write_samples

    rows = ctx.progress.read_metrics()
    metrics |= {
        "rows": len(material.examples),
        "dropped": len(material.set_aside),
        "trainable_parameters": tuned.trained,
    }
    tuned.save(ctx.out, model.ref or model.name)
    material.tokenizer.save_pretrained(ctx.out)
    save_records(ctx, material.set_aside)
    engine = (
        TorchEngine.open(model.path, adapter=ctx.out)
        if tuned.soft or tuned.narrowed
        else TorchEngine(tuned.network, material.tokenizer, material.stops, model.name)
    )
    after = answers(engine, material.questions, None) if material.questions else []
    describe(ctx.report, model.name, rows, metrics, config.model_dump(), material.set_aside)
    warnings = write_samples(ctx.report, material.questions, before, after)
    for warning in warnings:
        ctx.progress.say(f"warning: {warning}")
    metrics["warnings"] = len(warnings)
    if config.method == "full":  # from the files that were written, in their dtype
        return Model(
            ctx.out,
            metrics=metrics,
            golden=recorded(ctx.out),
            about={"format": "hf", "architecture": str(model.about.get("architecture", ""))},
        )
    golden = record(material.tokenizer, material.stops, torch_logits(engine.model))
    return Adapter(
        ctx.out,
        metrics=metrics,
        golden=golden,
        about={
            "base": model.digest,
            "method": config.method,
            **({"rank": tuned.lora.rank} if tuned.lora is not None else {}),
            "template": config.chat_template,
            "base_kept": "nf4" if tuned.kept else "as-is",
        },
    )


def prepare(tuned: Any, config: Any, adapter: Adapter | None = None) -> None:
    """Set up the trainable parameters. Seed torch before: a new adapter is initialized randomly."""
    if adapter is not None:
        tuned.go_on(adapter.path)
    elif config.method == "lora":
        tuned.adapt(config.lora)
    elif config.method in ("prompt_tuning", "prefix_tuning"):
        tuned.put_before(
            config.method, config.soft_prompt.num_virtual_tokens, config.soft_prompt.prompt_tuning_init_text
        )
    else:
        tuned.freeze(config.freeze)


def in_memory(error: RuntimeError) -> TrainingError | None:
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


def context_of(model: Model) -> int:
    """Return a model's maximum context length in tokens."""
    from llmworks.tokenize.load import read_json

    config = read_json(model.path / "config.json")
    found = (
        config.get("max_position_embeddings") or config.get("n_positions") or (config.get("shape") or {}).get("context")
    )
    return int(found) if isinstance(found, int) and found > 0 else 1 << 30


def check_golden(
    config: TuneConfig, model: Model | Adapter, tokenizer: Any, stops: Sequence[int], stage: str = "train.sft"
) -> None:
    """Check that the model's golden tokens replay, or may change. GoldenMismatch, with what to do, otherwise."""
    from llmworks.tokenize.chat.golden import require

    if model.golden is not None and config.golden == "keep":
        try:
            require(model.golden, tokenizer, stops, step=f"{stage} (golden: keep)")
        except GoldenMismatch as error:
            raise GoldenMismatch(
                f"{error}; if the template is meant to change (chat_template: {config.chat_template}), set golden to"
                " 'renew: REASON'"
            ) from None
