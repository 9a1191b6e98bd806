"""Validate the turns of a conversation: order, empty turns, tool calls and their results.

Pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmworks.core.types import Json, Message


def find_problems(messages: Sequence[Message], tools: Sequence[Json] = ()) -> list[str]:
    """List problems, one line each, turns counted from 1; empty for a conversation that can be trained on."""
    found: list[str] = []
    if not messages:
        return ["has no turns"]
    found += _check_order(messages)
    found += [
        f"turn {i} ({m.role}) is empty" for i, m in enumerate(messages, 1) if not m.content.strip() and not m.tool_calls
    ]
    found += _check_calls(messages, tools)
    if not any(m.role == "assistant" for m in messages):
        found.append("has no assistant turn")
    elif messages[-1].role != "assistant":
        found.append(f"ends with a {messages[-1].role} turn without an answer")
    elif not any(m.weight for m in messages if m.role == "assistant"):
        found.append("every assistant turn has weight 0, so there are no tokens to train on")
    return found


def _check_order(messages: Sequence[Message]) -> list[str]:
    found: list[str] = []
    before = ""
    for i, message in enumerate(messages, 1):
        role = message.role
        if role == "system" and i > 1:
            found.append(f"turn {i} is a system turn; only the first turn can be one")
        elif role == "assistant" and before in ("", "system"):
            found.append(f"turn {i} is an assistant turn before any user turn")
        elif role == before and role in ("user", "assistant"):
            found.append(f"turns {i - 1} and {i} are both {role} turns")
        before = role
    return found


def _check_calls(messages: Sequence[Message], tools: Sequence[Json]) -> list[str]:
    """Find calls without results, results without calls, and calls of functions that are not among the tools."""
    found: list[str] = []
    functions = {f.get("name"): f for f in (tool.get("function", tool) for tool in tools)}
    waiting: list[str] = []  # ids of calls that have no result yet; "" for a call without an id
    for i, message in enumerate(messages, 1):
        if message.role == "tool":
            if not waiting:
                found.append(f"turn {i} is a tool result without a call")
            elif message.tool_call_id and any(waiting) and message.tool_call_id not in waiting:
                found.append(f"turn {i} is the result of {message.tool_call_id!r}, which no turn called")
            else:
                waiting.remove(message.tool_call_id if message.tool_call_id in waiting else waiting[0])
            continue
        if waiting:
            found.append(
                f"turn {i} ({message.role}) comes before the result of {len(waiting)}"
                f" call{'s' if len(waiting) > 1 else ''}"
            )
            waiting = []
        if message.tool_calls and message.role != "assistant":
            found.append(f"turn {i} is a {message.role} turn with a tool call")
        for call in message.tool_calls if message.role == "assistant" else ():
            waiting.append(call.id)
            function = functions.get(call.name)
            if functions and function is None:
                found.append(f"turn {i} calls {call.name!r}, which is not among the tools")
            elif function is not None:
                missing = [
                    name
                    for name in (function.get("parameters") or {}).get("required") or []
                    if name not in call.arguments
                ]
                found += (
                    [f"turn {i} calls {call.name!r} without the required argument {missing[0]!r}"] if missing else []
                )
    return found


def merge_consecutive_turns(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Merge consecutive turns of one role (user, system, or assistant without calls), with an empty line between."""
    out: list[Message] = []
    for message in messages:
        last = out[-1] if out else None
        if (
            last
            and last.role == message.role
            and message.role in ("user", "assistant", "system")
            and not last.tool_calls
            and last.weight == message.weight
            and not (last.extra or message.extra)
        ):
            out[-1] = Message(
                last.role,
                "\n\n".join(filter(None, (last.content, message.content))),
                message.tool_calls,
                name=last.name,
                weight=last.weight,
            )
        else:
            out.append(message)
    return tuple(out)
