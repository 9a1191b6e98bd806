"""Stage `train.scaling`: many small trainings, the law that they follow, and what it says of one that is larger: which
is then run, too.

Says by its report how many parameters and tokens are best for how much work, and how far off the prediction was.
`scaling_law.py` is the mathematics.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, ValidationError, model_validator

from llmworks.core.artifact import Adapter, Config, Dataset, Model, Report, Tokenizer
from llmworks.core.context import Context
from llmworks.core.errors import UserError
from llmworks.core.progress import Progress, write_whole
from llmworks.model.shape import Shape
from llmworks.train.pretrain import PretrainOptimizer

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder
    from llmworks.train.scaling_law import Interval, Law, Run

LEAST = 8  # runs: five coefficients, and enough left over for intervals that hold what they should
ROUND = 64  # rows of an embedding, as model.new has them


class Size(Config):
    """What sizes differ in."""

    width: int = Field(gt=0, description="numbers of a token's state")
    layers: int = Field(gt=0, description="blocks")


class ScalingConfig(Config):
    """The grid of runs, how each is trained, and the run that is predicted."""

    sizes: list[Size] = Field(
        [Size(width=w, layers=n) for w, n in ((32, 1), (32, 2), (64, 2), (96, 3), (128, 4))],
        min_length=3,
        description="sizes of the grid",
    )
    flops: list[float] = Field(
        [1e12, 2e12, 4e12],
        min_length=1,
        description="operations of a run; each size is run with each, with as many tokens as that is",
    )
    target: Size = Field(Size(width=192, layers=6), description="the size that is predicted, then run")
    target_flops: float = Field(1.2e13, gt=0, description="operations of the run that is predicted")
    head_width: int = Field(32, gt=0, description="numbers of a head, in each size")
    shape: Shape = Field(
        Shape(), description="all other switches of the decoder; width, layers, heads and vocabulary are not read"
    )
    batch: int = Field(8, gt=0, description="rows of a step")
    optimizer: PretrainOptimizer = Field(
        PretrainOptimizer(name="muon", learning_rate=0.006),
        description="optimizer; its learning rate is that of `rate_width`",
    )
    rate_width: int = Field(
        128, ge=0, description="learning rates of other widths are by the root of this over theirs; 0: the same for all"
    )
    passes: float = Field(
        4.0,
        gt=0,
        description=(
            "runs that would read the data more often are left out: what is read again teaches less (Muennighoff et al."
            " 2023, arXiv:2305.16264)"
        ),
    )
    least_steps: int = Field(20, gt=1, description="runs of fewer steps are left out")
    look_rows: int = Field(256, ge=0, description="rows of held-out tokens that each run is measured on; 0: all")
    draws: int = Field(200, gt=19, description="times that runs are drawn again for intervals")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for size in (*self.sizes, self.target):
            if size.width % self.head_width:
                raise ValueError(f"width {size.width} is not divided by head_width {self.head_width}")
            try:
                self.shape_of(size, ROUND, ROUND)
            except ValidationError as error:
                raise ValueError(f"width {size.width}, {size.layers} layers: {error.errors()[0]['msg']}") from None
        if len(set(self.flops)) < len(self.flops) or len({(s.width, s.layers) for s in self.sizes}) < len(self.sizes):
            raise ValueError("sizes or flops hold one value twice; each run is one size with one amount of work")
        if self.target_flops <= max(self.flops):
            raise ValueError(
                f"target_flops {self.target_flops:g} is not more than those of the grid, {max(self.flops):g}"
            )
        return self

    def shape_of(self, size: Size, vocabulary: int, length: int) -> Shape:
        """The decoder of a size."""
        more = {
            "width": size.width,
            "layers": size.layers,
            "heads": size.width // self.head_width,
            "kv_heads": 0,
            "head_width": 0,
            "hidden": 0,
            "vocabulary": vocabulary,
            "context": length,
        }
        return Shape.model_validate(self.shape.model_dump() | more)

    def rate_of(self, size: Size) -> float:
        """The learning rate of a size."""
        return self.optimizer.learning_rate * math.sqrt(self.rate_width / size.width if self.rate_width else 1.0)


@dataclass(frozen=True)
class Plan:
    """One run that is to be made."""

    name: str
    size: Size
    shape: Shape
    steps: int
    tokens: int
    work: float
    parameters: int


def scaling(
    config: ScalingConfig, tokenizer: Tokenizer | Model | Adapter, data: Dataset, held_out: Dataset, ctx: Context
) -> Report:
    """Train every size with every amount of work, fit L(N, D) and the parabolas, predict the target, run it, and
    compare.

    What was trained before a kill is not trained again. Errors: UserError where too few runs are left; DataError as
    `train.pretrain`.
    """
    from llmworks.data.store.packed_tokens import Packed
    from llmworks.tokenize.chat.named import tokenizer_of
    from llmworks.tokenize.load import ids_of
    from llmworks.train import scaling_law as laws
    from llmworks.train.loop.packed import same_tokenizer

    loaded = tokenizer_of(tokenizer)
    for given in (data, held_out):
        same_tokenizer(given, loaded, tokenizer.name)
    packed, unseen = Packed(data), Packed(held_out)
    vocabulary = -(-ids_of(loaded) // ROUND) * ROUND
    length = int(data.about.get("length") or max(int((s["rows"][1:] - s["rows"][:-1]).max()) for s in packed.shards))
    there = sum(len(s["tokens"]) for s in packed.shards)
    plans, left_out = grid(config, vocabulary, length, there, len(packed))
    target, why = planned(config, config.target, config.target_flops, vocabulary, length, there, len(packed))
    if target is None:
        raise UserError(f"the target ({why}) cannot be run; change target_flops, passes or the data")
    work = sum(p.work for p in plans)
    ctx.progress.say(
        f"{len(plans)} runs of {work:.2g} operations, then the target of {target.work:.2g}"
        + (f"; {len(left_out)} left out" if left_out else "")
    )
    runs = [
        train_one(config, plan, packed, unseen, loaded, ctx, f"{i + 1} of {len(plans)}") for i, plan in enumerate(plans)
    ]
    law = laws.fit(runs, config.draws, ctx.seed)
    expected = law.interval(target.parameters, target.tokens)
    ctx.progress.say(
        f"the target is expected at {expected.value:.4f} nats a token ({expected.low:.4f} to {expected.high:.4f})"
    )
    reached = train_one(
        config, replace(target, name=f"target-{target.name}"), packed, unseen, loaded, ctx, "the target"
    )
    tell(ctx, config, plans, runs, left_out, law, laws.valleys(runs, config.draws, ctx.seed), target, expected, reached)
    return _report_of(runs, law, expected, ctx, reached)


def _report_of(runs: list[Run], law: Law, expected: Interval, ctx: Context, reached: Run) -> Report:
    """The report with its figures."""
    metrics = {
        "runs": len(runs),
        "alpha": law.alpha,
        "beta": law.beta,
        "floor": law.floor,
        "predicted": expected.value,
        "low": expected.low,
        "high": expected.high,
    }
    return Report(
        ctx.out,
        metrics={
            **metrics,
            "loss": reached.loss,
            "off": abs(expected.value / reached.loss - 1),
            "within": int(expected.low <= reached.loss <= expected.high),
        },
    )


def grid(
    config: ScalingConfig, vocabulary: int, length: int, tokens: int, rows: int
) -> tuple[list[Plan], list[tuple[str, str]]]:
    """The runs that are made, and those that are left out, with the reason.

    Errors: UserError for fewer than a law needs.
    """
    plans: list[Plan] = []
    left_out: list[tuple[str, str]] = []
    for flops in config.flops:
        for size in config.sizes:
            plan, why = planned(config, size, flops, vocabulary, length, tokens, rows)
            if plan is not None and any(p.shape == plan.shape and p.steps == plan.steps for p in plans):
                plan, why = None, "as many steps as another run of this size"
            if plan is not None:
                plans.append(plan)
            else:
                left_out.append((f"width {size.width}, {size.layers} layers, {flops:.2g} operations", why))
    if len(plans) < LEAST:
        first = f"; the first that is not: {left_out[0][0]} ({left_out[0][1]})" if left_out else ""
        raise UserError(
            f"{len(plans)} runs of {len(config.flops) * len(config.sizes)} are left, a law needs {LEAST}{first}"
        )
    if min(len({p.parameters for p in plans}), len({p.tokens for p in plans})) < 3:
        raise UserError(
            "the runs that are left have fewer than three sizes, or amounts of tokens; give more sizes or more flops"
        )
    return plans, left_out


def planned(
    config: ScalingConfig, size: Size, flops: float, vocabulary: int, length: int, tokens: int, rows: int
) -> tuple[Plan | None, str]:
    """A run of so many operations: forward and twice that backward, of matrix products. Or None, and why not."""
    from llmworks.model.anatomy.parts import parts_of

    shape = config.shape_of(size, vocabulary, length)
    parts = parts_of(shape, length // 2)
    each = 3 * sum(part.work for part in parts)
    per_step = tokens / rows * config.batch
    steps = round(flops / each / per_step)
    if steps < config.least_steps:
        return None, f"{steps} steps are fewer than least_steps {config.least_steps}"
    read = steps * per_step
    if read > config.passes * tokens:
        return None, f"reads the data {read / tokens:.1f} times, more than passes {config.passes:g}"
    return (
        Plan(
            f"{size.width}x{size.layers}-{flops:.17g}",
            size,
            shape,
            steps,
            round(read),
            each * read,
            sum(part.parameters for part in parts),
        ),
        "",
    )


def train_one(
    config: ScalingConfig, plan: Plan, packed: Any, unseen: Any, tokenizer: Any, ctx: Context, which: str
) -> Run:
    """One run, or what is left of it from before."""
    import torch

    from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
    from llmworks.train.loop.heldout import measure
    from llmworks.train.loop.loop import Habits, train
    from llmworks.train.loop.packed import PackedSteps, packed_loss
    from llmworks.train.scaling_law import Run

    folder = ctx.scratch / plan.name
    done = folder / "run.json"
    if done.exists():
        return Run(**json.loads(done.read_text(encoding="utf-8")))
    folder.mkdir(exist_ok=True)
    ctx.progress.say(
        f"{which}: width {plan.size.width}, {plan.size.layers} layers, {plan.parameters:,} parameters, {plan.tokens:,}"
        " tokens"
    )
    torch.manual_seed(ctx.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network: Any = DecoderForCausalLM(DecoderConfig(shape=plan.shape.model_dump()))
    network.to(device)
    steps = PackedSteps(
        packed, plan.steps, rows=config.batch, parts=1, length=plan.shape.context, seed=ctx.seed, device=device
    )
    optimizer = config.optimizer.model_copy(update={"learning_rate": config.rate_of(plan.size)})
    progress = Progress(folder / "metrics.jsonl", stream=ctx.progress.stream, quiet=ctx.progress.quiet)
    train(network, steps, packed_loss, optimizer, Habits(checkpoint_every=200), scratch=folder, progress=progress)
    loss = measure(network, unseen, tokenizer, rows=config.look_rows, batch=config.batch).per_token
    run = Run(plan.parameters, plan.tokens, plan.work, loss)
    write_whole(done, json.dumps(asdict(run)))
    ctx.progress.metric(run=plan.name, **asdict(run))
    return run


def tell(
    ctx: Context,
    config: ScalingConfig,
    plans: list[Plan],
    runs: list[Run],
    left_out: list[tuple[str, str]],
    law: Law,
    valleys: list[Any],
    target: Plan,
    expected: Interval,
    reached: Run,
) -> None:
    """Fill the report."""
    report = ctx.report
    report.title = f"Scaling law of {len(runs)} runs"
    off, inside = expected.value / reached.loss - 1, expected.low <= reached.loss <= expected.high
    report.lead = (
        f"L(N, D) = {law.floor:.3f} + {law.a:.4g} / N^{law.alpha:.3f} + {law.b:.4g} / D^{law.beta:.3f}. The run of"
        f" {target.work:.2g} operations, {target.work / max(config.flops):.1f} times the largest of the grid, was"
        f" expected at {expected.value:.4f} nats a token ({expected.low:.4f} to {expected.high:.4f}) and reached"
        f" {reached.loss:.4f}: {abs(off):.2%} {'below' if off > 0 else 'above'} what was expected,"
        f" {'within' if inside else 'outside of'} the interval."
    )
    ctx.progress.say(report.lead)
    best, most = law.best(target.work, target.work / (target.parameters * target.tokens))
    report.text(
        "What is best",
        f"For {target.work:.2g} operations the law has its least loss at {best:,.0f} parameters and {most:,.0f} tokens,"
        f" {most / best:,.0f} for each parameter. The target has {target.parameters:,} parameters and {target.tokens:,}"
        " tokens.",
    )
    _describe_runs(report, plans, target, runs, reached, law, config)
    _describe_valleys(valleys, report, runs, law)
    ends = sorted((r.loss, law.at(r.parameters, r.tokens)) for r in [*runs, reached])
    report.curves(
        "Measured and of the law",
        {"runs": [(a, b) for a, b in ends], "equal": [(ends[0][0], ends[0][0]), (ends[-1][0], ends[-1][0])]},
        x="measured, nats per token",
        y="of the law",
    )
    if left_out:
        report.table("Left out", ("run", "why"), left_out)
    report.data = {
        "law": {name: asdict(law.of(name)) for name in ("floor", "a", "alpha", "b", "beta")},
        "runs": [asdict(r) for r in runs],
        "target": asdict(reached),
        "predicted": asdict(expected),
        "within": inside,
        "best": {"parameters": best, "tokens": most},
    }


def _describe_runs(
    report: ReportBuilder,
    plans: list[Plan],
    target: Plan,
    runs: list[Run],
    reached: Run,
    law: Law,
    config: ScalingConfig,
) -> None:
    """Tables of the law's coefficients and of all runs."""
    report.table(
        "The law",
        ("coefficient", "value", "low", "high"),
        [(name, i.value, i.low, i.high) for name in ("floor", "a", "alpha", "b", "beta") for i in (law.of(name),)],
        note=(
            "Intervals hold nine of ten of the values that are found when runs are drawn again with replacement."
            " Parameters are all of them, the embedding once."
        ),
    )
    rows = [
        (p.name, p.parameters, p.tokens, p.work, config.rate_of(p.size), r.loss, law.at(p.parameters, p.tokens))
        for p, r in zip([*plans, target], [*runs, reached], strict=True)
    ]
    report.table(
        "Runs",
        ("run", "parameters", "tokens", "operations", "learning rate", "loss", "of the law"),
        rows,
        note="The last is the target, which the law has not seen.",
    )


