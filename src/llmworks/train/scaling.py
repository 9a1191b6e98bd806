"""Stage `train.scaling`: many small trainings, the law that they follow, and what it says of one that is larger: which
is then run, too.

Says by its report how many parameters and tokens are best for how much work, and how far off the prediction was.
`scaling_law.py` is the mathematics.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from llmworks.core.artifact import Adapter, Dataset, Model, Report, Tokenizer
from llmworks.core.context import Context
from llmworks.core.errors import UserError
from llmworks.core.progress import Progress, write_whole
from llmworks.train.scaling_plan import ROUND, Plan, ScalingConfig, grid, planned
from llmworks.train.scaling_report import tell

if TYPE_CHECKING:
    from llmworks.train.scaling_law import Interval, Law, Run


def scaling(
    config: ScalingConfig, tokenizer: Tokenizer | Model | Adapter, data: Dataset, eval_data: Dataset, ctx: Context
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
    for given in (data, eval_data):
        same_tokenizer(given, loaded, tokenizer.name)
    packed, unseen = Packed(data), Packed(eval_data)
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
    law = laws.fit(runs, config.bootstrap_iters, ctx.seed)
    expected = law.interval(target.parameters, target.tokens)
    ctx.progress.say(
        f"the target is expected at {expected.value:.4f} nats a token ({expected.low:.4f} to {expected.high:.4f})"
    )
    reached = train_one(
        config, replace(target, name=f"target-{target.name}"), packed, unseen, loaded, ctx, "the target"
    )
    tell(
        ctx,
        config,
        plans,
        runs,
        left_out,
        law,
        laws.valleys(runs, config.bootstrap_iters, ctx.seed),
        target,
        expected,
        reached,
    )
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
        f"{which}: width {plan.size.hidden_size}, {plan.size.num_hidden_layers} layers, {plan.parameters:,} parameters, {plan.tokens:,}"
        " tokens"
    )
    torch.manual_seed(ctx.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network: Any = DecoderForCausalLM(DecoderConfig(shape=plan.shape.model_dump()))
    network.to(device)
    steps = PackedSteps(
        packed,
        plan.steps,
        rows=config.batch_size,
        parts=1,
        length=plan.shape.max_position_embeddings,
        seed=ctx.seed,
        device=device,
    )
    optimizer = config.optimizer.model_copy(update={"learning_rate": config.rate_of(plan.size)})
    progress = Progress(folder / "metrics.jsonl", stream=ctx.progress.stream, quiet=ctx.progress.quiet)
    train(network, steps, packed_loss, optimizer, Habits(checkpoint_every=200), scratch=folder, progress=progress)
    loss = measure(network, unseen, tokenizer, rows=config.eval_samples, batch=config.batch_size).per_token
    run = Run(plan.parameters, plan.tokens, plan.work, loss)
    write_whole(done, json.dumps(asdict(run)))
    ctx.progress.metric(run=plan.name, **asdict(run))
    return run
