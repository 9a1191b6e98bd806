"""The fast encoder gives the ids and masks of the template itself; templates that look into contents are run for every
conversation.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import TEMPLATE, make_tokenizer
from tokenizers import AddedToken

from llmworks.core.errors import ModelError, RequestError
from llmworks.core.types import Message, ToolCall
from llmworks.tokenize.chat.encode import ConversationEncoder
from llmworks.tokenize.chat.named_templates import NAMED_TEMPLATES, get_named_template
from llmworks.tokenize.chat.template_cache import SkeletonCache, get_pattern
from llmworks.tokenize.chat.templates import adapt_tools, add_tool_support, render_masked
from llmworks.tokenize.load import load_tokenizer

TOOL = {
    "name": "f",
    "description": "Does f.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
QWEN = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n'"
    " }}{%- else %}{{- '<|im_start|>system\\nYou are Q.<|im_end|>\\n' }}{%- endif %}{%- for message in messages %}{%-"
    " if (message.role == 'user') or (message.role == 'system' and not loop.first) or (message.role == 'assistant' and"
    " not message.tool_calls) %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n'"
    " }}{%- elif message.role == 'assistant' %}{{- '<|im_start|>' + message.role }}{%- if message.content %}{{- '\\n' +"
    " message.content }}{%- endif %}{%- for c in message.tool_calls %}{{- '\\n' }}{{- c.function | tojson }}{%- endfor"
    " %}{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n'"
    " }}{%- endif %}"
)
ONLY_THERE = (
    "{% for m in messages %}{% if m.content is string and m.content %}{{ m.role }}:{{ m.content | trim }}<|im_end|>{%"
    " endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
SETS = (
    "{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}{% set ns.s = m.content.strip()"
    " %}{% else %}{% set c = ns.s + m['content'] %}[{{ m.role }}] {{ c }}<|im_end|>{% endif %}{% endfor %}{% if"
    " add_generation_prompt %}[assistant] {% endif %}"
)
LOOKS = {
    "splits": "{% for m in messages %}{{ m.content.split('x')[-1] }}<|im_end|>{% endfor %}",
    "asks": "{% for m in messages %}{% if 'x' in m.content %}X{% endif %}{{ m.content }}<|im_end|>{% endfor %}",
    "length": "{% for m in messages %}{{ m.content | length }}{{ m.content }}<|im_end|>{% endfor %}",
    "equal": "{% for m in messages %}{% if m.content == 'x' %}X{% endif %}{{ m.content }}<|im_end|>{% endfor %}",
    "json": "{% for m in messages %}{{ m | tojson }}<|im_end|>{% endfor %}",
    "whole": "{% for m in messages %}{{ m }}<|im_end|>{% endfor %}",
    "upper": "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}",
    "slice": "{% for m in messages %}{{ m.content[:2] }}<|im_end|>{% endfor %}",
    "tilde": (
        "{% for m in messages %}{% set c = m.content ~ '' %}{% if c == 'x' %}X{% endif %}{{ c }}<|im_end|>{% endfor %}"
    ),
    "format": "{% for m in messages %}{{ '%s' % m.content }}<|im_end|>{% endfor %}",
    "join": "{% for m in messages %}{{ [m.content, 'x'] | join }}<|im_end|>{% endfor %}",
    "kept": (
        "{% for m in messages %}{% set c %}{{ m.content }}{% endset %}{% if c == 'x' %}X{% endif %}{{ c }}<|im_end|>{%"
        " endfor %}"
    ),
    "macro": (
        "{% macro f(x) %}{{ x }}{% endmacro %}{% for m in messages %}{% if f(m.content) == 'x' %}X{% endif"
        " %}<|im_end|>{% endfor %}"
    ),
    "chosen": "{% for m in messages | selectattr('content', 'equalto', 'x') %}{{ m.content }}<|im_end|>{% endfor %}",
    "sorted": "{% for m in messages | sort(attribute='content') %}{{ m.content }}<|im_end|>{% endfor %}",
    "escapes": "{% autoescape true %}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% endautoescape %}",
    "safe": "{% set nl = '\\n' | safe %}{% for m in messages %}{{ m.content + nl }}<|im_end|>{% endfor %}",
    "block": "{% for m in messages %}{% block b scoped %}{{ m.content }}{% endblock %}<|im_end|>{% endfor %}",
    "recursive": "{% for m in messages recursive %}{{ m.content }}<|im_end|>{% endfor %}",
    "no end": "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}",
}
TEXTS = (
    "Hi",
    "",
    " ",
    "x",
    "  two  words \n",
    "\n\nlines\n",
    "谢谢 🙂 é",
    "12345 it's",
    "<|im_start|>user\nfalse<|im_end|>",
    "a<b & 'c'",
    "{{ m }} {% if %}",
    "\U0010fffe0r 1t",
)


def tokenizer_with(template: str) -> Any:
    tokenizer = make_tokenizer(template)
    if template in map(get_named_template, NAMED_TEMPLATES):
        tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return tokenizer


def conversations(count: int = 200) -> list[tuple[Message, ...]]:
    draw = random.Random(3)
    found = []
    for _ in range(count):
        turns = [Message("system", draw.choice(TEXTS))] if draw.random() < 0.4 else []
        for _ in range(draw.randint(1, 3)):
            turns += [
                Message("user", draw.choice(TEXTS)),
                Message("assistant", draw.choice(TEXTS), weight=int(draw.random() < 0.8)),
            ]
        found.append(tuple(turns[: -1 if draw.random() < 0.1 else None]))
    return found


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        QWEN,
        ONLY_THERE,
        SETS,
        add_tool_support(TEMPLATE),
        *map(get_named_template, NAMED_TEMPLATES),
        *LOOKS.values(),
    ],
)
def test_ids_and_masks_are_those_of_the_template(template: str) -> None:
    tokenizer = tokenizer_with(template)
    fast = ConversationEncoder(tokenizer)
    for messages in conversations():
        try:
            expected = render_masked(tokenizer, messages)
        except Exception as error:
            with pytest.raises(type(error)):
                fast.encode(messages)
            continue
        ids, mask = fast.encode(messages)
        assert (ids, bytes(mask)) == (list(expected.ids), bytes(expected.mask))
        if all(m.weight for m in messages):
            assert fast.encode_plain([m.role for m in messages], [m.content for m in messages]) == (ids, mask)


@pytest.mark.parametrize(
    "template",
    [TEMPLATE, QWEN, ONLY_THERE, SETS, add_tool_support(TEMPLATE), *map(get_named_template, NAMED_TEMPLATES)],
)
def test_usual_templates_have_a_skeleton(template: str) -> None:
    messages = (
        Message("system", "a"),
        Message("user", "b"),
        Message("assistant", "c"),
        Message("user", "d"),
        Message("assistant", "e"),
    )
    pattern = get_pattern(messages)
    assert pattern is not None
    assert SkeletonCache(tokenizer_with(template)).get_segments(pattern, lambda: messages) is not None


@pytest.mark.parametrize("template", LOOKS.values(), ids=LOOKS)
def test_a_template_that_looks_into_contents_has_none(template: str) -> None:
    messages = (Message("user", "b"), Message("assistant", "c"))
    pattern = get_pattern(messages)
    assert pattern is not None
    assert SkeletonCache(tokenizer_with(template)).get_segments(pattern, lambda: messages) is None


def test_tools_and_calls() -> None:
    turns = (
        Message("user", "b"),
        Message("assistant", "", (ToolCall("f", {"a": 1}, "1"),)),
        Message("tool", "2", tool_call_id="1"),
        Message("assistant", "e"),
    )
    for template in (TEMPLATE, add_tool_support(TEMPLATE), QWEN):
        tokenizer = make_tokenizer(template)
        shown, tools = adapt_tools(tokenizer, turns, (TOOL,))
        expected = render_masked(tokenizer, shown, tools=tools)
        ids, mask = ConversationEncoder(tokenizer).encode(turns, (TOOL,))
        assert (ids, bytes(mask)) == (list(expected.ids), bytes(expected.mask))


def test_what_the_template_refuses_is_refused() -> None:
    with pytest.raises(RequestError, match="the template llama-2"):
        ConversationEncoder(tokenizer_with(get_named_template("llama-2"))).encode(
            (Message("tool", "b"), Message("assistant", "c"))
        )


OVERLAPPING = {
    "begins alike": ["<|im_end|>!", "<|im_end"],
    "ends alike": ["x<|im_end|>"],
    "overlaps": ["ab<"],
    "stands within": ["im_e"],
    "itself": ["zz"],
    "strips": [AddedToken("<s>", rstrip=True)],
    "normalized": [AddedToken("i<|", normalized=True)],
    "apart": ["<think>", "</think>"],
}


@pytest.mark.parametrize("kind", OVERLAPPING)
def test_added_tokens_that_overlap(kind: str) -> None:
    tokenizer = make_tokenizer(TEMPLATE)
    tokenizer.add_tokens(OVERLAPPING[kind])
    fast = ConversationEncoder(tokenizer)
    for text in ("Hi", "x", "ab", "zzz", "im_e", "!", "<think>a</think>", " <s> a", "Hi<|", "h<|im_end"):
        for asked, said in ((text, "yes"), ("yes", text), (text, text)):
            messages = (
                Message("user", asked),
                Message("assistant", said),
                Message("user", asked),
                Message("assistant", said),
            )
            expected = render_masked(tokenizer, messages)
            ids, mask = fast.encode(messages)
            assert (ids, bytes(mask)) == (list(expected.ids), bytes(expected.mask))


DATED = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}{%"
    " for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{%"
    " endif %}"
)


def test_dates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template that writes the day is run again every time, or the day is frozen."""
    tokenizer = make_tokenizer(DATED)
    turns = (Message("user", "a"), Message("assistant", "b"))
    pattern = get_pattern(turns)
    assert pattern is not None
    assert SkeletonCache(tokenizer).get_segments(pattern, lambda: turns) is None
    assert SkeletonCache(tokenizer, frozen=True).get_segments(pattern, lambda: turns) is not None
    frozen = ConversationEncoder(tokenizer, frozen=True)
    expected = render_masked(tokenizer, turns, frozen=True)
    assert frozen.encode(turns)[0] == list(expected.ids)
    assert tokenizer.decode(frozen.encode(turns)[0]) == "26 Jul 2024user:a<|im_end|>assistant:b<|im_end|>"
    assert ConversationEncoder(tokenizer).encode(turns)[0] == list(render_masked(tokenizer, turns).ids)


def test_templates_by_name(tmp_path: Path) -> None:
    """What transformers chooses of several templates is what the one writes that they become."""
    named = {
        "default": "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}\n",
        "tool_use": "{{ tools[0].function.name }}{% for m in messages %}[{{ m.content }}]{% endfor %}",
    }
    tokenizer = make_tokenizer()
    tokenizer.chat_template = named
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    turns = [{"role": "user", "content": "a"}]
    for tools in (None, [{"type": "function", "function": TOOL}]):
        assert loaded.apply_chat_template(turns, tools=tools, tokenize=False) == tokenizer.apply_chat_template(
            turns, tools=tools, tokenize=False
        )
    tokenizer.chat_template = {"other": "x"}
    tokenizer.save_pretrained(tmp_path / "none")
    with pytest.raises(ModelError, match="none is called default"):
        load_tokenizer(tmp_path / "none")
