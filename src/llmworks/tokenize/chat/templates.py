"""Chat templates: render a conversation to token ids with a mask of what is to be learned, and make a template
tool-aware.

Renders with the model's own Jinja template, always; never guesses a format. The mask is found by rendering prefixes, so
it holds for every template that only appends, and a template that does not is refused. Knows no model weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmworks.core.errors import ModelError, RequestError
from llmworks.core.types import Json, Message, ToolCall

# Put in front of a template: the date that some templates insert becomes a constant.
FROZEN_DATE = "26 Jul 2024"
_FROZEN = (
    f"{{%- macro strftime_now(format) -%}}{FROZEN_DATE}{{%- endmacro -%}}{{%- set date_string = '{FROZEN_DATE}' -%}}"
)
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
TOOL_PREAMBLE = (
    f'Answer by calling a function: {CALL_OPEN}{{"name": NAME, "arguments": {{...}}}}{CALL_CLOSE}\nFunctions:'
)

# Put in front of a model's own template: rewrites `messages` so that tools stand in the system turn and calls are text.
# It renders exactly what `flatten_tools` builds; without tools and calls it changes nothing.
_TOOL_PREFIX = Path(__file__).with_name("tools.jinja").read_text(encoding="utf-8")


Segment = tuple[str, int]


@dataclass(frozen=True)
class Rendered:
    """Token ids of a conversation and, of the same length, 1 where the token is to be learned."""

    ids: tuple[int, ...]
    mask: tuple[int, ...]


def tool_aware(template: str) -> str:
    """The template, taught to render `tools` and tool calls; the same text as before for conversations without them."""
    if "flat.text" in template:
        return template
    prefix = _TOOL_PREFIX
    for name, text in (("PREAMBLE", TOOL_PREAMBLE), ("OPEN", CALL_OPEN), ("CLOSE", CALL_CLOSE)):
        prefix = prefix.replace(f"={name})", f"={_jinja_string(text)})").replace(
            f"+ {name}", f"+ {_jinja_string(text)}"
        )
    return prefix + "{#- the model's own template -#}\n" + template.lstrip()


def _jinja_string(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def flatten_tools(messages: Sequence[Message], tools: Sequence[Json] = ()) -> tuple[Message, ...]:
    """Messages with the tools written into the system turn and calls written as text, for a template that knows no
    tools.
    """
    out = [
        replace(m, content=m.content + "".join(render_call(c) for c in m.tool_calls), tool_calls=()) for m in messages
    ]
    if tools:
        text = "\n".join([TOOL_PREAMBLE, *(describe_tool(tool) for tool in tools)])
        if out and out[0].role == "system":
            out[0] = Message("system", out[0].content + "\n\n" + text)
        else:
            out.insert(0, Message("system", text))
    return tuple(out)


def describe_tool(tool: Json) -> str:
    """A function's signature (`?` marks what is optional) and its parameters; fewer tokens than its JSON schema,
    nothing of it left out.
    """
    tool = tool.get("function", tool)
    parameters = tool.get("parameters") or {}
    required = parameters.get("required") or []
    signature = ", ".join(name if name in required else f"{name}?" for name in parameters.get("properties") or {})
    lines = [f"{tool['name']}({signature}): {tool.get('description') or ''}"]
    for name, spec in (parameters.get("properties") or {}).items():
        kind = spec["type"] if isinstance(spec.get("type"), str) else "any"
        facts = [kind] if name in required else [kind, "optional"]
        facts += [
            f"{key}: {json.dumps(value, ensure_ascii=False)}"
            for key, value in spec.items()
            if key != "description" and not (key == "type" and isinstance(value, str))
        ]
        lines.append(f"- {name} ({', '.join(facts)}): {spec.get('description') or ''}")
    return "\n".join(lines)


def render_call(call: ToolCall) -> str:
    """A tool call as the text that a tool-aware model writes."""
    return (
        f'{CALL_OPEN}{{"name": {json.dumps(call.name, ensure_ascii=False)}, "arguments":'
        f" {json.dumps(call.arguments, ensure_ascii=False)}}}{CALL_CLOSE}"
    )


def parse_calls(text: str, *, strip: bool = True) -> tuple[str, tuple[ToolCall, ...]]:
    """Split an answer into its plain text and the tool calls in it. A call that is not valid JSON stays in the text."""
    plain, calls, at = "", [], 0
    while (start := text.find(CALL_OPEN, at)) >= 0:
        end = text.find(CALL_CLOSE, start)
        body = text[start + len(CALL_OPEN) : end if end >= 0 else len(text)]
        stop = end + len(CALL_CLOSE) if end >= 0 else len(text)
        call = _call_from_json(body)
        plain += text[at:start] if call else text[at:stop]
        if call:
            calls.append(call)
        at = stop
    said = plain + text[at:]
    return (said.strip() if strip else said) if calls else text, tuple(calls)


def _call_from_json(body: str) -> ToolCall | None:
    try:
        value = json.loads(body)
    except ValueError:
        return None
    if isinstance(value, dict) and isinstance(value.get("name"), str) and isinstance(value.get("arguments"), dict):
        return ToolCall(value["name"], value["arguments"])
    return None


def render_text(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    tools: Sequence[Json] = (),
    generation_prompt: bool = True,
    frozen: bool = False,
) -> str:
    """The text that the model's template makes of a conversation; `frozen` fixes the dates that some templates insert.

    Errors: ModelError without a template, RequestError when the template refuses the conversation.
    """
    import jinja2

    template = tokenizer.chat_template
    if not template:
        raise ModelError(
            "this model has no chat template; give it one (tokenizer_config.json: chat_template) or use a base-model"
            " task"
        )
    turns: list[Json] = []
    for m in messages:
        turn: Json = {"role": m.role, "content": m.content}
        if m.tool_calls:
            turn["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in m.tool_calls
            ]
        if m.tool_call_id:
            turn["tool_call_id"] = m.tool_call_id
        if m.name:
            turn["name"] = m.name
        turns.append(turn)
    try:
        text = tokenizer.apply_chat_template(
            turns,
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            chat_template=_FROZEN + template if frozen else template,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise RequestError(f"the model's chat template refuses this conversation: {error}") from None
    return str(text)


def renders_tools(tokenizer: Any) -> bool:
    """Whether the model's template shows tools at all; many drop them silently."""
    probe = (Message("user", "?"),)
    tool = {
        "type": "function",
        "function": {"name": "probe_4f1c", "description": "", "parameters": {"type": "object", "properties": {}}},
    }
    try:
        return "probe_4f1c" in render_text(tokenizer, probe, tools=(tool,))
    except RequestError:
        return False


