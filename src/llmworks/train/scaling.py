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
from llmworks.core.progress import Progress, write_atomic
from llmworks.train.scaling_plan import VOCAB_MULTIPLE, ScalingConfig, ScalingRunPlan, plan_run, plan_runs
from llmworks.train.scaling_report import write_report

if TYPE_CHECKING:
    from llmworks.train.scaling_law import ScalingInterval, ScalingLaw, ScalingRun


def scaling(
    config: ScalingConfig, tokenizer: Tokenizer | Model | Adapter, data: Dataset, eval_data: Dataset, ctx: Context
) -> Report:
    """Train every size with every compute budget, fit the scaling law, predict the target run, run it, and compare.

    Fits L(N, D) and IsoFLOP parabolas. Finished runs are not repeated after an interruption.

    Errors: UserError if too few runs remain; DataError as in `train.pretrain`.
    """
    from llmworks.data.store.packed_tokens import PackedDataset
    from llmworks.tokenize.chat.named_templates import load_model_tokenizer
    from llmworks.tokenize.load import count_embedding_rows
    from llmworks.train import scaling_law as laws
    from llmworks.train.loop.packed_steps import check_tokenizer

    loaded = load_model_tokenizer(tokenizer)
    for given in (data, eval_data):
        check_tokenizer(given, loaded, tokenizer.name)
    packed, unseen = PackedDataset(data), PackedDataset(eval_data)
    vocabulary = -(-count_embedding_rows(loaded) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    length = int(data.about.get("length") or max(int((s["rows"][1:] - s["rows"][:-1]).max()) for s in packed.shards))
    num_tokens = sum(len(s["tokens"]) for s in packed.shards)
    plans, skipped = plan_runs(config, vocabulary, length, num_tokens, len(packed))
    target, why = plan_run(config, config.target, config.target_flops, vocabulary, length, num_tokens, len(packed))
    if target is None:
        raise UserError(f"the target ({why}) cannot be run; change target_flops, max_epochs or the data")
    work = sum(p.flops for p in plans)
    ctx.progress.log(
        f"{len(plans)} runs of {work:.2g} FLOPs in total, then the target of {target.flops:.2g} FLOPs"
        + (f"; {len(skipped)} skipped" if skipped else "")
    )
    runs = [
        train_one(config, plan, packed, unseen, loaded, ctx, f"run {i + 1} of {len(plans)}")
        for i, plan in enumerate(plans)
    ]
    law = laws.fit_law(runs, config.bootstrap_iters, ctx.seed)
    predicted = law.predict_interval(target.parameters, target.tokens)
    ctx.progress.log(
        f"predicted loss of the target: {predicted.value:.4f} nats per token ({predicted.low:.4f} to"
        f" {predicted.high:.4f})"
    )
    measured = train_one(
        config, replace(target, name=f"target-{target.name}"), packed, unseen, loaded, ctx, "target run"
    )
    write_report(
        ctx,
        config,
        plans,
        runs,
        skipped,
        law,
        laws.fit_isoflop_curves(runs, config.bootstrap_iters, ctx.seed),
        target,
        predicted,
        measured,
    )
    return _create_report(runs, law, predicted, ctx, measured)


def _create_report(
    runs: list[ScalingRun], law: ScalingLaw, predicted: ScalingInterval, ctx: Context, measured: ScalingRun
) -> Report:
    """Return the report artifact with its metrics."""
    metrics = {
        "runs": len(runs),
        "alpha": law.alpha,
        "beta": law.beta,
        "floor": law.floor,
        "predicted": predicted.value,
        "low": predicted.low,
        "high": predicted.high,
    }
    return Report(
        ctx.out,
        metrics={
            **metrics,
            "loss": measured.loss,
            "off": abs(predicted.value / measured.loss - 1),
            "within": int(predicted.low <= measured.loss <= predicted.high),
        },
    )


def train_one(
    config: ScalingConfig, plan: ScalingRunPlan, packed: Any, unseen: Any, tokenizer: Any, ctx: Context, which: str
) -> ScalingRun:
    """Train one model, or return its result if it is already finished."""
    import torch

    from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
    from llmworks.train.loop.eval_loss import evaluate_loss
    from llmworks.train.loop.loop import LoopConfig, train
    from llmworks.train.loop.packed_steps import PackedSteps, packed_loss
    from llmworks.train.scaling_law import ScalingRun

    folder = ctx.scratch / plan.name
    done = folder / "run.json"
    if done.exists():
        return ScalingRun(**json.loads(done.read_text(encoding="utf-8")))
    folder.mkdir(exist_ok=True)
    ctx.progress.log(
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
        batch_size=config.batch_size,
        num_micro_batches=1,
        length=plan.shape.max_position_embeddings,
        seed=ctx.seed,
        device=device,
    )
    optimizer = config.optimizer.model_copy(update={"learning_rate": config.get_learning_rate(plan.size)})
    progress = Progress(folder / "metrics.jsonl", stream=ctx.progress.stream, quiet=ctx.progress.quiet)
    train(network, steps, packed_loss, optimizer, LoopConfig(save_steps=200), scratch=folder, progress=progress)
    loss = evaluate_loss(network, unseen, tokenizer, max_rows=config.eval_samples, batch_size=config.batch_size).loss
    run = ScalingRun(plan.parameters, plan.tokens, plan.flops, loss)
    write_atomic(done, json.dumps(asdict(run)))
    ctx.progress.log_metrics(run=plan.name, **asdict(run))
    return run
