"""Stage `data.doctor`: check a dataset and a chat template for training faults.

Template faults are found by `tokenize/chat/template_faults.py`, faults of the rows here. The report shows label tokens
in color. Does not load model weights.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Dataset, Model, Report, Tokenizer
from llmworks.core.context import Context
from llmworks.core.errors import ModelError, RequestError
from llmworks.core.types import Message
from llmworks.data.chat import conversations
from llmworks.data.conversations.turns import problems
from llmworks.data.faults.case import LEVELS, Case, _add
from llmworks.data.faults.pairs import OTHER_TURN, among, of_pairs
from llmworks.data.faults.report import FIRST, SHOWN, write_report
from llmworks.data.store.rows import Row, read_chat, read_preference, schema_of
from llmworks.data.text.statistics import question_of
from llmworks.tokenize.chat.control_tokens import ControlTokens
from llmworks.tokenize.chat.named import CHOICES, Template, tokenizer_of
from llmworks.tokenize.chat.template_faults import Finding, Uses, probe
from llmworks.tokenize.chat.templates import Rendered, encode, for_template, render_masked
from llmworks.tokenize.load import read_json, stop_ids

if TYPE_CHECKING:
    pass


class DoctorConfig(Config):
    """How the data will be used in training."""

    chat_template: Template = Field("keep", description=CHOICES)
    max_length: int | None = Field(
        None, gt=1, description="maximum sequence length of the training; default: the model's max_position_embeddings"
    )
    limit: int | None = Field(None, gt=0, description="check only this many rows; default: all")


def doctor(
    config: DoctorConfig,
    model: Model | Adapter | Tokenizer,
    data: Dataset,
    ctx: Context,
    eval_data: Dataset | None = None,
) -> Report:
    """Report every fault of the template and of the rows; `errors` and `warnings` are metrics for a gate.

    `eval_data` is the data that the model will be evaluated on; its questions must not be in the training data.
    Errors: ModelError for a model without a readable tokenizer; DataError for data that are not conversations.
    """
    tokenizer, stops, vocabulary, longest = load(config, model)
    pairs = schema_of(data) == "preference"
    rows = (read_preference(data) if pairs else read_chat(data))[: config.limit]
    cases = {f.code: Case(f) for f in probe(tokenizer, stops, uses_of(rows), vocabulary)}
    drawn: list[tuple[str, Rendered]] = []
    tokens = learned = 0
    broken = any(case.finding.code in ("no-template", "template-broken") for case in cases.values())
    with ctx.progress.bar("check", len(rows), "rows") as bar:
        for row in rows:
            for side, messages in zip((" chosen", " rejected") if pairs else ("",), conversations(row), strict=True):
                rendered = None if broken else examine(tokenizer, row, messages, config.max_length or longest, cases)
                if rendered is not None:
                    tokens, learned = tokens + len(rendered.ids), learned + sum(rendered.mask)
                    flagged = any(case.rows[-1:] == [row["id"]] for case in cases.values())
                    if len(drawn) < FIRST or (flagged and len(drawn) < FIRST + SHOWN):
                        drawn.append((row["id"] + side, rendered))
            bar.advance()
    among(rows, pairs, cases)
    if pairs:
        of_pairs(rows, cases)
    if eval_data is not None:
        shared(rows, eval_data, cases)
    found = sorted(
        cases.values(), key=lambda case: (LEVELS.index(case.finding.level), -len(case.rows), case.finding.code)
    )
    return write_report(
        ctx, model, data, tokenizer, found, drawn, {"rows": len(rows), "tokens": tokens, "learned": learned}
    )


def load(config: DoctorConfig, model: Model | Adapter | Tokenizer) -> tuple[Any, list[int], int | None, int | None]:
    """Load (tokenizer with the configured template, stop ids, vocab_size, max_position_embeddings) of a model."""
    tokenizer = tokenizer_of(model, config.chat_template)
    known = read_json(model.path / "config.json") if (model.path / "config.json").exists() else {}
    known = known.get("text_config") or known
    return tokenizer, stop_ids(model.path, tokenizer), known.get("vocab_size"), known.get("max_position_embeddings")


def require_template(name: str, tokenizer: Any, stops: Sequence[int], uses: Uses) -> None:
    """Raise ModelError for a template with an error, such as a missing end token or a dropped system turn."""
    fault = next((f for f in probe(tokenizer, stops, uses) if f.level == "error"), None)
    if fault is not None:
        raise ModelError(f"{name}: {fault.what}; {fault.fix} (run llmworks data doctor for details)")


def uses_of(rows: Sequence[Row]) -> Uses:
    """Return the template features that the rows use."""
    turns = [row.get("messages") or [*row["prompt"], *row["chosen"]] for row in rows]
    return Uses(
        system=any(m["role"] == "system" for messages in turns for m in messages),
        tools=any(row.get("tools") for row in rows) or any(m.get("tool_calls") for messages in turns for m in messages),
        results=any(m["role"] == "tool" for messages in turns for m in messages),
        turns=any(sum(m["role"] == "assistant" for m in messages) > 1 for messages in turns),
    )


def examine(
    tokenizer: Any, row: Row, messages: tuple[Message, ...], longest: int | None, cases: dict[str, Case]
) -> Rendered | None:
    """Check one conversation and add its faults to `cases`; returns it as rendered for training, or None."""
    for code, level, what, fix in _said(tokenizer, messages, row):
        _add(cases, row, Finding(code, level, what, fix))
    shown, tools = for_template(tokenizer, messages, row.get("tools") or ())
    try:
        rendered = render_masked(tokenizer, shown, tools=tools)
    except (RequestError, ModelError) as error:
        _add(cases, row, Finding("not-rendered", "error", str(error), "correct or remove these rows"))
        return None
    if not any(rendered.mask[1:]):
        _add(
            cases,
            row,
            Finding(
                "nothing-learned",
                "error",
                "the row has no label tokens (all are masked)",
                "it needs an assistant turn of weight 1",
            ),
        )
    if longest is not None and len(rendered.ids) > longest:
        kept = sum(rendered.mask[:longest])
        code, what = (
            ("answer-cut-off", "no label token is left") if not kept else ("answer-cut", "answers lose their end")
        )
        _add(
            cases,
            row,
            Finding(
                code,
                "error",
                f"longer than {longest} tokens: when truncated there, {what}",
                "remove longer rows (llmworks rejects, never truncates them), or raise max_length",
            ),
        )
    if (lost := _lost(tokenizer, messages)) is not None:
        _add(
            cases,
            row,
            Finding(
                "text-lost",
                "warning",
                f"the tokenizer does not round-trip the text, for example {lost!r}",
                "the model sees other text than what is written",
            ),
        )
    return rendered


def _said(
    tokenizer: Any, messages: Sequence[Message], row: Row
) -> Iterator[tuple[str, Literal["error", "warning", "note"], str, str]]:
    """Yield (code, level, what, fix) of faults in the turns themselves."""
    found = problems(messages, row.get("tools") or ())
    if found:
        what = re.sub(
            r"^turns? \d+( and \d+)?( \((\w+)\))?",
            lambda m: f"a {m[3]} turn" if m[3] else "turns" if m[1] else "a turn",
            found[0],
        )
        yield "turns", "error", what, "data.chat rejects such rows (turns: strict)"
    control = _control(tokenizer)
    for where, tokens in [
        *((f"the text of a {m.role} turn", control.of_turn(m)) for m in messages),
        ("the description of a tool", control.of_tools(row.get("tools") or ())),
    ]:
        if tokens:
            what = (
                f"{where} contains {' and '.join(map(repr, tokens[:3]))}, which"
                f" become{'s a special token' if len(tokens) == 1 else ' special tokens'}"
            )
            yield (
                "special-in-text",
                "error",
                what,
                "a user can end turns and speak for others: remove it from the text (data.pack rejects such rows)",
            )
    learned = [m for m in messages if m.role == "assistant" and m.weight]
    if any(OTHER_TURN.search(m.content) for m in learned):
        yield (
            "other-turn-learned",
            "warning",
            "a trained answer continues with a turn of another role (Human:, ### Instruction ...)",
            "the model would be trained to speak for the user: cut the answer there",
        )
    if any(m.content != m.content.strip() and m.content.strip() for m in learned):
        yield "white-space", "note", "trained answers begin or end with white space", ""


@functools.lru_cache(maxsize=1)
def _control(tokenizer: Any) -> ControlTokens:
    return ControlTokens(tokenizer)


def _lost(tokenizer: Any, messages: Sequence[Message]) -> str | None:
    """Return an excerpt of text that does not survive encoding and decoding, or None."""
    for message in messages:
        text = message.content
        if text.isascii():
            continue
        back = tokenizer.decode(encode(tokenizer, text), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if back.strip() != text.strip():
            at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), 0)
            return text[max(0, at - 10) : at + 10]
    return None


def shared(rows: Sequence[Row], held_out: Dataset, cases: dict[str, Case]) -> None:
    """Add the rows whose question is also in the eval data to `cases`."""
    other = read_preference(held_out) if schema_of(held_out) == "preference" else read_chat(held_out)
    known = {question_of(row) for row in other}
    for row in rows:
        if question_of(row) in known:
            _add(
                cases,
                row,
                Finding(
                    "in-held-out",
                    "error",
                    f"the question is also in {held_out.name}",
                    "the evaluation would be contaminated: split by question (data.split keeps groups together)",
                ),
            )
