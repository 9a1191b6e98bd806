"""Chat templates: render a conversation to token ids with a loss mask, and make a template tool-aware.

Always renders with the model's own Jinja template; never guesses a format. The mask is found by rendering prefixes, so
it is correct for every template that only appends; other templates are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmworks.core.errors import ModelError, RequestError
from llmworks.core.types import Json, Message, ToolCall
from llmworks.tokenize.chat.special_tokens import ESCAPE, get_escaper
from llmworks.tokenize.chat.tool_schemas import normalize_tool

# Prepended to a template: makes the date that some templates insert a constant.
FROZEN_DATE = "26 Jul 2024"
_FROZEN = (
    f"{{%- macro strftime_now(format) -%}}{FROZEN_DATE}{{%- endmacro -%}}{{%- set date_string = '{FROZEN_DATE}' -%}}"
)
CALL_OPEN, CALL_CLOSE = "<tool_call>", "</tool_call>"
TOOL_PREAMBLE = (
    f'Answer by calling a function: {CALL_OPEN}{{"name": NAME, "arguments": {{...}}}}{CALL_CLOSE}\nFunctions:'
)

# Prepended to a model's own template: rewrites `messages` so that tools are in the system turn and tool calls are text.
# It renders exactly what `flatten_tools` builds; without tools and tool calls it changes nothing.
_TOOL_PREFIX = Path(__file__).with_name("tools.jinja").read_text(encoding="utf-8")


Segment = tuple[str, int]


@dataclass(frozen=True)
class RenderedConversation:
    """Token ids of a conversation, and its loss mask of the same length: 1 for label tokens."""

    ids: tuple[int, ...]
    mask: tuple[int, ...]


def add_tool_support(template: str) -> str:
    """Extend a template to render `tools` and tool calls; conversations without them are rendered as before."""
    if "flat.text" in template:
        return template
    prefix = _TOOL_PREFIX
    for name, text in (("PREAMBLE", TOOL_PREAMBLE), ("OPEN", CALL_OPEN), ("CLOSE", CALL_CLOSE)):
        prefix = prefix.replace(f"={name})", f"={_quote_jinja(text)})").replace(f"+ {name}", f"+ {_quote_jinja(text)}")
    return prefix + "{#- the model's own template -#}\n" + template.lstrip()


def _quote_jinja(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def flatten_tools(messages: Sequence[Message], tools: Sequence[Json] = ()) -> tuple[Message, ...]:
    """Write tools into the system turn and tool calls as text, for a template without tool support."""
    out = [
        replace(m, content=m.content + "".join(render_tool_call(c) for c in m.tool_calls), tool_calls=())
        for m in messages
    ]
    if tools:
        text = "\n".join([TOOL_PREAMBLE, *(describe_tool(tool) for tool in tools)])
        if out and out[0].role == "system":
            out[0] = Message("system", out[0].content + "\n\n" + text)
        else:
            out.insert(0, Message("system", text))
    return tuple(out)


def describe_tool(tool: Json) -> str:
    """Describe a function: signature (`?` marks optional parameters) and parameters.

    Takes fewer tokens than its JSON schema, without omitting anything.
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


def render_tool_call(call: ToolCall) -> str:
    """Format a tool call as the text that a tool-aware model generates."""
    return (
        f'{CALL_OPEN}{{"name": {json.dumps(call.name, ensure_ascii=False)}, "arguments":'
        f" {json.dumps(call.arguments, ensure_ascii=False)}}}{CALL_CLOSE}"
    )


