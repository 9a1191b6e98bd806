"""Engines: what they answer is what the reference answers, however requests are batched, cached or streamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llmworks.core.errors import RequestError
from llmworks.core.types import Engine, Message, Request, Sampling
from llmworks.generate.engines.llamacpp import LlamaCppEngine
from llmworks.generate.engines.torch import TorchEngine
from llmworks.model.io.load import load_model

PROMPTS = ["hi", "what is the weather in Oslo", "the quick brown fox " * 4, "12345", "a b c d e f g"]


def ask(text: str, **sampling: Any) -> Request:
    return Request((Message("user", text),), sampling=Sampling(**{"max_tokens": 24, **sampling}))


@pytest.fixture(scope="module")
def hf(pico: Path) -> TorchEngine:
    return TorchEngine.open(pico)


@pytest.fixture(scope="module")
def cpp(pico_gguf: Path) -> Iterator[LlamaCppEngine]:
    engine = LlamaCppEngine(pico_gguf, threads=1)
    yield engine
    engine.close()


def greedy_reference(pico: Path, prompt: list[int], n: int) -> list[int]:
    """transformers' own greedy generation."""
    model = load_model(pico)
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=n,
        do_sample=False,
    )
    ids = out[0, len(prompt) :].tolist()
    return ids[: ids.index(2)] if 2 in ids else ids


def test_greedy_equals_transformers(hf: TorchEngine, pico: Path) -> None:
    for text in PROMPTS:
        done = hf.generate([ask(text)])[0]
        assert list(done.ids) == greedy_reference(pico, hf.prompt_ids(ask(text)), 24)
        assert done.completion_tokens == len(done.ids)


def test_batched_equals_one_by_one(hf: TorchEngine) -> None:
    requests = [ask(text, max_tokens=4 + 5 * i) for i, text in enumerate(PROMPTS)]  # rows end at different times
    together = hf.generate(requests)
    for request, done in zip(requests, together, strict=True):
        alone = hf.generate([request])[0]
        assert done.ids == alone.ids
        assert done.logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_shared_beginning_changes_nothing(hf: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [ask("the same long beginning of all of these prompts, then " + t) for t in ("one", "another two", "3")]
    shared = [c.ids for c in hf.generate(requests)]
    monkeypatch.setattr("llmworks.generate.engines.torch.SHARED_PREFIX_MIN", 10_000)
    assert [c.ids for c in hf.generate(requests)] == shared


def test_torch_and_llama_cpp_agree_on_greedy_tokens(hf: TorchEngine, cpp: LlamaCppEngine) -> None:
    requests = [ask(text) for text in PROMPTS]
    for ours, theirs in zip(hf.generate(requests), cpp.generate(requests), strict=True):
        assert ours.ids == theirs.ids
        assert ours.finish == theirs.finish
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=2e-2)


def test_both_llama_cpp_bindings_agree(cpp: LlamaCppEngine) -> None:
    """xllamacpp generates, cyllama scores: the sampled tokens are the scorer's largest, with the same
    log-probabilities.
    """
    request = ask("what is the weather in Oslo")
    done = cpp.generate([request])[0]
    prompt = cpp.prompt_ids(request)
    logits = cpp.logits([*prompt, *done.ids])
    assert [int(row.argmax()) for row in logits[len(prompt) - 1 : -1]] == list(done.ids)
    assert list(cpp.score([[*prompt, *done.ids]], [len(prompt)])[0].logprobs) == pytest.approx(done.logprobs, abs=1e-3)


@pytest.mark.parametrize("name", ["hf", "cpp"])
def test_sampling_follows_the_seed(name: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(name)
    a, b, c = (engine.generate([ask("hi", temperature=1.5, seed=s)])[0].ids for s in (1, 1, 2))
    assert a == b
    assert a != c


@pytest.mark.parametrize("name", ["hf", "cpp"])
def test_requests_that_cannot_be_answered(name: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(name)
    with pytest.raises(RequestError, match="ignores tools"):
        engine.generate([Request((Message("user", "x"),), tools=({"name": "f"},))])
    with pytest.raises(RequestError, match="tokens"):
        engine.generate([ask("word " * 600)])
    with pytest.raises(RequestError, match="empty"):
        engine.generate([Request()])
