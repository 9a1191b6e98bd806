"""Completions as OpenAI API objects: whole, streamed in chunks, and with the tool calls in the completion's text."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from llmworks.core.types import Completion, Delta
from llmworks.generate.decode.stopping import displayable_length
from llmworks.tokenize.chat.templates import CALL_OPEN, parse_tool_calls

DONE = "data: [DONE]\n\n"


def build_usage(completion: Completion) -> dict[str, int]:
    """Return the token counts."""
    return {
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": completion.completion_tokens,
        "total_tokens": completion.prompt_tokens + completion.completion_tokens,
    }


def get_finish_reason(completion: Completion) -> str:
    """Return the API's finish reason."""
    return "content_filter" if completion.finish == "filtered" else completion.finish


def split_tool_calls(identity: str, text: str) -> tuple[str, list[dict[str, Any]]]:
    """Return (text without tool calls, tool calls in the API's format)."""
    plain, calls = parse_tool_calls(text)
    return plain, [
        {
            "id": f"call_{identity[-12:]}_{i}",
            "type": "function",
            "function": {"name": c.name, "arguments": json.dumps(c.arguments, ensure_ascii=False)},
        }
        for i, c in enumerate(calls)
    ]


def build_completion(
    identity: str, created: int, model: str, completion: Completion, with_tools: bool
) -> dict[str, Any]:
    """Return a `chat.completion` object."""
    text, calls = split_tool_calls(identity, completion.text) if with_tools else (completion.text, [])
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
    if calls:
        message["tool_calls"] = calls
    reason = "tool_calls" if calls else get_finish_reason(completion)
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return {
        "id": identity,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": build_usage(completion),
    }


async def stream_chunks(
    identity: str,
    created: int,
    model: str,
    first: Delta,
    rest: AsyncIterator[Delta],
    with_tools: bool,
    include_usage: bool,
) -> AsyncIterator[str]:
    """Yield server-sent events of `chat.completion.chunk` objects.

    With tools, text from the start of a tool call on is buffered until it is parsed.
    """

    def event(delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        body: dict[str, Any] = {
            "id": identity,
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
            "choices": [choice],
        }
        if include_usage:
            body["usage"] = None
        return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

    yield event({"role": "assistant", "content": ""})
    text, sent = "", 0
    completion = Completion("", "stop")
    async for delta in _chain_first(first, rest):
        text += delta.text
        completion = delta.done or completion
        end = len(text)
        if with_tools:
            end = text.find(CALL_OPEN) if CALL_OPEN in text else displayable_length(text, [CALL_OPEN])
        if end > sent:
            yield event({"content": text[sent:end]})
            sent = end
    _, calls = split_tool_calls(identity, text) if with_tools else ("", [])
    tail = strip_tool_calls(text[sent:]) if calls else text[sent:]
    if tail:
        yield event({"content": tail})
    if calls:
        yield event({"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]})
    yield event({}, "tool_calls" if calls else get_finish_reason(completion))
    if include_usage:
        body = {
            "id": identity,
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
            "choices": [],
            "usage": build_usage(completion),
        }
        yield f"data: {json.dumps(body)}\n\n"
    yield DONE


async def _chain_first(first: Delta, rest: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    yield first
    async for delta in rest:
        yield delta


def strip_tool_calls(text: str) -> str:
    """Return the text outside tool calls, with its white space."""
    return parse_tool_calls(text, strip=False)[0]
