"""Stage `data.doctor`: would this model learn from these conversations what is meant?

Looks at the template, then at every row.

Faults of the template are found by `tokenize.probe`; faults of rows here. What is learned is shown in colour. Knows no
weights.
"""

from __future__ import annotations

import functools
import html
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Dataset, Model, Report, Tokenizer
from llmworks.core.context import Context
from llmworks.core.errors import ModelError, RequestError
from llmworks.core.types import Json, Message
from llmworks.data.chat import conversations
from llmworks.data.conversations.turns import problems
from llmworks.data.store.rows import Row, read_chat, read_preference, schema_of
from llmworks.data.text.statistics import question_of
from llmworks.tokenize import view
from llmworks.tokenize.chat.control_tokens import ControlTokens
from llmworks.tokenize.chat.named import CHOICES, Template, tokenizer_of
from llmworks.tokenize.chat.template_faults import Finding, Uses, probe
from llmworks.tokenize.chat.templates import Rendered, encode, for_template, render_masked
from llmworks.tokenize.load import read_json, stop_ids

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder

LEVELS = ("error", "warning", "note")
FIRST, SHOWN = 2, 5  # rows drawn from the beginning; rows named for each finding, and drawn because of one
LEAKED = 20  # characters of an answer that may stand in its prompt by chance
FEWEST, BIASED = 20, 0.7  # pairs from which on a preference for length is told, and from which share on
OTHER_TURN = re.compile(
    r"\n\s*(?:(?:Human|User|USER|Assistant|System): |### (?:Instruction|Response|Human|Assistant)\b)"
)


class DoctorConfig(Config):
    """How the data will be trained on."""

    template: Template = Field("keep", description=CHOICES)
    max_tokens: int | None = Field(
        None, gt=1, description="the longest conversation that training takes; default: what the model reads"
    )
    limit: int | None = Field(None, gt=0, description="only the first rows")


@dataclass
class Case:
    """A finding about rows, and the ids of the rows that it is about."""

    finding: Finding
    rows: list[str] = field(default_factory=list)


