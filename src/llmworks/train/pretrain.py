"""Stage `train.pretrain`: train a model on packed tokens, from nothing or on from where it is: every token is learned.

Ends with bits per byte on tokens that it did not see, curves, and what it writes before and after. What was killed goes
on from its checkpoint.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Config, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError, MissingDependency, ModelError, TrainingError, UserError
from llmworks.train.distributed.config import DataParallel, Parallel, share_of
from llmworks.train.loop.schedule import OptimizerConfig

if TYPE_CHECKING:
    from llmworks.data.store.packed_tokens import Packed
    from llmworks.train.distributed.pipeline import Pipelined
    from llmworks.train.distributed.sharding import Placed
    from llmworks.train.distributed.world import World
    from llmworks.train.loop.packed import PackedSteps


class PretrainOptimizer(OptimizerConfig):
    """The optimizer's fields, with what is usual from nothing."""

    beta2: float = Field(
        0.95, ge=0, lt=1, description="decay of the second moment; lion: of the momentum, 0.99 is usual"
    )
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled weight decay of matrices; vectors, as gains and biases, have none"
    )
    warmup_ratio: float = Field(
        0.02, ge=0, lt=1, description="fraction of all steps over which the learning rate rises from zero"
    )


class PretrainConfig(Config):
    """How long, in what steps, and what is looked at on the way."""

    num_train_epochs: float = Field(1.0, gt=0, le=100_000, description="passes over the data; may be a fraction")
    num_train_tokens: int = Field(0, ge=0, description="tokens to read, in place of epochs; 0: by epochs")
    batch_size: int = Field(8, gt=0, description="rows that are computed at once")
    gradient_accumulation_steps: int = Field(
        1, gt=0, description="parts of a step; its loss is the mean over all their labels, as in one large batch"
    )
    optimizer: PretrainOptimizer = Field(PretrainOptimizer(), description="optimizer and learning rate")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description=(
            "of products, under autocast; weights stay fp32. auto: bf16 on a GPU that has it, fp16 on an older one,"
            " fp32 on a CPU, where the others are many times slower"
        ),
    )
    gradient_checkpointing: bool = Field(
        False, description="keep no activations of blocks, compute them again backward: less memory, a third more time"
    )
    torch_compile: bool = Field(False, description="torch.compile: the first step takes a minute or more")
    parallel: Parallel = Field(
        Parallel(),
        description=(
            "what processes share, where several are started (--nproc, torchrun); a step is the same whatever their"
            " number"
        ),
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "decay of a running mean of the weights, which is what is saved, less in the first steps, (1 + step) / (10"
            " + step); 0: the last weights are"
        ),
    )
    loss_spike_threshold: float = Field(
        3.0,
        ge=0,
        description=(
            "stop at a loss so many nats above the median of the last 50 steps, or before there are 20, thrice so many"
            " above the first; 0: never"
        ),
    )
    eval_steps: int = Field(100, gt=0, description="steps between two looks at held-out tokens, with samples")
    eval_samples: int = Field(
        64, gt=0, description="rows of held-out tokens at each look; at the end all of them are measured, too"
    )
    sample_prompts: list[str] = Field(["The", "In the", "def "], description="beginnings of the samples")
    sample_max_tokens: int = Field(40, ge=0, description="tokens of a sample; 0: no samples")
    save_steps: int = Field(100, gt=0, description="steps between two checkpoints")
    save_total_limit: int = Field(2, gt=0, description="checkpoints that are kept")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_train_tokens and "num_train_epochs" in self.model_fields_set and self.num_train_epochs != 1.0:
            raise ValueError("tokens and epochs are both given; give one of them")
        return self


def pretrain(
    config: PretrainConfig, model: Model, data: Dataset, ctx: Context, eval_data: Dataset | None = None
) -> Model:
    """Train all weights of the model on the rows of `data`, whose tokens must be its tokenizer's.

    Errors: DataError for data that are no packed tokens, of another tokenizer, or fewer than a step; ModelError for
    rows that are longer than the model reads; TrainingError when the loss is no number or jumps.
    """
    from llmworks.train.distributed import world

    with world.opened(config.parallel) as here:
        try:
            return _pretrain(config, model, data, ctx, eval_data, here)
        except RuntimeError as error:
            if "allocate memory" not in str(error) and "out of memory" not in str(error):
                raise
            raise TrainingError(
                "there is too little memory for a step; make batch smaller and accumulation larger, or set recompute"
            ) from error


