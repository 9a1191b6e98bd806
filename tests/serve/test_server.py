"""The official openai client against a live server, for the Hugging Face and the GGUF model; errors have the API's
form.
"""

from __future__ import annotations

import asyncio
import io
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from tests.conftest import TEMPLATE, make_pico

from llmworks.core.errors import AccessError, EngineError, RequestError, UserError
from llmworks.core.types import Completion, Delta, Engine, Message, Request, Sampling, ToolCall
from llmworks.generate.chat import ChatSession, run_chat
from llmworks.generate.engines.llamacpp import LlamaCppEngine
from llmworks.generate.engines.remote import RemoteEngine
from llmworks.generate.engines.torch import TorchEngine
from llmworks.generate.providers.openai import collect_calls
from llmworks.generate.providers.protocol import PartialToolCall
from llmworks.serve.completion_objects import build_completion, stream_chunks
from llmworks.serve.server import build_app, check_port
from llmworks.tokenize.chat.templates import add_tool_support, render_tool_call

HI: list[Any] = [{"role": "user", "content": "hi there"}]


class Live:
    """A server in a thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.server = uvicorn.Server(uvicorn.Config(build_app(engine, "pico"), port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}/v1"
        self.client = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0)

    def stop(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join()
        self.engine.close()


@pytest.fixture(scope="module", params=["hf", "gguf"])
def live(request: pytest.FixtureRequest, pico: Path, pico_gguf: Path) -> Iterator[Live]:
    server = Live(TorchEngine.open(pico) if request.param == "hf" else LlamaCppEngine(pico_gguf, threads=1))
    yield server
    server.stop()


def test_chat_with_usage(live: Live) -> None:
    done = live.client.chat.completions.create(model="pico", messages=HI, max_tokens=8, temperature=0)
    assert done.choices[0].finish_reason in ("length", "stop")
    assert done.usage is not None
    assert done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert 0 < done.usage.completion_tokens <= 8
    assert (
        done.choices[0].message.content
        == live.engine.generate([Request((Message("user", "hi there"),), sampling=Sampling(max_tokens=8))])[0].text
    )


def test_stream_is_the_same_answer_with_usage(live: Live) -> None:
    asked: dict[str, Any] = {"model": "pico", "messages": HI, "max_tokens": 12, "temperature": 0}
    plain = live.client.chat.completions.create(**asked)
    events = list(live.client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(e.choices[0].delta.content or "" for e in events if e.choices) == plain.choices[0].message.content
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == plain.choices[0].finish_reason
    assert events[-1].usage == plain.usage


def test_same_greedy_answer_in_the_terminal(live: Live) -> None:
    served = live.client.chat.completions.create(model="pico", messages=HI, max_tokens=16, temperature=0)
    screen = io.StringIO()
    run_chat(ChatSession(live.engine, Sampling(max_tokens=16)), "hi there", target=screen)
    assert screen.getvalue() == f"{served.choices[0].message.content}\n"


def test_terminal_over_http_and_dialogue(live: Live) -> None:
    remote = RemoteEngine(live.url, "pico")
    screen = io.StringIO()
    conversation = ChatSession(remote, Sampling(max_tokens=6))
    run_chat(conversation, None, io.StringIO("hi\n\n/help\n/system be brief\nagain\n/exit\nnever\n"), screen)
    assert [t.role for t in conversation.turns] == ["user", "assistant", "user", "assistant"]
    assert conversation.turns[2].content == "again"
    assert conversation.system == "be brief"
    assert (
        remote.generate([Request((Message("user", "hi"),), sampling=Sampling(max_tokens=6))])[0].text
        == conversation.turns[1].content
    )
    with pytest.raises(RequestError, match="not token ids"):
        remote.generate([Request(ids=(1, 2))])
    remote.close()
    other = RemoteEngine(live.url, "other")
    with pytest.raises(AccessError, match=r"404: The model 'other' does not exist"):
        other.generate([Request((Message("user", "hi"),))])
    other.close()


def test_seed_and_stop(live: Live) -> None:
    asked: dict[str, Any] = {
        "model": "pico",
        "messages": HI,
        "max_tokens": 16,
        "temperature": 1.3,
        "top_p": 0.9,
        "seed": 5,
    }
    first, second = (live.client.chat.completions.create(**asked).choices[0].message.content for _ in range(2))
    assert first == second
    text = (
        live.client.chat.completions.create(model="pico", messages=HI, max_tokens=16, temperature=0)
        .choices[0]
        .message.content
    )
    assert text
    stop = text[2:4]
    stopped = live.client.chat.completions.create(model="pico", messages=HI, max_tokens=16, temperature=0, stop=stop)
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"messages": [{"role": "robot", "content": "x"}]}, 400, "unknown role 'robot'"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "w " * 600}]}, 400, "tokens"),
        ({"model": "gpt-9"}, 404, "does not exist"),
        ({"temperature": 9}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"n": 2}, 400, "n: 2 is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "ignores tools"),
        ({"tools": [{"name": "f"}]}, 400, "tools[0]"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"stop": ["a", "b", "c", "d", "e"]}, 400, "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_cannot_be_answered(
    live: Live, change: dict[str, Any], status: int, words: str, stream: bool
) -> None:
    reply = httpx.post(
        f"{live.url}/chat/completions",
        json={"model": "pico", "messages": HI, "max_tokens": 4, "stream": stream, **change},
    )
    assert reply.status_code == status
    assert words in reply.json()["error"]["message"]
    assert reply.json()["error"]["type"] == "invalid_request_error"


def test_bodies_paths_and_health(live: Live) -> None:
    assert "not JSON" in httpx.post(f"{live.url}/chat/completions", content=b"{").json()["error"]["message"]
    assert "not JSON" in httpx.post(f"{live.url}/chat/completions", content=b"\xff").json()["error"]["message"]
    assert httpx.get(f"{live.url}/nothing").json()["error"]["message"].startswith("GET /v1/nothing")
    assert httpx.get(live.url.removesuffix("/v1") + "/health").json() == {"status": "ok", "model": "pico"}
    assert [m.id for m in live.client.models.list()] == ["pico"]
    with pytest.raises(openai.NotFoundError):
        live.client.models.retrieve("other")


def test_a_client_that_goes_away_frees_the_server(live: Live) -> None:
    stream = live.client.chat.completions.create(model="pico", messages=HI, max_tokens=300, temperature=0, stream=True)
    next(iter(stream))
    stream.close()
    assert live.client.chat.completions.create(model="pico", messages=HI, max_tokens=4).choices


def test_a_client_that_waits_no_longer_for_a_whole_answer_frees_the_server(pico: Path) -> None:
    closed = threading.Event()

    class Endless(TorchEngine):
        def stream(self, request: Request) -> Iterator[Delta]:
            try:
                while True:
                    time.sleep(0.01)
                    yield Delta("x")
            finally:
                closed.set()

    server = Live(Endless.open(pico))
    try:
        with pytest.raises(openai.APITimeoutError):
            server.client.chat.completions.create(model="pico", messages=HI, timeout=0.3)
        assert closed.wait(10)
    finally:
        server.stop()


def test_requests_at_the_same_time_get_their_own_answers(live: Live) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask(text: str) -> str | None:
        asked: list[Any] = [{"role": "user", "content": text}]
        return (
            live.client.chat.completions.create(model="pico", messages=asked, max_tokens=12, temperature=0)
            .choices[0]
            .message.content
        )

    texts = ["hi", "what is the weather", "12345", "fox", "hi", "the quick brown fox"]
    alone = [ask(text) for text in texts]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(ask, texts)) == alone


def test_tools_reach_a_model_whose_template_shows_them(tmp_path: Path) -> None:
    server = Live(TorchEngine.open(make_pico(tmp_path / "aware", template=add_tool_support(TEMPLATE))))
    tool: Any = {
        "type": "function",
        "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
    }
    try:
        with_tools = server.client.chat.completions.create(model="pico", messages=HI, max_tokens=4, tools=[tool])
        without = server.client.chat.completions.create(
            model="pico", messages=HI, max_tokens=4, tools=[tool], tool_choice="none"
        )
        assert with_tools.usage is not None
        assert without.usage is not None
        assert with_tools.usage.prompt_tokens > without.usage.prompt_tokens + 10
    finally:
        server.stop()


def events_of(pieces: list[Delta]) -> list[str]:
    """The server-sent events of a streamed answer."""

    async def rest() -> AsyncIterator[Delta]:
        for piece in pieces[1:]:
            yield piece

    async def collect() -> list[str]:
        return [event async for event in stream_chunks("chatcmpl-1", 0, "m", pieces[0], rest(), True, False)]

    return asyncio.run(collect())


def test_calls_in_the_answer_become_tool_calls() -> None:
    text = "Let me see. " + render_tool_call(ToolCall("get_weather", {"city": "Oslo"}))
    done = Completion(text, "stop", prompt_tokens=3, completion_tokens=4)
    answer = build_completion("chatcmpl-1", 0, "m", done, with_tools=True)["choices"][0]
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] == "Let me see."
    assert json.loads(answer["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "Oslo"}
    pieces = [Delta(c) for c in text[:-1]] + [Delta(text[-1], done)]
    events = [json.loads(e.removeprefix("data: ")) for e in events_of(pieces) if "[DONE]" not in e]
    deltas = [e["choices"][0]["delta"] for e in events]
    assert "".join(d.get("content") or "" for d in deltas).strip() == "Let me see."
    assert [d["tool_calls"][0]["function"]["name"] for d in deltas if "tool_calls" in d] == ["get_weather"]
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_fragments_of_streamed_calls_are_joined() -> None:
    calls: dict[int, PartialToolCall] = {}
    collect_calls(calls, [{"index": 0, "id": "x", "function": {"name": "f", "arguments": ""}}])
    collect_calls(
        calls,
        [{"index": 0, "function": {"arguments": '{"a"'}}, {"index": 1, "function": {"name": "g", "arguments": "{}"}}],
    )
    collect_calls(calls, [{"index": 0, "function": {"arguments": ": 1}"}}])
    assert calls == {0: PartialToolCall("f", '{"a": 1}'), 1: PartialToolCall("g", "{}")}


def test_a_call_that_never_closes_is_text() -> None:
    text = '<tool_call>{"name": "f", "argu'
    events = [
        json.loads(e.removeprefix("data: "))
        for e in events_of([Delta(text, Completion(text, "length"))])
        if "[DONE]" not in e
    ]
    assert "".join(e["choices"][0]["delta"].get("content") or "" for e in events) == text
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_an_engine_that_fails_in_the_middle_ends_the_stream_with_an_error(pico: Path) -> None:
    class Failing(TorchEngine):
        def stream(self, request: Request) -> Iterator[Delta]:
            yield Delta("so far")
            raise EngineError("the other side went away")

    server = Live(Failing.open(pico))
    try:
        events = iter(server.client.chat.completions.create(model="pico", messages=HI, stream=True))
        assert next(events).choices[0].delta.role == "assistant"
        assert next(events).choices[0].delta.content == "so far"
        with pytest.raises(openai.APIError, match="the other side went away"):
            next(events)
        remote = RemoteEngine(server.url, "pico")
        with pytest.raises(EngineError, match="the other side went away"):
            list(remote.stream(Request((Message("user", "hi"),))))
    finally:
        server.stop()


def test_port_in_use_and_dead_server() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1:{port}"):
            check_port("127.0.0.1", port)
    with pytest.raises(UserError, match="99999"):
        check_port("127.0.0.1", 99999)
    dead = RemoteEngine(f"http://127.0.0.1:{port}/v1", "m")
    with pytest.raises(EngineError, match="is the server running"):
        dead.generate([Request((Message("user", "x"),))])
    dead.close()
