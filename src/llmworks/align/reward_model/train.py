"""Train a reward model: score head, shared fine-tuning loop, and a report with calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmworks.align.preference.run import Policy, check_run
from llmworks.core.artifact import Model
from llmworks.core.context import Context
from llmworks.train.finetune.method import TrainingData, TrainMethod
from llmworks.train.finetune.run import explain_out_of_memory, run_training, save_records

if TYPE_CHECKING:
    from llmworks.train.finetune.trainable import TrainableModel

from llmworks.align.reward_model.config import RewardConfig, ScorerConfig


def train_scorer(
    config: ScorerConfig,
    policy: Policy,
    material: TrainingData,
    ctx: Context,
    kind: Any,
    labels: Mapping[str, Sequence[bool]],
) -> Model:
    """Train a reward model of one kind, `whole` completions or `steps`. UserError for an unsupported configuration."""
    from llmworks.align.report import describe_scores
    from llmworks.align.reward_model.objectives import PairRewardObjective, ProcessRewardObjective, make_saver
    from llmworks.train.distributed import world

    check_run(config, has_eval_data=bool(material.eval_examples))
    objectives: list[Any] = []

    def make_method(tuned: TrainableModel, material: TrainingData) -> TrainMethod:
        from llmworks.align.preference.objective import MethodContext

        given = MethodContext(config, tuned, material, ctx, here.device)
        objectives.append(
            PairRewardObjective(given, margin=config.margin_coefficient, center=config.center_rewards_coefficient)
            if isinstance(config, RewardConfig)
            else ProcessRewardObjective(given, labels)
        )
        made: TrainMethod = objectives[0].build_method()
        return made

    def finish(tuned: TrainableModel, metrics: dict[str, Any]) -> Model:
        rows = ctx.progress.read_metrics()
        objective = objectives[0]
        make_saver(policy.model, ctx.out, ctx.scratch, kind, pad_token_id=choose_pad_token(material))(tuned)
        material.tokenizer.save_pretrained(ctx.out)
        save_records(ctx, material.dropped)
        metrics |= {"rows": len(material.examples), "dropped": len(material.dropped)}
        metrics["trainable_parameters"] = tuned.num_trainable_parameters
        scores, fields = objective.eval_scores, config.model_dump()
        metrics |= describe_scores(ctx.report, policy.name, rows, metrics, fields, material.dropped, scores, kind)
        architecture = str(policy.model.about.get("architecture", ""))
        return Model(ctx.out, metrics=metrics, about={"format": "hf", "head": kind, "architecture": architecture})

    with world.init_world(config.parallelism) as here:
        try:
            made = run_training(
                config,
                policy.model,
                ctx,
                here,
                material,
                make_method,
                _skip_report,
                adapter=policy.adapter,
                finish=finish,
            )
        except RuntimeError as error:
            raise (explain_out_of_memory(error) or error) from error
    assert isinstance(made, Model)
    return made


def choose_pad_token(material: TrainingData) -> int:
    """Return a padding token id that does not end any completion.

    transformers reads the score at the last token that is not padding.
    """
    ends = {answer.ids[-1] for example in material.examples for answer in example.completions}
    tokenizer = material.tokenizer
    return next(
        (
            int(id)
            for id in (tokenizer.pad_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids)
            if id is not None and id not in ends
        ),
        0,
    )


def _skip_report(*_: Any) -> None:
    """Do nothing: the report is written where the scores are known."""