def parse_tool_calls(text: str, *, strip: bool = True) -> tuple[str, tuple[ToolCall, ...]]:
    """Split an answer into its plain text and its tool calls; a call that is not valid JSON stays in the text."""
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
    content = plain + text[at:]
    return (content.strip() if strip else content) if calls else text, tuple(calls)


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
    """Render a conversation to text with the model's chat template; `frozen` fixes dates that some templates insert.

    Special tokens in message text are escaped, so that `encode` encodes them as text.

    Errors: ModelError without a template, RequestError when the template refuses the conversation.
    """
    import jinja2

    template = tokenizer.chat_template
    if not template:
        raise ModelError(
            "this model has no chat template; set one (tokenizer_config.json: chat_template) or use a base-model task"
        )
    turns = [_to_template_turn(message) for message in messages]
    definitions: list[Json] = list(tools)
    if (escaper := get_escaper(tokenizer)) is not None:
        turns = [escaper.escape_value(turn, turn["role"]) for turn in turns]
        definitions = escaper.escape_value(definitions)
    try:
        text = tokenizer.apply_chat_template(
            turns,
            tools=definitions or None,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            chat_template=_FROZEN + template if frozen else template,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise RequestError(f"the model's chat template refuses this conversation: {error}") from None
    return str(text)


def _to_template_turn(m: Message) -> Json:
    """Return a message as templates read it."""
    turn: Json = m.extra_fields | {"role": m.role, "content": m.content}
    if m.tool_calls:
        turn["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in m.tool_calls
        ]
    if m.tool_call_id:
        turn["tool_call_id"] = m.tool_call_id
    if m.name:
        turn["name"] = m.name
    return turn


def can_render_tools(tokenizer: Any) -> bool:
    """Return whether the model's template renders tools; many drop them silently."""
    probe = (Message("user", "?"),)
    tool = {
        "type": "function",
        "function": {"name": "probe_4f1c", "description": "", "parameters": {"type": "object", "properties": {}}},
    }
    try:
        return "probe_4f1c" in render_text(tokenizer, probe, tools=(tool,))
    except RequestError:
        return False


def adapt_tools(
    tokenizer: Any, messages: Sequence[Message], tools: Sequence[Json]
) -> tuple[tuple[Message, ...], tuple[Json, ...]]:
    """Return (messages, tools) as the template can render them: tools become text if the template would drop them.

    Errors: RequestError for a tool that is no function with a JSON schema.
    """
    try:
        functions = [normalize_tool(tool) for tool in tools]
    except ValueError as error:
        raise RequestError(str(error)) from None
    if (tools or any(m.tool_calls for m in messages)) and not can_render_tools(tokenizer):
        return flatten_tools(messages, functions), ()
    return tuple(messages), tuple({"type": "function", "function": function} for function in functions)


def find_unread_fields(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Json] = ()) -> list[str]:
    """Return the further fields of turns, such as reasoning_content, that change nothing in the rendered text."""
    names = list(dict.fromkeys(name for message in messages for name in message.extra_fields))
    if not names:
        return []
    messages, tools = adapt_tools(tokenizer, messages, tools)
    ends = [i + 1 for i, message in enumerate(messages) if message.role == "assistant"] or [len(messages)]

    def render(turns: Sequence[Message]) -> list[str]:
        return [render_text(tokenizer, turns[:end], tools=tools, generation_prompt=False) for end in ends]

    whole = render(messages)
    return [name for name in names if render([_drop_field(message, name) for message in messages]) == whole]


