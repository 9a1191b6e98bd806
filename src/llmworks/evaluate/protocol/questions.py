"""Turn rows into questions: render templates, prepend few-shot examples, find options and right answers.

Plain text or chat turns; does not tokenize.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmworks.core.artifact import Dataset
from llmworks.core.errors import DataError, UserError
from llmworks.core.types import Message
from llmworks.data.readers.input_files import find_files
from llmworks.data.store.jsonl import RejectedRows
from llmworks.data.store.raw_rows import read_raw_rows
from llmworks.data.store.rows import flatten_messages, read_chat
from llmworks.evaluate.protocol.task import Task
from llmworks.evaluate.protocol.templates import render_list, render_string, render_value

Row = dict[str, Any]
ID_FIELDS = ("id", "task_id", "question_id", "key")  # fields that may hold a row's id


@dataclass(frozen=True)
class Question:
    """One row as a question: plain text or chat turns (several where the options differ before the answer), and the
    right answer.

    `options`: the continuations to score; `choices`: the same as the task names them; `gold`: indices of the right
    choices; `references`: right answers as text; `row`: what score functions read.
    """

    id: str
    row: Row
    group: str
    shown: str
    plain: tuple[str, ...] = ()
    turns: tuple[tuple[Message, ...], ...] = ()
    prefix: str = ""
    options: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()
    references: tuple[str, ...] = ()


def read_rows(task: Task, data: Dataset, split: str) -> list[Row]:
    """Read all rows, each with a unique `id`.

    DataError when there are none, or one cannot be read: scores of a subset would not be comparable.
    """
    if task.rows == "chat":
        rows = read_chat(data)
    else:
        rejected = RejectedRows()
        rows = [row for file in _files(data.path, split) for _, _, row in read_raw_rows(file, rejected)]
        if rejected.rows:
            first = rejected.rows[0]
            raise DataError(
                f"{data.name}: {len(rejected.rows)} rows cannot be read, the first in {first['file']}:{first['line']}:"
                f" {first['reason']}"
            )
        rows = _with_ids(rows)
    if not rows:
        raise DataError(f"{data.name}: has no rows")
    return rows


def filter_rows(task: Task, rows: Sequence[Row], name: str) -> list[Row]:
    """Filter the rows by the task's `only`. DataError when none are left."""
    passing = (
        [row for row in rows if render_string(task.only, row).strip() not in ("", "False", "0", "None")]
        if task.only
        else list(rows)
    )
    if not passing:
        raise DataError(
            f"{name}: none of the {len(rows)} rows passes the filter of task {task.name!r} (`only`: {task.only})"
        )
    return passing


def _files(path: Path, split: str) -> list[Path]:
    if not split or path.is_file():
        return [path]
    found = [file for file in find_files(path) if file.name.split(".")[0].split("-")[0] == split]
    if not found:
        raise DataError(f"{path}: has no file of split {split!r} ({split}.jsonl, {split}-00000-of-00001.parquet)")
    return found


def _with_ids(rows: list[Row]) -> list[Row]:
    """Add an id to each row: its own where unique, else its row number."""
    for name in ID_FIELDS:
        ids = [str(row[name]) for row in rows if isinstance(row.get(name), (str, int))]
        if len(ids) == len(rows) == len(set(ids)):
            return [{**row, "id": id} for row, id in zip(rows, ids, strict=True)]
    return [{**row, "id": str(number)} for number, row in enumerate(rows, 1)]


def select_half(rows: Sequence[Row], side: str, task: Task) -> list[Row]:
    """Return one half of the rows, split by a hash of their content, not by ids or order; rows of one group, and
    identical rows, are in the same half.
    """
    if side == "all":
        return list(rows)
    found = [row for row in rows if get_half(row, render_string(task.group, row)) == side]
    if not found:
        raise DataError(f"none of the {len(rows)} rows is in the half {side!r}; there are too few rows to split")
    return found


def get_half(row: Row, group: str) -> str:
    """Return the row's half: "dev" or "test"."""
    content = group or json.dumps({k: v for k, v in row.items() if k not in ID_FIELDS}, sort_keys=True, default=str)
    return "dev" if hashlib.sha256(" ".join(content.lower().split()).encode()).digest()[0] % 2 else "test"


def build_questions(task: Task, rows: Sequence[Row], pool: Sequence[Row], *, same_pool: bool) -> list[Question]:
    """Convert all rows to questions.

    `pool`: rows to draw few-shot examples from; `same_pool`: it is the rows themselves, so a row must not be its own
    example.

    Errors: UserError for too few examples; DataError for a row without a right answer, or that does not fit a template.
    """
    sampler = FewShotSampler(task, pool, same_pool)
    conversations = task.rows == "chat" and not task.question
    return [
        _build_chat_question(task, row, sampler) if conversations else _build_question(task, row, sampler)
        for row in rows
    ]


