"""Stage `align.process`: train a process reward model (PRM) on labeled steps.

The output has a score head in place of the LM head; transformers loads it as a token classification model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llmworks.align.preference.examples import Answer, Answered, kept
from llmworks.align.preference.run import HELD, Policy
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError, ModelError, RequestError
from llmworks.core.types import Message, messages_from_json
from llmworks.data.store.jsonl import Rejected
from llmworks.data.store.raw_rows import raw_rows
from llmworks.tokenize.chat.templates import encode, render_prompt
from llmworks.train.finetune.method import Material
from llmworks.train.finetune.run import context_of

if TYPE_CHECKING:
    pass

from llmworks.align.reward_model.config import ScorerConfig
from llmworks.align.reward_model.train import train_scorer

BREAK = "\n"  # step separator


class ProcessConfig(ScorerConfig):
    """Training fields of a process reward model."""

    batch_size: int = Field(8, gt=0, description="completions per micro-batch")


def process(
    config: ProcessConfig,
    model: Model,
    data: Dataset,
    ctx: Context,
    adapter: Adapter | None = None,
    eval_data: Dataset | None = None,
) -> Model:
    """Train a process reward model to score the steps of completions.

    Rows: `prompt` (string or messages), `steps` (strings) and `labels` (true or false, one per step). TRL's
    `completions` is read in place of `steps` too.

    Errors: DataError when no row can be used, or all labels are equal; ModelError for an unknown architecture;
    TrainingError when the loss is not finite.
    """
    policy = Policy(model, adapter)
    tokenizer, stops = policy.open(config, "align.process")
    most = min(config.max_length, context_of(model))
    examples, labels, lost = steps_of(data, tokenizer, most)
    tests: list[Answered] = []
    if eval_data is not None:
        tests, more, _ = steps_of(eval_data, tokenizer, most, limit=config.eval_samples, mark=HELD)
        labels |= more
    right = sum(label for example in examples for label in labels[example.id])
    total = sum(len(labels[example.id]) for example in examples)
    if right in (0, total):
        raise DataError(
            f"{data.name}: all {total} steps are labeled {'right' if right else 'wrong'}; both labels are needed"
        )
    ctx.progress.say(
        f"{len(examples)} completions, {total:,} steps, {right / total:.0%} of them correct"
        + (f"; {len(lost)} rows rejected" if lost else "")
    )
    return train_scorer(config, policy, Material(tokenizer, stops, examples, lost, tests, []), ctx, "steps", labels)


def steps_of(
    data: Dataset, tokenizer: Any, most: int, *, limit: int = 0, mark: str = ""
) -> tuple[list[Answered], dict[str, list[bool]], list[tuple[str, str]]]:
    """Return (examples whose label tokens each end a step, step labels by example id, rejected rows with reasons)."""
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
        return "has no list of strings `steps`"
    if any(BREAK.strip(" ") in step.strip() for step in steps):
        return "a step contains a line break, which is the step separator"
    if (
        not isinstance(labels, list)
        or len(labels) != len(steps)
        or not all(isinstance(label, bool) or label in (0, 1) for label in labels)
    ):
        return f"`labels` must be true or false for each of the {len(steps)} steps"
    try:
        turns = (Message("user", prompt),) if isinstance(prompt, str) else messages_from_json(prompt or [])
        if not turns:
            return "`prompt` is neither a string nor a conversation"
        begin = render_prompt(tokenizer, turns)
        pieces = [encode(tokenizer, step.strip() + BREAK) for step in steps]
    except (RequestError, ModelError, ValueError, TypeError, AttributeError) as error:
        return f"cannot be read: {error}"
    ids = tuple(token for piece in pieces for token in piece)
    mask = tuple(int(at + 1 == len(piece)) for piece in pieces for at in range(len(piece)))
    if len(begin) + len(ids) > most:
        return f"{len(begin) + len(ids)} tokens, longer than max_length {most}"
    return Answered(id, tuple(begin), (Answer(ids, mask),)), [bool(label) for label in labels]
