"""Stage `align.process`: train a process reward model (PRM) on labeled steps.

The output has a score head in place of the LM head; transformers loads it as a token classification model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from llmworks.align.preference.examples import CompletionTokens, PromptCompletions, split_rejected
from llmworks.align.preference.run import EVAL_ID_SUFFIX, Policy
from llmworks.align.reward_model.config import ScorerConfig
from llmworks.align.reward_model.train import train_scorer
from llmworks.core.artifact import Adapter, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError, ModelError, RequestError
from llmworks.core.types import Message, messages_from_json
from llmworks.data.store.jsonl import RejectedRows
from llmworks.data.store.raw_rows import read_raw_rows
from llmworks.tokenize.chat.templates import encode_text, render_prompt
from llmworks.train.finetune.method import TrainingData
from llmworks.train.finetune.run import get_context_length

STEP_SEPARATOR = "\n"  # step separator


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
    tokenizer, stops = policy.open_tokenizer(config, "align.process")
    max_length = min(config.max_length, get_context_length(model))
    examples, labels, rejected_rows = read_steps(data, tokenizer, max_length)
    eval_examples: list[PromptCompletions] = []
    if eval_data is not None:
        eval_examples, more, _ = read_steps(
            eval_data, tokenizer, max_length, limit=config.eval_samples, id_suffix=EVAL_ID_SUFFIX
        )
        labels |= more
    num_correct = sum(label for example in examples for label in labels[example.id])
    total = sum(len(labels[example.id]) for example in examples)
    if num_correct in (0, total):
        raise DataError(
            f"{data.name}: all {total} steps are labeled {'right' if num_correct else 'wrong'}; both labels are needed"
        )
    ctx.progress.log(
        f"{len(examples)} completions, {total:,} steps, {num_correct / total:.0%} of them correct"
        + (f"; {len(rejected_rows)} rows rejected" if rejected_rows else "")
    )
    return train_scorer(
        config, policy, TrainingData(tokenizer, stops, examples, rejected_rows, eval_examples, []), ctx, "steps", labels
    )


def read_steps(
    data: Dataset, tokenizer: Any, max_length: int, *, limit: int = 0, id_suffix: str = ""
) -> tuple[list[PromptCompletions], dict[str, list[bool]], list[tuple[str, str]]]:
    """Return (examples whose label tokens each end a step, step labels by example id, rejected rows with reasons)."""
    rejected = RejectedRows()
    results: list[tuple[str, PromptCompletions | str]] = []
    labels: dict[str, list[bool]] = {}
    for number, (_, _, row) in enumerate(read_raw_rows(data.path, rejected)):
        if limit and number == limit:
            break
        id = f"{row.get('id', number)}{id_suffix}"
        id = f"{id} ({number})" if id in labels else id
        example = _tokenize_steps(tokenizer, id, row, max_length)
        results.append((id, example if isinstance(example, str) else example[0]))
        if not isinstance(example, str):
            labels[id] = example[1]
    results += [(f"{row['file']}:{row['line']}", row["reason"]) for row in rejected.rows]
    examples, rejected_rows = split_rejected(results, data.name)
    return examples, labels, rejected_rows


def _tokenize_steps(
    tokenizer: Any, id: str, row: Mapping[str, Any], max_length: int
) -> tuple[PromptCompletions, list[bool]] | str:
    steps, labels, prompt = row.get("steps", row.get("completions")), row.get("labels"), row.get("prompt")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) and step.strip() for step in steps):
        return "has no list of strings `steps`"
    if any(STEP_SEPARATOR.strip(" ") in step.strip() for step in steps):
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
        prompt_ids = render_prompt(tokenizer, turns)
        pieces = [encode_text(tokenizer, step.strip() + STEP_SEPARATOR) for step in steps]
    except (RequestError, ModelError, ValueError, TypeError, AttributeError) as error:
        return f"cannot be read: {error}"
    ids = tuple(token for piece in pieces for token in piece)
    mask = tuple(int(at + 1 == len(piece)) for piece in pieces for at in range(len(piece)))
    if len(prompt_ids) + len(ids) > max_length:
        return f"{len(prompt_ids) + len(ids)} tokens, longer than max_length {max_length}"
    return PromptCompletions(id, tuple(prompt_ids), (CompletionTokens(ids, mask),)), [bool(label) for label in labels]
