"""Session fixtures: a pico Llama with a byte-level tokenizer and a chat template, its GGUF file, small conversations, a
workspace.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("LLMWORKS_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module", autouse=True)
def _collected() -> None:
    """Take what stays (libraries, session fixtures) out of the garbage collector's sight.

    Every stage collects garbage at its end, which costs 0.2 s where a million objects are alive.
    """
    gc.collect()
    gc.freeze()


TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the seconds of each room beside its budget (tests/budgets.py), when whole rooms ran."""
    from tests.budgets import BUDGETS

    spent: dict[str, float] = {}
    reports = [report for found in terminalreporter.stats.values() for report in found]
    for report in reports:
        if hasattr(report, "duration"):
            words = report.nodeid.partition("::")[0].split("/")
            room = words[1] if len(words) > 2 else ""
            spent[room] = spent.get(room, 0.0) + report.duration
    if sum(spent.values()) < 60:  # a file, a test
        return
    default = "not slow" in terminalreporter.config.option.markexpr
    terminalreporter.section("seconds of rooms (budget)")
    for room, seconds in sorted(spent.items(), key=lambda found: -found[1]):
        budget = BUDGETS.get(room, 0)
        over = "  OVER ITS BUDGET" if default and seconds > budget else ""
        terminalreporter.write_line(f"{seconds:7.1f} ({budget:3}) {room or 'tests/*.py'}{over}")


def make_tokenizer(template: str | None = TEMPLATE) -> Any:
    """A small byte-level BPE with SmolLM's pre-tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [
        "the quick brown fox",
        "user assistant system",
        '{"name": "get_weather", "arguments": {"city": "Oslo"}}',
        "what is the weather in",
    ] * 20
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=template,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def make_pico(out: Path, seed: int = 0, template: str | None = TEMPLATE) -> Path:
    """A Llama of two layers with random weights, grouped-query attention and tied embeddings."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(template)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # say printable text: other tokens get the logit 0, which is never the largest
        for token, index in tokenizer.get_vocab().items():
            text = tokenizer.convert_tokens_to_string([token])
            if token == "<|endoftext|>" or not (text.isascii() and text.isprintable()):
                model.model.embed_tokens.weight[index] = 0
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the pico model."""
    return make_pico(tmp_path_factory.mktemp("pico") / "model")


@pytest.fixture(scope="session")
def pico_gguf(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pico model as an F32 GGUF file."""
    from llmworks.core.progress import Progress
    from llmworks.quantize.llamacpp.writer import write_gguf

    target = tmp_path_factory.mktemp("gguf") / "pico.gguf"
    write_gguf(pico, target, "f32", Progress(quiet=True))
    return target


@pytest.fixture(scope="session")
def bfcl_rows() -> list[dict[str, Any]]:
    """The 400 BFCL questions with answers, from the registry package."""
    from llmworks import assets
    from llmworks.data.published.bfcl import rows as read
    from llmworks.data.store.jsonl import RejectedRows

    rejected = RejectedRows()
    rows = read(assets.fetch("bfcl-simple"), rejected)
    assert not rejected.rows
    return rows


def write_chats(folder: Path) -> Path:
    """JSONL of twelve small conversations in six groups."""
    cities = ["Oslo", "Rome", "Lima", "Bern", "Kyiv", "Cairo"]
    rows = [
        {
            "id": f"r{i}",
            "group": cities[i % 6],
            "messages": [
                {"role": "user", "content": f"weather in {cities[i % 6]} {i}"},
                {"role": "assistant", "content": f"rain {cities[i % 6]}"},
            ],
        }
        for i in range(12)
    ]
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return file


def write_recipe(folder: Path, pico: Path, chats: Path, **sft: Any) -> Path:
    """A recipe that trains the pico model on the small conversations; `sft` are its config fields."""
    config = {"num_train_epochs": 2, "batch_size": 2, "save_steps": 1, "num_sample_prompts": 1, **sft}
    text = f"""\
name: small
steps:
  base: {{use: "path:{pico}"}}
  raw: {{use: "path:{chats}"}}
  chats: {{stage: data.chat, inputs: {{data: raw}}}}
  train: {{stage: data.split, inputs: {{data: chats}}, config: {{split: train, n_splits: 3}}}}
  test: {{stage: data.split, inputs: {{data: chats}}, config: {{split: test, n_splits: 3}}}}
  tuned:
    stage: train.sft
    inputs: {{model: base, data: train, eval_data: test}}
    config: {json.dumps(config)}
  merged: {{stage: merge.adapter, inputs: {{adapter: tuned, model: base}}}}
  small: {{stage: quantize.gguf, inputs: {{model: merged}}, config: {{type: f16}}}}
"""
    file = folder / "small.yaml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.fixture
def chat_file(tmp_path: Path) -> Path:
    """A file of `write_chats` of the test's own."""
    return write_chats(tmp_path)


@pytest.fixture
def recipe_file(tmp_path: Path, pico: Path, chat_file: Path) -> Callable[..., Path]:
    """`write_recipe` into the test's folder."""
    return lambda **sft: write_recipe(tmp_path, pico, chat_file, **sft)
