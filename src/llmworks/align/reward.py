"""Stages `align.reward` and `align.process`: a model that scores answers, learned of pairs; and one that scores the steps of an answer, learned of labelled steps.

What is made is a model with a head in place of the one over the vocabulary; transformers reads it as a model for classification. It scores in `align.grpo` and its kin.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import Field, model_validator

from llmworks.align.answered import Answer, Answered, apart, kept
from llmworks.align.preference import HELD, Policy, PreferenceConfig, examples_of, rows_of
from llmworks.artifact import Adapter, Dataset, Model
from llmworks.context import Context
from llmworks.data.jsonl import Rejected
from llmworks.data.rawrows import raw_rows
from llmworks.errors import DataError, ModelError, RequestError, UserError
from llmworks.tokenize.templates import encode, render_prompt
from llmworks.train.tuning import Material, Way, context_of, in_memory, tune
from llmworks.types import Message, messages_from_json

if TYPE_CHECKING:
    from llmworks.train.tuned import Tuned

BREAK = "\n"  # between steps


class RewardConfig(PreferenceConfig):
    """What is trained, and how far apart answers should score."""

    rates: ClassVar[Mapping[str, float]] = {"lora": 5e-4, "full": 2e-5}

    margin: float = Field(0.0, ge=0, description="how far apart the scores of a pair should be, for each unit of its own margin (a field `margin`, or the difference of its `scores`)")
    center: float = Field(0.0, ge=0, description="weight of the square of both scores' sum, which keeps scores around 0; 0.01 is usual (arXiv:2312.09244)")
    look_rows: int = Field(512, gt=0, description="held-out pairs of a look; accuracy and calibration are of the last one")

    @model_validator(mode="after")
    def _scores(self) -> Self:
        if self.samples != type(self).model_fields["samples"].default:
            raise ValueError("samples: a model that scores writes nothing; leave it out")
        return self

    @property
    def makes(self) -> type[Model]:
        """A model, also where an adapter was trained: it is folded."""
        return Model


class ProcessConfig(RewardConfig):
    """What is trained."""

    margin: float = Field(0.0, ge=0, le=0, description="not of steps")
    center: float = Field(0.0, ge=0, le=0, description="not of steps")
    batch_size: int = Field(8, gt=0, description="answers per part of a step")


def reward(config: RewardConfig, model: Model, pairs: Dataset, ctx: Context, adapter: Adapter | None = None, held_out: Dataset | None = None) -> Model:
    """Learn to score answers of preference pairs (Bradley-Terry). The head is put on the model, or on the model with `adapter`.

    Errors: DataError when no pair can be used; ModelError for an architecture that is not known; TrainingError when the loss stops being a number.
    """
    policy = Policy(model, adapter)
    tokenizer, stops = policy.open(config, "align.reward")
    most = min(config.max_tokens, context_of(model))
    rows, unseen = rows_of(pairs, singles=False), rows_of(held_out, singles=False)[: config.look_rows] if held_out is not None else []
    examples, lost = examples_of(config, tokenizer, rows, pairs.name, most, singles=False)
    tests = apart(examples_of(config, tokenizer, unseen, held_out.name, most, singles=False)[0], HELD) if held_out is not None else []
    ctx.progress.say(f"{len(examples)} pairs" + (f"; {len(lost)} rows set aside" if lost else ""))
    return _train(config, policy, Material(tokenizer, stops, examples, lost, tests, []), ctx, "whole", {})


def process(config: ProcessConfig, model: Model, data: Dataset, ctx: Context, adapter: Adapter | None = None, held_out: Dataset | None = None) -> Model:
    """Learn to score the steps of answers. Rows: `prompt` (text, or turns), `steps` (texts) and `labels` (true or false, one of each step); TRL's `completions` in place of `steps` is read, too.

    Errors: DataError when no row can be used, or all labels are one; ModelError for an architecture that is not known; TrainingError when the loss stops being a number.
    """
    policy = Policy(model, adapter)
    tokenizer, stops = policy.open(config, "align.process")
    most = min(config.max_tokens, context_of(model))
    examples, labels, lost = steps_of(data, tokenizer, most)
    tests: list[Answered] = []
    if held_out is not None:
        tests, more, _ = steps_of(held_out, tokenizer, most, limit=config.look_rows, mark=HELD)
        labels |= more
    right = sum(label for example in examples for label in labels[example.id])
    total = sum(len(labels[example.id]) for example in examples)
    if right in (0, total):
        raise DataError(f"{data.name}: all {total} steps are {'right' if right else 'wrong'}; both kinds are needed")
    ctx.progress.say(f"{len(examples)} answers, {total:,} steps, {right / total:.0%} of them right" + (f"; {len(lost)} rows set aside" if lost else ""))
    return _train(config, policy, Material(tokenizer, stops, examples, lost, tests, []), ctx, "steps", labels)


def steps_of(data: Dataset, tokenizer: Any, most: int, *, limit: int = 0, mark: str = "") -> tuple[list[Answered], dict[str, list[bool]], list[tuple[str, str]]]:
    """(examples whose weighed tokens end a step each, the labels of each example's steps, rows that cannot be used)."""
    rejected = Rejected()
    made: list[tuple[str, Answered | str]] = []
    labels: dict[str, list[bool]] = {}
    for number, (_, _, row) in enumerate(raw_rows(data.path, rejected)):
        if limit and number == limit:
            break
        id = f"{row.get('id', number)}{mark}"
        id = f"{id} ({number})" if id in labels else id
        example = _stepped(tokenizer, id, row, most)
        made.append((id, example if isinstance(example, str) else example[0]))
        if not isinstance(example, str):
            labels[id] = example[1]
    made += [(f"{row['file']}:{row['line']}", row["reason"]) for row in rejected.rows]
    examples, lost = kept(made, data.name)
    return examples, labels, lost


def _stepped(tokenizer: Any, id: str, row: Mapping[str, Any], most: int) -> tuple[Answered, list[bool]] | str:
    steps, labels, prompt = row.get("steps", row.get("completions")), row.get("labels"), row.get("prompt")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) and step.strip() for step in steps):
        return "has no list of texts `steps`"
    if any(BREAK.strip(" ") in step.strip() for step in steps):
        return "a step has a line break in it, which ends a step"
    if not isinstance(labels, list) or len(labels) != len(steps) or not all(isinstance(label, bool) or label in (0, 1) for label in labels):
        return f"`labels` must be true or false for each of {len(steps)} steps"
    try:
        turns = (Message("user", prompt),) if isinstance(prompt, str) else messages_from_json(prompt or [])
        if not turns:
            return "`prompt` is neither a text nor a conversation"
        begin = render_prompt(tokenizer, turns)
        pieces = [encode(tokenizer, step.strip() + BREAK) for step in steps]
    except (RequestError, ModelError, ValueError, TypeError, AttributeError) as error:
        return f"cannot be read: {error}"
    ids = tuple(token for piece in pieces for token in piece)
    mask = tuple(int(at + 1 == len(piece)) for piece in pieces for at in range(len(piece)))
    if len(begin) + len(ids) > most:
        return f"{len(begin) + len(ids)} tokens, longer than max_tokens {most}"
    return Answered(id, tuple(begin), (Answer(ids, mask),)), [bool(label) for label in labels]