def is_duplicate(one: Row, other: Row) -> bool:
    """Return whether two rows are equal except for their ids; neither may be the other's example."""
    return one is other or {k: v for k, v in one.items() if k not in ID_FIELDS} == {
        k: v for k, v in other.items() if k not in ID_FIELDS
    }


class FewShotSampler:
    """Sampler of few-shot examples.

    `each` samples as the lm-evaluation-harness does: one generator over all questions, one extra row where the
    question's own may be among them.
    """

    def __init__(self, task: Task, pool: Sequence[Row], same_pool: bool) -> None:
        self.task, self.shots = task, task.shots
        self.draw_extra = self.shots.draw_extra
        if self.draw_extra is None:
            self.draw_extra = same_pool and not self.shots.rows  # the row itself may be drawn
        self.random = random.Random(self.shots.seed)
        self.pools: dict[str, list[Row]] = {}
        self.fixed_examples: dict[str, list[Row]] = {}
        for row in (self.shots.rows or pool) if self.shots.count else ():
            self.pools.setdefault(self._group(row), []).append(row)

    def _group(self, row: Row) -> str:
        return render_string(self.task.group, row) if self.shots.same_group else ""

    def sample(self, row: Row) -> list[Row]:
        """Sample few-shot examples for a row. UserError when there are too few."""
        if not self.shots.count:
            return []
        group, count = self._group(row), self.shots.count + bool(self.draw_extra)
        pool = self.pools.get(group, [])
        if len(pool) < count:
            where = f" of the group {group!r}" if self.shots.same_group else ""
            raise UserError(
                f"num_fewshot is {self.shots.count}, but there are only {len(pool)} rows{where} to draw examples from"
                + (", including the row itself" if self.draw_extra else "")
            )
        if self.shots.choose == "each":
            found = self.random.sample(pool, count)
            # without an extra example the harness keeps the question among its examples; replacing it must not change
            # what is drawn for later questions
            more = self.random if self.draw_extra else random.Random(f"{self.shots.seed} {row['id']}")
        else:
            if group not in self.fixed_examples:
                self.fixed_examples[group] = (
                    pool[:count] if self.shots.choose == "first" else random.Random(self.shots.seed).sample(pool, count)
                )
            found, more = self.fixed_examples[group], random.Random(self.shots.seed)
        kept = [other for other in found if not is_duplicate(other, row)][: self.shots.count]
        if len(kept) == self.shots.count:
            return kept
        rest = [other for other in pool if not is_duplicate(other, row)]
        if len(rest) < self.shots.count:
            raise UserError(
                f"num_fewshot is {self.shots.count}, but only {len(rest)} of the rows to draw examples from differ from"
                f" row {row['id']!r}"
            )
        if self.shots.choose == "each" and self.draw_extra:
            return more.sample(rest, self.shots.count)
        unused = [other for other in rest if other not in kept]
        return kept + (
            unused[: self.shots.count - len(kept)]
            if self.shots.choose == "first"
            else more.sample(unused, self.shots.count - len(kept))
        )


def _build_question(task: Task, row: Row, sampler: FewShotSampler) -> Question:
    if task.kind == "perplexity":
        body = render_string(task.question, row)
        if not body:
            raise DataError(f"row {row['id']!r}: has no text")
        return Question(row["id"], row, render_string(task.group, row), body, plain=(body,))
    examples = sampler.sample(row)
    contexts = render_list(task.contexts, row) if task.contexts else [render_string(task.question, row)]
    prefix = render_string(task.prefix, row)
    choices = render_list(task.choices, row) if task.choices else contexts
    answer = render_value(task.answer, row)
    if task.refuse_numeric_question and _is_index(task.question, row):
        raise DataError(
            f"row {row['id']!r}: the question is a number, an index of the choices in the lm-evaluation-harness"
            " (multiple inputs), which is not supported; write the contexts as `contexts`"
        )
    chosen = task.kind == "choice" or (task.kind == "generate" and bool(task.choices))
    gold = gold_indices(row, parse_gold(task, row, answer), choices) if chosen else ()
    references = tuple(choices[i] for i in gold) if gold else _references(answer)
    if task.contexts:
        ending = render_string(task.question, row)
        options: tuple[str, ...] = (ending,)
        if not ending:
            raise DataError(
                f"row {row['id']!r}: `question` is empty; with `contexts` it is the continuation of each of them"
            )
    else:
        options = tuple(choices) if task.kind == "choice" else references if task.kind == "likelihood" else ()
    shown = contexts[0] if not task.contexts else " | ".join(contexts)
    scored = row if not isinstance(answer, Mapping) else {**row, "answer": answer}
    plain: tuple[str, ...] = ()
    turns: tuple[tuple[Message, ...], ...] = ()
    if task.prompt == "plain":
        front = _build_fewshot_prefix(task, row, examples)
        plain = tuple(
            front + context + (_get_delimiter(task, context, prefix) if prefix else "") + prefix for context in contexts
        )
    else:
        before = _build_fewshot_turns(task, row, examples)
        turns = tuple((*before, Message("user", context)) for context in contexts)
    return Question(
        row["id"],
        scored,
        render_string(task.group, row),
        shown,
        plain,
        turns,
        prefix,
        options,
        tuple(choices) if task.kind == "choice" else (),
        gold if task.kind == "choice" else (),
        references,
    )


