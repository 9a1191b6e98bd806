"""Golden tokens replayed on engines: what agrees passes, another template, other weights or a token added by a server
do not.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.conftest import TEMPLATE, make_pico, make_tokenizer
from tests.generate.loopback import Loopback, openai_reply

from llmworks.cli import main
from llmworks.core.types import Completion, messages_from_json
from llmworks.model.from_gguf import read_quantization_type
from llmworks.runtime.session import Session
from llmworks.tokenize.chat.templates import adapt_tools, render_prompt


@pytest.fixture
def check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """(exit code, {what: ok}, all that was said) of `verify --golden`."""
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))

    def run(*words: str) -> tuple[int, dict[str, Any], str]:
        code = main(["verify", "--golden", *words, "--json"])
        said = capsys.readouterr()
        return code, {c["what"]: c["ok"] for c in json.loads(said.out or "[]")}, said.out + said.err

    return run


def changed(pico: Path, target: Path, template: str) -> Path:
    shutil.copytree(pico, target)
    make_tokenizer(template).save_pretrained(target)
    return target


def test_engines_that_run_here(check: Callable[..., Any], pico: Path, pico_gguf: Path, tmp_path: Path) -> None:
    good = {"tokens": True, "logits": True}
    assert check(str(pico), str(pico_gguf))[:2] == (0, good)
    local = good | {"weights": True}
    assert check(str(pico), str(pico))[:2] == (0, local)
    code, found, said = check(str(pico), str(make_pico(tmp_path / "other", seed=1)))
    assert (code, found) == (1, local | {"logits": False})
    assert "does not replay the golden tokens of model: logits:" in said
    code, found, said = check(
        str(pico), str(changed(pico, tmp_path / "system", TEMPLATE.replace("{% for", "{{ '<|im_start|>' }}{% for", 1)))
    )
    assert (code, found) == (1, local | {"tokens": False})
    assert "conversation 1: token 1 is 1, recorded" in said
    assert check(str(pico), str(pico_gguf), "--tolerance", "0")[0] == 1


def test_weights_that_no_golden_token_reads(check: Callable[..., Any], pico: Path, tmp_path: Path) -> None:
    """The input embedding of a token that occurs nowhere in the record, in a model with untied embeddings."""
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "tie_word_embeddings": False, "vocab_size": 2048}
    made = Session(tmp_path / "ws", quiet=True).make("model.new", tokenizer=pico, config=shape).path
    weights = load_file(made / "model.safetensors")
    weights["model.embed_tokens.weight"][2047, 3] = float("nan")
    damaged = tmp_path / "damaged"
    shutil.copytree(made, damaged)
    (damaged / "manifest.json").unlink()
    save_file(weights, damaged / "model.safetensors", {"format": "pt"})
    assert check(str(made), str(made))[:2] == (0, {"tokens": True, "weights": True, "logits": True})
    code, found, said = check(str(made), str(damaged))
    assert (code, found) == (1, {"tokens": True, "weights": False, "logits": True})
    assert "weights: model.embed_tokens.weight holds 1 values that are NaN or infinite" in said


def test_a_record_is_replayed_on_its_own_model(
    check: Callable[..., Any], pico: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "gguf", str(pico), "--out", str(tmp_path / "small"), "--quiet", "--set", "type=f16"]) == 0
    capsys.readouterr()
    assert check(str(tmp_path / "small"))[:2] == (0, {"tokens": True, "logits": True})
    code, _, said = check(str(pico))
    assert code == 2
    assert "no golden tokens recorded" in said
    assert check(str(pico), str(tmp_path / "small"))[0] == 0
    assert main(["verify", str(pico), "more"]) == 2


@pytest.mark.parametrize(("kind", "bound"), [("q4_0", 3.0), ("q8_0", 0.3), ("f16", 0.05), ("f32", 0.02)])
def test_a_file_alone_says_how_far_it_may_be(
    kind: str,
    bound: float,
    pico: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its header has the type; the directory's record is not beside it."""
    assert (
        main(["quantize", "gguf", str(pico), "--out", str(tmp_path / "small"), "--quiet", "--set", f"type={kind}"]) == 0
    )
    shutil.copyfile(next((tmp_path / "small").glob("*.gguf")), tmp_path / "alone.gguf")
    assert read_quantization_type(tmp_path / "alone.gguf") == kind
    seen: list[float] = []
    monkeypatch.setattr(
        "llmworks.generate.replay.replay", lambda recorded, engine, within, reference: seen.append(within) or []
    )
    assert main(["verify", "--golden", str(pico), f"gguf:{tmp_path / 'alone.gguf'}"]) == 0
    assert seen == [bound]


@pytest.fixture
def server() -> Iterator[Loopback]:
    server = Loopback()
    yield server
    server.stop()


def counting(tokenizer: Any, extra: int = 0, usage: bool = True) -> Callable[[Any, dict[str, Any]], None]:
    def behave(handler: Any, body: dict[str, Any]) -> None:
        messages, tools = adapt_tools(tokenizer, messages_from_json(body["messages"]), body.get("tools") or ())
        made = openai_reply(Completion("said", "stop"))
        made["usage"]["prompt_tokens"] = len(render_prompt(tokenizer, messages, tools=tools)) + extra
        handler.say(200, json.dumps(made if usage else {**made, "usage": None}).encode())

    return behave


def test_servers(check: Callable[..., Any], pico: Path, server: Loopback) -> None:
    tokenizer = make_tokenizer(TEMPLATE)
    ref = f"{server.url}#m"
    server.behaviours = [counting(tokenizer)] * 10
    assert check(str(pico), ref)[:2] == (0, {"prompts": True, "greedy completions": None})
    server.behaviours = [counting(tokenizer, extra=1)] * 10
    code, found, said = check(str(pico), ref)
    assert (code, found["prompts"]) == (1, False)
    assert "the server read" in said
    assert "an extra BOS token" in said
    server.behaviours = [counting(make_tokenizer(TEMPLATE.replace("{% for", "{{ '<|im_start|>' }}{% for", 1)))] * 10
    assert check(str(pico), ref)[0] == 1
    server.behaviours = [counting(tokenizer, usage=False)] * 10
    assert check(str(pico), ref)[:2] == (0, {"prompts": None, "greedy completions": None})


def test_mistakes(check: Callable[..., Any], pico: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"a": 1}\n')
    code, _, said = check(str(pico), str(tmp_path / "data.jsonl"))
    assert code == 2
    assert "only models and adapters have golden tokens" in said
    code, _, said = check(str(pico), "http://127.0.0.1:9/v1#m")
    assert code in (1, 3)
    assert len(said.strip().splitlines()) == 1