def _train(config: RewardConfig, policy: Policy, material: Material, ctx: Context, kind: Any, labels: Mapping[str, Sequence[bool]]) -> Model:
    from llmworks.align.scoring import Ranking, Steps, saver
    from llmworks.train import world

    if (config.best or config.look_every) and not material.unseen:
        raise UserError(f"config.{'best' if config.best else 'look_every'} looks at held-out rows; give them as held_out")
    if world.processes() > 1:
        raise UserError("an alignment runs in one process; start one")
    kept_by: list[Any] = []

    def way(tuned: Tuned, material: Material) -> Way:
        from llmworks.align.ways import Given

        given = Given(config, tuned, material, ctx, here.device)
        kept_by.append(Ranking(given, margin=config.margin, center=config.center) if kind == "whole" else Steps(given, labels))
        made: Way = kept_by[0].way()
        return made

    def finish(tuned: Tuned, metrics: dict[str, Any]) -> Model:
        rows = ctx.progress.read_metrics()
        learner = kept_by[0]
        saver(policy.model, ctx.out, ctx.scratch, kind, pad=pad_of(material))(tuned)
        material.tokenizer.save_pretrained(ctx.out)
        if ctx.progress.metrics is not None:
            shutil.copyfile(ctx.progress.metrics, ctx.out / "metrics.jsonl")
        if material.set_aside:
            (ctx.out / "set_aside.jsonl").write_text("".join(json.dumps({"id": id, "reason": reason}, ensure_ascii=False) + "\n" for id, reason in material.set_aside), encoding="utf-8")
        metrics |= {"rows": len(material.examples), "set_aside": len(material.set_aside), "trained_parameters": tuned.trained}
        from llmworks.align.page import describe_scores

        metrics |= describe_scores(ctx.report, policy.name, rows, metrics, config.model_dump(), material.set_aside, learner.seen, kind)
        return Model(ctx.out, metrics=metrics, about={"format": "hf", "head": kind, "architecture": str(policy.model.about.get("architecture", ""))})

    with world.opened(config.parallel) as here:
        try:
            made = tune(config, policy.model, ctx, here, material, way, _no_page, adapter=policy.adapter, finish=finish)
        except RuntimeError as error:
            raise (in_memory(error) or error) from error
    assert isinstance(made, Model)
    return made


def pad_of(material: Material) -> int:
    """A token that fills up batches and ends no answer: transformers reads the score at the last token that is another."""
    ends = {answer.ids[-1] for example in material.examples for answer in example.answers}
    tokenizer = material.tokenizer
    return next((int(id) for id in (tokenizer.pad_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids) if id is not None and id not in ends), 0)


def _no_page(*_: Any) -> None:
    """The page is written where scores are known."""
