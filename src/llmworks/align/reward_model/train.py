"""Train a reward model: score head, shared fine-tuning loop, and a report with calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmworks.align.preference.run import Policy, check_run
from llmworks.core.artifact import Model
from llmworks.core.context import Context
from llmworks.train.finetune.method import Material, Way
from llmworks.train.finetune.run import in_memory, save_records, tune

if TYPE_CHECKING:
    from llmworks.train.finetune.trainable import Tuned

from llmworks.align.reward_model.config import RewardConfig, ScorerConfig


def train_scorer(
    config: ScorerConfig,
    policy: Policy,
    material: Material,
    ctx: Context,
    kind: Any,
    labels: Mapping[str, Sequence[bool]],
) -> Model:
    """Train a reward model of one kind (`whole` completions or `steps`) and report its scores.

    Errors: UserError for an unsupported configuration.
    """
    from llmworks.align.reward_model.run import Ranking, Steps, saver
    from llmworks.train.distributed import world

    check_run(config, held_out=bool(material.unseen))
    kept_by: list[Any] = []

    def way(tuned: Tuned, material: Material) -> Way:
        from llmworks.align.preference.objective import Given

        given = Given(config, tuned, material, ctx, here.device)
        kept_by.append(
            Ranking(given, margin=config.margin_coefficient, center=config.center_rewards_coefficient)
            if isinstance(config, RewardConfig)
            else Steps(given, labels)
        )
        made: Way = kept_by[0].way()
        return made

    def finish(tuned: Tuned, metrics: dict[str, Any]) -> Model:
        rows = ctx.progress.read_metrics()
        learner = kept_by[0]
        saver(policy.model, ctx.out, ctx.scratch, kind, pad=pad_of(material))(tuned)
        material.tokenizer.save_pretrained(ctx.out)
        save_records(ctx, material.set_aside)
        metrics |= {
            "rows": len(material.examples),
            "dropped": len(material.set_aside),
            "trainable_parameters": tuned.trained,
        }
        from llmworks.align.report import describe_scores

        metrics |= describe_scores(
            ctx.report, policy.name, rows, metrics, config.model_dump(), material.set_aside, learner.seen, kind
        )
        return Model(
            ctx.out,
            metrics=metrics,
            about={"format": "hf", "head": kind, "architecture": str(policy.model.about.get("architecture", ""))},
        )

    with world.opened(config.spread) as here:
        try:
            made = tune(config, policy.model, ctx, here, material, way, _no_page, adapter=policy.adapter, finish=finish)
        except RuntimeError as error:
            raise (in_memory(error) or error) from error
    assert isinstance(made, Model)
    return made


def pad_of(material: Material) -> int:
    """Return a padding token id that does not end any completion.

    transformers reads the score at the last token that is not padding.
    """
    ends = {answer.ids[-1] for example in material.examples for answer in example.answers}
    tokenizer = material.tokenizer
    return next(
        (
            int(id)
            for id in (tokenizer.pad_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids)
            if id is not None and id not in ends
        ),
        0,
    )


def _no_page(*_: Any) -> None:
    """Do nothing: the report is written where the scores are known."""