def _is_index(question: str, row: Row) -> bool:
    """Return whether a question is an integer: a field, or digits that a template wrote."""
    found = render_value(question, row)
    return isinstance(found, int) or (question not in row and isinstance(found, str) and found.isdigit())


def _build_chat_question(task: Task, row: Row, sampler: FewShotSampler) -> Question:
    before = tuple(m for example in sampler.sample(row) for m in _conversation(example))
    messages = _conversation(row)
    reference = messages[-1].content
    description = render_string(task.description, row)
    system = (Message("system", description),) if description else ()
    return Question(
        row["id"],
        row,
        row.get("group") or "",
        messages[-2].content,
        turns=((*system, *before, *messages[:-1]),),
        references=(reference,),
    )


def _conversation(row: Row) -> tuple[Message, ...]:
    try:
        messages = flatten_messages(row)
    except ValueError as error:
        raise DataError(f"row {row['id']!r}: {error}") from None
    if len(messages) < 2 or messages[-1].role != "assistant":
        raise DataError(f"row {row['id']!r} does not end with an assistant turn, so it has no reference answer")
    return messages


def parse_gold(task: Task, row: Row, right: Any) -> Any:
    """Return the right answer; digits written by a template are an index, whatever the choices are named, as in the
    lm-evaluation-harness.
    """
    is_template_output = isinstance(right, str) and isinstance(task.answer, str) and task.answer not in row
    return int(right) if is_template_output and right.isdecimal() and len(right) < 10 else right


def gold_indices(row: Row, right: Any, choices: Sequence[str]) -> tuple[int, ...]:
    """Return the indices of the right choices, given as indices, texts, or a list of either.

    DataError when one is not among the choices.
    """
    out: list[int] = []
    for item in right if isinstance(right, list) else [right]:
        number = isinstance(item, int) or (isinstance(item, str) and item.strip().isdecimal() and len(item) < 10)
        if isinstance(item, str) and item in choices:
            place = list(choices).index(item)
        elif number:
            place = int(item)
        else:
            place = -1
        if not 0 <= place < len(choices):
            raise DataError(
                f"row {row['id']!r}: the right answer {str(item)[:60]!r} is not among its {len(choices)} choices"
            )
        out.append(place)
    if not out:
        raise DataError(f"row {row['id']!r}: has no right answer")
    return tuple(out)


def _references(right: Any) -> tuple[str, ...]:
    if isinstance(right, Mapping):
        return ()
    return tuple(str(item) for item in right) if isinstance(right, list) else (str(right),)


def _build_example(task: Task, row: Row) -> tuple[str, str]:
    """Return (question, answer) of a few-shot example."""
    prefix = render_string(task.prefix, row)
    if task.contexts:
        contexts, place = (
            render_list(task.contexts, row),
            gold_indices(row, parse_gold(task, row, render_value(task.answer, row)), render_list(task.contexts, row))[
                0
            ],
        )
        return contexts[place], _join(prefix, render_string(task.question, row), " ")
    if task.example_answer:
        answer = render_string(task.example_answer, row)
    else:
        right = (
            parse_gold(task, row, render_value(task.answer, row)) if task.choices else render_value(task.answer, row)
        )
        if isinstance(right, Mapping):
            raise UserError(f"{task.name}: few-shot examples need `example_answer`, because `answer` is a mapping")
        if task.choices and (task.kind == "choice" or isinstance(right, int)):
            choices = render_list(task.choices, row)
            right = choices[gold_indices(row, right, choices)[0]]
        answer = str(right[0] if isinstance(right, list) else right)
    return render_string(task.question, row), _join(prefix, answer, " ")


def _build_fewshot_prefix(task: Task, row: Row, examples: Sequence[Row]) -> str:
    """Build the description and few-shot examples of a plain prompt."""
    out = render_string(task.description, row)
    for example in examples:
        example_question, example_answer = _build_example(task, example)
        prefix = render_string(task.prefix, example)
        out += (
            example_question
            + (_get_delimiter(task, example_question, prefix) if prefix else task.before_answer)
            + example_answer
            + task.between
        )
    return out


def _build_fewshot_turns(task: Task, row: Row, examples: Sequence[Row]) -> tuple[Message, ...]:
    description = render_string(task.description, row)
    out = [Message("system", description)] if description else []
    for example in examples:
        example_question, example_answer = _build_example(task, example)
        out += [Message("user", example_question), Message("assistant", example_answer)]
    return tuple(out)


def _get_delimiter(task: Task, before: str, after: str) -> str:
    return "" if not before or before[-1].isspace() or after[0].isspace() else task.before_answer


def _join(first: str, second: str, between: str) -> str:
    if not first or not second:
        return first or second
    return first + second if first[-1].isspace() or second[0].isspace() else first + between + second