def for_template(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Json]
) -> tuple[tuple[Message, ...], tuple[Json, ...]]:
    """(messages, tools) as the model's template can show them: as they are, or written into the text where it would
    drop them.
    """
    if (tools or any(m.tool_calls for m in messages)) and not renders_tools(tokenizer):
        return flatten_tools(messages, tools), ()
    return tuple(messages), tuple(
        tool if "function" in tool else {"type": "function", "function": tool} for tool in tools
    )


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of rendered text; special tokens are recognised, none are added."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def render_prompt(tokenizer: Any, messages: Sequence[Message], *, tools: Sequence[Json] = ()) -> tuple[int, ...]:
    """Token ids of a conversation that waits for the assistant's answer."""
    return encode(tokenizer, render_text(tokenizer, messages, tools=tools))


def segments(render: Callable[[int, bool], str], messages: Sequence[Message]) -> list[Segment]:
    """A conversation's text in pieces, each with 1 where it is learned: every assistant turn (but those of weight 0)
    with its end-of-turn token.

    `render(count, prompt)` gives the text of the first turns, with a generation prompt or without. White space that the
    template writes after the end token is not learned.
    Errors: ModelError when rendering a longer conversation changes the text of a shorter one.
    """
    found: list[Segment] = []
    done = ""
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt, full = render(i, True), render(i + 1, False)
        if not prompt.startswith(done) or not full.startswith(prompt):
            raise ModelError(
                "the chat template rewrites earlier turns when the conversation goes on, so no loss mask can be made"
                " for it"
            )
        answer = full[len(prompt) :]
        end = len(answer.rstrip())
        found += [(prompt[len(done) :], 0), (answer[:end], message.weight), (answer[end:], 0)]
        done = full
    whole = done if messages and messages[-1].role == "assistant" else render(len(messages), False)
    if whole.startswith(done):
        found.append((whole[len(done) :], 0))
    return [segment for segment in found if segment[0]]


def render_masked(
    tokenizer: Any, messages: Sequence[Message], *, tools: Sequence[Json] = (), frozen: bool = False
) -> Rendered:
    """Token ids of a whole conversation, with mask 1 on every assistant turn (but those of weight 0) including its
    end-of-turn token.

    Each assistant turn is encoded apart from what precedes it, exactly as generation will see it, so no token straddles
    the border.
    Errors: ModelError when rendering a longer conversation changes the text of a shorter one.
    """
    ids: list[int] = []
    mask: list[int] = []
    for text, learned in segments(
        lambda count, prompt: render_text(
            tokenizer, messages[:count], tools=tools, generation_prompt=prompt, frozen=frozen
        ),
        messages,
    ):
        new = encode(tokenizer, text)
        ids.extend(new)
        mask.extend([learned] * len(new))
    return Rendered(tuple(ids), tuple(mask))