def _pretrain(
    config: PretrainConfig, model: Model, data: Dataset, ctx: Context, held_out: Dataset | None, world: World
) -> Model:
    """`pretrain` in one of the processes; the first looks, draws and saves."""

    from llmworks.model.golden import record
    from llmworks.tokenize.chat.named import tokenizer_of
    from llmworks.train.loop.heldout import measure
    from llmworks.train.loop.loop import Habits, train
    from llmworks.train.loop.packed import packed_loss
    from llmworks.train.loop.samples import continued

    _require_compiler(config, world)
    tokenizer = tokenizer_of(model)
    network, packed, unseen, length = _open(ctx, model, data, held_out, tokenizer, world, config)
    steps = _steps(config, world, packed, data, length, ctx)
    parameters = sum(p.numel() for p in network.parameters())
    precision, placed, whole = _place(config, world, network, model)
    begun = (
        continued(whole, tokenizer, config.sample_prompts, config.sample_max_tokens, ctx.seed) if world.first else []
    )
    kept: dict[int, list[str]] = {}

    def look(step: int) -> dict[str, float]:
        placed.gather(whole)
        if not world.first:
            return {}
        kept[step] = continued(whole, tokenizer, config.sample_prompts, config.sample_max_tokens, ctx.seed)
        if config.sample_max_tokens and config.sample_prompts:
            ctx.progress.say(f"step {step + 1}: {config.sample_prompts[0]}{kept[step][0]}".replace("\n", "⏎"))
        if unseen is None:
            return {}
        found = measure(whole, unseen, tokenizer, rows=config.eval_samples, batch=config.batch_size)
        ctx.progress.say(
            f"step {step + 1}: held out {found.bits_per_byte:.4f} bits per byte, perplexity {found.perplexity:,.1f}"
        )
        return {"eval_loss": found.per_token, "bits_per_byte": found.bits_per_byte, "perplexity": found.perplexity}

    habits = Habits(
        config.save_steps,
        config.save_total_limit,
        precision,
        config.ema_decay,
        config.loss_spike_threshold,
        look,
        config.eval_steps,
    )
    ctx.progress.say(
        f"{parameters:,} parameters, {len(steps):,} steps of {config.batch_size * config.gradient_accumulation_steps} rows"
        + (f", {world.size} processes" if world.size > 1 else "")
    )
    metrics: dict[str, Any] = dict(
        train(placed, steps, packed_loss, config.optimizer, habits, scratch=ctx.scratch, progress=ctx.progress)
    )
    placed.gather(whole)
    if not world.first or whole is None:
        return Model(ctx.out)
    save(whole.to("cpu"), tokenizer, model, ctx.out)
    metrics = _describe(ctx, metrics, parameters, unseen, whole, tokenizer, config, model, data, begun, network)
    return Model(
        ctx.out,
        golden=record(ctx.out),
        metrics=metrics,
        about={"format": "hf", "dtype": "float32", "architecture": str(model.about.get("architecture", ""))},
    )


def _require_compiler(config: PretrainConfig, world: World) -> None:
    """MissingDependency where `compile` needs a C++ compiler that is not here."""
    if (
        config.torch_compile
        and world.device.type == "cpu"
        and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    ):
        raise MissingDependency(
            "compile: there is no C++ compiler here; install one, such as g++, or leave compile out"
        )


def _open(
    ctx: Context,
    model: Model,
    data: Dataset,
    held_out: Dataset | None,
    tokenizer: Any,
    world: World,
    config: PretrainConfig,
) -> tuple[Any, Packed, Packed | None, int]:
    """The model to train and the tokens to train on."""
    import torch

    from llmworks.data.store.packed_tokens import Packed
    from llmworks.model.io.load import open_trainable

    torch.manual_seed(ctx.seed)
    network = open_trainable(model.path)
    if not any(True for _ in network.parameters()):
        raise ModelError(f"{model.name}: has no weights to train (an n-gram model is counted, by train.ngram)")
    packed, unseen = Packed(data), Packed(held_out) if held_out is not None else None
    length = check(model, network, tokenizer, data, packed)
    if held_out is not None and unseen is not None:
        check(model, network, tokenizer, held_out, unseen)
    network.to(world.device)
    if config.gradient_checkpointing:
        if not network.supports_gradient_checkpointing:
            raise UserError("config.recompute: this architecture does not have it")
        network.activation_checkpointing_enable({"use_reentrant": False})
    return network, packed, unseen, length


