"""Shared parts of online methods: config fields, prompts, and the training run.

The policy samples completions, reward functions score them, and completions with higher rewards become more probable.
The loss is each method's own. Torch-free.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmworks.align.preference.run import Policy, check_run, warn_shared_prompts
from llmworks.align.rl.rewards import RewardFunctions, check_names
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError, RequestError
from llmworks.core.types import Message
from llmworks.data.store.rows import Row, flatten_messages, read_chat
from llmworks.tokenize.chat.templates import render_prompt
from llmworks.train.finetune.config import GenerativeFinetuneConfig
from llmworks.train.finetune.method import TrainingData
from llmworks.train.finetune.run import explain_out_of_memory, get_context_length, run_training

if TYPE_CHECKING:
    from llmworks.align.preference.objective import MethodContext
    from llmworks.align.rl.objective import RolloutObjective
    from llmworks.align.rl.rollout import RolloutPrompt
    from llmworks.align.rl.sampling import RolloutOptions, RolloutSampler
    from llmworks.train.finetune.method import TrainMethod
    from llmworks.train.finetune.trainable import TrainableModel


class OnlineAlignmentConfig(GenerativeFinetuneConfig):
    """Sampling, reward functions and reuse of rollouts."""

    default_learning_rates: ClassVar[Mapping[str, float]] = {"lora": 1e-4, "full": 1e-6}

    reward_funcs: dict[str, float] = Field(
        {"verified": 1.0},
        description=(
            "reward functions and their weights: score functions (verified: by the row's `answer`),"
            " FILE.py:FUNCTION (in the sandbox), model (the input `reward_model`), judge (the input `judge`),"
            " length (share of max_completion_length), overlong (0 to -1 over the last overlong_buffer tokens)"
        ),
    )
    num_generations: int = Field(8, ge=1, le=256, description="completions sampled per prompt")
    temperature: float = Field(
        1.0,
        ge=0.01,
        description="sampling temperature, also of the trained log-probabilities; no top-p or top-k",
    )
    max_completion_length: int = Field(256, gt=0, description="longest completion in tokens; longer ones are truncated")
    mask_truncated_completions: bool = Field(
        False,
        description=(
            "mask completions truncated at max_completion_length out of the loss (DAPO); false: train on them by"
            " their reward, without an end token"
        ),
    )
    overlong_buffer: int = Field(
        0,
        ge=0,
        description=(
            "tokens before max_completion_length over which the reward `overlong`"
            " falls to -1 (DAPO soft overlong punishment)"
        ),
    )
    reward_timeout: float = Field(
        5.0, gt=0, description="timeout in seconds of a reward function of a file, per completion"
    )
    on_reward_error: Literal["drop", "raise"] = Field(
        "drop",
        description=(
            "completions on which a reward function fails or returns NaN. drop: record them with the reason, do not"
            " train on them; raise: stop the run"
        ),
    )
    criteria: str = Field("", description="grading criteria for the judge, in words")
    num_train_epochs: float = Field(1.0, gt=0, description="passes over the prompts; may be a fraction")
    batch_size: int = Field(4, gt=0, description="prompts per micro-batch, with all their completions")
    gradient_accumulation_steps: int = Field(1, gt=0, description="micro-batches per step")
    num_minibatches: int = Field(1, gt=0, description="optimizer steps that each rollout is divided into")
    num_iterations: int = Field(1, gt=0, description="passes over each rollout (mu of GRPO)")
    dynamic_sampling_rounds: int = Field(
        0,
        ge=0,
        le=10,
        description=(
            "rounds in which prompts whose completions all have the same reward are replaced by others (dynamic"
            " sampling of DAPO)"
        ),
    )
    max_length: int = Field(
        2048, gt=1, description="longest prompt plus max_completion_length, in tokens; longer prompts are rejected"
    )
    eval_steps: int = Field(
        0,
        ge=0,
        description=(
            "steps between evaluations of greedy completions of held-out prompts; they are always evaluated"
            " before the first and after the last step"
        ),
    )
    metric_for_best_model: Literal["", "accuracy"] = Field(
        "",
        description=(
            "save the weights of the evaluation with the highest mean reward (accuracy); empty = the weights of the"
            " last step"
        ),
    )

    def reads(self) -> tuple[str, ...]:
        """Return the files of reward functions."""
        return tuple(name.rpartition(":")[0] for name in self.reward_funcs if ":" in name)

    @model_validator(mode="after")
    def _online(self) -> Self:
        check_names(self.reward_funcs)
        if self.dynamic_sampling_rounds and self.num_generations < 2:
            raise ValueError(
                "dynamic_sampling_rounds replaces prompts whose completions all have the same reward; it needs"
                " num_generations of at least 2"
            )
        if self.lora.lora_dropout:
            raise ValueError(
                "lora.lora_dropout: dropout would change the log-probabilities of sampled completions; leave it 0"
            )
        if ("overlong" in self.reward_funcs) != bool(self.overlong_buffer):
            raise ValueError(
                "the reward function `overlong` and overlong_buffer, the tokens over which it falls, need each other"
            )
        if self.max_completion_length >= self.max_length:
            raise ValueError(
                f"max_completion_length {self.max_completion_length} leaves no token for a prompt: max_length is"
                f" {self.max_length}"
            )
        return self


def get_prompt(row: Row) -> tuple[Message, ...]:
    """Return a conversation without its final assistant turn, with tools rendered as text.

    Empty where it has no prompt.
    """
    turns = flatten_messages(row) if row["messages"] else ()
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    return turns if turns and turns[-1].role in ("user", "tool") else ()


def read_prompts(
    config: OnlineAlignmentConfig, tokenizer: Any, data: Dataset, max_length: int, limit: int = 0
) -> tuple[list[RolloutPrompt], list[tuple[str, str]]]:
    """Return (prompts, rejected rows with the reason).

    Errors: DataError when none is left.
    """
    from llmworks.align.rl.rollout import RolloutPrompt

    prompts: list[RolloutPrompt] = []
    rejected: list[tuple[str, str]] = []
    rows = read_chat(data)[: limit or None]
    for row in rows:
        turns = get_prompt(row)
        try:
            ids = render_prompt(tokenizer, turns) if turns else ()
        except (RequestError, ValueError) as error:
            rejected.append((str(row["id"]), str(error)))
            continue
        if not ids:
            rejected.append((str(row["id"]), "has no prompt"))
        elif len(ids) + config.max_completion_length > max_length:
            rejected.append(
                (
                    str(row["id"]),
                    (
                        f"a prompt of {len(ids)} tokens leaves no room for max_completion_length"
                        f" {config.max_completion_length}"
                        f" in {max_length}"
                    ),
                )
            )
        else:
            prompts.append(RolloutPrompt(row, turns, tuple(ids)))
    if not prompts:
        raise DataError(
            f"{data.name}: none of {len(rows)} rows has a usable prompt; the first:"
            f" {rejected[0][1] if rejected else 'no rows'}"
        )
    return prompts, rejected


def run_online(
    config: OnlineAlignmentConfig,
    policy: Policy,
    data: Dataset,
    ctx: Context,
    eval_data: Dataset | None,
    build_objective: Callable[[MethodContext, RolloutSampler], RolloutObjective],
    stage: str,
    *,
    use_reference: bool,
    reward_model: Model | None,
    judge: Model | Adapter | None,
) -> Adapter | Model:
    """Train the policy on its own completions. `use_reference`: whether the reference's log-probabilities are needed.

    Errors: DataError for rows without a prompt or that cannot be scored; UserError for a reward function without its
    model or file; TrainingError for a loss that is not finite, or, with on_reward_error raise, a failed reward.
    """
    from llmworks.align.preference.objective import MethodContext
    from llmworks.align.rl.sampling import RolloutSampler
    from llmworks.train.distributed import world

    check_run(config, has_eval_data=eval_data is not None)
    failed_file = ctx.scratch / "failed_rewards.jsonl"
    rewards = _open_rewards(config, reward_model, judge, failed_file, ctx)
    tokenizer, stops = policy.open_tokenizer(config, stage)
    max_length = min(config.max_length, get_context_length(policy.model))
    read = functools.partial(read_prompts, config, tokenizer, max_length=max_length)
    prompts, rejected = read(data)
    eval_prompts = read(eval_data, limit=config.eval_samples)[0] if eval_data is not None else []
    warn_shared_prompts(prompts, eval_prompts, lambda one: one.ids, ctx.progress.log)
    for one in (*prompts, *eval_prompts):
        rewards.check_row(one.row, one.prompt)
    prompts_per_rollout = _prompts_per_rollout(config, prompts, data)
    questions = [{**one.row, "messages": _with_empty_answer(one)} for one in eval_prompts[: config.num_sample_prompts]]
    _log_setup(ctx, prompts, config, prompts_per_rollout, rejected)
    options = _rollout_options(config, prompts_per_rollout, use_reference)
    objectives: list[RolloutObjective] = []
    with world.init_world(config.parallelism) as here:

        def make_method(tuned: TrainableModel, material: TrainingData) -> TrainMethod:
            given = MethodContext(config, tuned, material, ctx, here.device)
            objectives.append(build_objective(given, RolloutSampler(given, prompts, rewards, options)))
            return objectives[0].build_method()

        def describe(report: Any, title: str, rows: Any, metrics: Any, fields: Any, set_aside: Any) -> None:
            _describe(failed_file, ctx, metrics, report, title, rows, fields, set_aside, objectives)

        material = TrainingData(tokenizer, stops, prompts, rejected, eval_prompts, questions)
        try:
            return run_training(
                config, policy.model, ctx, here, material, make_method, describe, adapter=policy.adapter
            )
        except RuntimeError as error:
            raise (explain_out_of_memory(error) or error) from error


def _log_setup(
    ctx: Context,
    prompts: list[RolloutPrompt],
    config: OnlineAlignmentConfig,
    prompts_per_rollout: int,
    rejected: list[tuple[str, str]],
) -> None:
    """Log the number of prompts and the reward functions."""
    ctx.progress.log(
        (
            f"{len(prompts)} prompts, {config.num_generations} completions for each of {prompts_per_rollout} per"
            " rollout, scored by"
            f" {', '.join(f'{weight:g} x {name}' for name, weight in config.reward_funcs.items())}"
        )
        + (f"; {len(rejected)} rows rejected" if rejected else "")
    )


def _open_rewards(
    config: OnlineAlignmentConfig,
    reward_model: Model | None,
    judge: Model | Adapter | None,
    failed_file: Path,
    ctx: Context,
) -> RewardFunctions:
    """Return the reward functions of a configuration."""
    rewards = RewardFunctions(
        config.reward_funcs,
        max_completion_length=config.max_completion_length,
        overlong_buffer=config.overlong_buffer,
        timeout=config.reward_timeout,
        reward_model=reward_model,
        judge=None if judge is None else lambda: ctx.open_engine(judge),
        criteria=config.criteria,
        failed_file=failed_file,
        stop_on_error=config.on_reward_error == "raise",
    )
    return rewards


def _prompts_per_rollout(config: OnlineAlignmentConfig, prompts: list[RolloutPrompt], data: Dataset) -> int:
    """Return the prompts per rollout.

    Errors: DataError where the dataset has fewer.
    """
    prompts_per_rollout = config.batch_size * config.gradient_accumulation_steps * config.num_minibatches
    if len(prompts) < prompts_per_rollout:
        raise DataError(
            f"{data.name}: {len(prompts)} prompts, a rollout needs {prompts_per_rollout} (batch_size"
            f" {config.batch_size},"
            f" gradient_accumulation_steps {config.gradient_accumulation_steps}, num_minibatches"
            f" {config.num_minibatches}); add prompts,"
            " or lower these"
        )
    return prompts_per_rollout


def _rollout_options(config: OnlineAlignmentConfig, prompts_per_rollout: int, use_reference: bool) -> RolloutOptions:
    """Return the rollout options of a configuration."""
    from llmworks.align.rl.sampling import RolloutOptions

    options = RolloutOptions(
        config.num_generations,
        config.temperature,
        config.max_completion_length,
        prompts_per_rollout,
        config.batch_size,
        config.num_minibatches,
        config.num_iterations,
        use_reference,
        config.dynamic_sampling_rounds,
    )
    return options


def _describe(
    failed_file: Path,
    ctx: Context,
    metrics: Any,
    report: Any,
    title: str,
    rows: Any,
    fields: Any,
    set_aside: Any,
    objectives: list[RolloutObjective],
) -> None:
    """Write the report, with rewards of held-out prompts under their own metric names."""
    from llmworks.align.report import describe_online

    if failed_file.exists():
        shutil.copyfile(failed_file, ctx.out / failed_file.name)
    if "accuracy" in metrics:  # the training loop's name of any evaluation metric
        metrics["eval_reward"] = metrics.pop("accuracy")
        metrics.pop("eval_loss")
    metrics |= describe_online(
        report,
        title,
        rows,
        metrics,
        fields,
        set_aside,
        objectives[0].initial_eval_rewards,
        objectives[0].eval_rewards,
        ctx.scratch / "samples.json",
        failed_file,
        ctx.progress.log,
    )


def _with_empty_answer(one: RolloutPrompt) -> list[dict[str, Any]]:
    """Return the row's messages, with an empty assistant turn where it has none."""
    turns = list(one.row["messages"])
    return turns if turns[-1]["role"] == "assistant" else [*turns, {"role": "assistant", "content": ""}]
