"""Stage `train.sft`: supervised fine-tuning on conversations, completions or texts: an adapter beside frozen weights, or all weights, or some.

Only answers are learned. Ends by answering held-out questions as before and after, and says so when nothing changed or answers degenerate.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from llmworks.artifact import Adapter, Config, Dataset, Model
from llmworks.context import Context
from llmworks.data.doctor import require_template, uses_of
from llmworks.data.rows import Row
from llmworks.errors import DataError, GoldenMismatch, ModelError, TrainingError, UserError
from llmworks.tokenize.named import CHOICES, Template, use_template
from llmworks.train.lora import LoraConfig
from llmworks.train.parallel import Parallel, share_of
from llmworks.train.rows import training_rows
from llmworks.train.schedule import OptimizerConfig

if TYPE_CHECKING:
    from llmworks.train.examples import Example
    from llmworks.train.tuned import Tuned
    from llmworks.train.world import World

RATES = {"full": 5e-5, "prompt": 0.03, "prefix": 0.01}  # where none is given: an adapter's would break all weights, and move a soft prompt too slowly


class SoftConfig(Config):
    """A soft prompt."""

    tokens: int = Field(16, gt=0, le=1024, description="vectors that stand before every text")
    text: str = Field("", description="prompt: what they begin as, cut or repeated to their number; empty: tokens that are drawn")


class SftConfig(Config):
    """What is trained, on how much, and what the tuned model's template can do."""

    method: Literal["lora", "full", "prompt", "prefix"] = Field("lora", description="lora: an adapter, all else is frozen; full: the weights themselves, those that `freeze` leaves; prompt, prefix: vectors before every text (peft), a few thousand numbers")
    lora: LoraConfig = Field(LoraConfig(), description="the adapter")
    soft: SoftConfig = Field(SoftConfig(), description="the vectors of prompt and prefix")
    freeze: list[str] = Field([], description="full: weights that stay as they are, by names in the model's files with * and [0-9], as model.embed_tokens.* or model.layers.[0-9].*")
    epochs: float = Field(2.0, gt=0, description="passes over the data; may be a fraction")
    batch_size: int = Field(4, gt=0, description="rows of data per part of a step")
    accumulation: int = Field(1, gt=0, description="parts per step; the step's loss is normalised over all their label tokens")
    learn: Literal["all", "last"] = Field("all", description="which answers of a conversation are learned")
    max_tokens: int = Field(2048, gt=1, description="the longest row that is read whole")
    longer: Literal["set-aside", "cut", "refuse"] = Field("set-aside", description="rows longer than max_tokens: set aside and counted; cut at the end, so that a cut answer teaches no end; or the training does not begin")
    template: Template = Field("keep", description=f"the chat template that is trained with and saved. {CHOICES}")
    golden: str = Field("keep", pattern=r"^(keep|renew: .+)$", description="keep: the base's golden tokens must replay; 'renew: REASON' when the template or vocabulary changes")
    neftune: float = Field(0.0, ge=0, description="noise on embedded tokens while training, 5 is usual; 0: none (arXiv:2310.05914)")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description=f"learning rate schedule and optimizer; the learning rate, if not given, is 0.001, of method full {RATES['full']:g}, prompt {RATES['prompt']:g}, prefix {RATES['prefix']:g}")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="of products, under autocast; weights that are trained stay fp32. auto: bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU, where the others are many times slower")
    recompute: bool = Field(False, description="keep no activations of blocks, compute them again backward: less memory, a third more time")
    parallel: Parallel = Field(Parallel(), description="what processes share, where several are started (--nproc, torchrun); a step is the same whatever their number")
    look_every: int = Field(0, ge=0, description="steps between two looks at how well held-out answers are predicted; 0: at the end only")
    look_rows: int = Field(64, gt=0, description="held-out rows of a look")
    best: Literal["", "held_out", "accuracy"] = Field("", description="which look's weights are saved: the one with the lowest loss (held_out), or with the most tokens foreseen (accuracy); empty: the last step's")
    patience: int = Field(0, ge=0, description="end after so many looks that are no better than the best; 0: never")
    checkpoint_every: int = Field(20, gt=0, description="steps between two checkpoints")
    samples: int = Field(4, ge=0, description="held-out questions answered before and after")

    @model_validator(mode="before")
    @classmethod
    def _rate(cls, values: Any) -> Any:
        given = values.get("optimizer", {}) if isinstance(values, dict) else None
        if isinstance(given, dict) and values.get("method") in RATES and "learning_rate" not in given:
            return {**values, "optimizer": {**given, "learning_rate": RATES[values["method"]]}}
        return values

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.freeze and self.method != "full":
            raise ValueError("freeze is for method full; an adapter freezes all weights")
        if self.method != "lora" and self.lora != LoraConfig():
            raise ValueError(f"lora is for method lora; with {self.method} there is no adapter")
        if self.method not in ("prompt", "prefix") and self.soft != SoftConfig():
            raise ValueError(f"soft is for methods prompt and prefix, not for {self.method}")
        if self.method == "prefix" and self.soft.text:
            raise ValueError("soft.text is what a prompt begins as; a prefix begins at random")
        if self.method in ("prompt", "prefix") and (self.neftune or self.recompute or self.parallel.data == "shard"):
            raise ValueError(f"method {self.method} has no neftune, no recompute, and is not sharded")
        if self.patience and not self.best:
            raise ValueError("patience needs `best`, the metric that is to get better")
        if self.best and self.parallel.data == "shard":
            raise ValueError("best keeps whole weights; set parallel.data to replicate")
        if self.lora.base != "as-is" and self.parallel.data == "shard":
            raise ValueError("lora.base nf4 cannot be sharded; set parallel.data to replicate")
        if self.parallel.tensor > 1 or self.parallel.pipeline > 1:
            raise ValueError("parallel: a fine-tuning divides rows and weights (data), not matrices or blocks")
        return self

    @property
    def makes(self) -> type[Adapter] | type[Model]:
        """The kind of artifact that is made."""
        return Model if self.method == "full" else Adapter


