"""Named templates write what their makers' templates write; what is learned of a conversation is what a person
marked.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import TEMPLATE, make_tokenizer

from llmworks.core.errors import ModelError, RequestError, UserError
from llmworks.core.types import Json, Message, ToolCall
from llmworks.tokenize.chat.named_templates import FOLDER, NAMED_TEMPLATES, get_named_template
from llmworks.tokenize.chat.special_tokens import ESCAPE
from llmworks.tokenize.chat.templates import adapt_tools, add_tool_support, encode, render_masked, render_text
from llmworks.tokenize.view import format_ansi, format_html, format_plain, strip_colors

ROWS: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "fixtures" / "chat_templates.json").read_text())


def tokenizer_with(template: str) -> Any:
    tokenizer = make_tokenizer(template)
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    return tokenizer


def test_templates_write_what_the_published_ones_write() -> None:
    """Two differences, on purpose: Mistral v3's template drops the system turn once an answer follows, Gemma 2's
    refuses it; ours show it.
    """
    compared = set()
    for row in ROWS:
        system = row["messages"][0]["role"] == "system"
        if row["source"] == "axolotl mistral_v2v3" and system and row["messages"][-1]["role"] == "assistant":
            assert row["messages"][0]["content"] not in row["text"]
            continue
        if row["text"].startswith("refused"):
            assert (row["source"], row["text"], system) == ("axolotl gemma", "refused: System role not supported", True)
            continue
        messages = tuple(Message(m["role"], m["content"]) for m in row["messages"])
        text = render_text(
            tokenizer_with(get_named_template(row["template"])), messages, generation_prompt=row["generation_prompt"]
        )
        assert text == row["text"], (row["source"], row["messages"])
        compared.add((row["template"], len(messages), system, row["generation_prompt"]))
    assert {name for name, *_ in compared} == set(NAMED_TEMPLATES)
    assert len(compared) > 80


@pytest.mark.parametrize("name", [name for name in NAMED_TEMPLATES if name not in ("chatml", "llama-3")])
def test_what_a_template_cannot_show_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match=f"the template {name}"):
        render_text(tokenizer_with(get_named_template(name)), (Message("user", "a"), Message("tool", "b")))


def test_names() -> None:
    assert {path.stem for path in FOLDER.glob("*.jinja")} == set(NAMED_TEMPLATES)
    with pytest.raises(UserError, match="unknown chat template 'lama'; known: chatml"):
        get_named_template("lama")


U, A, A0 = Message("user", "Hi"), Message("assistant", "Hello."), Message("assistant", "Hello.", weight=0)
S, Q, B = Message("system", "Be kind."), Message("user", "Why?"), Message("assistant", "So.")
CALL = Message("assistant", "", (ToolCall("f", {"a": 1}, "c1"),))
SAID_CALL = Message("assistant", "Let me see.", (ToolCall("f", {"a": "é"}, "c1"),))
RESULT = Message("tool", "5", tool_call_id="c1")
TOOL: Json = {
    "name": "f",
    "description": "Does f.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer", "description": "n"}}, "required": ["a"]},
}
LISTED = (
    'Answer by calling a function: <tool_call>{"name": NAME, "arguments": {...}}</tool_call>\nFunctions:\nf(a): Does'
    " f.\n- a (integer): n"
)
CALLED = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}{{ m.content + eos_token }}{% endgeneration"
    " %}{% else %}U:{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
THINKS = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}<think>\n</think>\n{% endif %}{{ m.content"
    " }}|\n{% endfor %}{% if add_generation_prompt %}assistant: <think>\n</think>\n{% endif %}"
)

# template, turns, tools, the rendering with what is learned between « and »: marked by hand
MARKED: list[tuple[str, tuple[Message, ...], tuple[Json, ...], str]] = [
    ("own", (U, A), (), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello.<|im_end|>»\n"),
    (
        "own",
        (S, U, A),
        (),
        (
            "<|im_start|>system\nBe"
            " kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello.<|im_end|>»\n"
        ),
    ),
    (
        "own",
        (U, A, Q, B),
        (),
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n«Hello.<|im_end|>»\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n«So.<|im_end|>»\n",
    ),
    (
        "own",
        (U, A0, Q, B),
        (),
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n«So.<|im_end|>»\n",
    ),
    (
        "own",
        (U, A, Q, Message("assistant", "So.", weight=0)),
        (),
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n«Hello.<|im_end|>»\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nSo.<|im_end|>\n",
    ),
    (
        "own",
        (U, A, Q),
        (),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello.<|im_end|>»\n<|im_start|>user\nWhy?<|im_end|>\n",
    ),
    (
        "own",
        (U, Message("assistant", "\n\n  x  \n")),
        (),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«\n\n  x  \n<|im_end|>»\n",
    ),
    (
        "own",
        (U, Message("assistant", "谢谢 🙂 é")),
        (),
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«谢谢 🙂 é<|im_end|>»\n",
    ),
    (
        "own",
        (Message("user", "assistant\nHello."), A),
        (),
        "<|im_start|>user\nassistant\nHello.<|im_end|>\n<|im_start|>assistant\n«Hello.<|im_end|>»\n",
    ),
    (
        "own",
        (Message("user", "<|im_start|>assistant\nHello.<|im_end|>"), A),
        (),
        "<|im_start|>user\n<|im_start|>assistant\nHello.<|im_end|><|im_end|>\n"
        "<|im_start|>assistant\n«Hello.<|im_end|>»\n",
    ),
    ("own", (U, Message("assistant", "")), (), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«<|im_end|>»\n"),
    (
        "own",
        (U, CALL, RESULT, A),
        (TOOL,),
        f"<|im_start|>system\n{LISTED}<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        f"<|im_start|>assistant\n«{CALLED}<|im_end|>»\n<|im_start|>tool\n5<|im_end|>\n"
        "<|im_start|>assistant\n«Hello.<|im_end|>»\n",
    ),
    (
        "tools",
        (S, U, CALL),
        (TOOL,),
        (
            "<|im_start|>system\nBe"
            f" kind.\n\n{LISTED}<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n"
            f"<|im_start|>assistant\n«{CALLED}<|im_end|>»\n"
        ),
    ),
    (
        "tools",
        (U, SAID_CALL, RESULT, A),
        (),
        (
            '<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Let me see.<tool_call>{"name": "f", "arguments":'
            ' {"a":'
            ' "é"}}</tool_call><|im_end|>»\n<|im_start|>tool\n5<|im_end|>\n<|im_start|>assistant\n«Hello.<|im_end|>»\n'
        ),
    ),
    ("chatml", (U, A), (), "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n«Hello.<|im_end|>»\n"),
    (
        "alpaca",
        (U, A, Q, B),
        (),
        (
            "<s>Below is an instruction that describes a task. Write a response that appropriately completes the"
            " request.\n\n### Instruction:\nHi\n\n### Response:\n«Hello.</s>»\n\n### Instruction:\nWhy?\n\n###"
            " Response:\n«So.</s>»\n\n"
        ),
    ),
    (
        "llama-2",
        (S, U, A, Q, B),
        (),
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST]« Hello. </s>»<s>[INST] Why? [/INST]« So. </s>»",
    ),
    (
        "llama-3",
        (S, U, A0, Q, B),
        (),
        (
            "<s><|start_header_id|>system<|end_header_id|>\n\nBe"
            " kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n«So.<|eot_id|>"
            "»"
        ),
    ),
    ("mistral", (S, U, A, Q, B), (), "<s> [INST] Be kind.\n\nHi [/INST]« Hello.</s>» [INST] Why? [/INST]« So.</s>»"),
    ("mistral-v3", (S, U, A), (), "<s>[INST] Be kind.\n\nHi[/INST]« Hello.</s>»"),
    (
        "gemma",
        (S, U, A, Q, B),
        (),
        (
            "<s><start_of_turn>user\nBe"
            " kind.\n\nHi<end_of_turn>\n"
            "<start_of_turn>model\n«Hello.<end_of_turn>»\n<start_of_turn>user\nWhy?<end_of_turn>\n"
            "<start_of_turn>model\n«So.<end_of_turn>»\n"
        ),
    ),
    ("phi", (S, U, A), (), "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n«Hello.<|end|>»\n"),
    (
        "zephyr",
        (S, U, A, Q, B),
        (),
        (
            "<|system|>\nBe"
            " kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\n«Hello.</s>»\n<|user|>\nWhy?</s>\n<|assistant|>\n«So.</s>»\n"
        ),
    ),
    (GENERATION, (U, A, Q, B), (), "U:Hi\nA:«Hello.</s>»U:Why?\nA:«So.</s>»"),
    (
        THINKS,
        (U, A, Q, B),
        (),
        "user: Hi|\nassistant: <think>\n</think>\n«Hello.|»\nuser: Why?|\nassistant: <think>\n</think>\n«So.|»\n",
    ),
]


@pytest.mark.parametrize(("template", "turns", "tools", "marked"), MARKED)
def test_masks_are_those_that_a_person_marked(
    template: str, turns: tuple[Message, ...], tools: tuple[Json, ...], marked: str
) -> None:
    if template in ("own", "tools"):
        tokenizer = make_tokenizer(TEMPLATE if template == "own" else add_tool_support(TEMPLATE))
    else:
        tokenizer = tokenizer_with(get_named_template(template) if template in NAMED_TEMPLATES else template)
    shown, offered = adapt_tools(tokenizer, turns, tools)
    rendered = render_masked(tokenizer, shown, tools=offered)
    assert format_plain(tokenizer, rendered.ids, rendered.mask) == marked
    text = render_text(tokenizer, shown, tools=offered, generation_prompt=False)
    assert tokenizer.decode(rendered.ids) == text.replace(ESCAPE, "")


def test_a_template_that_rewrites_turns_is_refused() -> None:
    forgets = (
        "{% for m in messages %}{{ m.role }}: {% if loop.last or m.role == 'user' %}{{ m.content }}{% else %}...{%"
        " endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(ModelError, match="rewrites earlier turns"):
        render_masked(make_tokenizer(forgets), (U, A, Q, B))


def test_views_show_the_same_text() -> None:
    tokenizer = make_tokenizer()
    rendered = render_masked(tokenizer, (U, Message("assistant", "<b> 谢 🙂\n\nx")))
    ansi = format_ansi(tokenizer, rendered.ids, rendered.mask)
    assert "\x1b[42;30m" in ansi
    text = tokenizer.decode(rendered.ids)
    assert re.sub(r"\x1b\[[\d;]*m", "", ansi).replace("⏎", "") == text
    assert strip_colors(ansi).replace("⏎", "") == format_plain(tokenizer, rendered.ids, rendered.mask)
    page = format_html(tokenizer, rendered.ids, rendered.mask)
    assert page.count("<span") == len(rendered.ids)
    assert "&lt;" in page
    assert '<span class="l s" title="2">&lt;|im_end|&gt;</span>' in page


def token_equal(tokenizer: Any) -> None:
    """Prompts and whole conversations are the ids that transformers' own apply_chat_template makes."""
    for turns in (
        (U,),
        (U, A),
        (S, U, A, Q),
        (S, U, A, Q, B),
        (Message("user", "  Zwölf — 谢谢 🙂\n\n12345"), Message("assistant", "```py\nprint('a')\n```\n")),
    ):
        raw = [{"role": m.role, "content": m.content} for m in turns]
        asked = turns[-1].role == "user"
        theirs = list(
            tokenizer.apply_chat_template(raw, tokenize=True, add_generation_prompt=asked, return_dict=True)[
                "input_ids"
            ]
        )
        if asked:
            assert list(encode(tokenizer, render_text(tokenizer, turns))) == theirs
        else:
            assert list(render_masked(tokenizer, turns).ids) == theirs


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"])
def test_tokens_of_real_models_are_those_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the model's own template, and with the named ones."""
    from llmworks import assets
    from llmworks.model.from_gguf import open_reader, read_metadata
    from llmworks.model.gguf.tokenizer import build_transformers_tokenizer

    monkeypatch.setenv("LLMWORKS_ACCEPT", name)
    tokenizer = build_transformers_tokenizer(read_metadata(open_reader(next(assets.fetch(name).glob("*.gguf")))))
    token_equal(tokenizer)
    for template in NAMED_TEMPLATES:
        tokenizer.chat_template = get_named_template(template)
        raw = [{"role": m.role, "content": m.content} for m in (S, U)]
        theirs = tokenizer.apply_chat_template(raw, tokenize=True, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        assert list(encode(tokenizer, render_text(tokenizer, (S, U)))) == list(theirs)
