"""What every engine has to do, on the same small model: in this process by torch and llama.cpp, and behind HTTP in
every API, this project's own server too.

An engine offers what its `can` names, and refuses the rest in one line; what it answers is what transformers' own
decoding of that model answers.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import torch
import uvicorn
from tests.conftest import make_pico, make_tokenizer
from tests.generate.loopback import APIS, Loopback, vector

from llmworks.core.errors import LlmworksError, RequestError, UserError
from llmworks.core.types import Completion, Engine, Message, Request, Sampling
from llmworks.generate.engines.llamacpp import LlamaCppEngine
from llmworks.generate.engines.remote import RemoteEngine
from llmworks.generate.engines.torch import TorchEngine
from llmworks.generate.remote.endpoint import RemoteOptions
from llmworks.model.io.load import load_model
from llmworks.serve.server import build_app

ABILITIES = {"ids", "score", "logits", "tools", "schema", "embed", "parallel"}
HERE = {"ids", "score", "logits", "schema"}
WANTED: dict[str, set[str]] = {
    "torch": HERE,
    "llama.cpp": HERE | {"parallel"},
    "openai": {"tools", "schema", "embed", "parallel"},
    "openai with a tokenizer": {"tools", "schema", "embed", "parallel", "ids", "score"},
    "anthropic": {"tools", "schema", "parallel"},
    "google": {"tools", "schema", "embed", "parallel"},
    "cohere": {"tools", "schema", "embed", "parallel"},
    "own server": {"tools", "schema", "embed", "parallel"},
}
PROMPTS = ["hi", "what is the weather in Oslo", "the quick brown fox " * 4, "12345", "a b c d e f g"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["fox", "dog"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


def ask(text: str, **sampling: Any) -> Request:
    return Request((Message("user", text),), sampling=Sampling(**{"max_tokens": 24, **sampling}))


def serve_own(engine: Engine) -> tuple[uvicorn.Server, threading.Thread, str]:
    server = uvicorn.Server(uvicorn.Config(build_app(engine, "m"), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    return server, thread, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"


@pytest.fixture(scope="module", params=WANTED)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(name: str, pico: Path, pico_gguf: Path) -> Iterator[Engine]:
    if name in ("torch", "llama.cpp"):
        local: Engine = TorchEngine.open(pico) if name == "torch" else LlamaCppEngine(pico_gguf, threads=1)
        yield local
        local.close()
        return
    behind = TorchEngine.open(pico)
    if name == "own server":
        server, thread, url = serve_own(behind)
        remote = RemoteEngine(url, "m", RemoteOptions(retries=0))
        yield remote
        remote.close()
        server.should_exit = True
        thread.join()
        return
    api = name.split()[0]
    loopback = Loopback(api, lambda request: behind.generate([request])[0], behind)
    options = {"api": api, "retries": 0, "sampling": "explicit", **({"tokenizer": str(pico)} if name != api else {})}
    remote = RemoteEngine(loopback.url, "m", RemoteOptions.model_validate(options))
    yield remote
    remote.close()
    loopback.stop()


@pytest.fixture(scope="module")
def expected(pico: Path) -> dict[str, list[int]]:
    """What transformers' own greedy decoding writes, up to its stop token."""
    model, tokenizer = load_model(pico), make_tokenizer()
    out: dict[str, list[int]] = {}
    for text in PROMPTS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        whole = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=24,
            do_sample=False,
        )
        ids = whole[0, len(prompt) :].tolist()
        out[text] = ids[: ids.index(2)] if 2 in ids else ids
    return out


def text_of(ids: Sequence[int]) -> str:
    return str(make_tokenizer().decode(ids, skip_special_tokens=True))


def test_it_says_what_it_can(name: str, engine: Engine) -> None:
    assert engine.can == WANTED[name]
    assert engine.can <= ABILITIES
    assert engine.name


def test_answers_come_in_order_and_are_those_of_the_model(engine: Engine, expected: dict[str, list[int]]) -> None:
    done = engine.generate([ask(text) for text in PROMPTS])
    for text, answer in zip(PROMPTS, done, strict=True):
        assert answer.text == text_of(expected[text])
        assert answer.finish == ("length" if len(expected[text]) == 24 else "stop")
        assert answer.completion_tokens == len(expected[text])
        assert answer.prompt_tokens > 0
        assert list(answer.ids) == (expected[text] if engine.can >= {"ids", "logits"} else [])
        assert len(answer.logprobs) == len(answer.ids)