def _steps(
    config: PretrainConfig, world: World, packed: Packed, data: Dataset, length: int, ctx: Context
) -> PackedSteps:
    """The steps of packed rows, shared between processes."""
    from llmworks.train.loop.packed import PackedSteps

    share = share_of(config.batch_size * config.gradient_accumulation_steps, world.count("data"), config.batch_size)
    own = config.batch_size * config.gradient_accumulation_steps // world.count("data")
    if config.parallel.pipeline_parallel_size > 1 and own % share:
        raise UserError(
            f"a step has {own} rows in each process, which are no parts of {share}; with parallel.pipeline the parts"
            " must be alike: make batch divide it"
        )
    steps = PackedSteps(
        packed,
        steps_of(config, packed, data, length),
        rows=share,
        parts=config.batch_size * config.gradient_accumulation_steps // share,
        length=length,
        seed=ctx.seed,
        device=world.device,
        share=(world.at("data"), world.count("data")),
    )
    return steps


def _place(
    config: PretrainConfig, world: World, network: Any, model: Model
) -> tuple[str, Pipelined | Placed, Any | None]:
    """The model spread over processes, and the whole one that the first process looks at."""
    from llmworks.model.io.load import open_trainable
    from llmworks.train.distributed.pipeline import Pipelined
    from llmworks.train.distributed.sharding import place, resolved

    whole = (
        network
        if parallel_whole(config.parallel, world.size)
        else open_trainable(model.path).to(world.device)
        if world.first
        else None
    )
    precision = resolved(config.precision, world.device, spread=config.parallel != Parallel())
    placed = (Pipelined if config.parallel.pipeline_parallel_size > 1 else place)(
        network, config.parallel, world, precision=precision, compiled=config.torch_compile
    )
    return precision, placed, whole


def _describe(
    ctx: Context,
    metrics: dict[str, Any],
    parameters: Any,
    unseen: Packed | None,
    whole: Any,
    tokenizer: Any,
    config: PretrainConfig,
    model: Model,
    data: Dataset,
    begun: list[str],
    network: Any,
) -> dict[str, Any]:
    """Measure the result, write the page, and say what is wrong with it."""
    from llmworks.train.loop.heldout import measure
    from llmworks.train.loop.report import draw, picture
    from llmworks.train.loop.samples import continued

    rows = ctx.progress.read_metrics()
    if ctx.progress.metrics is not None:
        shutil.copyfile(ctx.progress.metrics, ctx.out / "metrics.jsonl")
    (ctx.out / "report").mkdir()
    picture(rows, ctx.out / "report" / "curves.png")
    metrics |= {"parameters": parameters}
    if unseen is not None:
        found = measure(whole, unseen, tokenizer, batch=config.batch_size)
        metrics |= {"bits_per_byte": round(found.bits_per_byte, 5), "perplexity": round(found.perplexity, 5)}
    ended = continued(whole, tokenizer, config.sample_prompts, config.sample_max_tokens, ctx.seed)
    warnings = draw(
        ctx.report,
        f"{model.name} on {data.name}",
        rows,
        metrics,
        config.sample_prompts,
        begun,
        ended,
        network.config.vocab_size,
    )
    for warning in warnings:
        ctx.progress.say(f"warning: {warning}")
    metrics["warnings"] = len(warnings)
    return metrics


def parallel_whole(parallel: Parallel | DataParallel, processes: int) -> bool:
    """Whether each process has all weights."""
    return processes == 1 or (
        parallel.data_parallel == "ddp" and parallel.tensor_parallel_size == parallel.pipeline_parallel_size == 1
    )


def check(model: Model, network: Any, tokenizer: Any, data: Dataset, packed: Any) -> int:
    """Whether the rows may be read by the model; returns their length. Errors: DataError, ModelError."""
    from llmworks.train.loop.packed import same_tokenizer

    same_tokenizer(data, tokenizer, model.name)
    largest = max(int(shard["tokens"].max()) for shard in packed.shards)
    if largest >= network.config.vocab_size:
        raise DataError(
            f"{data.name}: has token {largest:,}, {model.name} has {network.config.vocab_size:,}; pack it with the"
            " model's tokenizer"
        )
    length = max(int((shard["rows"][1:] - shard["rows"][:-1]).max()) for shard in packed.shards)
    reads = getattr(network.config, "max_position_embeddings", length)
    if length > reads:
        raise ModelError(
            f"{data.name}: has rows of {length:,} tokens, {model.name} reads {reads:,}; pack shorter rows, or make a"
            " model with more context"
        )
    return int(data.about.get("length") or length)


def steps_of(config: PretrainConfig, packed: Any, data: Dataset, length: int) -> int:
    """How many steps there are."""
    each = config.batch_size * config.gradient_accumulation_steps
    if not config.num_train_tokens:
        return max(1, round(config.num_train_epochs * (len(packed) // each or 1)))
    tokens = sum(len(shard["tokens"]) for shard in packed.shards)
    return max(1, round(config.num_train_tokens / (tokens / len(packed) * each)))


def save(network: Any, tokenizer: Any, model: Model, out: Path) -> None:
    """Write the model as what it was, its tokenizer beside it."""
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