def _describe_valleys(valleys: list[Any], report: ReportBuilder, runs: list[Run], law: Law) -> None:
    """Curves of equal work with their parabolas, and the best size for each."""
    series = {
        f"{v.work:.2g} operations": sorted(
            (math.log10(r.parameters), r.loss) for r in runs if r.work / v.work - 1 < 0.1 and v.work / r.work - 1 < 0.1
        )
        for v in valleys
    }
    for v in valleys:
        xs = [x for x, _ in series[f"{v.work:.2g} operations"]]
        series[f"{v.work:.2g}, parabola"] = [
            (x, v.curve[0] * (t := x * math.log(10)) ** 2 + v.curve[1] * t + v.curve[2])
            for x in (xs[0] + i * (xs[-1] - xs[0]) / 40 for i in range(41))
        ]
    if series:
        report.curves("Equal work", series, x="log10 of parameters", y="nats per token")
    found = [v for v in valleys if v.parameters is not None]
    if valleys:
        report.table(
            "The best size for equal work",
            ("operations", "parameters, of the parabola", "low", "high", "of the law"),
            [
                (
                    v.work,
                    v.parameters.value if v.parameters else None,
                    v.parameters.low if v.parameters else None,
                    v.parameters.high if v.parameters else None,
                    law.best(v.work)[0],
                )
                for v in valleys
            ],
            note="None where the parabola has no least loss among the sizes that were run.",
        )
    if len(found) > 1:
        from llmworks.train.scaling_law import power

        factor, exponent = power([v.work for v in found], [v.parameters.value for v in found])
        report.text(
            "By the parabolas",
            f"The best number of parameters grows as {factor:.3g} times operations to the {exponent:.2f} (Hoffmann et"
            " al. found 0.49).",
        )
