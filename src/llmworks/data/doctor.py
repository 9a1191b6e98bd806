"""Stage `data.doctor`: would this model learn from these conversations what is meant?

Looks at the template, then at every row.

Faults of the template are found by `tokenize.probe`; faults of rows here. What is learned is shown in colour. Knows no
weights.
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
    """How the data will be trained on."""

    chat_template: Template = Field("keep", description=CHOICES)
    max_length: int | None = Field(
        None, gt=1, description="the longest conversation that training takes; default: what the model reads"
    )
    limit: int | None = Field(None, gt=0, description="only the first rows")


def doctor(
    config: DoctorConfig,
    model: Model | Adapter | Tokenizer,
    data: Dataset,
    ctx: Context,
    eval_data: Dataset | None = None,
) -> Report:
    """Report every fault of the template and of the rows; `errors` and `warnings` are metrics for a gate.

    `held_out` is what the model will be measured on: its questions must not be in the data.
    Errors: ModelError for a model without a readable tokenizer; DataError for data that are no conversations.
    """
    tokenizer, stops, vocabulary, longest = load(config, model)
    pairs = schema_of(data) == "preference"
    rows = (read_preference(data) if pairs else read_chat(data))[: config.limit]
    cases = {f.code: Case(f) for f in probe(tokenizer, stops, uses_of(rows), vocabulary)}
    drawn: list[tuple[str, Rendered]] = []
    tokens = learned = 0
    broken = any(case.finding.code in ("no-template", "template-broken") for case in cases.values())
    with ctx.progress.bar("look at", len(rows), "rows") as bar:
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
    """(tokenizer with the template that is asked for, stop ids, rows of the embedding, longest input) of a model
    directory.
    """
    tokenizer = tokenizer_of(model, config.chat_template)
    known = read_json(model.path / "config.json") if (model.path / "config.json").exists() else {}
    known = known.get("text_config") or known
    return tokenizer, stop_ids(model.path, tokenizer), known.get("vocab_size"), known.get("max_position_embeddings")


def require_template(name: str, tokenizer: Any, stops: Sequence[int], uses: Uses) -> None:
    """ModelError for a template that would teach something else than what is meant: no end, a dropped system turn,
    another prompt than is asked with.
    """
    fault = next((f for f in probe(tokenizer, stops, uses) if f.level == "error"), None)
    if fault is not None:
        raise ModelError(f"{name}: {fault.what}; {fault.fix} (llmworks data doctor tells more)")


def uses_of(rows: Sequence[Row]) -> Uses:
    """What the rows need of a template."""
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
    """Add what is wrong with one conversation to `cases`; returns it as it would be trained on, None when it
    cannot be.
    """
    for code, level, what, fix in _said(tokenizer, messages, row):
        _add(cases, row, Finding(code, level, what, fix))
    shown, tools = for_template(tokenizer, messages, row.get("tools") or ())
    try:
        rendered = render_masked(tokenizer, shown, tools=tools)
    except (RequestError, ModelError) as error:
        _add(cases, row, Finding("not-rendered", "error", str(error), "correct these rows, or set them aside"))
        return None
    if not any(rendered.mask[1:]):
        _add(
            cases,
            row,
            Finding(
                "nothing-learned", "error", "no token of the row is learned", "it needs an assistant turn of weight 1"
            ),
        )
    if longest is not None and len(rendered.ids) > longest:
        kept = sum(rendered.mask[:longest])
        code, what = (
            ("answer-cut-off", "no answer is left")
            if not kept
            else ("answer-cut", "answers are cut and lose their end")
        )
        _add(
            cases,
            row,
            Finding(
                code,
                "error",
                f"longer than {longest} tokens: cut there, {what}",
                "set longer rows aside (llmworks never cuts), or raise max_tokens",
            ),
        )
    if (lost := _lost(tokenizer, messages)) is not None:
        _add(
            cases,
            row,
            Finding(
                "text-lost",
                "warning",
                f"the tokenizer cannot give back the text, for example {lost!r}",
                "the model reads something else than what is written",
            ),
        )
    return rendered


def _said(
    tokenizer: Any, messages: Sequence[Message], row: Row
) -> Iterator[tuple[str, Literal["error", "warning", "note"], str, str]]:
    """(code, level, what, fix) of faults in the turns themselves."""
    found = problems(messages, row.get("tools") or ())
    if found:
        what = re.sub(
            r"^turns? \d+( and \d+)?( \((\w+)\))?",
            lambda m: f"a {m[3]} turn" if m[3] else "turns" if m[1] else "a turn",
            found[0],
        )
        yield "turns", "error", what, "data.chat sets such rows aside (turns: strict)"
    control = _control(tokenizer)
    for where, tokens in [
        *((f"the text of a {m.role} turn", control.of_turn(m)) for m in messages),
        ("the description of a tool", control.of_tools(row.get("tools") or ())),
    ]:
        if tokens:
            what = (
                f"{where} holds {' and '.join(map(repr, tokens[:3]))}, which"
                f" become{'s a control token' if len(tokens) == 1 else ' control tokens'}"
            )
            yield (
                "special-in-text",
                "error",
                what,
                "a user can end turns and speak for others: take it out of the text (data.pack sets such rows aside)",
            )
    learned = [m for m in messages if m.role == "assistant" and m.weight]
    if any(OTHER_TURN.search(m.content) for m in learned):
        yield (
            "other-turn-learned",
            "warning",
            "a learned answer goes on with a turn of somebody else (Human:, ### Instruction ...)",
            "the model learns to speak for the user: cut the answer there",
        )
    if any(m.content != m.content.strip() and m.content.strip() for m in learned):
        yield "white-space", "note", "learned answers begin or end with white space", ""


@functools.lru_cache(maxsize=1)
def _control(tokenizer: Any) -> ControlTokens:
    return ControlTokens(tokenizer)


def _lost(tokenizer: Any, messages: Sequence[Message]) -> str | None:
    """A stretch of text that is not given back after encoding, if there is one."""
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
    """Questions that are in the held-out data too."""
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
                    f"the question is in {held_out.name} too",
                    "what is measured there was learned: split by question (data.split keeps groups together)",
                ),
            )
