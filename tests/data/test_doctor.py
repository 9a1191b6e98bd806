"""The doctor finds each planted fault, and nothing in good data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import TEMPLATE, make_tokenizer

from llmworks.cli import main

Row = dict[str, Any]
GOOD: list[Row] = [
    {
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "So."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Zwölf 谢谢 🙂"},
            {"role": "assistant", "content": "```py\nprint('Human: x')\n```"},
        ]
    },
]
TOOL = {
    "name": "f",
    "description": "d",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
}
WITH_TOOLS: Row = {
    "tools": [TOOL],
    "messages": [
        {"role": "user", "content": "Five?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 5}'}}],
        },
        {"role": "tool", "content": "5", "tool_call_id": "c1"},
        {"role": "assistant", "content": "Five."},
    ],
}


def one(user: str = "Hi", assistant: str = "Hello.", **fields: Any) -> Row:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}], **fields}


@pytest.fixture
def diagnose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, dict[str, Any]]]:
    """Findings by code, of a tokenizer and rows."""
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))

    def run(
        rows: list[Row] | None = None,
        template: str = TEMPLATE,
        change: Callable[[Any], None] | None = None,
        stop: list[int] | None = None,
        words: tuple[str, ...] = (),
        config: Row | None = None,
    ) -> dict[str, dict[str, Any]]:
        model = tmp_path / "model"
        shutil.rmtree(model, ignore_errors=True)
        tokenizer = make_tokenizer(template)
        if change:
            change(tokenizer)
        tokenizer.save_pretrained(model)
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2] if stop is None else stop}))
        (model / "config.json").write_text(
            json.dumps({"vocab_size": 400, "max_position_embeddings": 512, **(config or {})})
        )
        raw = tmp_path / "raw.jsonl"
        raw.write_text("".join(json.dumps({"id": str(i), **row}) + "\n" for i, row in enumerate(rows or GOOD)))
        assert main(["data", "chat", str(raw), "--out", str(tmp_path / "chat"), "--quiet", "--set", "turns=any"]) == 0
        code = main(
            ["data", "doctor", str(model), str(tmp_path / "chat"), "--out", str(tmp_path / "report"), "--quiet", *words]
        )
        report = json.loads((tmp_path / "report/report.json").read_text())
        assert code == (1 if report["errors"] else 0)
        return {finding["code"]: finding for finding in report["findings"]}

    return run


Diagnose = Callable[..., dict[str, dict[str, Any]]]
NOTES = {"pad-is-eos", "tools-dropped"}  # what the pico model is told of itself


def test_good_data_are_left_in_peace(diagnose: Diagnose) -> None:
    assert set(diagnose()) == NOTES
    assert all(f["level"] == "note" for f in diagnose().values())


def test_good_tool_data(diagnose: Diagnose) -> None:
    assert set(diagnose([WITH_TOOLS], words=("--set", "chat_template=tools"))) == {"pad-is-eos"}
    assert diagnose([WITH_TOOLS])["tools-dropped"]["level"] == "warning"


def replaced(*pairs: tuple[str, str]) -> str:
    template = TEMPLATE
    for old, new in pairs:
        assert old in template
        template = template.replace(old, new)
    return template


END = "'<|im_end|>' + '\n'"
GENERATION = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}{%- if m.role == 'assistant' %}OPEN{%- generation"
    " %}{{- m.content }}INSIDE{%- endgeneration %}OUTSIDE{%- else %}{{- m.content + '<|im_end|>' }}{%- endif %}{{- '\n'"
    " }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
STOP = "{{- '<|im_end|>' }}"
WIDE = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- generation %}{{- '<|im_start|>assistant\n' + m.content"
    " + '<|im_end|>' }}{%- endgeneration %}{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>'"
    " }}{%- endif %}{{- '\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# the fault: (its template, what is said of it)
TEMPLATES: dict[str, tuple[str, str, str]] = {
    "template-broken, syntax": (
        "template-broken",
        "{% for m in messages %}{{ m.content }",
        "refuses this conversation",
    ),
    "template-broken, a missing variable": ("template-broken", "{{ persona.name }}" + TEMPLATE, "persona"),
    "template-broken, no answers": (
        "template-broken",
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('users only') }}{% endif %}{{"
            " m.content }}{% endfor %}"
        ),
        "users only",
    ),
    "double-bos": ("double-bos", "{{ bos_token }}" + TEMPLATE, "twice"),
    "no-end": ("no-end", replaced((END, "'\n'")), "not trained to stop"),
    "rewrites-turns, an end at the last only": (
        "rewrites-turns",
        replaced((END, "('<|im_end|>' if loop.last or message['role'] != 'assistant' else '') + '\n'")),
        "rewrites earlier turns",
    ),
    "end-not-stop": (
        "end-not-stop",
        replaced(("<|im_end|>", "<|endoftext|>")),
        "'<|endoftext|>', which is not among the stop ids [2]",
    ),
    "generation-prompt, another": (
        "generation-prompt",
        replaced(("<|im_start|>assistant\n", "<|im_start|>assistant:\n")),
        "in generation an answer begins after",
    ),
    "generation-prompt, none": (
        "generation-prompt",
        TEMPLATE.partition("{% if add_generation_prompt")[0],
        "add_generation_prompt does not write '<|im_start|>assistant",
    ),
    "rewrites-turns": (
        "rewrites-turns",
        replaced(
            (
                "message['content']",
                (
                    "(message['content'] | upper if message['role'] == 'user' and not loop.last and loop.first else"
                    " message['content'])"
                ),
            )
        ),
        "when another follows",
    ),
    "rewrites-turns, of answers": (
        "rewrites-turns",
        replaced(
            ("message['content']", "(message['content'] if loop.last or message['role'] != 'assistant' else '...')")
        ),
        "rewrites earlier turns",
    ),
    "answer-dropped": (
        "answer-dropped",
        replaced(("message['content']", "(message['content'] if message['role'] != 'assistant' else '')")),
        "drops assistant turns",
    ),
    "system-dropped": (
        "system-dropped",
        replaced(("{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}")),
        "drops the system turn silently",
    ),
    "system-dropped, once answered": (
        "system-dropped",
        replaced(
            (
                "message['content']",
                "(message['content'] if message['role'] != 'system' or messages[-1]['role'] == 'user' else '')",
            )
        ),
        "when an answer follows",
    ),
    "system-refused": (
        "system-refused",
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE,
        "no system",
    ),
    "split-mark": ("split-mark", replaced(("<|im_start|>", "<|turn|>")), "'<|turn|>' is"),
    "date": ("date", "{{ strftime_now('%Y-%m-%d') }}" + TEMPLATE, "today's date"),
    "own-system": (
        "own-system",
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a very helpful assistant made by"
        " us<|im_end|>\n{% endif %}" + TEMPLATE,
        "very helpful",
    ),
    "trims": ("trims", replaced(("message['content']", "(message['content'] | trim)")), "trims white space"),
    "end-not-trained": (
        "end-not-trained",
        GENERATION.replace("OPEN", "").replace("INSIDE", "").replace("OUTSIDE", STOP),
        "omit '<|im_end|>",
    ),
    "mask-too-wide": ("mask-too-wide", WIDE, "cover '<|im_start|>assistant"),
}


@pytest.mark.parametrize("fault", TEMPLATES)
def test_faults_of_templates(fault: str, diagnose: Diagnose) -> None:
    code, template, says = TEMPLATES[fault]
    found = diagnose(template=template)
    assert code in found, found
    assert says in found[code]["what"]
    others = {c for c, f in found.items() if f["level"] == "error"} - {code}
    assert others <= {"not-rendered", "text-lossy"}, found  # one fault is not told as many


def test_no_template(diagnose: Diagnose) -> None:
    assert "no-template" in diagnose(change=lambda t: setattr(t, "chat_template", None))
    assert (
        set(diagnose(change=lambda t: setattr(t, "chat_template", None), words=("--set", "chat_template=chatml")))
        == NOTES
    )


def test_tools_that_a_template_half_shows(diagnose: Diagnose) -> None:
    lists = "{% if tools %}{{ tools | tojson }}{% endif %}"
    assert {"calls-dropped", "results-dropped"} <= set(
        diagnose(
            [WITH_TOOLS],
            template=lists
            + replaced(("message['content']", "(message['content'] if message['role'] != 'tool' else '')")),
        )
    )
    refuses = (
        lists
        + "{% for m in messages if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endfor %}"
        + TEMPLATE
    )
    assert "no tools here" in diagnose([WITH_TOOLS], template=refuses)["results-refused"]["what"]


def test_faults_of_tokenizers(diagnose: Diagnose) -> None:
    def adds_bos(tokenizer: Any) -> None:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
        tokenizer.bos_token = "<|endoftext|>"

    assert diagnose(change=adds_bos)["no-bos"]["level"] == "warning"
    assert "adds another one" in diagnose(change=adds_bos, template="{{ bos_token }}" + TEMPLATE)["double-bos"]["what"]
    assert "embedding 300 rows" in diagnose(config={"vocab_size": 300})["vocabulary"]["what"]
    assert "no end token" in diagnose(change=lambda t: setattr(t, "eos_token", None))["no-eos"]["what"]
    assert (
        "'<|im_end|>', which is not among the stop ids [0]"
        in diagnose(change=lambda t: setattr(t, "eos_token", "<|endoftext|>"), stop=[0])["end-not-stop"]["what"]
    )


ROWS: dict[str, tuple[str, list[Row], str]] = {
    "special-in-text": (
        "special-in-text",
        [one("say <|im_end|>\n<|im_start|>assistant\nno"), one()],
        "user turn contains",
    ),
    "special-in-text, of an answer": (
        "special-in-text",
        [one(assistant="a<|endoftext|>b")],
        "assistant turn contains '<|endoftext|>'",
    ),
    "answer-cut-off": ("answer-cut-off", [one("word " * 600), one()], "no label token is left"),
    "answer-cut": ("answer-cut", [one(assistant="word " * 600)], "lose their end"),
    "turns, order": (
        "turns",
        [
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "user", "content": "b"},
                    {"role": "assistant", "content": "c"},
                ]
            }
        ],
        "both user turns",
    ),
    "turns, empty": ("turns", [one(assistant=" ")], "is empty"),
    "turns, result without call": (
        "turns",
        [
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "tool", "content": "b"},
                    {"role": "assistant", "content": "c"},
                ]
            }
        ],
        "without a call",
    ),
    "no-label-tokens": (
        "no-label-tokens",
        [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}],
        "no label tokens",
    ),
    "other-turn-trained": (
        "other-turn-trained",
        [one(assistant="Yes.\n\nHuman: and then?\n\nAssistant: no")],
        "a turn of another role",
    ),
    "other-turn-trained, alpaca": (
        "other-turn-trained",
        [one(assistant="Yes.\n### Instruction:\nGo on")],
        "a turn of another role",
    ),
    "duplicate-row": ("duplicate-row", [one(), one()], "duplicate row"),
    "contradiction": ("contradiction", [one(), one(assistant="Go away.")], "different answers"),
    "white-space": ("white-space", [one(assistant=" Hello.")], "white space"),
    "identical-sides": (
        "identical-sides",
        [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"}],
        "are identical",
    ),
}


@pytest.mark.parametrize("fault", ROWS)
def test_faults_of_rows(fault: str, diagnose: Diagnose) -> None:
    code, rows, says = ROWS[fault]
    found = diagnose(rows)
    assert code in found, found
    assert says in found[code]["what"]
    assert found[code]["rows"] == 1
    assert found[code]["examples"] == ["1" if code in ("duplicate-row", "contradiction") else "0"]
    extra = {c for c, f in found.items() if f["level"] != "note"} - {code}
    assert extra <= {"turns"} if code == "no-label-tokens" else not extra, found


def test_text_that_a_tokenizer_loses(diagnose: Diagnose) -> None:
    def drops(tokenizer: Any) -> None:
        from tokenizers import normalizers

        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("é", "e")

    assert "é" in diagnose([one("Café?")], change=drops)["text-lossy"]["what"]


def test_a_template_may_refuse_some_rows(diagnose: Diagnose) -> None:
    refuses = "{% for m in messages if 'x9' in m.content %}{{ raise_exception('not this') }}{% endfor %}" + TEMPLATE
    found = diagnose([one(), one("x9")], template=refuses)
    assert found["not-rendered"]["examples"] == ["1"]
    assert "not this" in found["not-rendered"]["what"]


def test_what_is_shown(diagnose: Diagnose, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diagnose([one("<b>", "say <|im_end|>")])
    shown = capsys.readouterr().out
    assert "warning special-in-text" in shown
    assert "tokens trained on in green" in shown
    page = (tmp_path / "report/report.html").read_text()
    assert '<span class="l s" title="2">' in page
    assert "&lt;" in page
    assert "\x1b[33mwarning" in (tmp_path / "report/report.txt").read_text()


def test_words_on_the_command_line(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    raw = tmp_path / "raw.jsonl"
    raw.write_text(json.dumps(one()) + "\n")
    assert main(["data", "chat", str(raw), "--out", str(tmp_path / "chat"), "--quiet"]) == 0
    assert (
        main(["data", "doctor", str(pico), "--data", str(tmp_path / "chat"), "--quiet"]) == 0
    )  # a report needs no name
    assert "Report: " in capsys.readouterr().out
    for words, says in (
        (["data", "chat", str(raw)], "--out is missing"),
        (["data", "doctor", str(raw), str(tmp_path / "chat")], "is a dataset"),
        (["data", "doctor", str(pico), str(raw)], "no Parquet"),
    ):
        assert main([*words, "--quiet"]) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["data", "doctor", str(pico), str(raw), str(raw), "more", "--quiet"])
    assert "unexpected argument 'more'" in capsys.readouterr().err


def preference(prompt: str, chosen: str, rejected: str) -> Row:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


PAIRS = [
    preference(f"Question {i}?", f"Good {i}." + " More." * (i % 2), f"Bad {i}." + " More." * (1 - i % 2))
    for i in range(30)
]


def test_good_pairs_have_no_findings(diagnose: Callable[..., dict[str, dict[str, Any]]]) -> None:
    assert set(diagnose(PAIRS)) == NOTES


@pytest.mark.parametrize(
    ("code", "rows", "count"),
    [
        ("contradictory-pairs", [*PAIRS, preference("Question 1?", PAIRS[1]["rejected"], PAIRS[1]["chosen"])], 1),
        (
            "answer-in-prompt",
            [
                *PAIRS,
                preference(
                    "Is it true that water boils at 100 degrees?",
                    "water boils at 100 degrees",
                    "No, it does not boil at all",
                ),
            ],
            1,
        ),
        (
            "length-bias",
            [preference(f"Question {i}?", f"Good {i}." + " More." * (i % 4), f"Bad {i}.") for i in range(30)],
            30,
        ),
    ],
)
def test_faults_of_pairs(
    diagnose: Callable[..., dict[str, dict[str, Any]]], code: str, rows: list[Row], count: int
) -> None:
    found = diagnose(rows)
    assert set(found) - NOTES == {code}
    assert found[code]["rows"] == count


def test_questions_that_are_in_the_held_out_data(
    diagnose: Callable[..., dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(
        "".join(
            json.dumps(row) + "\n"
            for row in [
                {"messages": [{"role": "user", "content": " question 3? "}, {"role": "assistant", "content": "x"}]}
            ]
        )
    )
    assert main(["data", "chat", str(held), "--out", str(tmp_path / "held"), "--quiet"]) == 0
    found = diagnose(PAIRS, words=("--eval-data", str(tmp_path / "held")))
    assert {code: finding["examples"] for code, finding in found.items() if code not in NOTES} == {
        "in-eval-data": ["3"]
    }
