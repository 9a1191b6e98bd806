"""Find faults of a chat template and its tokenizer by rendering probe conversations.

Does not access datasets or weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llmworks.core.errors import ModelError, RequestError
from llmworks.core.types import Message, ToolCall
from llmworks.tokenize.chat.templates import can_render_tools, encode, render_answers, render_masked, render_text

SYSTEM_TEXT, USER_TEXT, ANSWER_TEXT, SECOND_USER_TEXT, SECOND_ANSWER_TEXT, RESULT_TEXT = (
    "zqsystem",
    "zqasked",
    "zqsaid",
    "zqagain",
    "zqmore",
    "zqresult",
)
MARKS = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<(?:start|end)_of_turn>|\[/?(?:INST|SYSTEM_PROMPT|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS)\]"
)
TOOL = {
    "type": "function",
    "function": {"name": "zqtool", "description": "d", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True)
class TrainingFault:
    """A fault and its fix; `error`: training or prompting goes wrong, `warning`: it may, `note`: for information."""

    code: str
    level: Literal["error", "warning", "note"]
    message: str
    fix: str = ""


@dataclass(frozen=True)
class TemplateUses:
    """Template features that the data use."""

    system: bool = False
    tools: bool = False
    results: bool = False
    turns: bool = False  # more than one assistant turn


def _error(code: str, message: str, fix: str = "") -> TrainingFault:
    """Return a fault that damages the training."""
    return TrainingFault(code, "error", message, fix)


def find_template_faults(
    tokenizer: Any, stop_ids: Sequence[int], uses: TemplateUses, vocab_size: int | None = None
) -> list[TrainingFault]:
    """Find all faults of a template for these uses.

    `vocab_size` is the number of rows of the model's embedding, None if unknown.
    """
    found = _check_tokens(tokenizer, vocab_size)
    if not tokenizer.chat_template:
        return [
            *found,
            _error(
                "no-template",
                "the model has no chat template",
                "name one (chat_template: chatml), or train on plain text",
            ),
        ]
    broken = "correct the template, or give the variable that it needs a default value"
    try:
        prompt = render_text(tokenizer, (Message("user", USER_TEXT),))
    except RequestError as error:
        return [*found, _error("template-broken", str(error), broken)]
    answered = (Message("user", USER_TEXT), Message("assistant", ANSWER_TEXT))
    try:
        full = render_text(tokenizer, answered, generation_prompt=False)
    except RequestError as error:
        return [*found, _error("template-broken", f"no answer can be rendered: {error}", broken)]
    found += (
        _check_marks(tokenizer, full) + _check_bos(tokenizer, full) + _check_generation_prompt(tokenizer, prompt, full)
    )
    if not any(f.code in ("generation-prompt", "rewrites-turns", "answer-dropped") for f in found):
        found += _check_end_token(tokenizer, stop_ids, uses)
        found += _check_generation_mask(tokenizer)
    return [*found, *_check_system(tokenizer, uses), *_check_tools(tokenizer, uses), *_check_text(tokenizer, prompt)]


def _check_tokens(tokenizer: Any, vocab_size: int | None) -> list[TrainingFault]:
    found: list[TrainingFault] = []
    if vocab_size is not None and len(tokenizer) > vocab_size:
        found.append(
            _error(
                "vocabulary",
                f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {vocab_size} rows",
                "resize the embedding, or use the model's own tokenizer",
            )
        )
    if tokenizer.eos_token_id is None:
        found.append(_error("no-eos", "the tokenizer has no end token", "set eos_token in tokenizer_config.json"))
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        what = (
            f"the padding token is the end token {tokenizer.eos_token!r}: trainers that mask padding in the loss mask"
            " the end token too"
        )
        found.append(
            TrainingFault(
                "pad-is-eos",
                "note",
                what,
                "llmworks masks by position, not by id; for other trainers set another pad_token",
            )
        )
    return found


def _check_marks(tokenizer: Any, full: str) -> list[TrainingFault]:
    """Find marks of the template that are not single tokens."""
    split = [mark for mark in dict.fromkeys(MARKS.findall(full)) if len(encode(tokenizer, mark)) > 1]
    if not split:
        return []
    what = (
        f"{split[0]!r} is {len(encode(tokenizer, split[0]))} tokens of this tokenizer, not one ({len(split)} such"
        f" mark{'s' if len(split) > 1 else ''})"
    )
    return [
        TrainingFault(
            "split-mark",
            "warning",
            what,
            "the template is another model's: use the model's own, or add the tokens and train their embeddings",
        )
    ]


def _check_bos(tokenizer: Any, full: str) -> list[TrainingFault]:
    bos = tokenizer.bos_token_id
    own, added = encode(tokenizer, full), tuple(tokenizer(full)["input_ids"])
    if bos is None:
        return []
    if own[:2] == (bos, bos):
        return [
            _error(
                "double-bos",
                f"the template writes {tokenizer.bos_token!r} twice",
                "remove one of them from the template",
            )
        ]
    if added[:2] == (bos, bos):
        what = f"the template writes {tokenizer.bos_token!r} and the tokenizer adds another one to rendered text"
        return [
            TrainingFault(
                "double-bos", "warning", what, "encode rendered text with add_special_tokens=False, as llmworks does"
            )
        ]
    if added[0] == bos and own[0] != bos:
        return [
            TrainingFault(
                "no-bos",
                "warning",
                f"the tokenizer adds {tokenizer.bos_token!r} at the beginning, the template does not write it",
                "begin the template with {{ bos_token }}",
            )
        ]
    return []


def _check_generation_prompt(tokenizer: Any, prompt: str, full: str) -> list[TrainingFault]:
    """Check that the training text continues the generation prompt."""
    bare = render_text(tokenizer, (Message("user", USER_TEXT),), generation_prompt=False)
    fix = (
        "let the template write the same beginning of an answer with add_generation_prompt as before an assistant turn"
    )
    if ANSWER_TEXT not in full:
        return [_error("answer-dropped", "the template drops assistant turns", "correct the template")]
    if not full.startswith(bare):
        return [
            _error(
                "rewrites-turns",
                "the template renders a turn differently when another follows, so no loss mask can be computed",
                "render every turn independently of later ones",
            )
        ]
    if not full.startswith(prompt):
        what = (
            f"in generation an answer begins after {prompt[len(bare) :]!r}; in training after"
            f" {full[len(bare) : full.index(ANSWER_TEXT)]!r}"
        )
        return [_error("generation-prompt", what, fix)]
    between = full[len(prompt) : full.index(ANSWER_TEXT)]
    if between.strip() and prompt != bare:  # an empty think block, which the model generates itself
        what = f"the template writes {between!r} before an answer; it is trained on, as the model has to generate it"
        return [TrainingFault("answer-prefix", "note", what, "")]
    if between.strip():
        return [
            _error(
                "generation-prompt",
                f"add_generation_prompt does not write {between!r}, which precedes every answer in training",
                fix,
            )
        ]
    return []


def _check_end_token(tokenizer: Any, stop_ids: Sequence[int], uses: TemplateUses) -> list[TrainingFault]:
    """Check that every answer ends with a label token that is a stop token of generation."""
    turns = (
        Message("user", USER_TEXT),
        Message("assistant", ANSWER_TEXT),
        Message("user", SECOND_USER_TEXT),
        Message("assistant", SECOND_ANSWER_TEXT),
    )
    found: list[TrainingFault] = []
    for messages in (turns[:2], turns):
        try:
            parts = render_answers(tokenizer, messages)
        except (RequestError, ModelError) as error:
            if len(messages) == 2 or uses.turns:
                found.append(
                    TrainingFault(
                        "rewrites-turns", "error", str(error), "render every turn independently of later ones"
                    )
                )
            continue
        if len(parts) > 1 and uses.turns:
            what = "the template rewrites earlier turns when another follows, such as without their thinking"
            fix = "each answer is trained on after its own prompt, as an example of its own"
            found.append(TrainingFault("rewrites-turns", "note", what, fix))
        ends = [
            one.ids[i]
            for one in parts
            for i, m in enumerate(one.mask)
            if m and (i + 1 == len(one.mask) or not one.mask[i + 1])
        ]
        for number, last in enumerate(ends, 1):
            if last in stop_ids or any(f.code in ("no-end", "end-not-stop") for f in found):
                continue
            text = tokenizer.decode([last])
            if text.strip() and (ANSWER_TEXT if number == 1 else SECOND_ANSWER_TEXT).endswith(text.strip()):
                found.append(
                    _error(
                        "no-end",
                        "answers end without an end token: the model is not trained to stop",
                        "write eos_token or an end-of-turn token after each answer",
                    )
                )
            else:
                found.append(
                    _error(
                        "end-not-stop",
                        f"answers end with {text!r}, which is not among the stop ids {sorted(stop_ids)}",
                        "add its id to eos_token_id in generation_config.json",
                    )
                )
    return found


def _check_generation_mask(tokenizer: Any) -> list[TrainingFault]:
    """Compare the loss mask with the template's own {% generation %} marks, which other trainers use."""
    if "generation %}" not in str(tokenizer.chat_template).replace("-%}", "%}"):
        return []
    turns = (
        Message("user", USER_TEXT),
        Message("assistant", ANSWER_TEXT),
        Message("user", SECOND_USER_TEXT),
        Message("assistant", SECOND_ANSWER_TEXT),
    )
    made = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in turns],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, theirs = list(made["input_ids"]), list(made["assistant_masks"])
    ours = render_masked(tokenizer, turns)
    if list(ours.ids) != ids or theirs == list(ours.mask):
        return []
    extra = tokenizer.decode([i for i, a, b in zip(ids, theirs, ours.mask, strict=True) if a and not b])
    missing = tokenizer.decode([i for i, a, b in zip(ids, theirs, ours.mask, strict=True) if b and not a])
    found: list[TrainingFault] = []
    if extra.strip():
        found.append(
            _error(
                "mask-too-wide",
                f"the template's own generation marks cover {extra[:60]!r}",
                "let {% generation %} enclose only the answer and its end token",
            )
        )
    if missing.strip():
        found.append(
            _error(
                "end-not-trained",
                f"the template's own generation marks omit {missing[:60]!r}",
                "let {% generation %} enclose the answer's end token too",
            )
        )
    return found


