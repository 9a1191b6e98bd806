"""Stage `data.doctor`: check a dataset and a chat template for training faults.

Template faults are found by `tokenize/chat/template_faults.py`, faults of the rows here. The report shows label tokens
in color. Does not load model weights.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, Dataset, Model, Report, Tokenizer
from llmworks.core.context import Context
from llmworks.core.errors import ModelError, RequestError
from llmworks.core.types import Message
from llmworks.data.chat import get_conversations
from llmworks.data.conversations.turns import find_problems
from llmworks.data.faults.finding import LEVELS, DatasetFinding, add_finding
from llmworks.data.faults.report import FIRST, SHOWN, write_report
from llmworks.data.faults.row_checks import OTHER_TURN, check_pairs, check_rows
from llmworks.data.store.rows import Row, detect_schema, read_chat, read_preference
from llmworks.data.text.statistics import get_question
from llmworks.tokenize.chat.named_templates import TEMPLATE_DESCRIPTION, Template, load_model_tokenizer
from llmworks.tokenize.chat.special_tokens import SpecialTokenDetector
from llmworks.tokenize.chat.template_faults import TemplateUses, TrainingFault, find_template_faults
from llmworks.tokenize.chat.templates import (
    RenderedConversation,
    adapt_tools,
    encode,
    find_unread_fields,
    render_answers,
)
from llmworks.tokenize.load import get_stop_ids, read_json


class DoctorConfig(Config):
    """How the data will be used in training."""

    chat_template: Template = Field("keep", description=TEMPLATE_DESCRIPTION)
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
    tokenizer, stops, vocabulary, longest = load_tokenizer_info(config, model)
    pairs = detect_schema(data) == "preference"
    rows = (read_preference(data) if pairs else read_chat(data))[: config.limit]
    cases = {
        f.code: DatasetFinding(f) for f in find_template_faults(tokenizer, stops, get_template_uses(rows), vocabulary)
    }
    drawn: list[tuple[str, RenderedConversation]] = []
    tokens = learned = 0
    broken = any(case.finding.code in ("no-template", "template-broken") for case in cases.values())
    with ctx.progress.bar("check", len(rows), "rows") as bar:
        for row in rows:
            for side, messages in zip(
                (" chosen", " rejected") if pairs else ("",), get_conversations(row), strict=True
            ):
                rendered = (
                    None
                    if broken
                    else check_conversation(tokenizer, row, messages, config.max_length or longest, cases)
                )
                if rendered is not None:
                    tokens += sum(len(one.ids) for one in rendered)
                    learned += sum(sum(one.mask) for one in rendered)
                    flagged = any(case.rows[-1:] == [row["id"]] for case in cases.values())
                    if len(drawn) < FIRST or (flagged and len(drawn) < FIRST + SHOWN):
                        drawn.append((row["id"] + side, rendered[-1]))
            bar.advance()
    check_rows(rows, pairs, cases)
    if pairs:
        check_pairs(rows, cases)
    if eval_data is not None:
        find_contaminated_rows(rows, eval_data, cases)
    found = sorted(
        cases.values(), key=lambda case: (LEVELS.index(case.finding.level), -len(case.rows), case.finding.code)
    )
    return write_report(
        ctx, model, data, tokenizer, found, drawn, {"rows": len(rows), "tokens": tokens, "num_label_tokens": learned}
    )


def load_tokenizer_info(
    config: DoctorConfig, model: Model | Adapter | Tokenizer
) -> tuple[Any, list[int], int | None, int | None]:
    """Load (tokenizer with the configured template, stop ids, vocab_size, max_position_embeddings) of a model."""
    tokenizer = load_model_tokenizer(model, config.chat_template)
    known = read_json(model.path / "config.json") if (model.path / "config.json").exists() else {}
    known = known.get("text_config") or known
    return tokenizer, get_stop_ids(model.path, tokenizer), known.get("vocab_size"), known.get("max_position_embeddings")


def require_template(name: str, tokenizer: Any, stop_ids: Sequence[int], uses: TemplateUses) -> None:
    """Raise ModelError for a template with an error, such as a missing end token or a dropped system turn."""
    fault = next((f for f in find_template_faults(tokenizer, stop_ids, uses) if f.level == "error"), None)
    if fault is not None:
        raise ModelError(f"{name}: {fault.message}; {fault.fix} (run llmworks data doctor for details)")


def get_template_uses(rows: Sequence[Row]) -> TemplateUses:
    """Return the template features that the rows use."""
    turns = [row.get("messages") or [*row["prompt"], *row["chosen"]] for row in rows]
    return TemplateUses(
        system=any(m["role"] == "system" for messages in turns for m in messages),
        tools=any(row.get("tools") for row in rows) or any(m.get("tool_calls") for messages in turns for m in messages),
        results=any(m["role"] == "tool" for messages in turns for m in messages),
        turns=any(sum(m["role"] == "assistant" for m in messages) > 1 for messages in turns),
    )


def check_conversation(
    tokenizer: Any, row: Row, messages: tuple[Message, ...], max_length: int | None, cases: dict[str, DatasetFinding]
) -> list[RenderedConversation] | None:
    """Check one conversation and add its faults to `cases`; returns it as rendered for training, or None.

    It is rendered once, or once for each answer where the template rewrites earlier turns.
    """
    for code, level, what, fix in _find_turn_faults(tokenizer, messages, row):
        add_finding(cases, row, TrainingFault(code, level, what, fix))
    shown, tools = adapt_tools(tokenizer, messages, row.get("tools") or ())
    try:
        rendered = render_answers(tokenizer, shown, tools=tools)
    except (RequestError, ModelError) as error:
        add_finding(cases, row, TrainingFault("not-rendered", "error", str(error), "correct or remove these rows"))
        return None
    for name in find_unread_fields(tokenizer, messages, row.get("tools") or ()):
        fix = "use a template that reads it, or move it into the content; otherwise the model never sees it"
        what = f"the template does not read the field {name!r} of turns"
        add_finding(cases, row, TrainingFault(f"unread-{name}", "warning", what, fix))
    if not rendered or not all(any(one.mask[1:]) for one in rendered):
        add_finding(
            cases,
            row,
            TrainingFault(
                "no-label-tokens",
                "error",
                "the row has no label tokens (all are masked)",
                "it needs an assistant turn of weight 1",
            ),
        )
    longest = max(rendered, key=lambda one: len(one.ids), default=RenderedConversation((), ()))
    if max_length is not None and len(longest.ids) > max_length:
        kept = sum(longest.mask[:max_length])
        code, what = (
            ("answer-cut-off", "no label token is left") if not kept else ("answer-cut", "answers lose their end")
        )
        add_finding(
            cases,
            row,
            TrainingFault(
                code,
                "error",
                f"longer than {max_length} tokens: when truncated there, {what}",
                "remove longer rows (llmworks rejects, never truncates them), or raise max_length",
            ),
        )
    if (lost := _find_lossy_text(tokenizer, messages)) is not None:
        add_finding(
            cases,
            row,
            TrainingFault(
                "text-lossy",
                "warning",
                f"the tokenizer does not round-trip the text, for example {lost!r}",
                "the model sees other text than what is written",
            ),
        )
    return rendered or None


def _find_turn_faults(
    tokenizer: Any, messages: Sequence[Message], row: Row
) -> Iterator[tuple[str, Literal["error", "warning", "note"], str, str]]:
    """Yield (code, level, what, fix) of faults in the turns themselves."""
    found = find_problems(messages, row.get("tools") or ())
    if found:
        what = re.sub(
            r"^turns? \d+( and \d+)?( \((\w+)\))?",
            lambda m: f"a {m[3]} turn" if m[3] else "turns" if m[1] else "a turn",
            found[0],
        )
        yield "turns", "error", what, "data.chat rejects such rows (turns: strict)"
    control = _get_special_tokens(tokenizer)
    for where, tokens in [
        *((f"the text of a {m.role} turn", control.find_in_turn(m)) for m in messages),
        ("the description of a tool", control.find_in_tools(row.get("tools") or ())),
    ]:
        if tokens:
            what = (
                f"{where} contains {' and '.join(map(repr, tokens[:3]))}, special tokens that are encoded as text here"
            )
            yield (
                "special-in-text",
                "warning",
                what,
                "with control_tokens: keep, and in other trainers, a user can end turns and speak for others",
            )
    learned = [m for m in messages if m.role == "assistant" and m.weight]
    if any(OTHER_TURN.search(m.content) for m in learned):
        yield (
            "other-turn-trained",
            "warning",
            "a trained answer continues with a turn of another role (Human:, ### Instruction ...)",
            "the model would be trained to speak for the user: cut the answer there",
        )
    if any(m.content != m.content.strip() and m.content.strip() for m in learned):
        yield "white-space", "note", "trained answers begin or end with white space", ""


@functools.lru_cache(maxsize=1)
def _get_special_tokens(tokenizer: Any) -> SpecialTokenDetector:
    return SpecialTokenDetector(tokenizer)


def _find_lossy_text(tokenizer: Any, messages: Sequence[Message]) -> str | None:
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


def find_contaminated_rows(rows: Sequence[Row], eval_data: Dataset, cases: dict[str, DatasetFinding]) -> None:
    """Add the rows whose question is also in the eval data to `cases`."""
    other = read_preference(eval_data) if detect_schema(eval_data) == "preference" else read_chat(eval_data)
    known = {get_question(row) for row in other}
    for row in rows:
        if get_question(row) in known:
            add_finding(
                cases,
                row,
                TrainingFault(
                    "in-eval-data",
                    "error",
                    f"the question is also in {eval_data.name}",
                    "the evaluation would be contaminated: split by question (data.split keeps groups together)",
                ),
            )