def sft(config: SftConfig, model: Model, data: Dataset, ctx: Context, held_out: Dataset | None = None) -> Adapter | Model:
    """Train on the rows of `data`: conversations (data.chat), documents, or rows of `prompt` and `completion`.

    Errors: DataError when no row can be trained on; GoldenMismatch when the template changes and golden is "keep";
    TrainingError when the loss stops being a number.
    """
    from llmworks.train import world

    if model.format != "hf":
        raise ModelError(f"{model.name}: training needs a Hugging Face directory, this is {model.format}; convert it with the stage model.from_gguf")
    if (config.best or config.look_every) and held_out is None:
        raise UserError(f"config.{'best' if config.best else 'look_every'} looks at held-out rows; give them as held_out")
    with world.opened(config.parallel) as here:
        try:
            return tune(config, model, data, ctx, held_out, here)
        except RuntimeError as error:
            if "allocate memory" not in str(error) and "out of memory" not in str(error):
                raise
            raise TrainingError("there is too little memory for a step; make batch_size smaller and accumulation larger, set recompute, or keep the base in fewer bits (lora.base)") from error


@dataclass(frozen=True)
class Material:
    """What is learned from: the rows as examples, those set aside with the reason, the held-out rows that are looked at, and questions that are answered."""

    tokenizer: Any
    stops: Sequence[int]
    examples: list[Example]
    set_aside: list[tuple[str, str]]
    unseen: list[Example]
    questions: list[Row]


def read(config: SftConfig, model: Model, data: Dataset, held_out: Dataset | None) -> Material:
    """Rows as the model is given them. Errors: DataError, GoldenMismatch, and ModelError for a template that would damage them."""
    from llmworks.tokenize.load import load_tokenizer, stop_ids
    from llmworks.train.answers import answerable

    tokenizer = load_tokenizer(model.path)
    stops = stop_ids(model.path, tokenizer)
    use_template(tokenizer, config.template)
    check_golden(config, model, tokenizer, stops)
    rows = training_rows(data)
    if "messages" in rows[0]:
        require_template(model.name, tokenizer, stops, uses_of(rows))
    most = context_of(model) - (config.soft.tokens if config.method in ("prompt", "prefix") else 0)
    examples, set_aside = make_examples(tokenizer, rows, config, data.name, most)
    set_aside = [*((str(id), str(why)) for id, why in data.about.get("lost", [])), *set_aside]  # those that a teacher did not answer
    unseen = make_examples(tokenizer, training_rows(held_out)[: config.look_rows], config, held_out.name, most)[0] if held_out is not None else []
    questions = answerable(held_out)[: config.samples] if held_out is not None else []
    return Material(tokenizer, stops, examples, set_aside, unseen, questions)


