"""Shared parts of online methods: config fields, prompts, and the training run.

The policy samples completions, reward functions score them, and completions with higher rewards become more probable.
The loss is each method's own. Torch-free.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmworks.align.preference.run import Policy, check_run, shared_prompts
from llmworks.align.rl.rewards import Rewards, check_names
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError, RequestError
from llmworks.core.types import Message
from llmworks.data.store.rows import Row, flat_messages, read_chat
from llmworks.tokenize.chat.templates import render_prompt
from llmworks.train.finetune.config import WriterConfig
from llmworks.train.finetune.method import Material
from llmworks.train.finetune.run import context_of, in_memory, tune

if TYPE_CHECKING:
    from llmworks.align.preference.objective import Given
    from llmworks.align.rl.experience import Asked
    from llmworks.align.rl.objective import Groups
    from llmworks.align.rl.rollouts import Drawing, Habit
    from llmworks.train.finetune.method import Way
    from llmworks.train.finetune.trainable import Tuned


class OnlineConfig(WriterConfig):
    """Sampling, reward functions and reuse of rollouts."""

    rates: ClassVar[Mapping[str, float]] = {"lora": 1e-4, "full": 1e-6}

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
            "truncated completions: learn: trained on by their reward, without an end token; leave: masked out of"
            " the loss (DAPO)"
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
            "completions on which a reward function fails or returns NaN: aside: recorded with the reason and not"
            " trained on; stop: the run stops"
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
            "which evaluation's weights are saved: accuracy: the one with the highest mean reward; empty: the"
            " last step's"
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


def prompt_of(row: Row) -> tuple[Message, ...]:
    """Return a conversation without its final assistant turn, with tools rendered as text.

    Empty where it has no prompt.
    """
    turns = flat_messages(row) if row["messages"] else ()
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    return turns if turns and turns[-1].role in ("user", "tool") else ()


def prompts_of(
    config: OnlineConfig, tokenizer: Any, data: Dataset, most: int, limit: int = 0
) -> tuple[list[Asked], list[tuple[str, str]]]:
    """Return (prompts, rejected rows with the reason).

    Errors: DataError when none is left.
    """
    from llmworks.align.rl.experience import Asked

    found: list[Asked] = []
    lost: list[tuple[str, str]] = []
    rows = read_chat(data)[: limit or None]
    for row in rows:
        turns = prompt_of(row)
        try:
            ids = render_prompt(tokenizer, turns) if turns else ()
        except (RequestError, ValueError) as error:
            lost.append((str(row["id"]), str(error)))
            continue
        if not ids:
            lost.append((str(row["id"]), "has no prompt"))
        elif len(ids) + config.max_completion_length > most:
            lost.append(
                (
                    str(row["id"]),
                    (
                        f"a prompt of {len(ids)} tokens leaves no room for max_completion_length"
                        f" {config.max_completion_length}"
                        f" in {most}"
                    ),
                )
            )
        else:
            found.append(Asked(row, turns, tuple(ids)))
    if not found:
        raise DataError(
            f"{data.name}: none of {len(rows)} rows has a usable prompt; the first: {lost[0][1] if lost else 'no rows'}"
        )
    return found, lost


def run(
    config: OnlineConfig,
    policy: Policy,
    data: Dataset,
    ctx: Context,
    held_out: Dataset | None,
    groups_of: Callable[[Given, Drawing], Groups],
    stage: str,
    *,
    compared: bool,
    reward: Model | None,
    judge: Model | Adapter | None,
) -> Adapter | Model:
    """Train the policy on its own completions. `compared`: whether the reference's log-probabilities are needed.

    Errors: DataError for rows without a prompt or that cannot be scored; UserError for a reward function without its
    model or file; TrainingError for a loss that is not finite, or, with on_reward_error raise, a failed reward.
    """
    from llmworks.align.preference.objective import Given
    from llmworks.align.rl.rollouts import Drawing
    from llmworks.train.distributed import world

    check_run(config, held_out=held_out is not None)
    aside = ctx.scratch / "failed_rewards.jsonl"
    rewards = _open_rewards(config, reward, judge, aside, ctx)
    tokenizer, stops = policy.open(config, stage)
    most = min(config.max_length, context_of(policy.model))
    asked, lost = prompts_of(config, tokenizer, data, most)
    unseen = prompts_of(config, tokenizer, held_out, most, config.eval_samples)[0] if held_out is not None else []
    shared_prompts(asked, unseen, lambda one: one.ids, ctx.progress.say)
    for one in (*asked, *unseen):
        rewards.check(one.row, one.prompt)
    each = _prompts_of_draw(config, asked, data)
    questions = [{**one.row, "messages": _with_answer(one)} for one in unseen[: config.num_sample_prompts]]
    _announce(ctx, asked, config, each, lost)
    habit = _habit_of(config, each, compared)
    made: list[Groups] = []
    with world.opened(config.spread) as here:

        def way(tuned: Tuned, material: Material) -> Way:
            given = Given(config, tuned, material, ctx, here.device)
            made.append(groups_of(given, Drawing(given, asked, rewards, habit)))
            return made[0].way()

        def describe(report: Any, title: str, rows: Any, metrics: Any, fields: Any, set_aside: Any) -> None:
            _describe(aside, ctx, metrics, report, title, rows, fields, set_aside, made)

        try:
            return tune(
                config,
                policy.model,
                ctx,
                here,
                Material(tokenizer, stops, asked, lost, unseen, questions),
                way,
                describe,
                adapter=policy.adapter,
            )
        except RuntimeError as error:
            raise (in_memory(error) or error) from error


def _announce(ctx: Context, asked: list[Asked], config: OnlineConfig, each: int, lost: list[tuple[str, str]]) -> None:
    """Log the number of prompts and the reward functions."""
    ctx.progress.say(
        (
            f"{len(asked)} prompts, {config.num_generations} completions for each of {each} per rollout, scored by"
            f" {', '.join(f'{weight:g} x {name}' for name, weight in config.reward_funcs.items())}"
        )
        + (f"; {len(lost)} rows rejected" if lost else "")
    )


def _open_rewards(
    config: OnlineConfig, reward: Model | None, judge: Model | Adapter | None, aside: Path, ctx: Context
) -> Rewards:
    """Return the reward functions of a configuration."""
    rewards = Rewards(
        config.reward_funcs,
        most=config.max_completion_length,
        soft=config.overlong_buffer,
        seconds=config.reward_timeout,
        reward=reward,
        judge=None if judge is None else lambda: ctx.open_engine(judge),
        criteria=config.criteria,
        aside=aside,
        stop=config.on_reward_error == "raise",
    )
    return rewards


def _prompts_of_draw(config: OnlineConfig, asked: list[Asked], data: Dataset) -> int:
    """Return the prompts per rollout.

    Errors: DataError where the dataset has fewer.
    """
    each = config.batch_size * config.gradient_accumulation_steps * config.num_minibatches
    if len(asked) < each:
        raise DataError(
            f"{data.name}: {len(asked)} prompts, a rollout needs {each} (batch_size {config.batch_size},"
            f" gradient_accumulation_steps {config.gradient_accumulation_steps}, num_minibatches"
            f" {config.num_minibatches}); add prompts,"
            " or lower these"
        )
    return each


def _habit_of(config: OnlineConfig, each: int, compared: bool) -> Habit:
    """Return the rollout options of a configuration."""
    from llmworks.align.rl.rollouts import Habit

    habit = Habit(
        config.num_generations,
        config.temperature,
        config.max_completion_length,
        each,
        config.batch_size,
        config.num_minibatches,
        config.num_iterations,
        compared,
        config.dynamic_sampling_rounds,
    )
    return habit


def _describe(
    aside: Path,
    ctx: Context,
    metrics: Any,
    report: Any,
    title: str,
    rows: Any,
    fields: Any,
    set_aside: Any,
    made: list[Groups],
) -> None:
    """Write the report, with rewards of held-out prompts under their own metric names."""
    from llmworks.align.report import describe_online

    if aside.exists():
        shutil.copyfile(aside, ctx.out / aside.name)
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
        made[0].began,
        made[0].seen,
        ctx.scratch / "samples.json",
        aside,
        ctx.progress.say,
    )


def _with_answer(one: Asked) -> list[dict[str, Any]]:
    """Return the row's messages, with an empty assistant turn where it has none."""
    turns = list(one.row["messages"])
    return turns if turns[-1]["role"] == "assistant" else [*turns, {"role": "assistant", "content": ""}]
