"""Stage `train.pretrain`: pretrain a model on packed tokens, from scratch or from its weights (continued pretraining).

Every token is a label. Ends with bits per byte on held-out tokens, curves, and samples before and after. An interrupted
run resumes from its checkpoint.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError, MissingDependency, ModelError, TrainingError, UserError
from llmworks.train.distributed.config import DataParallelConfig, ParallelConfig, get_micro_batch_rows
from llmworks.train.forgetting.check import FIELD_DESCRIPTION, GeneralReference, record_reference, report_forgetting
from llmworks.train.loop.schedule import OptimizerConfig
from llmworks.train.loop.trainer_config import TrainerConfig

if TYPE_CHECKING:
    from llmworks.data.store.packed_tokens import PackedDataset
    from llmworks.train.distributed.pipeline import PipelinedModel
    from llmworks.train.distributed.sharding import DistributedModel
    from llmworks.train.distributed.world import World
    from llmworks.train.loop.packed_steps import PackedSteps


class PretrainOptimizer(OptimizerConfig):
    """Optimizer fields with defaults for training from scratch."""

    beta2: float = Field(
        0.95, ge=0, lt=1, description="decay of the second moment; lion: of the momentum, 0.99 is usual"
    )
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled weight decay of matrices; vectors such as biases and norm weights have none"
    )
    warmup_ratio: float = Field(
        0.02,
        ge=0,
        lt=1,
        description="fraction of all steps with linear warm-up to the peak rate",
    )


class PretrainConfig(TrainerConfig):
    """Length of the training, batch size, optimizer, evaluation and checkpoints."""

    num_train_epochs: float = Field(1.0, gt=0, le=100_000, description="number of training epochs; may be a fraction")
    num_train_tokens: int = Field(
        0, ge=0, description="number of training tokens, instead of num_train_epochs; 0 = use num_train_epochs"
    )
    batch_size: int = Field(8, gt=0, description="rows per micro-batch")
    optimizer: PretrainOptimizer = Field(PretrainOptimizer(), description="optimizer and learning rate schedule")
    torch_compile: bool = Field(False, description="torch.compile; the first step takes a minute or more")
    parallel: ParallelConfig = Field(
        ParallelConfig(),
        description=(
            "parallelism across processes when several are started (--nproc, torchrun); a step is the same for any"
            " number of them"
        ),
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "EMA decay; the averaged weights are saved. In the first steps the decay is (1 + step) / (10 + step),"
            " if that is less. 0 = save the last weights"
        ),
    )
    loss_spike_threshold: float = Field(
        3.0,
        ge=0,
        description=(
            "stop at a loss this many nats above the median of the last 50 steps; before there are 20 steps, three"
            " times that above the first loss; 0 = never"
        ),
    )
    eval_steps: int = Field(100, gt=0, description="steps between evaluations on the eval set, with samples")
    eval_samples: int = Field(
        64, gt=0, description="held-out rows per evaluation during training; the final evaluation uses all of them"
    )
    sample_prompts: list[str] = Field(["The", "In the", "def "], description="prompts of the samples")
    sample_max_tokens: int = Field(40, ge=0, description="max tokens of a sample; 0 = no samples")
    num_general_prompts: int = Field(8, ge=0, le=40, description=FIELD_DESCRIPTION)
    save_steps: int = Field(100, gt=0, description="steps between checkpoints")
    save_total_limit: int = Field(2, gt=0, description="number of checkpoints to keep")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_train_tokens and "num_train_epochs" in self.model_fields_set and self.num_train_epochs != 1.0:
            raise ValueError("num_train_tokens and num_train_epochs are both set; set one of them")
        return self


def pretrain(
    config: PretrainConfig, model: Model, data: Dataset, ctx: Context, eval_data: Dataset | None = None
) -> Model:
    """Train all weights of the model on the rows of `data`, packed with the model's tokenizer.

    Errors: DataError for data that are not packed tokens, use another tokenizer, or have fewer rows than a step;
    ModelError for rows longer than the model's context; TrainingError when the loss is not finite or spikes.
    """
    from llmworks.train.distributed import world

    with world.init_world(config.parallel) as here:
        try:
            return _pretrain(config, model, data, ctx, eval_data, here)
        except RuntimeError as error:
            if "allocate memory" not in str(error) and "out of memory" not in str(error):
                raise
            raise TrainingError(
                "out of memory; reduce batch_size and raise gradient_accumulation_steps, or set gradient_checkpointing"
            ) from error


def _pretrain(
    config: PretrainConfig, model: Model, data: Dataset, ctx: Context, held_out: Dataset | None, world: World
) -> Model:
    """Run `pretrain` in one of the processes; the first one evaluates, samples and saves."""
    from llmworks.model.golden import record_golden
    from llmworks.tokenize.chat.named_templates import load_model_tokenizer
    from llmworks.train.loop.eval_loss import evaluate_loss
    from llmworks.train.loop.loop import LoopConfig, train
    from llmworks.train.loop.packed_steps import packed_loss
    from llmworks.train.loop.samples import sample_continuations

    _require_compiler(config, world)
    tokenizer = load_model_tokenizer(model)
    network, packed, eval_rows, length = _open_inputs(ctx, model, data, held_out, tokenizer, world, config)
    steps = _create_steps(config, world, packed, data, length, ctx)
    parameters = sum(p.numel() for p in network.parameters())
    precision, distributed, full_model = _distribute(config, world, network, model)
    settings = (config.sample_prompts, config.sample_max_tokens, ctx.seed)
    samples_before = sample_continuations(full_model, tokenizer, *settings) if world.is_main else []
    reference = _record_reference(config, full_model, tokenizer, model, ctx) if world.is_main else None
    samples: dict[int, list[str]] = {}

    def evaluate(step: int) -> dict[str, float]:
        distributed.gather_weights(full_model)
        if not world.is_main:
            return {}
        samples[step] = sample_continuations(full_model, tokenizer, *settings)
        if config.sample_max_tokens and config.sample_prompts:
            ctx.progress.log(f"step {step + 1}: {config.sample_prompts[0]}{samples[step][0]}".replace("\n", "⏎"))
        if eval_rows is None:
            return {}
        limits = {"max_rows": config.eval_samples, "batch_size": config.batch_size}
        found = evaluate_loss(full_model, eval_rows, tokenizer, **limits)
        ctx.progress.log(
            f"step {step + 1}: eval {found.bits_per_byte:.4f} bits per byte, perplexity {found.perplexity:,.1f}"
        )
        return {"eval_loss": found.loss, "bits_per_byte": found.bits_per_byte, "perplexity": found.perplexity}

    saves, averages = (config.save_steps, config.save_total_limit), (config.ema_decay, config.loss_spike_threshold)
    loop_config = LoopConfig(*saves, precision, *averages, evaluate, config.eval_steps)
    rows, more = config.batch_size * config.gradient_accumulation_steps, f", {world.size} processes"
    ctx.progress.log(f"{parameters:,} parameters, {len(steps):,} steps of {rows} rows{more if world.size > 1 else ''}")
    keep: dict[str, Any] = {"scratch": ctx.scratch, "progress": ctx.progress}
    metrics: dict[str, Any] = dict(train(distributed, steps, packed_loss, config.optimizer, loop_config, **keep))
    distributed.gather_weights(full_model)
    if not world.is_main or full_model is None:
        return Model(ctx.out)
    save_model(full_model.to("cpu"), tokenizer, model, ctx.out)
    metrics = _describe(
        ctx, metrics, parameters, eval_rows, full_model, tokenizer, config, model, data, samples_before, network
    )
    if reference is not None:
        report_forgetting(_make_engine(full_model, tokenizer, model), reference, ctx, metrics)
    return Model(
        ctx.out,
        golden=record_golden(ctx.out),
        metrics=metrics,
        about={"format": "hf", "dtype": "float32", "architecture": str(model.about.get("architecture", ""))},
    )


def _make_engine(network: Any, tokenizer: Any, model: Model) -> Any:
    from llmworks.generate.engines.torch import TorchEngine
    from llmworks.tokenize.load import get_stop_ids

    return TorchEngine(network.eval(), tokenizer, get_stop_ids(model.path, tokenizer), model.name)


def _record_reference(
    config: PretrainConfig, network: Any, tokenizer: Any, model: Model, ctx: Context
) -> GeneralReference | None:
    """Record general answers before training."""
    if not config.num_general_prompts:
        return None
    training = network.training
    reference = record_reference(
        _make_engine(network, tokenizer, model), config.num_general_prompts, ctx.scratch / "general.json"
    )
    network.train(training)
    return reference


def _require_compiler(config: PretrainConfig, world: World) -> None:
    """Raise MissingDependency if torch_compile needs a C++ compiler and there is none."""
    if (
        config.torch_compile
        and world.device.type == "cpu"
        and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    ):
        raise MissingDependency(
            "torch_compile: no C++ compiler found; install one, such as g++, or leave torch_compile out"
        )


def _open_inputs(
    ctx: Context,
    model: Model,
    data: Dataset,
    held_out: Dataset | None,
    tokenizer: Any,
    world: World,
    config: PretrainConfig,
) -> tuple[Any, PackedDataset, PackedDataset | None, int]:
    """Open the model to train and the packed tokens; return (model, training rows, eval rows, row length)."""
    import torch

    from llmworks.data.store.packed_tokens import PackedDataset
    from llmworks.model.io.load import load_trainable

    torch.manual_seed(ctx.seed)
    network = load_trainable(model.path)
    if not any(True for _ in network.parameters()):
        raise ModelError(f"{model.name}: has no trainable weights (an n-gram model is counted by train.ngram)")
    packed, eval_rows = PackedDataset(data), PackedDataset(held_out) if held_out is not None else None
    length = check_rows(model, network, tokenizer, data, packed)
    if held_out is not None and eval_rows is not None:
        check_rows(model, network, tokenizer, held_out, eval_rows)
    network.to(world.device)
    if config.gradient_checkpointing:
        if not network.supports_gradient_checkpointing:
            raise UserError("config.gradient_checkpointing: this architecture does not support it")
        network.activation_checkpointing_enable({"use_reentrant": False})
    return network, packed, eval_rows, length


def _create_steps(
    config: PretrainConfig, world: World, packed: PackedDataset, data: Dataset, length: int, ctx: Context
) -> PackedSteps:
    """Create the steps over the packed rows, divided among processes."""
    from llmworks.train.loop.packed_steps import PackedSteps

    share = get_micro_batch_rows(
        config.batch_size * config.gradient_accumulation_steps, world.get_axis_size("data"), config.batch_size
    )
    own = config.batch_size * config.gradient_accumulation_steps // world.get_axis_size("data")
    if config.parallel.pipeline_parallel_size > 1 and own % share:
        raise UserError(
            f"a step has {own} rows per process, not divisible into micro-batches of {share}; with"
            " parallel.pipeline_parallel_size all micro-batches must have one size: choose a batch_size that"
            " divides the rows"
        )
    steps = PackedSteps(
        packed,
        count_steps(config, packed, data, length),
        batch_size=share,
        num_micro_batches=config.batch_size * config.gradient_accumulation_steps // share,
        length=length,
        seed=ctx.seed,
        device=world.device,
        shard=(world.get_axis_rank("data"), world.get_axis_size("data")),
    )
    return steps


def _distribute(
    config: PretrainConfig, world: World, network: Any, model: Model
) -> tuple[str, PipelinedModel | DistributedModel, Any | None]:
    """Place the model on the processes; return also the full copy that the first process evaluates."""
    from llmworks.model.io.load import load_trainable
    from llmworks.train.distributed.pipeline import PipelinedModel
    from llmworks.train.distributed.sharding import distribute_model, resolve_precision

    full_model = (
        network
        if holds_all_weights(config.parallel, world.size)
        else load_trainable(model.path).to(world.device)
        if world.is_main
        else None
    )
    precision = resolve_precision(config.precision, world.device, sharded=config.parallel != ParallelConfig())
    distributed = (PipelinedModel if config.parallel.pipeline_parallel_size > 1 else distribute_model)(
        network, config.parallel, world, precision=precision, compiled=config.torch_compile
    )
    return precision, distributed, full_model


def _describe(
    ctx: Context,
    metrics: dict[str, Any],
    parameters: Any,
    eval_rows: PackedDataset | None,
    full_model: Any,
    tokenizer: Any,
    config: PretrainConfig,
    model: Model,
    data: Dataset,
    samples_before: list[str],
    network: Any,
) -> dict[str, Any]:
    """Evaluate the trained model and write the report with its warnings."""
    from llmworks.train.loop.eval_loss import evaluate_loss
    from llmworks.train.loop.report import save_curves, write_report
    from llmworks.train.loop.samples import sample_continuations

    rows = ctx.progress.read_metrics()
    if ctx.progress.metrics is not None:
        shutil.copyfile(ctx.progress.metrics, ctx.out / "metrics.jsonl")
    (ctx.out / "report").mkdir()
    save_curves(rows, ctx.out / "report" / "curves.png")
    metrics |= {"parameters": parameters}
    if eval_rows is not None:
        found = evaluate_loss(full_model, eval_rows, tokenizer, batch_size=config.batch_size)
        metrics |= {"bits_per_byte": round(found.bits_per_byte, 5), "perplexity": round(found.perplexity, 5)}
    samples_after = sample_continuations(
        full_model, tokenizer, config.sample_prompts, config.sample_max_tokens, ctx.seed
    )
    warnings = write_report(
        ctx.report,
        f"{model.name} on {data.name}",
        rows,
        metrics,
        config.sample_prompts,
        samples_before,
        samples_after,
        network.config.vocab_size,
    )
    for warning in warnings:
        ctx.progress.log(f"warning: {warning}")
    metrics["warnings"] = len(warnings)
    return metrics


def holds_all_weights(parallel: ParallelConfig | DataParallelConfig, processes: int) -> bool:
    """Return whether each process holds all weights."""
    return processes == 1 or (
        parallel.data_parallel == "ddp" and parallel.tensor_parallel_size == parallel.pipeline_parallel_size == 1
    )


def check_rows(model: Model, network: Any, tokenizer: Any, data: Dataset, packed: Any) -> int:
    """Check that the model can read the rows; return their length. Errors: DataError, ModelError."""
    from llmworks.train.loop.packed_steps import check_tokenizer

    check_tokenizer(data, tokenizer, model.name)
    largest = max(int(shard["tokens"].max()) for shard in packed.shards)
    if largest >= network.config.vocab_size:
        raise DataError(
            f"{data.name}: has token id {largest:,}, but {model.name} has a vocabulary"
            f" of {network.config.vocab_size:,}; pack it with the model's tokenizer"
        )
    length = max(int((shard["rows"][1:] - shard["rows"][:-1]).max()) for shard in packed.shards)
    reads = getattr(network.config, "max_position_embeddings", length)
    if length > reads:
        raise ModelError(
            f"{data.name}: has rows of {length:,} tokens, but the context length of {model.name} is {reads:,};"
            " pack shorter rows, or create a model with a longer context"
        )
    return int(data.about.get("length") or length)


def count_steps(config: PretrainConfig, packed: Any, data: Dataset, length: int) -> int:
    """Return the number of steps."""
    each = config.batch_size * config.gradient_accumulation_steps
    if not config.num_train_tokens:
        return max(1, round(config.num_train_epochs * (len(packed) // each or 1)))
    tokens = sum(len(shard["tokens"]) for shard in packed.shards)
    return max(1, round(config.num_train_tokens / (tokens / len(packed) * each)))


def save_model(network: Any, tokenizer: Any, model: Model, out: Path) -> None:
    """Save the model in its own format, with its tokenizer."""
    from llmworks.model.io.decoder_files import save_decoder
    from llmworks.model.nn.decoder import DecoderForCausalLM
    from llmworks.tokenize.load import read_json

    ids = {
        name: value
        for name, value in read_json(model.path / "config.json").items()
        if name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    if isinstance(network, DecoderForCausalLM):
        save_decoder(network, out, token_ids=ids)
    else:
        network.save_pretrained(out)
    tokenizer.save_pretrained(out)
    generation = model.path / "generation_config.json"
    if generation.exists():
        shutil.copyfile(generation, out / "generation_config.json")