def tune(config: SftConfig, model: Model, data: Dataset, ctx: Context, held_out: Dataset | None, world: World, loss_of: Callable[[Tuned, Material], Any] | None = None) -> Adapter | Model:
    """`sft` in one of the processes; the first looks, answers and saves. `loss_of`: makes the loss of a batch, where it is not that of next tokens."""
    import torch

    from llmworks.generate.engines.torch import TorchEngine
    from llmworks.train.answers import answers, predicted
    from llmworks.train.best import Best
    from llmworks.train.examples import Steps
    from llmworks.train.loop import Habits, train
    from llmworks.train.loss import Noise, next_token_loss
    from llmworks.train.packed import packed_loss
    from llmworks.train.placement import cast, place, resolved
    from llmworks.train.pretrain import parallel_whole
    from llmworks.train.tuned import open_tuned

    material = read(config, model, data, held_out)
    say(ctx, config, material)
    tuned = open_tuned(model.path)
    before: list[str] = []
    if material.questions and world.first:  # on the CPU, where the engine reads
        before = answers(TorchEngine(tuned.network, material.tokenizer, material.stops, model.name), material.questions, ctx.scratch / "before.json")
    torch.manual_seed(ctx.seed)
    prepare(tuned, config)
    precision = resolved(config.precision, world.device, spread=config.parallel.data == "shard")
    if precision != "fp32" and config.method == "lora" and config.parallel.data != "shard":  # whose pieces are of one format
        tuned.narrow(precision)
    network = tuned.network.to(world.device)
    if config.recompute:
        if not network.supports_gradient_checkpointing:
            raise UserError("config.recompute: this architecture does not have it")
        network.activation_checkpointing_enable({"use_reentrant": False})
    loss: Any = loss_of(tuned, material) if loss_of is not None else packed_loss if tuned.free else next_token_loss
    if config.neftune:
        loss = Noise(network, config.neftune).around(loss)
    each, shares = config.batch_size * config.accumulation, world.count("data")
    size = share_of(each, shares, config.batch_size)
    steps = Steps(material.examples, epochs=config.epochs, size=config.batch_size, accumulation=config.accumulation, seed=ctx.seed, free=tuned.free, device=world.device, share=(world.at("data"), shares), cut=size)
    placed = place(network, config.parallel, world, precision=precision)
    whole = tuned
    if not parallel_whole(config.parallel, world.size) and world.first:
        whole = open_tuned(model.path)
        prepare(whole, config)
        whole.network.to(world.device)

    def look(step: int) -> dict[str, float]:
        placed.gather(whole.network if world.first else None)
        if not world.first:
            return {}
        with cast(world.device, precision):
            found = predicted(whole.network, material.unseen, free=tuned.free, size=config.batch_size, device=world.device)
        ctx.progress.say(f"step {step + 1}: held-out answers {found['held_out']:.4f} nats a token, {found['accuracy']:.1%} foreseen")
        return found

    best = Best(config.best, ctx.scratch, config.patience) if config.best else None
    habits = Habits(config.checkpoint_every, precision=precision, look=look if material.unseen else None, look_every=config.look_every, best=best, faster={"b": config.lora.faster} if config.lora.faster > 1 else {})
    metrics: dict[str, Any] = dict(train(placed, steps, loss, config.optimizer, habits, scratch=ctx.scratch, progress=ctx.progress))
    placed.gather(whole.network if world.first else None)
    if not world.first:
        return config.makes(ctx.out)
    whole.network.to("cpu").eval()
    return _finish(config, model, material, ctx, whole, before, metrics, None if best is None else best.step)


