"""The HTTP engine against a server that misbehaves on purpose: what may pass is sent again, what may not is said in one
line, nothing is lost.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.generate.loopback import APIS, REPLY, Behaviour, Handler, Loopback, answers, events, says

from llmworks.core.errors import AccessError, EngineError, LlmworksError, RequestError, UserError
from llmworks.core.types import Completion, Message, Request, Sampling
from llmworks.generate.engines.remote import RemoteEngine
from llmworks.generate.remote.endpoint import RemoteOptions, get_api_key, parse_remote
from llmworks.generate.remote.rate_limit import RateLimiter, compute_backoff
from llmworks.runtime.session import load
from llmworks.tokenize.chat.templates import parse_tool_calls


@pytest.fixture
def api(request: pytest.FixtureRequest) -> str:
    """What the server speaks; a test that is for several APIs says so by `everywhere`."""
    return str(getattr(request, "param", "openai"))


everywhere = pytest.mark.parametrize("api", APIS, indirect=True)


def options(api: str, **more: Any) -> RemoteOptions:
    return RemoteOptions.model_validate({"api": api, **more})


@pytest.fixture
def server(api: str) -> Iterator[Loopback]:
    server = Loopback(api)
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmworks.generate.engines.remote.compute_backoff", lambda attempt: 0.01)
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY", "CO_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def engine(server: Loopback, api: str) -> Iterator[RemoteEngine]:
    engine = RemoteEngine(server.url, "m", options(api, timeout=0.5, concurrency=8, input_price=1.0, output_price=2.0))
    yield engine
    engine.close()


def reply(text: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    return {
        "id": "x",
        "object": "chat.completion",
        "choices": [choice],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


def hangs(handler: Handler, body: dict[str, Any]) -> None:
    time.sleep(1.0)
    handler.close_connection = True


def stops_half_way(handler: Handler, body: dict[str, Any]) -> None:
    content = json.dumps(REPLY[handler.server.api](Completion("a long answer", "stop"))).encode()
    handler.say(200, content[: len(content) // 2], length=len(content))
    handler.close_connection = True


def resets(handler: Handler, body: dict[str, Any]) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()


def ask(text: str = "hi", **sampling: Any) -> Request:
    return Request((Message("user", text),), sampling=Sampling(**{"max_tokens": 8, **sampling}))


PASSING: dict[str, Behaviour] = {
    "429": says({"error": {"message": "slow down"}}, 429, {"retry-after": "0.05"}),
    "429 with a date": says({"error": "slow down"}, 429, {"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}),
    "429 in milliseconds": says({"error": "slow down"}, 429, {"retry-after-ms": "40"}),
    "429 with nonsense": says(b"", 429, {"retry-after": "soon"}),
    "500": says({"error": {"message": "oops"}}, 500),
    "502 as HTML": says(b"<html>Bad Gateway</html>", 502),
    "503 without a body": says(b"", 503),
    "529": says({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, 529),
    "408": says({"detail": "timeout"}, 408),
    "a timeout": hangs,
    "half a body": stops_half_way,
    "a reset": resets,
    "HTML": says(b"<html>hello</html>"),
    "nothing": says(b""),
    "no choices": says({"choices": []}),
    "no message": says({"choices": [{"finish_reason": "stop"}]}),
    "a list": says([1, 2]),
    "a number": says(7),
    "not UTF-8": says(b"\xff\xfe\xfa"),
    "a string for a message": says({"choices": [{"message": "hi"}]}),
    "usage of another kind": lambda handler, body: handler.say(
        200,
        json.dumps({**REPLY[handler.server.api](Completion("x", "stop")), "usage": [1], "usageMetadata": [1]}).encode(),
    ),
}


@everywhere
@pytest.mark.parametrize("what", PASSING)
def test_what_may_pass_is_sent_again(what: str, server: Loopback, engine: RemoteEngine) -> None:
    server.behaviours = [PASSING[what], PASSING[what]]
    done = engine.generate([ask()])[0]
    assert done == Completion("to hi", "stop", prompt_tokens=10, completion_tokens=5)
    assert len(server.seen) == 3
    account = engine.usage
    assert (account.requests, account.retries) == (1, 2)
    assert (account.prompt_tokens, account.completion_tokens) == (10, 5)
    assert account.cost == pytest.approx(20e-6)


@everywhere
def test_a_bad_day(server: Loopback, api: str) -> None:
    """Many requests, most go wrong in some way: all are answered, in their order, each paid for once."""
    engine = RemoteEngine(server.url, "m", options(api, retries=50, concurrency=8))
    draw = random.Random(0)
    quick = [b for name, b in PASSING.items() if b is not hangs]
    server.behaviours = [draw.choice([*quick, answers, answers]) for _ in range(80)]
    done = engine.generate([ask(f"question {i}") for i in range(60)])
    assert [c.text for c in done] == [f"to question {i}" for i in range(60)]
    assert engine.usage.requests == 60
    assert engine.usage.retries == len(server.seen) - 60
    assert 1 < server.most <= 8
    engine.close()


FINAL: dict[str, tuple[Behaviour, type[LlmworksError], str]] = {
    "400": (says({"error": {"message": "messages\n are too long"}}, 400), RequestError, "400: messages are too long"),
    "404": (says({"detail": "no such model"}, 404), AccessError, "404: no such model"),
    "403": (says({"error": {"message": "no"}}, 403), AccessError, r"403: no; check the key"),
    "401": (
        says({"error": {"message": "bad key"}}, 401),
        AccessError,
        r"401: bad key; check the key in \$OPENAI_API_KEY",
    ),
    "402": (says({"message": "pay first"}, 402), AccessError, "402: pay first"),
    "no money": (
        says({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, 429),
        AccessError,
        "429: You exceeded",
    ),
    "a long pause": (
        says({"error": {"message": "tomorrow"}}, 429, {"retry-after": "86400"}),
        EngineError,
        "the server asks to wait 86400 s",
    ),
}


@pytest.mark.parametrize("what", FINAL)
def test_what_does_not_pass_is_said_at_once(what: str, server: Loopback, engine: RemoteEngine) -> None:
    behaviour, kind, says_so = FINAL[what]
    server.behaviours = [behaviour]
    with pytest.raises(kind, match=says_so) as caught:
        engine.generate([ask()])
    assert "\n" not in str(caught.value)
    assert len(server.seen) == 1


def test_a_closed_server_is_asked_no_more(server: Loopback) -> None:
    engine = RemoteEngine(server.url, "m", RemoteOptions(concurrency=2))
    server.behaviours = [says({"error": {"message": "bad key"}}, 401)] * 40
    found = dict(engine.each([ask(f"q{i}") for i in range(40)]))
    assert len(found) == 40
    assert all(isinstance(answer, AccessError) for answer in found.values())
    assert len(server.seen) <= 2
    server.behaviours = []
    assert [c.text for c in engine.generate([ask("again")])] == ["to again"]  # with another key, say
    engine.close()


def test_forbidden_after_answers_is_one_request(server: Loopback) -> None:
    """Some providers answer 403 to a text that their moderation does not like."""
    engine = RemoteEngine(server.url, "m", RemoteOptions(concurrency=1))
    engine.generate([ask("fine")])
    server.behaviours = [says({"error": {"message": "flagged"}}, 403)]
    found = dict(engine.each([ask(f"q{i}") for i in range(5)]))
    assert sorted(type(answer).__name__ for answer in found.values()) == ["Completion"] * 4 + ["RequestError"]
    engine.close()


def test_attempts_end(server: Loopback) -> None:
    server.behaviours = [PASSING["500"]] * 9
    engine = RemoteEngine(server.url, "m", RemoteOptions(retries=2))
    with pytest.raises(EngineError, match="500: oops, after 3 attempts"):
        engine.generate([ask()])
    assert len(server.seen) == 3
    engine.close()


def test_one_failure_does_not_lose_the_others(server: Loopback, engine: RemoteEngine) -> None:
    server.behaviours = [says({"error": {"message": "refused"}}, 400)]
    found = dict(engine.each([ask(f"q{i}") for i in range(12)]))
    errors = [answer for answer in found.values() if isinstance(answer, LlmworksError)]
    assert len(errors) == 1
    assert {a.text for a in found.values() if isinstance(a, Completion)} < {f"to q{i}" for i in range(12)}
    assert len(found) == 12


def test_all_wait_when_the_server_asks_to(server: Loopback, engine: RemoteEngine) -> None:
    server.behaviours = [says(b"", 429, {"retry-after": "0.6"}) for _ in range(8)]
    engine.generate([ask(f"q{i}") for i in range(20)])
    first, later = server.seen[0][0], sorted(t for t, _, _ in server.seen)[8:]
    assert min(later) - first >= 0.6


def test_not_more_at_once_than_allowed(server: Loopback) -> None:
    def slow(handler: Handler, body: dict[str, Any]) -> None:
        time.sleep(0.05)
        answers(handler, body)

    server.behaviours = [slow] * 12
    engine = RemoteEngine(server.url, "m", RemoteOptions(concurrency=3))
    engine.generate([ask(f"q{i}") for i in range(12)])
    assert server.most == 3
    engine.close()


def test_the_budget_ends_asking(server: Loopback) -> None:
    engine = RemoteEngine(
        server.url, "m", RemoteOptions(concurrency=1, input_price=1.0, output_price=2.0, budget=50e-6)
    )
    found = dict(engine.each([ask(f"q{i}") for i in range(6)]))
    assert sum(isinstance(a, Completion) for a in found.values()) == 3  # 20, 40, 60 millionths
    assert all("the budget of 5e-05 is spent" in str(a) for a in found.values() if not isinstance(a, Completion))
    assert len(server.seen) == 3
    engine.close()


def test_a_server_that_is_not_there_is_said_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    engine = RemoteEngine(url, "m")
    with pytest.raises(EngineError, match="is the server running"):
        engine.generate([ask()])
    assert engine.usage.retries == 0
    engine.close()


def test_closing_wakes_who_waits(server: Loopback) -> None:
    engine = RemoteEngine(server.url, "m", RemoteOptions(requests_per_minute=1))
    engine.generate([ask()])
    began = time.monotonic()
    threading.Timer(0.1, engine.close).start()
    with pytest.raises(EngineError, match="closed"):
        engine.generate([ask()])
    assert time.monotonic() - began < 5

    # streams


@everywhere
def test_a_stream_is_the_whole_answer(server: Loopback, engine: RemoteEngine) -> None:
    pieces = list(engine.stream(ask("ä")))
    assert "".join(p.text for p in pieces) == "to ä"
    assert pieces[-1].done == Completion("to ä", "stop", prompt_tokens=10, completion_tokens=5)
    assert engine.usage.completion_tokens == 5


@everywhere
@pytest.mark.parametrize("what", ["429", "500", "a timeout", "a reset", "nothing"])
def test_a_stream_that_has_not_begun_is_asked_again(what: str, server: Loopback, engine: RemoteEngine) -> None:
    server.behaviours = [PASSING[what]]
    assert "".join(p.text for p in engine.stream(ask())) == "to hi"


def half(api: str) -> bytes:
    """A stream as far as its text."""
    content = events(
        api,
        Completion("so far", "stop", prompt_tokens=10, completion_tokens=5),
        leave={"openai": 3, "anthropic": 3, "google": 1, "cohere": 2}[api],
    )
    return content


def half_then(more: bytes = b"", length: int | None = None) -> Behaviour:
    def behave(handler: Handler, body: dict[str, Any]) -> None:
        handler.say(200, half(handler.server.api) + more, length=length)
        handler.close_connection = True

    return behave


def an_error(handler: Handler, body: dict[str, Any]) -> None:
    api = handler.server.api
    said = (
        {"type": "error", "error": {"type": "overloaded_error", "message": "out of memory"}}
        if api == "anthropic"
        else {"error": {"message": "out of memory"}}
    )
    said = (
        {"type": "message-end", "delta": {"error": "out of memory", "finish_reason": "ERROR"}}
        if api == "cohere"
        else said
    )
    half_then(b"data: " + json.dumps(said).encode() + b"\n\n")(handler, body)


BROKEN: dict[str, tuple[Behaviour, str]] = {
    "the connection": (half_then(length=10_000), "was interrupted after 6 characters"),
    "no finish": (half_then(), "ended without"),
    "half an event": (half_then(b'data: {"choi\n\n'), "malformed"),
    "an error": (an_error, "out of memory"),
}


@everywhere
@pytest.mark.parametrize("what", BROKEN)
def test_half_a_stream_is_no_answer(what: str, server: Loopback, engine: RemoteEngine) -> None:
    behaviour, message = BROKEN[what]
    server.behaviours = [behaviour]
    seen = []
    with pytest.raises(EngineError, match=message):
        seen.extend(engine.stream(ask()))
    assert "".join(p.text for p in seen) == "so far"
    assert all(p.done is None for p in seen)
    assert len(server.seen) == 1

    # what is sent and what is understood


def test_what_is_sent(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    engine = RemoteEngine(server.url, "m")
    tool = {"name": "f", "parameters": {}}
    engine.generate(
        [
            Request(
                (Message("system", "s"), Message("user", "u")),
                tools=(tool,),
                sampling=Sampling(max_tokens=3, temperature=0.5, seed=7, stop=("x",)),
            )
        ]
    )
    _, body, headers = server.seen[0]
    assert headers["authorization"] == "Bearer sk-1"
    assert body == {
        "model": "m",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 1.0,
        "stream": False,
        "seed": 7,
        "stop": ["x"],
        "tools": [{"type": "function", "function": tool}],
    }
    engine.close()


def test_a_model_that_knows_the_limit_by_its_new_name(server: Loopback, engine: RemoteEngine) -> None:
    message = (
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    )
    server.behaviours = [says({"error": {"message": message}}, 400)]
    assert [c.text for c in engine.generate([ask("a")]) + engine.generate([ask("b")])] == ["to a", "to b"]
    assert [next(k for k in body if k.startswith("max")) for _, body, _ in server.seen] == [
        "max_tokens",
        "max_completion_tokens",
        "max_completion_tokens",
    ]


def test_answers_are_read_as_they_are(server: Loopback, engine: RemoteEngine) -> None:
    good = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    bad = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": '}}
    server.behaviours = [
        says(reply("cut", "length")),
        says(reply("", "content_filter")),
        says(reply(None, "tool_calls", tool_calls=[good])),
        says(reply("x", tool_calls=[bad])),
        says(reply(None)),
        says({**reply("no usage"), "usage": None}),
    ]
    cut, filtered, called, broken, empty, free = (engine.generate([ask()])[0] for _ in range(6))
    assert (cut.finish, filtered.finish, empty.text, free.completion_tokens) == ("length", "filtered", "", 0)
    assert parse_tool_calls(called.text)[1][0].arguments == {"a": 1}
    assert parse_tool_calls(broken.text) == ('x<tool_call>{"name": "f", "arguments": {"a": }</tool_call>', ())

    # references and keys


def test_options_stand_behind_the_model() -> None:
    url, model, options = parse_remote(
        "https://api.groq.com/openai/v1#meta/llama-3:70b?key=GROQ_API_KEY&concurrency=16&requests_per_minute=30&input_price=0.5"
    )
    assert (url, model) == ("https://api.groq.com/openai/v1", "meta/llama-3:70b")
    assert options == RemoteOptions(key="GROQ_API_KEY", concurrency=16, requests_per_minute=30, input_price=0.5)
    same = [load(f"http://h/v1#m{rest}").digest for rest in ("", "?concurrency=2", "?key=A")]
    assert len(set(same)) == 1  # how fast a model is asked makes it no other model
    assert load("http://h/v1#n").digest != same[0]


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("http://h/v1", "no model"),
        ("http://h/v1#m?speed=9", "option 'speed'.*known: api, key, sampling"),
        ("http://h/v1#m?concurrency=0", "greater than 0"),
        ("http:///v1#m", "no host"),
    ],
)
def test_mistakes_in_references(ref: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_remote(ref)


def test_the_key_goes_nowhere_it_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    monkeypatch.setenv("OTHER", "sk-2")
    default, named = RemoteOptions(), RemoteOptions(key="OTHER")
    for url in ("https://api.openai.com/v1", "http://127.0.0.1:1/v1", "http://localhost/v1", "http://[::1]:1/v1"):
        assert get_api_key(url, default, "OPENAI_API_KEY") == "sk-1"
    for url in ("http://example.org/v1", "http://10.0.0.7:8000/v1"):
        assert get_api_key(url, default, "OPENAI_API_KEY") == ""
        assert get_api_key(url, named, "OPENAI_API_KEY") == "sk-2"
    with pytest.raises(UserError, match="MISSING is not set"):
        get_api_key("https://h/v1", RemoteOptions(key="MISSING"), "OPENAI_API_KEY")

        # pace


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def paced(monkeypatch: pytest.MonkeyPatch, **limits: int) -> tuple[RateLimiter, Clock]:
    clock = Clock()
    pace = RateLimiter(**limits, clock=clock)
    monkeypatch.setattr(pace, "sleep", lambda seconds: setattr(clock, "now", clock.now + seconds + 1e-9))
    return pace, clock


def most_in_a_minute(times: list[tuple[float, float]]) -> tuple[int, float]:
    """(requests, tokens) of the busiest minute that begins with a request."""
    spans = [[(t, n) for t, n in times if begin <= t < begin + 60 - 1e-6] for begin, _ in times]
    return max(map(len, spans)), max(sum(n for _, n in span) for span in spans)


@pytest.mark.parametrize(("requests", "tokens"), [(10, 0), (0, 1000), (5, 1000)])
def test_requests_and_tokens_stay_below_their_limits(
    requests: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    pace, clock = paced(monkeypatch, requests=requests, tokens=tokens)
    times = []
    for _ in range(200):
        used = draw.randrange(20, 300)
        pace.correct_usage(pace.acquire(300), used)  # guessed too high, corrected after the answer
        times.append((clock.now, used))
        clock.now += draw.random() * 4
    most, used = most_in_a_minute(times)
    assert most == requests or not requests
    assert used <= tokens or not tokens
    assert requests or used > 0.7 * tokens


def test_one_request_above_the_limit_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pace, clock = paced(monkeypatch, tokens=100)
    times = []
    for tokens in (50, 500, 50):
        pace.acquire(tokens)
        times.append(clock.now)
    assert times == pytest.approx([0, 60, 120], abs=1e-3)


def test_delays_grow() -> None:
    for attempt in range(12):
        longest = min(60, 0.5 * 2**attempt)
        assert all(longest / 2 <= compute_backoff(attempt) <= longest for _ in range(50))


def test_an_interrupt_does_not_wait_for_a_server_that_hangs(server: Loopback) -> None:
    server.behaviours = [hangs] * 40
    code = (
        "import os, signal, threading, time\nfrom llmworks.generate.engines.remote import RemoteEngine\nfrom"
        " llmworks.generate.remote.endpoint import RemoteOptions\nfrom llmworks.core.types import Message, Request\n"
        f"engine = RemoteEngine({server.url!r}, 'm', RemoteOptions(timeout=60, concurrency=2))\n"
        # a shell that starts the tests in the background has it ignored
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()\n"
        "try:\n    engine.generate([Request((Message('user', 'a'),))] * 5)\nexcept KeyboardInterrupt:\n   "
        " engine.close()\n    print('interrupted')\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.returncode) == ("interrupted\n", 0), done.stderr
    assert time.monotonic() - began < 20
