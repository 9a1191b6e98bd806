"""Templates that take thinking out of history, or write an empty think block before the last answer, as Qwen3's.

Each answer is trained on after the prompt that it is generated after.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import make_pico, make_tokenizer

from llmworks.core.errors import ModelError
from llmworks.core.types import Message, Request, Sampling
from llmworks.data.store.rows import write_chat, write_preference
from llmworks.generate.engines.torch import TorchEngine
from llmworks.runtime.session import Session
from llmworks.tokenize.chat.encode import ConversationEncoder
from llmworks.tokenize.chat.template_faults import TemplateUses, find_template_faults
from llmworks.tokenize.chat.templates import render_answers, render_masked, render_prompt, render_text
from llmworks.train.finetune.examples import make_examples

# As Qwen3: thinking is shown for the answers after the last question, with an empty block where there is none.
QWEN3 = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{%- set c = m.content %}"
    "{%- set r = m.reasoning_content or '' %}{%- if '</think>' in c %}{%- set r = c.split('</think>')[0]"
    ".split('<think>')[-1].strip('\\n') %}{%- set c = c.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>assistant\\n' }}{%- if loop.index0 > ns.last and (loop.last or r) %}"
    "{{- '<think>\\n' + r + '\\n</think>\\n\\n' }}{%- endif %}{{- c + '<|im_end|>\\n' }}{%- else %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
HISTORY = QWEN3.replace("(loop.last or r)", "r")  # takes thinking out of history, writes no empty block
THOUGHT = "<think>\nhm\n</think>\n\n"
ONE = (Message("user", "a"), Message("assistant", "b"))
TWO = (*ONE, Message("user", "c"), Message("assistant", THOUGHT + "d"))
THREE = (
    Message("user", "a"),
    Message("assistant", THOUGHT + "b"),
    *TWO[2:],
    Message("user", "e"),
    Message("assistant", "f"),
)
USES = TemplateUses(system=False, tools=False, results=False, turns=True)


def to_row(messages: tuple[Message, ...], id: str = "r") -> dict[str, Any]:
    turns = [{"role": m.role, "content": m.content, **({} if m.weight else {"weight": 0})} for m in messages]
    return {"id": id, "group": "", "messages": turns, "tools": [], "answer": None, "extra": {}}


@pytest.mark.parametrize("template", [QWEN3, HISTORY], ids=["empty block", "history"])
@pytest.mark.parametrize("messages", [ONE, TWO, THREE], ids=["one turn", "two turns", "three turns"])
def test_each_answer_follows_the_prompt_that_it_is_generated_after(
    template: str, messages: tuple[Message, ...]
) -> None:
    tokenizer = make_tokenizer(template)
    answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
    parts = render_answers(tokenizer, messages)
    if template == HISTORY and messages == TWO:  # nothing to take out of history
        assert parts == [render_masked(tokenizer, messages)]
        return
    if len(answers) > 1:
        assert len(parts) == len(answers)
        with pytest.raises(ModelError, match="rewrites earlier turns"):
            render_masked(tokenizer, messages)
    for part, i in zip(parts, answers, strict=True):
        prompt = render_prompt(tokenizer, messages[:i])
        assert part.ids[: len(prompt)] == prompt
        assert part.mask == (0,) * len(prompt) + (1,) * (len(part.ids) - len(prompt)) or len(answers) == 1
        whole = render_text(tokenizer, messages[: i + 1], generation_prompt=False)
        assert tokenizer.decode(part.ids).rstrip() == whole.rstrip()
        labels = [id for id, m in zip(part.ids, part.mask, strict=True) if m]
        assert labels[-1] == 2
        assert tokenizer.decode(labels) == whole[len(tokenizer.decode(prompt)) :].rstrip()
    bulk = [tuple(ids) for ids, _ in ConversationEncoder(tokenizer).encode_answers(messages)]
    assert bulk == [part.ids for part in parts]


def test_templates_that_only_append_are_rendered_once() -> None:
    assert len(render_answers(make_tokenizer(), THREE)) == 1
    assert render_answers(make_tokenizer(), THREE) == [render_masked(make_tokenizer(), THREE)]


def test_weights_and_the_last_answer() -> None:
    tokenizer = make_tokenizer(QWEN3)
    masked = (TWO[0], Message("assistant", "b", weight=0), *TWO[2:])
    made = make_examples(tokenizer, to_row(masked), 500)
    assert not isinstance(made, str)
    assert [example.part for example in made] == [0]
    (last,) = make_examples(tokenizer, to_row(THREE), 500, last=True)
    assert "f<|im_end|>" in tokenizer.decode(last.ids)
    examples = make_examples(tokenizer, to_row(THREE), 500)
    assert [example.id for example in examples] == ["r", "r~2", "r~3"]
    assert make_examples(tokenizer, to_row((*ONE[:1], Message("assistant", "b", weight=0))), 500) == (
        "no assistant tokens to train on"
    )


def test_the_doctor_notes_it_and_refuses_nothing(tmp_path: Path) -> None:
    for template, codes in ((QWEN3, {"answer-prefix", "rewrites-turns"}), (HISTORY, set())):
        faults = {fault.code: fault for fault in find_template_faults(make_tokenizer(template), [2], USES)}
        assert not [fault for fault in faults.values() if fault.level == "error"]
        assert codes <= set(faults)
        assert all(faults[code].level == "note" for code in codes)
    header_missing = QWEN3.replace("{{- '<|im_start|>assistant\\n' }}{%- endif %}", "{%- endif %}")
    levels = {f.code: f.level for f in find_template_faults(make_tokenizer(header_missing), [2], USES)}
    assert levels["generation-prompt"] == "error"


def test_training_and_replay(tmp_path: Path) -> None:
    """A model that has learned the rows by heart gives each answer in the engine, from the prompt of its own turn."""
    model = make_pico(tmp_path / "pico", template=QWEN3)
    write_chat(tmp_path / "rows", [to_row(TWO, f"r{i}") for i in range(4)])
    session = Session(tmp_path / "workspace", quiet=True)
    config = {"method": "full", "num_train_epochs": 60, "optimizer": {"learning_rate": 0.01}, "num_general_prompts": 0}
    made = session.make("train.sft", model=model, data=tmp_path / "rows", config=config)
    assert made.metrics["rows"] == 8
    engine = TorchEngine.open(made.path)
    requests = [Request(TWO[:end], sampling=Sampling(max_tokens=40)) for end in (1, 3)]
    first, second = (completion.text for completion in engine.generate(requests))
    assert first == "<think>\n\n</think>\n\nb"
    assert second == THOUGHT + "d"
    packed = session.make("data.pack", model=model, data=tmp_path / "rows", config={"max_length": 256})
    assert packed.metrics["pieces"] == 8
    pairs = [
        {
            "id": f"p{i}",
            "group": "",
            "prompt": to_row(TWO[:3])["messages"],
            "chosen": [{"role": "assistant", "content": "d"}],
            "rejected": [{"role": "assistant", "content": THOUGHT + "e"}],
            "tools": [],
            "answer": None,
            "extra": {},
        }
        for i in range(4)
    ]
    write_preference(tmp_path / "pairs", pairs)
    small = {"num_train_epochs": 1, "num_general_prompts": 0}
    aligned = session.make("align.dpo", policy=model, pairs=tmp_path / "pairs", config=small)
    assert aligned.metrics["rows"] == 4
    doctor = session.make("data.doctor", model=model, data=tmp_path / "rows")
    assert doctor.metrics["errors"] == 0
    assert json.loads((doctor.path / "manifest.json").read_text())
