"""The providers' own clients, against the loopback server: it speaks as they do, and this project sends what they send.

One conversation with a system message, a tool call and its result, how to sample, tools and a schema goes out by both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import cohere
import httpx
import openai
import pytest
from google import genai
from tests.generate.loopback import APIS, Loopback, says

from llmworks.core.errors import AccessError, EngineError, RequestError, UserError
from llmworks.core.types import Completion, Message, Request, Sampling, ToolCall
from llmworks.generate.engines.remote import RemoteEngine
from llmworks.generate.remote.endpoint import RemoteOptions, get_api, parse_remote
from llmworks.runtime.session import load
from llmworks.tokenize.chat.templates import parse_tool_calls, render_tool_call

CALL = ToolCall("add", {"a": 1, "b": [2, 3]}, "c1")
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "integer"}}},
    "required": ["a"],
}
TOOL = {"name": "add", "description": "adds", "parameters": PARAMETERS}
SCHEMA = {
    "type": "object",
    "properties": {"sum": {"type": "integer"}},
    "required": ["sum"],
    "additionalProperties": False,
}
SAMPLING = Sampling(max_tokens=50, temperature=0.5, top_p=0.9, seed=7, stop=("END",))
TURNS = (
    Message("system", "be brief"),
    Message("user", "add 1 to 2 and 3"),
    Message("assistant", "I add.", (CALL,)),
    Message("tool", "3, 4", tool_call_id="c1"),
    Message("assistant", "3 and 4"),
    Message("user", "sure?"),
)
REQUEST = Request(TURNS, tools=(TOOL,), sampling=SAMPLING, schema=SCHEMA)
SAID = Completion("Let me see. " + render_tool_call(CALL), "stop", prompt_tokens=10, completion_tokens=5)


@pytest.fixture
def server(api: str) -> Iterator[Loopback]:
    server = Loopback(api, lambda request: SAID)
    yield server
    server.stop()


@pytest.fixture
def engine(server: Loopback, api: str) -> Iterator[RemoteEngine]:
    engine = RemoteEngine(server.url, "m", RemoteOptions.model_validate({"api": api, "retries": 0}))
    yield engine
    engine.close()


def by_openai(server: Loopback) -> tuple[str, Any]:
    client = openai.OpenAI(base_url=server.url, api_key="k", max_retries=0)
    server.clients.append(client.close)
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": json.dumps(CALL.arguments)}}
    messages: Any = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "add 1 to 2 and 3"},
        {"role": "assistant", "content": "I add.", "tool_calls": [call]},
        {"role": "tool", "content": "3, 4", "tool_call_id": "c1"},
        {"role": "assistant", "content": "3 and 4"},
        {"role": "user", "content": "sure?"},
    ]
    asked: Any = {
        "model": "m",
        "messages": messages,
        "max_tokens": 50,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "stop": ["END"],
        "tools": [{"type": "function", "function": TOOL}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}},
    }
    whole = client.chat.completions.create(**asked, stream=False)
    text = "".join(
        c.choices[0].delta.content or ""
        for c in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        if c.choices
    )
    message = whole.choices[0].message
    assert text == message.content
    (made,) = message.tool_calls
    return message.content, (
        made.function.name,
        json.loads(made.function.arguments),
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
    )


def by_anthropic(server: Loopback) -> tuple[str, Any]:
    client = anthropic.Anthropic(base_url=server.root, api_key="k", max_retries=0)
    server.clients.append(client.close)
    asked: Any = {
        "model": "m",
        "max_tokens": 50,
        "system": "be brief",
        "stop_sequences": ["END"],
        "tools": [{"name": "add", "description": "adds", "input_schema": PARAMETERS}],
        "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "add 1 to 2 and 3"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "I add."},
                    {"type": "tool_use", "id": "c1", "name": "add", "input": CALL.arguments},
                ],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "3, 4"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "3 and 4"}]},
            {"role": "user", "content": [{"type": "text", "text": "sure?"}]},
        ],
    }
    whole = client.messages.create(**asked, stream=False)
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        assert [b.type for b in stream.get_final_message().content] == ["text", "tool_use"]
        assert stream.get_final_message().usage.output_tokens == 5
    said, made = whole.content
    assert (text, whole.stop_reason) == (said.text, "tool_use")
    return said.text, (
        made.name,
        made.input,
        whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0),
        whole.usage.output_tokens,
    )


def by_google(server: Loopback) -> tuple[str, Any]:
    client = genai.Client(api_key="k", http_options={"base_url": server.root})
    server.clients.append(client.close)
    types = genai.types
    contents = [
        types.Content(role="user", parts=[types.Part(text="add 1 to 2 and 3")]),
        types.Content(
            role="model",
            parts=[
                types.Part(text="I add."),
                types.Part(function_call=types.FunctionCall(name="add", args=CALL.arguments)),
            ],
        ),
        types.Content(
            role="user",
            parts=[types.Part(function_response=types.FunctionResponse(name="add", response={"result": "3, 4"}))],
        ),
        types.Content(role="model", parts=[types.Part(text="3 and 4")]),
        types.Content(role="user", parts=[types.Part(text="sure?")]),
    ]
    config = types.GenerateContentConfig(
        system_instruction=types.Content(parts=[types.Part(text="be brief")]),
        max_output_tokens=50,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop_sequences=["END"],
        tools=[
            types.Tool(
                function_declarations=[
                    types.FunctionDeclaration(name="add", description="adds", parameters_json_schema=PARAMETERS)
                ]
            )
        ],
        response_mime_type="application/json",
        response_json_schema=SCHEMA,
        automatic_function_calling=types.AutomaticFunctionCallingConfig(disable=True),
    )
    whole = client.models.generate_content(model="m", contents=contents, config=config)
    streamed = list(client.models.generate_content_stream(model="m", contents=contents, config=config))
    text = "".join(part.text for part in whole.candidates[0].content.parts if part.text and not part.thought)
    assert (
        "".join(p.text for c in streamed for p in c.candidates[0].content.parts or [] if p.text and not p.thought)
        == text
    )
    (made,) = whole.function_calls
    counts = whole.usage_metadata
    return text, (
        made.name,
        made.args,
        counts.prompt_token_count,
        counts.candidates_token_count + counts.thoughts_token_count,
    )


def by_cohere(server: Loopback) -> tuple[str, Any]:
    connections = httpx.Client()
    client = cohere.ClientV2(api_key="k", base_url=server.root, httpx_client=connections)
    server.clients.append(connections.close)
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": json.dumps(CALL.arguments)}}
    asked: Any = {
        "model": "m",
        "max_tokens": 50,
        "temperature": 0.5,
        "p": 0.9,
        "k": 0,
        "seed": 7,
        "stop_sequences": ["END"],
        "tools": [{"type": "function", "function": TOOL}],
        "response_format": {"type": "json_object", "schema": SCHEMA},
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "add 1 to 2 and 3"},
            {"role": "assistant", "content": "I add.", "tool_calls": [call]},
            {"role": "tool", "content": "3, 4", "tool_call_id": "c1"},
            {"role": "assistant", "content": "3 and 4"},
            {"role": "user", "content": "sure?"},
        ],
    }
    whole = client.chat(**asked)
    text = "".join(e.delta.message.content.text for e in client.chat_stream(**asked) if e.type == "content-delta")
    said = next(b.text for b in whole.message.content if b.type == "text")
    assert (text, whole.finish_reason) == (said, "TOOL_CALL")
    (made,) = whole.message.tool_calls
    return said, (
        made.function.name,
        json.loads(made.function.arguments),
        int(whole.usage.tokens.input_tokens),
        int(whole.usage.tokens.output_tokens),
    )


CLIENTS: dict[str, Callable[[Loopback], tuple[str, Any]]] = {
    "openai": by_openai,
    "anthropic": by_anthropic,
    "google": by_google,
    "cohere": by_cohere,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("api", APIS)
def test_the_same_is_sent_and_understood_as_by_the_own_client(api: str, server: Loopback, engine: RemoteEngine) -> None:
    text, (name, arguments, read, wrote) = CLIENTS[api](server)
    theirs = [
        json.loads(json.dumps(body).replace("parameters_json_schema", "parametersJsonSchema"))
        for _, body, _ in server.seen
    ]  # the API takes both spellings
    server.seen.clear()
    done = engine.generate([REQUEST])[0]
    pieces = list(engine.stream(REQUEST))
    ours = [body for _, body, _ in server.seen]
    for body in [*ours, *theirs]:
        if api == "anthropic" and not body.get("stream"):
            body.pop("stream", None)  # false is what its absence means
    for one, other in zip(ours, theirs, strict=True):
        assert one == other
    assert (parse_tool_calls(done.text, strip=False), done.prompt_tokens, done.completion_tokens) == (
        (text, (ToolCall(name, arguments),)),
        read,
        wrote,
    )
    assert (done, pieces[-1].done) == (SAID, SAID)
    assert "".join(p.text for p in pieces) == SAID.text


def test_what_a_server_reads_is_what_was_asked() -> None:
    """The loopback server turns a body back into a request: nothing is lost on any wire but what the API has no place
    for.
    """
    for api in APIS:
        got: list[Request] = []

        def keep(request: Request, got: list[Request] = got) -> Completion:
            got.append(request)
            return SAID

        server = Loopback(api, keep)
        engine = RemoteEngine(server.url, "m", RemoteOptions.model_validate({"api": api, "retries": 0}))
        engine.generate([REQUEST])
        (request,) = got
        assert [(m.role, m.content, [(c.name, c.arguments) for c in m.tool_calls]) for m in request.messages] == [
            (m.role, m.content, [(c.name, c.arguments) for c in m.tool_calls]) for m in TURNS
        ]
        assert (request.tools, request.schema, request.sampling.stop, request.sampling.max_tokens) == (
            (TOOL,),
            SCHEMA,
            ("END",),
            50,
        )
        engine.close()
        server.stop()


@pytest.mark.parametrize("api", APIS)
def test_calls_without_ids_get_them_in_their_order(api: str, server: Loopback, engine: RemoteEngine) -> None:
    """Conversations of training sets seldom carry ids; APIs that pair results with calls by id want them."""
    turns = (
        Message("user", "u"),
        Message("assistant", "", (ToolCall("f", {}), ToolCall("g", {"x": 1}))),
        Message("tool", "1"),
        Message("tool", "2"),
    )
    engine.generate([Request(turns)])
    (_, body, _), *_ = server.seen
    if api == "anthropic":
        assert (
            [b["tool_use_id"] for b in body["messages"][2]["content"]]
            == [b["id"] for b in body["messages"][1]["content"]]
            == ["call_1", "call_2"]
        )
    if api == "google":
        assert [p["functionResponse"]["name"] for p in body["contents"][2]["parts"]] == ["f", "g"]
    if api == "cohere":
        assert [m["tool_call_id"] for m in body["messages"][2:]] == ["call_1", "call_2"]


@pytest.mark.parametrize(
    ("api", "header"),
    [
        ("openai", "authorization"),
        ("anthropic", "x-api-key"),
        ("google", "x-goog-api-key"),
        ("cohere", "authorization"),
    ],
)
def test_the_key_of_the_api_is_sent(api: str, header: str, server: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "openai": "OPENAI_API_KEY",
        "anthropic": "ANTHROPIC_API_KEY",
        "google": "GEMINI_API_KEY",
        "cohere": "CO_API_KEY",
    }
    for name in names.values():
        monkeypatch.setenv(name, f"of-{name}")
    engine = RemoteEngine(server.url, "m", RemoteOptions.model_validate({"api": api}))
    engine.generate([Request((Message("user", "u"),))])
    ((_, _, headers),) = server.seen
    assert headers[header].removeprefix("Bearer ") == f"of-{names[api]}"
    assert not any(f"of-{other}" in value for name, other in names.items() if name != api for value in headers.values())
    engine.close()


def test_the_host_says_the_api() -> None:
    for ref, api in (
        ("https://api.anthropic.com/v1#claude", "anthropic"),
        ("https://generativelanguage.googleapis.com/v1beta#gemini", "google"),
        ("https://api.cohere.com/v2#command", "cohere"),
        ("https://openrouter.ai/api/v1#anthropic/claude", "openai"),
        ("http://127.0.0.1:1/v1#m?api=anthropic", "anthropic"),
    ):
        url, _, options = parse_remote(ref)
        assert get_api(url, options) == api
    with pytest.raises(UserError, match="option 'api': Input should be '', 'openai', 'anthropic'"):
        parse_remote("http://h/v1#m?api=claude")
    assert load("http://h/v1#m?sampling=default").digest != load("http://h/v1#m").digest  # it answers otherwise


FINAL = {
    "google: a wrong key": (
        "google",
        says(
            {
                "error": {
                    "code": 400,
                    "message": "API key not valid.",
                    "status": "INVALID_ARGUMENT",
                    "details": [{"reason": "API_KEY_INVALID"}],
                }
            },
            400,
        ),
        AccessError,
        r"400: API key not valid.; check the key in \$GEMINI_API_KEY",
    ),
    "anthropic: no credit": (
        "anthropic",
        says(
            {"type": "error", "error": {"type": "invalid_request_error", "message": "Your credit balance is too low"}},
            400,
        ),
        AccessError,
        "400: Your credit balance",
    ),
    "anthropic: no sampling": (
        "anthropic",
        says(
            {"type": "error", "error": {"type": "invalid_request_error", "message": "temperature: not supported"}}, 400
        ),
        RequestError,
        r"append \?sampling=default",
    ),
    "cohere: a wrong key": (
        "cohere",
        says({"message": "invalid api token"}, 401),
        AccessError,
        r"401: invalid api token; check the key in \$CO_API_KEY",
    ),
    "google: another end": (
        "google",
        says({"candidates": [{"content": {"parts": []}, "finishReason": "OTHER"}]}),
        EngineError,
        "ended with the reason OTHER",
    ),
    "cohere: an error": (
        "cohere",
        says({"message": {"content": []}, "finish_reason": "ERROR"}),
        EngineError,
        "ended with the reason ERROR",
    ),
}


@pytest.mark.parametrize("what", FINAL)
def test_what_providers_say(what: str) -> None:
    api, behaviour, kind, message = FINAL[what]
    server = Loopback(api)
    server.behaviours = [behaviour]
    engine = RemoteEngine(
        server.url, "m", RemoteOptions.model_validate({"api": api, "retries": 0, "sampling": "explicit"})
    )
    with pytest.raises(kind, match=message):
        engine.generate([Request((Message("user", "u"),))])
    engine.close()
    server.stop()


@pytest.mark.parametrize("api", ["google"])
def test_google_says_how_long_to_wait_in_its_body(api: str, server: Loopback) -> None:
    server.behaviours = [
        says(
            {
                "error": {
                    "code": 429,
                    "message": "quota",
                    "status": "RESOURCE_EXHAUSTED",
                    "details": [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "0.3s"}],
                }
            },
            429,
        )
    ]
    engine = RemoteEngine(server.url, "m", RemoteOptions(api="google"))
    engine.generate([Request((Message("user", "u"),))])
    (first, _, _), (second, _, _) = server.seen
    assert 0.3 <= second - first < 3
    engine.close()


@pytest.mark.parametrize("api", ["google"])
def test_a_blocked_prompt_is_a_filtered_answer(api: str, server: Loopback, engine: RemoteEngine) -> None:
    server.behaviours = [says({"promptFeedback": {"blockReason": "SAFETY"}, "usageMetadata": {"promptTokenCount": 4}})]
    assert engine.generate([REQUEST])[0] == Completion("", "filtered", prompt_tokens=4)


@pytest.mark.parametrize("api", APIS)
def test_a_model_that_takes_no_sampling(api: str, server: Loopback) -> None:
    engine = RemoteEngine(server.url, "m", RemoteOptions.model_validate({"api": api, "sampling": "default"}))
    engine.generate([Request((Message("user", "u"),))])
    ((_, body, _),) = server.seen
    assert not {"temperature", "top_p", "topP", "p", "k"} & {*body, *body.get("generationConfig", {})}
    engine.close()


@pytest.mark.parametrize("api", APIS)
def test_a_model_that_takes_sampling(api: str, server: Loopback) -> None:
    engine = RemoteEngine(server.url, "m", RemoteOptions.model_validate({"api": api, "sampling": "explicit"}))
    engine.generate([Request((Message("user", "u"),), sampling=Sampling(temperature=0.5, top_p=0.75))])
    ((_, body, _),) = server.seen
    sent = {**body, **body.get("generationConfig", {})}
    assert (sent["temperature"], sent.get("top_p", sent.get("topP", sent.get("p")))) == (0.5, 0.75)
    engine.close()
