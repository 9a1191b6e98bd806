"""A loopback server that speaks the APIs of four providers as they document them, and misbehaves when told to.

It reads requests strictly, as the provider's own service would, and refuses what the documentation does not allow. Its
answers come from a function over the project's own nouns. `tests/generate/test_providers.py` shows that the providers'
own clients understand it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from llmworks.core.errors import LlmworksError
from llmworks.core.types import Completion, Message, Request, Sampling, ToolCall, messages_from_json
from llmworks.tokenize.chat.templates import parse_tool_calls

Behaviour = Callable[["Handler", dict[str, Any]], None]
Answer = Callable[[Request], Completion]
APIS = ("openai", "anthropic", "google", "cohere")
BASES = {"openai": "/v1", "anthropic": "/v1", "google": "/v1beta", "cohere": "/v2"}


class Refused(Exception):
    """A request that the documentation does not allow."""


def need(condition: Any, why: str) -> None:
    if not condition:
        raise Refused(why)


def only(body: dict[str, Any], allowed: str) -> None:
    unknown = set(body) - set(allowed.split())
    need(not unknown, f"unknown field {sorted(unknown)}")


def echo(request: Request) -> Completion:
    """Says what it was asked."""
    return Completion("to " + request.messages[-1].content, "stop", prompt_tokens=10, completion_tokens=5)


# OpenAI


def openai_request(path: str, body: dict[str, Any], headers: dict[str, str]) -> Request:
    need(path == "/v1/chat/completions", f"no such path {path}")
    only(
        body,
        "model messages max_tokens max_completion_tokens temperature top_p stream stream_options seed stop tools"
        " response_format",
    )
    need("stream_options" not in body or body["stream"], "stream_options without stream")
    for tool in body.get("tools", []):
        need(tool["type"] == "function" and tool["function"]["name"], "tools are functions")
    shape = body.get("response_format")
    need(shape is None or (shape["type"] == "json_schema" and shape["json_schema"]["name"]), "response_format")
    s = Sampling(
        body.get("max_tokens") or body.get("max_completion_tokens"),
        body.get("temperature", 1.0),
        body.get("top_p", 1.0),
        0,
        body.get("seed"),
        tuple(body.get("stop", ())),
    )
    return Request(
        messages_from_json(body["messages"]),
        tools=tuple(t["function"] for t in body.get("tools", [])),
        sampling=s,
        schema=shape and shape["json_schema"]["schema"],
    )


def openai_reply(done: Completion) -> dict[str, Any]:
    text, calls = parse_tool_calls(done.text, strip=False)
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {"id": f"c{i}", "type": "function", "function": {"name": c.name, "arguments": json.dumps(c.arguments)}}
            for i, c in enumerate(calls)
        ]
    finish = {"stop": "tool_calls" if calls else "stop", "length": "length", "filtered": "content_filter"}[done.finish]
    usage = {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": usage,
    }


def openai_events(done: Completion) -> list[Any]:
    whole = openai_reply(done)
    choice = whole["choices"][0]
    base = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        *({"content": c} for c in choice["message"]["content"]),
    ]
    for i, call in enumerate(choice["message"].get("tool_calls", [])):
        written = call["function"]["arguments"]
        deltas.append(
            {
                "tool_calls": [
                    {
                        "index": i,
                        "id": call["id"],
                        "type": "function",
                        "function": {"name": call["function"]["name"], "arguments": ""},
                    }
                ]
            }
        )
        deltas += [
            {"tool_calls": [{"index": i, "function": {"arguments": part}}]} for part in (written[:3], written[3:])
        ]
    chunks = [{**base, "choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
    chunks.append({**base, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]})
    return [*chunks, {**base, "choices": [], "usage": whole["usage"]}, "[DONE]"]


# Anthropic


def anthropic_request(path: str, body: dict[str, Any], headers: dict[str, str]) -> Request:
    need(path == "/v1/messages", f"no such path {path}")
    version = headers.get("anthropic-version")
    need(version in ("2023-06-01", "2026-10-21"), "anthropic-version: header is required")
    only(
        body,
        ("temperature top_p top_k " if version == "2023-06-01" else "")
        + "model messages max_tokens system stream stop_sequences tools output_config",
    )
    need(body.get("max_tokens"), "max_tokens: field required")
    need(not ("temperature" in body and "top_p" in body and body["temperature"] == 0), "temperature and top_p")
    messages, open_calls = [Message("system", body["system"])] if body.get("system") else [], set()
    need(body["messages"] and body["messages"][0]["role"] == "user", "messages: first message must use the user role")
    for turn, following in zip(body["messages"], [*body["messages"][1:], None], strict=True):
        need(following is None or turn["role"] != following["role"], "roles must alternate")
        need(
            turn["role"] in ("user", "assistant") and turn["content"], "messages: text content blocks must be non-empty"
        )
        text, calls = "", []
        for block in turn["content"]:
            if block["type"] == "text":
                need(block["text"], "text content blocks must be non-empty")
                text += block["text"]
            elif block["type"] == "tool_use":
                need(turn["role"] == "assistant" and block["id"] and isinstance(block["input"], dict), "tool_use")
                open_calls.add(block["id"])
                calls.append(ToolCall(block["name"], block["input"], block["id"]))
            else:
                need(
                    block["type"] == "tool_result" and block["tool_use_id"] in open_calls,
                    "unexpected tool_use_id found in tool_result blocks",
                )
                messages.append(Message("tool", block["content"], tool_call_id=block["tool_use_id"]))
        if text or calls:
            messages.append(Message(turn["role"], text, tuple(calls)))
    for tool in body.get("tools", []):
        need(
            set(tool) <= {"name", "description", "input_schema"} and tool["input_schema"]["type"] == "object",
            "tools.0.input_schema.type: field required",
        )
    shape = body.get("output_config")
    need(shape is None or shape["format"]["type"] == "json_schema", "output_config")
    tools = tuple(
        {
            "name": t["name"],
            "parameters": t["input_schema"],
            **({"description": t["description"]} if "description" in t else {}),
        }
        for t in body.get("tools", [])
    )
    s = Sampling(
        body["max_tokens"],
        body.get("temperature", 1.0),
        body.get("top_p", 1.0),
        body.get("top_k", 0),
        None,
        tuple(body.get("stop_sequences", ())),
    )
    return Request(tuple(messages), tools=tools, sampling=s, schema=shape and shape["format"]["schema"])


def anthropic_reply(done: Completion) -> dict[str, Any]:
    text, calls = parse_tool_calls(done.text, strip=False)
    blocks: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    blocks += [
        {"type": "tool_use", "id": f"toolu_{i}", "name": c.name, "input": c.arguments} for i, c in enumerate(calls)
    ]
    stop = {"stop": "tool_use" if calls else "end_turn", "length": "max_tokens", "filtered": "refusal"}[done.finish]
    usage = {
        "input_tokens": done.prompt_tokens - 2,
        "cache_read_input_tokens": 2,
        "cache_creation_input_tokens": 0,
        "output_tokens": done.completion_tokens,
    }
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": blocks,
        "stop_reason": stop,
        "stop_sequence": None,
        "usage": usage,
    }


def anthropic_events(done: Completion) -> list[Any]:
    whole = anthropic_reply(done)
    begin = {**whole, "content": [], "stop_reason": None, "usage": {**whole["usage"], "output_tokens": 1}}
    out: list[Any] = [{"type": "message_start", "message": begin}, {"type": "ping"}]
    for i, block in enumerate(whole["content"]):
        if block["type"] == "text":
            out.append({"type": "content_block_start", "index": i, "content_block": {"type": "text", "text": ""}})
            out += [
                {"type": "content_block_delta", "index": i, "delta": {"type": "text_delta", "text": c}}
                for c in block["text"]
            ]
        else:
            written = json.dumps(block["input"])
            out.append({"type": "content_block_start", "index": i, "content_block": {**block, "input": {}}})
            out += [
                {"type": "content_block_delta", "index": i, "delta": {"type": "input_json_delta", "partial_json": p}}
                for p in ("", written[:3], written[3:])
            ]
        out.append({"type": "content_block_stop", "index": i})
    out.append(
        {
            "type": "message_delta",
            "delta": {"stop_reason": whole["stop_reason"], "stop_sequence": None},
            "usage": {"output_tokens": done.completion_tokens},
        }
    )
    return [*out, {"type": "message_stop"}]


# Google


def google_request(path: str, body: dict[str, Any], headers: dict[str, str]) -> Request:
    need(
        path.replace("/v1beta", "/v1")
        in ("/v1/models/m:generateContent", "/v1/models/m:streamGenerateContent?alt=sse"),
        f"no such path {path}",
    )
    only(body, "contents systemInstruction generationConfig tools toolConfig")
    config = body.get("generationConfig", {})
    only(config, "maxOutputTokens temperature topP topK seed stopSequences responseMimeType responseJsonSchema")
    need("topK" not in config or config["topK"] > 0, "top_k must be positive")
    need(
        "responseJsonSchema" not in config or config.get("responseMimeType") == "application/json",
        "a schema needs responseMimeType",
    )
    messages = [Message("system", part["text"]) for part in body.get("systemInstruction", {}).get("parts", [])]
    need(body.get("contents"), "contents are required")
    for turn in body["contents"]:
        need(turn["role"] in ("user", "model") and turn["parts"], "Please use a valid role: user, model.")
        text, calls = "", []
        for part in turn["parts"]:
            need(len(part) == 1, "one kind of data in a part")
            if "text" in part:
                need(part["text"], "a part must have data")
                text += part["text"]
            elif "functionCall" in part:
                calls.append(ToolCall(part["functionCall"]["name"], part["functionCall"]["args"]))
            else:
                need(
                    part["functionResponse"]["name"] and isinstance(part["functionResponse"]["response"], dict),
                    "functionResponse needs a name",
                )
                messages.append(
                    Message(
                        "tool", part["functionResponse"]["response"]["result"], name=part["functionResponse"]["name"]
                    )
                )
        if text or calls:
            messages.append(Message("assistant" if turn["role"] == "model" else "user", text, tuple(calls)))
    tools = tuple(
        {
            "name": f["name"],
            **({"description": f["description"]} if "description" in f else {}),
            "parameters": f.get("parametersJsonSchema") or f.get("parameters_json_schema"),
        }
        for t in body.get("tools", [])
        for f in t["functionDeclarations"]
    )
    s = Sampling(
        config["maxOutputTokens"],
        config.get("temperature", 1.0),
        config.get("topP", 1.0),
        config.get("topK", 0),
        config.get("seed"),
        tuple(config.get("stopSequences", ())),
    )
    return Request(tuple(messages), tools=tools, sampling=s, schema=config.get("responseJsonSchema"))


def google_reply(done: Completion) -> dict[str, Any]:
    text, calls = parse_tool_calls(done.text, strip=False)
    parts: list[dict[str, Any]] = [{"text": "hm", "thought": True}]
    parts += [{"text": text}] if text else []
    parts += [{"functionCall": {"name": c.name, "args": c.arguments}} for c in calls]
    usage = {
        "promptTokenCount": done.prompt_tokens,
        "candidatesTokenCount": max(0, done.completion_tokens - 1),
        "thoughtsTokenCount": min(1, done.completion_tokens),
        "totalTokenCount": done.prompt_tokens + done.completion_tokens,
    }
    reason = {"stop": "STOP", "length": "MAX_TOKENS", "filtered": "SAFETY"}[done.finish]
    return {
        "candidates": [{"content": {"role": "model", "parts": parts}, "finishReason": reason, "index": 0}],
        "usageMetadata": usage,
        "modelVersion": "m",
    }


def google_events(done: Completion) -> list[Any]:
    whole = google_reply(done)
    parts, final = whole["candidates"][0]["content"]["parts"], whole["candidates"][0]["finishReason"]
    pieces = [
        {"text": c} if "text" in p and not p.get("thought") else p
        for p in parts
        for c in (p["text"] if "text" in p and not p.get("thought") else [p])
    ]
    events = [
        {
            "candidates": [{"content": {"role": "model", "parts": [p]}, "index": 0}],
            "usageMetadata": {"promptTokenCount": done.prompt_tokens},
        }
        for p in pieces
    ]
    return [
        *events,
        {
            "candidates": [{"content": {"role": "model", "parts": [{"text": ""}]}, "finishReason": final, "index": 0}],
            "usageMetadata": whole["usageMetadata"],
        },
    ]


# Cohere


def cohere_request(path: str, body: dict[str, Any], headers: dict[str, str]) -> Request:
    need(path == "/v2/chat", f"no such path {path}")
    only(body, "model messages max_tokens stream temperature p k seed stop_sequences tools response_format")
    need(0.01 <= body.get("p", 0.75) <= 0.99, "p must be between 0.01 and 0.99")
    need(0 <= body.get("k", 0) <= 500, "k must be between 0 and 500")
    open_calls = set()
    for message in body["messages"]:
        only(message, "role content tool_calls tool_call_id")
        open_calls |= {call["id"] for call in message.get("tool_calls", [])}
        need(message["role"] != "tool" or message["tool_call_id"] in open_calls, "tool_call_id of no call")
        need(message.get("content") or message.get("tool_calls"), "content must not be empty")
    shape = body.get("response_format")
    need(shape is None or shape["type"] == "json_object", "response_format")
    s = Sampling(
        body["max_tokens"],
        body.get("temperature", 0.3),
        body.get("p", 0.75),
        body.get("k", 0),
        body.get("seed"),
        tuple(body.get("stop_sequences", ())),
    )
    return Request(
        messages_from_json(body["messages"]),
        tools=tuple(t["function"] for t in body.get("tools", [])),
        sampling=s,
        schema=shape and shape["schema"],
    )


def cohere_reply(done: Completion) -> dict[str, Any]:
    text, calls = parse_tool_calls(done.text, strip=False)
    message: dict[str, Any] = {"role": "assistant"}
    if text:
        message["content"] = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": text}]
    if calls:
        message["tool_calls"] = [
            {"id": f"c{i}", "type": "function", "function": {"name": c.name, "arguments": json.dumps(c.arguments)}}
            for i, c in enumerate(calls)
        ]
    reason = {"stop": "TOOL_CALL" if calls else "COMPLETE", "length": "MAX_TOKENS", "filtered": "ERROR_TOXIC"}[
        done.finish
    ]
    tokens = {"input_tokens": done.prompt_tokens, "output_tokens": done.completion_tokens}
    return {
        "id": "x",
        "message": message,
        "finish_reason": reason,
        "usage": {"billed_units": {"input_tokens": 1, "output_tokens": 1}, "tokens": tokens},
    }


def cohere_events(done: Completion) -> list[Any]:
    whole = cohere_reply(done)
    out: list[Any] = [{"type": "message-start", "id": "x", "delta": {"message": {"role": "assistant"}}}]
    text = "".join(b.get("text", "") for b in whole["message"].get("content", []))
    if text:
        out.append(
            {"type": "content-start", "index": 0, "delta": {"message": {"content": {"type": "text", "text": ""}}}}
        )
        out += [{"type": "content-delta", "index": 0, "delta": {"message": {"content": {"text": c}}}} for c in text]
        out.append({"type": "content-end", "index": 0})
    for i, call in enumerate(whole["message"].get("tool_calls", [])):
        out.append(
            {
                "type": "tool-call-start",
                "index": i,
                "delta": {
                    "message": {"tool_calls": {**call, "function": {"name": call["function"]["name"], "arguments": ""}}}
                },
            }
        )
        written = call["function"]["arguments"]
        out += [
            {
                "type": "tool-call-delta",
                "index": i,
                "delta": {"message": {"tool_calls": {"function": {"arguments": part}}}},
            }
            for part in (written[:3], written[3:])
        ]
        out.append({"type": "tool-call-end", "index": i})
    return [*out, {"type": "message-end", "delta": {"finish_reason": whole["finish_reason"], "usage": whole["usage"]}}]


# given text and vectors


def completions(engine: Any, body: dict[str, Any]) -> dict[str, Any]:
    """The completions API as vLLM has it: ids go on, or are echoed with their log-probabilities and those of the best
    token there.
    """
    only(body, "model prompt max_tokens temperature top_p seed stop echo logprobs")
    ids = body["prompt"]
    if not body.get("echo"):
        done = engine.generate(
            [
                Request(
                    ids=tuple(ids),
                    sampling=Sampling(
                        body["max_tokens"],
                        body["temperature"],
                        body["top_p"],
                        0,
                        body.get("seed"),
                        tuple(body.get("stop", ())),
                    ),
                )
            ]
        )[0]
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(done.ids)}
        return {
            "choices": [{"index": 0, "text": done.text, "finish_reason": done.finish, "logprobs": None}],
            "usage": usage,
        }
    need(body["max_tokens"] == 1 and body["logprobs"] == 1, "asked for what is not served here")
    rows = engine.logits(ids).astype("float64")
    rows -= rows.max(axis=1, keepdims=True)
    import numpy as np

    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    following = [*ids[1:], int(rows[-1].argmax())]
    chances = [None, *(float(row[t]) for row, t in zip(rows, following, strict=True))]
    tops = [
        None,
        *(
            {str(t): float(row[t]), str(int(row.argmax())): float(row.max())}
            for row, t in zip(rows, following, strict=True)
        ),
    ]
    return {
        "choices": [
            {
                "index": 0,
                "text": "...",
                "finish_reason": "length",
                "logprobs": {"token_logprobs": chances, "top_logprobs": tops},
            }
        ],
        "usage": {"prompt_tokens": len(ids), "completion_tokens": 1},
    }


def vector(text: str) -> list[float]:
    """Something that tells texts apart."""
    return [float(len(text)), float(sum(text.encode()))]


def openai_embed(body: dict[str, Any]) -> dict[str, Any]:
    only(body, "model input encoding_format")
    data = [{"object": "embedding", "index": i, "embedding": vector(text)} for i, text in enumerate(body["input"])]
    return {"object": "list", "model": "m", "data": data[::-1], "usage": {"prompt_tokens": 1, "total_tokens": 1}}


def google_embed(body: dict[str, Any]) -> dict[str, Any]:
    need(all(r["model"] == "models/m" for r in body["requests"]), "model of every request")
    return {"embeddings": [{"values": vector(r["content"]["parts"][0]["text"])} for r in body["requests"]]}


def cohere_embed(body: dict[str, Any]) -> dict[str, Any]:
    only(body, "model texts input_type embedding_types truncate")
    need(len(body["texts"]) <= 96, "at most 96 texts")
    return {"id": "x", "embeddings": {"float": [vector(text) for text in body["texts"]]}, "texts": body["texts"]}


EMBED = {"/v1/embeddings": openai_embed, "/v1beta/models/m:batchEmbedContents": google_embed, "/v2/embed": cohere_embed}
READ = {"openai": openai_request, "anthropic": anthropic_request, "google": google_request, "cohere": cohere_request}
REPLY = {"openai": openai_reply, "anthropic": anthropic_reply, "google": google_reply, "cohere": cohere_reply}
EVENTS = {"openai": openai_events, "anthropic": anthropic_events, "google": google_events, "cohere": cohere_events}


def error(api: str, message: str, status: int) -> dict[str, Any]:
    """How each provider words an error."""
    if api == "anthropic":
        return {"type": "error", "error": {"type": "invalid_request_error", "message": message}}
    return (
        {"message": message}
        if api == "cohere"
        else {"error": {"message": message, "code": status, "status": "INVALID_ARGUMENT"}}
    )


class Handler(BaseHTTPRequestHandler):
    """One request: takes the next behaviour of the server's list, `answers` when it is empty."""

    protocol_version = "HTTP/1.1"
    server: Loopback

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.server.lock:
            self.server.seen.append((time.monotonic(), body, {k.lower(): v for k, v in self.headers.items()}))
            self.server.busy += 1
            self.server.most = max(self.server.most, self.server.busy)
            behaviour = self.server.behaviours.pop(0) if self.server.behaviours else answers
        try:
            behaviour(self, body)
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def say(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, *args: Any) -> None:
        pass