def _drop_field(message: Message, name: str) -> Message:
    fields = {key: value for key, value in message.extra_fields.items() if key != name}
    return replace(message, extra=json.dumps(fields, ensure_ascii=False) if fields else "")


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Encode rendered text to token ids; the template's special tokens are recognized, none are added.

    Special tokens that stand in the text of a message are encoded as text.
    """
    if ESCAPE in text and (escaper := get_escaper(tokenizer)) is not None:
        return escaper.encode(text)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_text(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Encode plain text, such as a prompt or a document, to token ids; special tokens in it are encoded as text."""
    if (escaper := get_escaper(tokenizer)) is not None and escaper.detector.find_in_text(text):
        return tuple(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    return encode(tokenizer, text)


def render_prompt(tokenizer: Any, messages: Sequence[Message], *, tools: Sequence[Json] = ()) -> tuple[int, ...]:
    """Render a conversation with the generation prompt and encode it to token ids."""
    return encode(tokenizer, render_text(tokenizer, messages, tools=tools))


class TemplateRewritesTurns(ModelError):
    """A template that renders earlier turns differently when the conversation continues, such as without thinking."""


def render_answers(
    tokenizer: Any, messages: Sequence[Message], *, tools: Sequence[Json] = (), frozen: bool = False
) -> list[RenderedConversation]:
    """Render a conversation for training: whole, or where the template rewrites earlier turns, once for each answer.

    Then an answer has the prompt that it is generated after, and is the only part with labels. What the template writes
    between the prompt and the answer, such as an empty think block, is a label, since the model has to generate it.
    Errors: ModelError when an answer does not continue its own prompt.
    """
    try:
        return [render_masked(tokenizer, messages, tools=tools, frozen=frozen)]
    except TemplateRewritesTurns:
        pass
    found: list[RenderedConversation] = []
    for i, message in enumerate(messages):
        if message.role != "assistant" or not message.weight:
            continue
        prompt, whole = (
            render_text(tokenizer, messages[:end], tools=tools, generation_prompt=end == i, frozen=frozen)
            for end in (i, i + 1)
        )
        if not whole.startswith(prompt):
            raise ModelError(
                "the chat template renders an answer differently from the prompt that it is generated after, so no loss"
                " mask can be computed"
            )
        answer = whole[len(prompt) :].rstrip()
        ids = [encode(tokenizer, text) for text in (prompt, answer)]
        found.append(RenderedConversation(ids[0] + ids[1], (0,) * len(ids[0]) + (1,) * len(ids[1])))
    return found


def split_segments(render: Callable[[int, bool], str], messages: Sequence[Message]) -> list[Segment]:
    """Split a conversation's text into (text, loss mask) segments.

    The mask is 1 for every assistant turn (except those of weight 0) including its end-of-turn token, and 0 for the
    white space that the template writes after it. `render(count, prompt)` renders the first turns, with or without a
    generation prompt.
    Errors: ModelError when rendering a longer conversation changes the text of a shorter one.
    """
    found: list[Segment] = []
    rendered_text = ""
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt, full = render(i, True), render(i + 1, False)
        if not prompt.startswith(rendered_text) or not full.startswith(prompt):
            raise TemplateRewritesTurns(
                "the chat template rewrites earlier turns when the conversation continues, so no loss mask can be"
                " computed"
            )
        answer = full[len(prompt) :]
        end = len(answer.rstrip())
        found += [(prompt[len(rendered_text) :], 0), (answer[:end], message.weight), (answer[end:], 0)]
        rendered_text = full
    whole = rendered_text if messages and messages[-1].role == "assistant" else render(len(messages), False)
    if whole.startswith(rendered_text):
        found.append((whole[len(rendered_text) :], 0))
    return [segment for segment in found if segment[0]]


def render_masked(
    tokenizer: Any, messages: Sequence[Message], *, tools: Sequence[Json] = (), frozen: bool = False
) -> RenderedConversation:
    """Render a conversation to token ids with a loss mask.

    The mask is 1 for every assistant turn (except those of weight 0) including its end-of-turn token. Each assistant
    turn is encoded separately from the text before it, as in generation, so no token spans the border.
    Errors: ModelError when rendering a longer conversation changes the text of a shorter one.
    """
    ids: list[int] = []
    mask: list[int] = []
    for text, learned in split_segments(
        lambda count, prompt: render_text(
            tokenizer, messages[:count], tools=tools, generation_prompt=prompt, frozen=frozen
        ),
        messages,
    ):
        new = encode(tokenizer, text)
        ids.extend(new)
        mask.extend([learned] * len(new))
    return RenderedConversation(tuple(ids), tuple(mask))