def _check_system(tokenizer: Any, uses: TemplateUses) -> list[TrainingFault]:
    level: Literal["error", "warning"] = "error" if uses.system else "warning"
    turns = (Message("system", SYSTEM_TEXT), Message("user", USER_TEXT), Message("assistant", ANSWER_TEXT))
    try:
        shown = [
            SYSTEM_TEXT in render_text(tokenizer, turns[:2]),
            SYSTEM_TEXT in render_text(tokenizer, turns, generation_prompt=False),
        ]
    except RequestError as error:
        fix = "put the system text into the first user turn"
        return [TrainingFault("system-refused", level, f"system turns are refused: {error}", fix)]
    if all(shown):
        return []
    where = (
        "" if not any(shown) else " in generation" if shown[1] else " when an answer follows, so it is never trained on"
    )
    return [
        TrainingFault(
            "system-dropped",
            level,
            f"the template drops the system turn silently{where}",
            "put the system text into the first user turn, or correct the template",
        )
    ]


def _check_tools(tokenizer: Any, uses: TemplateUses) -> list[TrainingFault]:
    found: list[TrainingFault] = []
    level: Literal["error", "warning", "note"] = "warning" if uses.tools else "note"
    if not can_render_tools(tokenizer):
        found.append(
            TrainingFault(
                "tools-dropped",
                level,
                "the template drops tools silently; llmworks writes them into the system turn instead",
                "train with chat_template: tools, so that the saved template renders them",
            )
        )
        return found
    if not uses.results:
        return found
    call = ToolCall("zqtool", {}, "call00001")
    turns = (
        Message("user", USER_TEXT),
        Message("assistant", "", (call,)),
        Message("tool", RESULT_TEXT, tool_call_id="call00001"),
    )
    try:
        text = render_text(tokenizer, turns, tools=(TOOL,))
    except RequestError as error:
        return [
            *found,
            _error("results-refused", f"tool results are refused: {error}", "correct the template"),
        ]
    if RESULT_TEXT not in text:
        found.append(
            TrainingFault(
                "results-dropped", "error", "the template drops tool results silently", "correct the template"
            )
        )
    if "zqtool" not in text.partition(USER_TEXT)[2]:
        found.append(_error("calls-dropped", "the template drops tool calls silently", "correct the template"))
    return found


def _check_text(tokenizer: Any, prompt: str) -> list[TrainingFault]:
    """Check what the template does to text: own system prompt, dates, trimming."""
    found: list[TrainingFault] = []
    before = MARKS.sub(" ", prompt.partition(USER_TEXT)[0])
    words = re.findall(r"[A-Za-z]{2,}", before)
    if len(words) > 4:
        found.append(
            TrainingFault(
                "own-system",
                "note",
                f"without a system turn the template inserts its own system prompt: {' '.join(before.split())[:80]!r}",
                "give a system turn if that is not wanted",
            )
        )
    if render_text(tokenizer, (Message("user", USER_TEXT),), frozen=True) != prompt:
        found.append(
            TrainingFault(
                "date",
                "warning",
                "the template inserts today's date: the same conversation gives different tokens tomorrow",
                "give the date as a variable with a default",
            )
        )
    padded = f"  {ANSWER_TEXT}\n\n"
    if padded not in render_text(
        tokenizer, (Message("user", USER_TEXT), Message("assistant", padded)), generation_prompt=False
    ):
        found.append(TrainingFault("trims", "note", "the template trims white space around answers", ""))
    return found