class Loopback(ThreadingHTTPServer):
    """A loopback server with a list of things to do wrong."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, api: str = "openai", answer: Answer = echo, engine: Any = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.api, self.answer, self.engine = api, answer, engine
        self.lock, self.turn = threading.Lock(), threading.Lock()
        self.behaviours: list[Behaviour] = []
        self.seen: list[tuple[float, dict[str, Any], dict[str, str]]] = []
        self.busy = self.most = 0
        self.clients: list[Callable[[], Any]] = []  # closed with the server
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def url(self) -> str:
        return self.root + BASES[self.api]

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass

    def stop(self) -> None:
        for close in self.clients:
            close()
        self.shutdown()
        self.server_close()
        self.thread.join()


def answers(handler: Handler, body: dict[str, Any]) -> None:
    """A server that behaves."""
    server = handler.server
    try:
        if handler.path in EMBED:
            handler.say(200, json.dumps(EMBED[handler.path](body)).encode())
            return
        if handler.path == "/v1/completions" and server.engine is not None:
            with server.turn:
                handler.say(200, json.dumps(completions(server.engine, body)).encode())
            return
        request = READ[server.api](handler.path, body, {k.lower(): v for k, v in handler.headers.items()})
        with server.turn:
            done = server.answer(request)
    except (Refused, LlmworksError, KeyError, TypeError, ValueError) as problem:
        handler.say(400, json.dumps(error(server.api, f"{type(problem).__name__}: {problem}", 400)).encode())
        return
    if body.get("stream") or "stream" in handler.path:
        handler.say(200, events(server.api, done), {"content-type": "text/event-stream"})
    else:
        handler.say(200, json.dumps(REPLY[server.api](done)).encode(), {"content-type": "application/json"})


def events(api: str, done: Completion, leave: int = 0) -> bytes:
    """A stream, without its last events."""
    listed = EVENTS[api](done)
    out = b""
    for event in listed[: len(listed) - leave]:
        named = f"event: {event['type']}\n".encode() if isinstance(event, dict) and "type" in event else b""
        out += named + b"data: " + (event if isinstance(event, str) else json.dumps(event)).encode() + b"\n\n"
    return out


def says(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Behaviour:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return lambda handler, body: handler.say(status, content, headers)