def _finish(config: SftConfig, model: Model, material: Material, ctx: Context, tuned: Tuned, before: list[str], metrics: dict[str, Any], best: int | None) -> Adapter | Model:
    """Save, answer again, report, and record golden tokens."""
    from llmworks.generate.engines.torch import TorchEngine
    from llmworks.model.golden import record as recorded
    from llmworks.model.golden import torch_logits
    from llmworks.tokenize.golden import record
    from llmworks.train.answers import answers, write_report, write_samples

    rows = ctx.progress.read_metrics()
    metrics |= {"rows": len(material.examples), "set_aside": len(material.set_aside), "trained_parameters": tuned.trained}
    looks = [row for row in rows if "held_out" in row]
    if looks:
        chosen = next((row for row in looks if row["step"] == best), looks[-1])
        metrics |= {"held_out": round(chosen["held_out"], 5), "accuracy": round(chosen["accuracy"], 5), "best_step": chosen["step"]}
    tuned.save(ctx.out, model.ref or model.name)
    material.tokenizer.save_pretrained(ctx.out)
    if ctx.progress.metrics is not None:
        shutil.copyfile(ctx.progress.metrics, ctx.out / "metrics.jsonl")
    if material.set_aside:
        (ctx.out / "set_aside.jsonl").write_text("".join(json.dumps({"id": id, "reason": reason}, ensure_ascii=False) + "\n" for id, reason in material.set_aside), encoding="utf-8")
    engine = TorchEngine.open(model.path, adapter=ctx.out) if tuned.soft or tuned.narrowed else TorchEngine(tuned.network, material.tokenizer, material.stops, model.name)
    after = answers(engine, material.questions, None) if material.questions else []
    write_report(ctx.report, model.name, rows, metrics, config.model_dump(), material.set_aside)
    warnings = write_samples(ctx.report, material.questions, before, after)
    for warning in warnings:
        ctx.progress.say(f"warning: {warning}")
    metrics["warnings"] = len(warnings)
    if config.method == "full":  # of what was written, in its number format
        return Model(ctx.out, metrics=metrics, golden=recorded(ctx.out), about={"format": "hf", "architecture": str(model.about.get("architecture", ""))})
    golden = record(material.tokenizer, material.stops, torch_logits(engine.model))
    return Adapter(ctx.out, metrics=metrics, golden=golden, about={"base": model.digest, "method": config.method, **({"rank": config.lora.rank} if config.method == "lora" else {}), "template": config.template, "base_kept": config.lora.base})


def prepare(tuned: Any, config: SftConfig) -> None:
    """Choose what is trained. Seed torch before: an adapter begins at random."""
    if config.method == "lora":
        tuned.adapt(config.lora)
    elif config.method in ("prompt", "prefix"):
        tuned.put_before(config.method, config.soft.tokens, config.soft.text)
    else:
        tuned.freeze(config.freeze)


def make_examples(tokenizer: Any, rows: Sequence[Row], config: SftConfig, name: str = "the data", most: int = 1 << 30) -> tuple[list[Example], list[tuple[str, str]]]:
    """(examples, (id, reason) of the rows set aside). `most`: tokens that the model reads. DataError when none is left, or for one that is too long where that is refused."""
    from llmworks.train.examples import make_example

    examples: list[Example] = []
    set_aside: list[tuple[str, str]] = []
    for row in rows:
        made = make_example(tokenizer, row, min(config.max_tokens, most), last=config.learn == "last", cut=config.longer == "cut")
        if isinstance(made, str):
            if config.longer == "refuse" and "longer than max_tokens" in made:
                raise DataError(f"{name}: row {row['id']!r}: {made}; set max_tokens higher, or longer to set-aside or cut")
            set_aside.append((str(row["id"]), made))
        else:
            examples.append(made)
    if not examples:
        raise DataError(f"{name}: none of {len(rows)} rows can be learned; the first: {set_aside[0][1] if set_aside else 'no rows'}")
    return examples, set_aside


def context_of(model: Model) -> int:
    """Tokens that a model reads."""
    from llmworks.tokenize.load import read_json

    config = read_json(model.path / "config.json")
    found = config.get("max_position_embeddings") or config.get("n_positions") or (config.get("shape") or {}).get("context")
    return int(found) if isinstance(found, int) and found > 0 else 1 << 30


def say(ctx: Context, config: SftConfig, material: Material) -> None:
    """What is about to be learned."""
    examples, set_aside = material.examples, material.set_aside
    tokens, learned = sum(len(e.ids) for e in examples), sum(e.labels for e in examples)
    cut = sum(len(e.ids) == config.max_tokens for e in examples) if config.longer == "cut" else 0
    ctx.progress.say(f"{len(examples)} rows, {tokens:,} tokens, {learned:,} of them learned" + (f"; {len(set_aside)} set aside" if set_aside else "") + (f"; up to {cut} cut" if cut else ""))


def check_golden(config: SftConfig, model: Model, tokenizer: Any, stops: Sequence[int]) -> None:
    """Whether the model's golden tokens replay, or may change. GoldenMismatch, with what to do, where neither is so."""
    from llmworks.tokenize.golden import require

    if model.golden is not None and config.golden == "keep":
        try:
            require(model.golden, tokenizer, stops, step="train.sft (golden: keep)")
        except GoldenMismatch as error:
            raise GoldenMismatch(f"{error}; if the template is to change (template: {config.template}), set golden to 'renew: WHY'") from None

