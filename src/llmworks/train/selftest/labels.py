"""An independent statement of which tokens a row trains on, and of the loss of those tokens.

Written without the code that training uses: turns are compared with decoded runs of the loss mask, special tokens
included, and the loss is the plain cross-entropy of single rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from llmworks.core.types import Message, messages_from_json
from llmworks.data.store.rows import Row


def find_label_problem(tokenizer: Any, stops: Collection[int], row: Row, example: Any, *, last: bool) -> str:
    """Return what is wrong with the labels of a tokenized row, or "".

    `stops`: ids of which every answer learns one at its end. `last`: only the last answer is trained on.
    """
    ids, runs = list(example.ids), find_runs(example.mask)
    where = f"row {example.id}: "
    if "messages" not in row:
        return _find_text_problem(tokenizer, row, ids, runs, where)
    messages = messages_from_json(row["messages"])
    answers = [turn for turn in messages if turn.role == "assistant" and turn.weight]
    answers = answers[-1:] if last else answers
    if len(runs) != len(answers):
        return f"{where}{len(answers)} answers are to be learned, but the loss mask has {len(runs)} runs"
    for number, ((begin, end), answer) in enumerate(zip(runs, answers, strict=True), 1):
        if ids[end - 1] not in stops:
            found = tokenizer.decode(ids[end - 1 : end])
            return f"{where}answer {number} does not learn its end token; its last label is {found!r}"
        labels = tokenizer.decode(ids[begin : end - 1], skip_special_tokens=False)
        if problem := _find_missing(answer, labels):
            return f"{where}answer {number}: {problem}"
        others = [turn for turn in messages if turn.role in ("user", "system") and _is_in(turn.content, labels)]
        foreign = next((turn for turn in others if not _is_in(turn.content, answer.content)), None)
        if foreign is not None:
            return f"{where}the prompt is in the loss mask: {foreign.content[:50]!r}"
    return "" if row.get("tools") else _find_text_change(tokenizer, row, ids, where)


def get_answered_part(row: Row, part: int) -> Row:
    """Return a row up to the answer of that number among those that are trained on; 0: all of it."""
    if not part:
        return row
    turns = messages_from_json(row["messages"])
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.weight]
    return {**row, "messages": row["messages"][: answers[part - 1] + 1]}


def find_runs(mask: Sequence[int]) -> list[tuple[int, int]]:
    """Return (begin, end) of every run of ones, without the first token, which nothing predicts."""
    edges = [i for i in range(1, len(mask) + 1) if bool(i < len(mask) and mask[i]) != bool(i > 1 and mask[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _find_missing(answer: Message, labels: str) -> str:
    """Return what of an answer its labels lack, or ""; a template may add to it, such as an empty think block."""
    if answer.tool_calls:
        lost = next((call.name for call in answer.tool_calls if call.name not in labels), "")
        return f"the call of {lost!r} is not in the loss mask" if lost else ""
    if _strip(answer.content) not in _strip(labels):
        return f"it is not in the loss mask as a whole: {answer.content[:50]!r}; the labels are {labels[:50]!r}"
    return ""


def _is_in(text: str, labels: str) -> bool:
    return len(_strip(text)) > 12 and _strip(text) in _strip(labels)


def _strip(text: str) -> str:
    return "".join(text.split())


def _find_text_problem(tokenizer: Any, row: Row, ids: list[int], runs: list[tuple[int, int]], where: str) -> str:
    """Return what is wrong with plain text, or a prompt and its completion: one run, with the EOS token at its end."""
    expected = str(row["completion"] if "prompt" in row else row["text"])
    if len(runs) != 1 or runs[0][1] != len(ids):
        return f"{where}the loss mask has {len(runs)} runs; one, up to the end, is expected"
    begin, end = runs[0]
    eos = tokenizer.eos_token_id
    if eos is not None and ids[-1] != eos:
        return f"{where}the end token is not learned"
    begin = 0 if "prompt" not in row and begin == 1 else begin  # the first token of a text is predicted by none
    labels = tokenizer.decode(ids[begin : end - (eos is not None)], skip_special_tokens="prompt" not in row)
    if _strip(labels) != _strip(expected):
        return f"{where}the labels are {labels[:50]!r}, the text is {expected[:50]!r}"
    return ""


def _find_text_change(tokenizer: Any, row: Row, ids: list[int], where: str) -> str:
    """Compare all ids with the conversation as transformers renders it, up to the last label."""
    rendered = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    known = _strip(tokenizer.decode(tokenizer(rendered, add_special_tokens=False)["input_ids"]))
    found = _strip(tokenizer.decode(ids))
    if not known.startswith(found):
        at = next((i for i, (a, b) in enumerate(zip(known, found, strict=False)) if a != b), len(known))
        return f"{where}the tokens are those of {found[at : at + 30]!r}, the template renders {known[at : at + 30]!r}"
    return ""


def compute_reference_loss(network: Any, examples: Sequence[Any]) -> tuple[float, int]:
    """Compute (cross-entropy in nats, labels) of single rows: the logits after token t - 1 predict token t."""
    import torch

    nats, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            logprobs = network(input_ids=torch.tensor([list(example.ids)])).logits[0].double().log_softmax(-1)
            for place in range(1, len(example.ids)):
                if example.mask[place]:
                    nats -= float(logprobs[place - 1, example.ids[place]])
                    count += 1
    return nats, count