def doctor(
    config: DoctorConfig,
    model: Model | Adapter | Tokenizer,
    data: Dataset,
    ctx: Context,
    held_out: Dataset | None = None,
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
                rendered = None if broken else examine(tokenizer, row, messages, config.max_tokens or longest, cases)
                if rendered is not None:
                    tokens, learned = tokens + len(rendered.ids), learned + sum(rendered.mask)
                    flagged = any(case.rows[-1:] == [row["id"]] for case in cases.values())
                    if len(drawn) < FIRST or (flagged and len(drawn) < FIRST + SHOWN):
                        drawn.append((row["id"] + side, rendered))
            bar.advance()
    among(rows, pairs, cases)
    if pairs:
        of_pairs(rows, cases)
    if held_out is not None:
        shared(rows, held_out, cases)
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
    tokenizer = tokenizer_of(model, config.template)
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


def _add(cases: dict[str, Case], row: Row, finding: Finding) -> None:
    case = cases.setdefault(finding.code, Case(finding))
    if not case.rows or case.rows[-1] != row["id"]:
        case.rows.append(row["id"])


def among(rows: Sequence[Row], pairs: bool, cases: dict[str, Case]) -> None:
    """Faults that show only among rows: the same conversation twice, one question with several answers, pairs of equal
    sides.
    """
    seen: dict[str, str] = {}
    answers: dict[str, tuple[str, str]] = {}
    for row in rows:
        if pairs and row["chosen"] == row["rejected"]:
            _add(
                cases,
                row,
                Finding(
                    "equal-sides",
                    "error",
                    "chosen and rejected are the same",
                    "such a pair teaches nothing: take it out",
                ),
            )
        turns = row.get("messages") or [*row["prompt"], *row["chosen"]]
        whole = json.dumps([turns, row.get("rejected"), row.get("tools")], sort_keys=True)
        if whole in seen:
            _add(
                cases,
                row,
                Finding(
                    "twice",
                    "warning",
                    "the same row stands more than once",
                    "data.chat with repeated=drop sets them aside",
                ),
            )
            continue
        seen[whole] = row["id"]
        asked, said = json.dumps([turns[:-1], row.get("tools")], sort_keys=True), json.dumps(turns[-1], sort_keys=True)
        if not pairs and answers.setdefault(asked, (said, row["id"]))[0] != said:
            _add(cases, row, Finding("contradiction", "note", "the same question has different answers", ""))


def of_pairs(rows: Sequence[Row], cases: dict[str, Case]) -> None:
    """Faults of preference pairs: one that another turns round, an answer that stands in its question, a preference for
    length.
    """
    preferred: dict[str, str] = {}
    longer = [row for row in rows if _length(row["chosen"]) > _length(row["rejected"])]
    for row in rows:
        prompt, good, bad = (
            json.dumps([row[side], row.get("tools")], sort_keys=True) for side in ("prompt", "chosen", "rejected")
        )
        if good != bad and preferred.get(f"{prompt}{bad}{good}"):
            _add(
                cases,
                row,
                Finding(
                    "contradictory-pairs",
                    "error",
                    "another pair prefers the same two answers the other way round",
                    "keep one of the two, or neither",
                ),
            )
        preferred[f"{prompt}{good}{bad}"] = row["id"]
        asked = "\n".join(m["content"] or "" for m in row["prompt"])
        said = "\n".join(m["content"] or "" for m in row["chosen"]).strip()
        if len(said) >= LEAKED and said in asked:
            _add(
                cases,
                row,
                Finding(
                    "answer-in-prompt",
                    "warning",
                    "the chosen answer stands in the prompt",
                    "the model learns to copy: take the answer out of the prompt",
                ),
            )
    share = len(longer) / max(1, len(rows))
    if len(rows) >= FEWEST and share > BIASED:
        ratio = sum(_length(row["chosen"]) for row in rows) / max(1, sum(_length(row["rejected"]) for row in rows))
        finding = Finding(
            "length-bias",
            "warning",
            f"the chosen answer is the longer one in {share:.0%} of the pairs, {ratio:.1f} times as long on average",
            "the model learns to be long: balance the pairs by length",
        )
        for row in longer:
            _add(cases, row, finding)


def _length(turns: Sequence[Json]) -> int:
    return sum(len(m.get("content") or "") for m in turns)


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


def write_report(
    ctx: Context,
    model: Model | Adapter | Tokenizer,
    data: Dataset,
    tokenizer: Any,
    found: list[Case],
    drawn: list[tuple[str, Rendered]],
    counts: dict[str, int],
) -> Report:
    """The findings as page, terminal text and metrics."""
    errors, warnings = (sum(case.finding.level == level for case in found) for level in ("error", "warning"))
    report = ctx.report
    report.title = f"{data.name} for {model.name}"
    report.lead = (
        f"{_count(errors, 'error')}, {_count(warnings, 'warning')} in {_count(counts['rows'], 'row')};"
        f" {counts['learned']:,} of {counts['tokens']:,} tokens are learned."
    )
    report.data = {
        "errors": errors,
        "warnings": warnings,
        **counts,
        "findings": [
            {
                "code": c.finding.code,
                "level": c.finding.level,
                "what": c.finding.what,
                "fix": c.finding.fix,
                "rows": len(c.rows),
                "examples": c.rows[:SHOWN],
            }
            for c in found
        ],
    }
    _describe_findings(found, report)
    page = view.STYLE + "".join(
        f"<p class=note>{html.escape(id)}</p>{view.as_html(tokenizer, r.ids, r.mask)}" for id, r in drawn
    )
    plain = "\n\n".join(f"{id}\n{view.as_plain(tokenizer, r.ids, r.mask)}" for id, r in drawn)
    if drawn:
        report.drawing(
            "What is learned",
            page,
            text=(
                "The first rows, and some with findings. Green is learned, grey is only read; control tokens are red."
                " The ids are tooltips."
            ),
            plain=plain,
        )
    _write_terminal(report, found, drawn, tokenizer)
    about = {"failed": f"{_count(errors, 'error')}: this data would damage the model"} if errors else {}
    return Report(ctx.out, metrics={"errors": errors, "warnings": warnings, **counts}, about=about)


def _describe_findings(found: list[Case], report: ReportBuilder) -> None:
    """The table of findings, or that there are none."""
    if found:
        rows = [
            (
                c.finding.level,
                c.finding.code,
                c.finding.what,
                len(c.rows) or "template",
                ", ".join(c.rows[:SHOWN]),
                c.finding.fix,
            )
            for c in found
        ]
        report.table("Findings", ("level", "code", "what is wrong", "rows", "for example", "what to do"), rows)
    else:
        report.text(
            "Findings",
            "None: the template renders what the rows hold, every answer ends with a learned token that generation"
            " stops at.",
        )


def _write_terminal(
    report: ReportBuilder, found: list[Case], drawn: list[tuple[str, Rendered]], tokenizer: Any
) -> None:
    """The findings as coloured text for a terminal."""
    colours = {"error": "\x1b[31m", "warning": "\x1b[33m", "note": "\x1b[36m"}
    lines = [report.lead]
    lines += [
        f"{colours[c.finding.level]}{c.finding.level:<7}\x1b[0m {c.finding.code}: {c.finding.what}"
        + (f" [{_count(len(c.rows), 'row')}: {', '.join(c.rows[:3])}]" if c.rows else "")
        + (f"\n        → {c.finding.fix}" if c.finding.fix else "")
        for c in found
    ]
    lines += [f"\n{id}, learned on green:\n{view.as_ansi(tokenizer, r.ids, r.mask)}" for id, r in drawn[:FIRST]]
    report.terminal = "\n".join(lines)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
