"""Stage `train.scaling`: fit a scaling law to many small trainings, predict a larger one, and run it to check.

Reports the compute-optimal numbers of parameters and tokens, and the error of the prediction. The mathematics is in
`scaling_law.py`.
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
    """Train every size with every compute budget, fit the scaling law, predict the target run, run it, and compare.

    Fits L(N, D) and IsoFLOP parabolas. Finished runs are not repeated after an interruption.

    Errors: UserError if too few runs remain; DataError as in `train.pretrain`.
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
        raise UserError(f"the target ({why}) cannot be run; change target_flops, max_epochs or the data")
    work = sum(p.work for p in plans)
    ctx.progress.say(
        f"{len(plans)} runs of {work:.2g} FLOPs in total, then the target of {target.work:.2g} FLOPs"
        + (f"; {len(left_out)} skipped" if left_out else "")
    )
    runs = [
        train_one(config, plan, packed, unseen, loaded, ctx, f"run {i + 1} of {len(plans)}")
        for i, plan in enumerate(plans)
    ]
    law = laws.fit(runs, config.bootstrap_iters, ctx.seed)
    expected = law.interval(target.parameters, target.tokens)
    ctx.progress.say(
        f"predicted loss of the target: {expected.value:.4f} nats per token ({expected.low:.4f} to {expected.high:.4f})"
    )
    reached = train_one(
        config, replace(target, name=f"target-{target.name}"), packed, unseen, loaded, ctx, "target run"
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
    """Return the report artifact with its metrics."""
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
    """Train one model, or return its result if it is already finished."""
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
        f"{which}: hidden size {plan.size.hidden_size}, {plan.size.num_hidden_layers} layers, {plan.parameters:,}"
        f" parameters, {plan.tokens:,} tokens"
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