def test_each_gives_every_answer_once(engine: Engine, expected: dict[str, list[int]]) -> None:
    requests = [ask(PROMPTS[i % 5]) for i in range(23)]
    seen: list[int] = []
    for place, answer in engine.each(requests):
        seen.append(place)
        assert isinstance(answer, Completion)
        assert answer.text == text_of(expected[PROMPTS[place % 5]])
    assert sorted(seen) == list(range(23))


def test_leaving_early_leaves_the_engine_usable(engine: Engine) -> None:
    answers = engine.each([ask(text) for text in PROMPTS * 3])
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    stream = engine.stream(ask("hi", max_tokens=200))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert engine.generate([ask("hi")])[0].text


def test_one_bad_request_does_not_lose_the_others(engine: Engine) -> None:
    requests = [ask("hi"), Request(), ask("12345")]
    found = dict(engine.each(requests))
    assert isinstance(found[1], RequestError)
    assert isinstance(found[0], Completion)
    assert isinstance(found[2], Completion)
    with pytest.raises(RequestError, match="the request is empty"):
        engine.generate(requests)


def test_a_stream_is_the_whole_answer(engine: Engine) -> None:
    for text in PROMPTS:
        pieces = list(engine.stream(ask(text)))
        whole = engine.generate([ask(text)])[0]
        assert pieces[-1].done is not None
        assert [piece.done for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert "".join(p.text for p in pieces) == whole.text == pieces[-1].done.text
        assert (pieces[-1].done.finish, pieces[-1].done.ids) == (whole.finish, whole.ids)
        assert len(pieces) > 2


def test_a_stop_string_ends_the_answer_and_is_not_in_it(engine: Engine) -> None:
    plain = engine.generate([ask("hi")])[0].text
    stop = plain[3:6]
    done = engine.generate([ask("hi", stop=(stop,))])[0]
    assert done.text == plain[: plain.index(stop)]
    assert done.finish == "stop"
    assert "".join(p.text for p in engine.stream(ask("hi", stop=(stop,)))) == done.text


def test_the_limit_ends_the_answer(engine: Engine) -> None:
    done = engine.generate([ask("hi", max_tokens=3)])[0]
    assert (done.finish, done.completion_tokens) == ("length", 3)


def test_system_and_turns_reach_the_model(engine: Engine, pico: Path) -> None:
    turns = (
        Message("system", "be brief"),
        Message("user", "hi"),
        Message("assistant", "hello"),
        Message("user", "what is the weather in Oslo"),
    )
    reference = TorchEngine.open(pico)
    for messages in (turns, turns[1:], turns[:2]):
        request = Request(messages, sampling=Sampling(max_tokens=12))
        ours, theirs = engine.generate([request])[0], reference.generate([request])[0]
        assert (ours.text, ours.prompt_tokens) == (theirs.text, theirs.prompt_tokens)


def test_sampling_is_followed(name: str, engine: Engine) -> None:
    if name != "anthropic":  # takes no seed
        a, b, c = (engine.generate([ask("hi", temperature=1.5, seed=s)])[0].text for s in (1, 1, 2))
        assert a == b
        assert a != c
    assert len({engine.generate([ask("hi", temperature=1.5)])[0].text for _ in range(4)}) > 1
    if name != "cohere":  # whose nucleus cannot be as small
        assert engine.generate([ask("hi", temperature=1.5, top_p=1e-6)])[0].text == engine.generate([ask("hi")])[0].text


def test_ids_go_in_where_they_can(engine: Engine, expected: dict[str, list[int]]) -> None:
    ids = tuple(
        make_tokenizer().apply_chat_template(
            [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
        )
    )
    request = Request(ids=ids, sampling=Sampling(max_tokens=24))
    if "ids" in engine.can:
        assert engine.generate([request])[0].text == text_of(expected["hi"])
    else:
        with pytest.raises(RequestError, match="takes messages, not token ids"):
            engine.generate([request])


def test_given_text_is_scored_where_it_can_be(engine: Engine, pico: Path) -> None:
    texts = [[1, 5, 9, 200, 17], [1, 5, 9, 30], [8, 9], [1, 5, 9, 200, 17, 30]]
    if "score" not in engine.can:
        with pytest.raises(RequestError, match="score"):
            engine.score(texts)
        return
    model = load_model(pico)
    with torch.inference_mode():
        rows = [model(torch.tensor([ids])).logits[0].double().log_softmax(-1) for ids in texts]
    for begins in ((1, 1, 1, 1), (4, 2, 1, 3)):
        found = engine.score(texts, begins)
        for scored, ids, logprobs, begin in zip(found, texts, rows, begins, strict=True):
            assert scored.logprobs == pytest.approx(
                [float(logprobs[i - 1, ids[i]]) for i in range(begin, len(ids))], abs=2e-4
            )
            assert scored.greedy == all(int(logprobs[i - 1].argmax()) == ids[i] for i in range(begin, len(ids)))
    best = [1, 5]
    for _ in range(4):
        with torch.inference_mode():
            best.append(int(model(torch.tensor([best])).logits[0, -1].argmax()))
    assert [s.greedy for s in engine.score([best, [*best[:-1], (best[-1] + 1) % 400]], [2, 2])] == [True, False]
    with pytest.raises(RequestError, match="nothing to score"):
        engine.score([[1, 2]], [2])


def test_all_logits_where_it_can(engine: Engine, pico: Path) -> None:
    if "logits" not in engine.can:
        with pytest.raises(RequestError, match="no logits"):
            engine.logits([1, 5])
        return
    with torch.inference_mode():
        wanted = load_model(pico)(torch.tensor([[1, 5, 9, 200]])).logits[0]
    assert torch.allclose(torch.from_numpy(engine.logits([1, 5, 9, 200])), wanted, atol=2e-3)


def test_a_schema_is_kept_where_it_can_be(name: str, engine: Engine) -> None:
    """The model has random weights: nothing but the schema makes it write JSON."""
    requests = [
        Request((Message("user", text),), sampling=Sampling(max_tokens=60, temperature=t, seed=1), schema=SCHEMA)
        for text in PROMPTS
        for t in (0.0, 1.2)
    ]
    if "schema" not in engine.can:
        with pytest.raises(RequestError, match="JSON schema"):
            engine.generate(requests[:1])
        return
    if name == "own server":  # does not take it yet, and says so
        with pytest.raises(RequestError, match="response_format"):
            engine.generate(requests[:1])
        return
    if name == "anthropic":
        requests = requests[::2]
    for done in engine.generate(requests):
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(done.text)), done
        assert done.finish == "stop"
    streamed = list(engine.stream(requests[0]))[-1].done
    assert streamed is not None
    assert jsonschema_rs.is_valid(SCHEMA, json.loads(streamed.text))


def test_a_schema_that_is_none_is_refused(name: str, engine: Engine) -> None:
    bad = Request((Message("user", "hi"),), schema={"type": "nothing"})
    found = dict(engine.each([bad, ask("hi")]))
    assert isinstance(found[0], LlmworksError)
    assert "\n" not in str(found[0])
    assert isinstance(found[1], Completion)


def test_vectors_where_it_can(name: str, engine: Engine) -> None:
    texts = [f"text {'x' * i}" for i in range(150)]
    if name == "own server" or "embed" not in engine.can:
        with pytest.raises(LlmworksError):
            engine.embed(texts)
        return
    assert engine.embed(texts) == [vector(text) for text in texts]
    assert engine.embed([]) == []


def test_tools_where_it_can(engine: Engine) -> None:
    """The model's template knows no tools: an engine that would drop them says so."""
    request = Request(
        (Message("user", "x"),), tools=({"name": "f", "parameters": {"type": "object", "properties": {}}},)
    )
    with pytest.raises(RequestError, match="ignores tools"):
        engine.generate([request])


def test_a_prompt_that_is_too_long_is_refused(engine: Engine) -> None:
    with pytest.raises(RequestError, match="tokens"):
        engine.generate([ask("word " * 600)])


def test_every_api_is_in_the_suite(tmp_path: Path) -> None:
    assert set(APIS) <= set(WANTED)
    make_pico(tmp_path / "other")
    with pytest.raises(UserError, match="cannot score given text"):
        RemoteEngine("https://api.anthropic.com/v1", "m", RemoteOptions(tokenizer=str(tmp_path / "other")))
