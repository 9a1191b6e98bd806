"""Replay a model's golden tokens on an engine: does it tokenize and predict as the recorded model did?

An engine is compared on what it exposes. A local engine: token ids, loss mask, stop tokens and logits. A server: the
number of prompt tokens, and greedy completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmworks.core.artifact import Golden, GoldenConversation
from llmworks.core.errors import LlmworksError
from llmworks.core.types import Engine, Request, Sampling, messages_from_json
from llmworks.model.golden import find_broken_weights
from llmworks.tokenize.chat.golden import replay_logits, replay_tokens

GREEDY_TOKENS = 8  # tokens of a greedy completion that are compared


@dataclass(frozen=True)
class ReplayCheck:
    """One compared property. `ok` is None when it is reported, not judged."""

    name: str
    passed: bool | None
    detail: str


def replay(golden: Golden, engine: Engine, tolerance: float, reference: Engine | None = None) -> list[ReplayCheck]:
    """Return every check that can be run on this engine.

    `tolerance`: bound of the mean absolute logit difference (nats). `reference`: engine whose greedy completions are
    compared.
    """
    checks: list[ReplayCheck] = []
    local_engine: Any = engine
    if hasattr(engine, "tokenizer") and hasattr(engine, "stops"):
        problems = replay_tokens(golden, local_engine.tokenizer, local_engine.stops)
        count = sum(len(c.ids) for c in golden.conversations)
        checks.append(
            ReplayCheck(
                "tokens",
                not problems,
                "; ".join(problems) or f"{count} ids, their masks and stop ids {golden.stop_ids} are as recorded",
            )
        )
    if hasattr(getattr(engine, "model", None), "named_parameters"):
        problem = find_broken_weights(local_engine.model)
        checks.append(ReplayCheck("weights", not problem, problem or "all are finite and below 1e8"))
    if "logits" in engine.can:
        gap = replay_logits(golden, engine.logits)
        detail = (
            f"{gap.mean:.2g} mean difference (allowed {tolerance:g}), {gap.maximum:.2g} maximum, same greedy token at"
            f" {gap.top1_agreement:.0%} of positions"
        )
        problem = gap.find_problem(tolerance)
        unjudged = gap.finite and tolerance == float("inf")  # three and fewer bits
        checks.append(ReplayCheck("logits", None if unjudged else not problem, problem or detail))
    if not checks:
        checks += _check_server(golden, engine, reference)
    return checks


def build_greedy_request(conversation: GoldenConversation) -> tuple[Request, int] | None:
    """Return (request up to the last answer, its number of prompt tokens as recorded); None for plain text."""
    if not conversation.messages or conversation.messages[-1].get("role") != "assistant":
        return None
    learned = conversation.mask
    last = max(i for i, m in enumerate(learned) if m)
    begin = next(i for i in range(last, -1, -1) if not learned[i]) + 1
    messages = messages_from_json(conversation.messages[:-1])
    return (
        Request(
            messages,
            tools=tuple({"type": "function", "function": t} if "function" not in t else t for t in conversation.tools),
            sampling=Sampling(max_tokens=GREEDY_TOKENS),
        ),
        begin,
    )


def _check_server(golden: Golden, engine: Engine, reference: Engine | None) -> list[ReplayCheck]:
    cases = [case for case in map(build_greedy_request, golden.conversations) if case is not None]
    if not cases:
        return [ReplayCheck("prompts", None, "the record holds plain text only, which cannot be sent to a chat server")]
    requests = [request for request, _ in cases]
    answers = dict(engine.each(requests))
    for answer in answers.values():
        if isinstance(answer, LlmworksError):
            raise answer
    done = [answers[i] for i in range(len(requests))]
    read = [getattr(answer, "prompt_tokens", 0) for answer in done]
    if not any(read):
        checks = [ReplayCheck("prompts", None, "the server does not report the number of prompt tokens")]
    else:
        wrong = [
            f"conversation {i}: the server read {got} tokens, {want} are recorded"
            for i, (got, (_, want)) in enumerate(zip(read, cases, strict=True), 1)
            if got != want
        ]
        hint = " (an extra BOS token, another chat template, or another tokenizer)" if wrong else ""
        checks = [
            ReplayCheck(
                "prompts",
                not wrong,
                (
                    "; ".join(wrong) + hint
                    if wrong
                    else f"the server read {', '.join(map(str, read))} tokens, as recorded"
                ),
            )
        ]
    if reference is not None:
        expected: Sequence[Any] = reference.generate(requests)
        same = sum(_strip_text(a) == _strip_text(b) for a, b in zip(done, expected, strict=True))
        checks.append(
            ReplayCheck(
                "greedy completions", None, f"the first {GREEDY_TOKENS} tokens agree in {same} of {len(requests)}"
            )
        )
    return checks


def _strip_text(answer: Any) -> str:
    return str(answer.text).strip()
