"""Golden tokens: a few conversations whose ids, loss mask, stop ids and top logits a model must reproduce after every
step.

Ids, mask and stop ids are compared exactly; logits within a tolerance that the step declares. The function that
computes logits is passed in, so that one record serves torch, llama.cpp and any other engine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llmworks.core.artifact import Golden, GoldenConversation
from llmworks.core.errors import GoldenMismatch, ModelError, RequestError
from llmworks.core.types import Json, Message, ToolCall, messages_from_json, messages_to_json
from llmworks.tokenize.chat.templates import RenderedConversation, can_render_tools, encode, render_masked

TOP_K = 32
SPREAD = 64  # further ids of a position, other ones at each
MIN_AGREEMENT = 0.5  # top-1 agreement below which the most probable tokens must at least be near the recorded ones
# How much more the logits of improbable tokens may change than those of the top. SmolLM2-135M, 4 to
# 8 bits: 1.6 to 2.2 times as much, both at most half of what is allowed.
SPREAD_FACTOR = 2.0
POSITIONS = 4  # per conversation
Logits = Callable[[Sequence[int]], Any]  # ids -> [len(ids), vocab_size], numpy

_WEATHER: Json = {
    "name": "get_weather",
    "description": "Current weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "Name of the city"},
            "unit": {"type": "string", "enum": ["C", "F"], "description": "Unit"},
        },
        "required": ["city"],
    },
}

CONVERSATIONS: tuple[tuple[tuple[Message, ...], tuple[Json, ...]], ...] = (
    ((Message("user", "What is the capital of France?"), Message("assistant", "The capital of France is Paris.")), ()),
    (
        (Message("system", "You answer in one word."), Message("user", "Is water wet?"), Message("assistant", "Yes.")),
        (),
    ),
    (
        (
            Message("user", "Añade 1 y 2 — en Python, por favor. 12345"),
            Message("assistant", "```python\nprint(1 + 2)  # 3\n```"),
            Message("user", "Danke! 谢谢 🙂\n\n  And in C?"),
            Message("assistant", 'printf("%d\\n", 1 + 2);'),
        ),
        (),
    ),
    (
        (
            Message("user", "Weather in Oslo, in C?"),
            Message("assistant", "", (ToolCall("get_weather", {"city": "Oslo", "unit": "C"}),)),
        ),
        (_WEATHER,),
    ),
)
TEXTS = (
    "The quick brown fox jumps over the lazy dog.\n",
    "def add(a, b):\n    return a + b\n",
    "Zwölf Boxkämpfer — 谢谢 🙂 3.14159",
)


@dataclass(frozen=True)
class LogitDifference:
    """Difference between replayed and recorded logits in nats, over all recorded positions.

    `maximum`, `mean`: over the recorded top 32. `spread`: mean over ids from the whole vocabulary. `logsumexp`: mean
    difference of the log-sum-exp of all logits.
    The mean difference of the top 32 is subtracted first, since softmax is invariant to it. `regret`: mean difference
    between the largest logit and that of the recorded most probable token. `finite`: no logit is NaN or infinite.
    """

    maximum: float
    mean: float
    top1_agreement: float
    spread: float = 0.0
    logsumexp: float = 0.0
    regret: float = 0.0
    finite: bool = True

    def find_problem(self, tolerance: float) -> str:
        """Return what is beyond a tolerance of the mean difference, or ""."""
        if not self.finite:
            return "logits are NaN or infinite"
        if not self.mean <= tolerance:
            return f"logits differ by {self.mean:.3g} on average, the tolerance is {tolerance:g}"
        if not self.spread <= SPREAD_FACTOR * tolerance:
            return (
                f"logits of improbable tokens differ by {self.spread:.3g} on average, the tolerance is"
                f" {SPREAD_FACTOR * tolerance:g}"
            )
        if not self.logsumexp <= tolerance:
            return f"the log-sum-exp of the logits differs by {self.logsumexp:.3g}, the tolerance is {tolerance:g}"
        if self.top1_agreement < MIN_AGREEMENT and self.regret > tolerance:
            return (
                f"the most probable token is the same at {self.top1_agreement:.0%} of the positions, and other tokens"
                f" have logits larger by {self.regret:.3g}"
            )
        return ""


def record_golden(tokenizer: Any, stop_ids: Sequence[int], logits: Logits) -> Golden:
    """Record the golden tokens of a model: with its chat template if it has one, else on plain text."""
    conversations = [
        _record_conversation(messages_to_json(m), list(t), "", r.ids, r.mask, logits)
        for m, t, r in render_golden_conversations(tokenizer)
    ]
    for text in () if conversations else TEXTS:
        ids = encode(tokenizer, text)
        conversations.append(_record_conversation([], [], text, ids, [1] * len(ids), logits))
    return Golden(conversations=conversations, stop_ids=sorted(stop_ids))


def render_golden_conversations(
    tokenizer: Any,
) -> list[tuple[tuple[Message, ...], tuple[Json, ...], RenderedConversation]]:
    """Render the golden conversations that the template accepts; none without a template.

    Many templates refuse a system turn or drop tools.
    """
    found = []
    for messages, tools in CONVERSATIONS if tokenizer.chat_template else ():
        if tools and not can_render_tools(tokenizer):
            continue
        with contextlib.suppress(RequestError, ModelError):
            found.append((messages, tools, render_masked(tokenizer, messages, tools=tools, frozen=True)))
    return found


def _record_conversation(
    messages: list[Json], tools: list[Json], text: str, ids: Sequence[int], mask: Sequence[int], logits: Logits
) -> GoldenConversation:
    import numpy as np

    values = np.asarray(logits(ids))
    positions = sorted({round((i + 1) * (len(ids) - 1) / POSITIONS) for i in range(POSITIONS)})
    top = [np.argsort(-values[p], kind="stable")[:TOP_K] for p in positions]
    size = values.shape[1]
    steps = [
        (np.arange(SPREAD) * size // SPREAD + at * size // (SPREAD * len(positions))) for at in range(len(positions))
    ]
    spread = [np.unique(one % size) for one in steps]
    return GoldenConversation(
        messages=messages,
        tools=tools,
        text=text,
        ids=list(ids),
        mask=list(mask),
        positions=positions,
        top_ids=[[int(i) for i in t] for t in top],
        top_logits=[[round(float(values[p][i]), 5) for i in t] for p, t in zip(positions, top, strict=True)],
        logsumexp=[round(_compute_logsumexp(values[p]), 5) for p in positions],
        spread_ids=[[int(i) for i in t] for t in spread],
        spread_logits=[[round(float(values[p][i]), 5) for i in t] for p, t in zip(positions, spread, strict=True)],
    )


def _compute_logsumexp(row: Any) -> float:
    import numpy as np

    wide = np.asarray(row, np.float64)
    return float(wide.max() + np.log(np.exp(wide - wide.max()).sum()))


def replay_tokens(golden: Golden, tokenizer: Any, stop_ids: Sequence[int]) -> list[str]:
    """Replay ids, loss mask and stop ids; returns one line per difference, empty when all are as recorded."""
    problems: list[str] = []
    if sorted(stop_ids) != sorted(golden.stop_ids):
        problems.append(f"stop ids are {sorted(stop_ids)}, recorded {sorted(golden.stop_ids)}")
    for number, conversation in enumerate(golden.conversations, 1):
        if conversation.text:
            ids: Sequence[int] = encode(tokenizer, conversation.text)
            mask: Sequence[int] = [1] * len(ids)
        else:
            try:
                rendered = render_masked(
                    tokenizer, messages_from_json(conversation.messages), tools=conversation.tools, frozen=True
                )
            except (ModelError, RequestError) as error:
                problems.append(f"conversation {number}: {error}")
                continue
            ids, mask = rendered.ids, rendered.mask
        if list(ids) != conversation.ids:
            at = next(
                (i for i, (a, b) in enumerate(zip(ids, conversation.ids, strict=False)) if a != b),
                min(len(ids), len(conversation.ids)),
            )
            problems.append(
                f"conversation {number}: token {at} is {_get_or_missing(ids, at)}, recorded"
                f" {_get_or_missing(conversation.ids, at)} ({len(ids)}"
                f" tokens, recorded {len(conversation.ids)})"
            )
        elif list(mask) != conversation.mask:
            problems.append(f"conversation {number}: same tokens, different loss mask")
    return problems


def replay_logits(golden: Golden, logits: Logits) -> LogitDifference:
    """Measure the difference between recorded and replayed logits."""
    import numpy as np

    gaps, spreads, sums, regrets, same, finite = [], [], [], [], 0, True
    for conversation in golden.conversations:
        values = np.asarray(logits(conversation.ids))
        finite = finite and bool(np.isfinite(values).all())
        for at, position in enumerate(conversation.positions):
            row, ids = values[position], conversation.top_ids[at]
            difference = row[ids] - np.asarray(conversation.top_logits[at])
            shift = difference.mean()
            gaps.append(np.abs(difference - shift))
            regrets.append(float(row.max() - row[ids[0]]))
            same += int(row.argmax()) == ids[0]
            if conversation.logsumexp:
                others = row[conversation.spread_ids[at]] - np.asarray(conversation.spread_logits[at])
                spreads.append(float(np.abs(others - shift).mean()))
                sums.append(float(abs(_compute_logsumexp(row) - conversation.logsumexp[at] - shift)))
    count = max(len(gaps), 1)
    return LogitDifference(
        max((float(gap.max()) for gap in gaps), default=0.0),
        sum(float(gap.mean()) for gap in gaps) / count,
        same / count,
        sum(spreads) / max(len(spreads), 1),
        sum(sums) / max(len(sums), 1),
        sum(regrets) / count,
        finite,
    )


def require_replay(
    golden: Golden,
    tokenizer: Any,
    stop_ids: Sequence[int],
    logits: Logits | None = None,
    *,
    mean_tolerance: float = 0.0,
    step: str,
) -> LogitDifference | None:
    """Replay tokens and logits; raise GoldenMismatch, with the differences, when a step did not preserve them."""
    problems = replay_tokens(golden, tokenizer, stop_ids)
    if problems:
        raise GoldenMismatch(f"{step}: golden tokens do not replay: {'; '.join(problems)}; nothing was published")
    if logits is None:
        return None
    gap = replay_logits(golden, logits)
    if problem := gap.find_problem(mean_tolerance):
        raise GoldenMismatch(
            f"{step}: golden {problem} (maximum {gap.maximum:.3g}, top-1 agreement {gap.top1_agreement:.0%}); nothing"
            " was published"
        )
    return gap


def _get_or_missing(ids: Sequence[int], index: int) -> int | str:
    return ids[index] if index < len(ids) else "missing"
