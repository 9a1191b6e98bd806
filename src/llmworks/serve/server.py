"""An OpenAI-compatible HTTP server over one engine: /v1/models, /v1/chat/completions (whole or streamed), /health.

Unsupported requests get the API's error body; nothing is changed silently. Uses only the Engine protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from llmworks.core.errors import EngineError, LlmworksError, RequestError, UserError
from llmworks.core.types import Completion, Delta, Engine
from llmworks.core.types import Request as EngineRequest
from llmworks.serve.completion_objects import build_completion, stream_chunks
from llmworks.serve.schema import ChatRequest

DEFAULT_MAX_TOKENS = 512
MAX_PARALLEL = 4


def build_error(
    message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """Return the API's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class RequestExecutor:
    """Runs requests in its own threads: one thread, or several for an engine that computes requests in parallel."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.threads = ThreadPoolExecutor(MAX_PARALLEL if "parallel" in engine.can else 1, thread_name_prefix="engine")
        self.stopping = threading.Event()  # once set, every running request ends at its next token with an error

    def close(self) -> None:
        """Wait until no thread uses the engine."""
        self.stopping.set()
        self.threads.shutdown(wait=True)

    async def complete(
        self, request: EngineRequest, is_disconnected: Callable[[], Awaitable[bool]]
    ) -> Completion | None:
        """Return a whole completion; stop and return None once `is_disconnected` reports so."""
        deltas = self.stream(request)
        try:
            async for delta in deltas:
                if delta.done is not None:
                    return delta.done
                if await is_disconnected():
                    return None
        finally:
            await deltas.aclose()
        raise EngineError("the engine ended without a completion")

    def stream(self, request: EngineRequest) -> AsyncGenerator[Delta, None]:
        """Stream a completion. Work starts immediately and stops when the iterator is closed."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()
        cancelled = threading.Event()

        def work() -> None:
            end: Exception | None = None
            try:
                stream = self.engine.stream(request)
                for delta in stream:
                    loop.call_soon_threadsafe(pieces.put_nowait, delta)
                    if cancelled.is_set() or self.stopping.is_set():
                        stream.close()  # type: ignore[attr-defined]
                        if delta.done is None:
                            raise EngineError("the server is stopping")
                        break
            except Exception as error:  # re-raised by the reader below
                end = error
            with contextlib.suppress(RuntimeError):  # the loop is closed when no client is left
                loop.call_soon_threadsafe(pieces.put_nowait, end)

        async def read() -> AsyncGenerator[Delta, None]:
            try:
                while (piece := await pieces.get()) is not None:
                    if isinstance(piece, Exception):
                        raise piece
                    yield piece
            finally:
                cancelled.set()

        self.threads.submit(work)
        return read()


async def stream_until_error(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """Yield the stream's lines; an engine error after the first line becomes the API's error object."""
    try:
        async for line in lines:
            yield line
    except LlmworksError as error:
        yield f"data: {json.dumps(build_error(str(error), 'server_error'))}\n\n"


def build_unknown_model_response(requested: str, name: str) -> JSONResponse:
    """Return the API's response to a request for a model that is not served."""
    message = f"The model {requested!r} does not exist; this server serves {name!r}"
    return JSONResponse(build_error(message, code="model_not_found", param="model"), 404)


def build_app(engine: Engine, name: str) -> FastAPI:
    """Build the application. `name` is the model's name in the API."""
    app = FastAPI(title="llmworks", docs_url=None, redoc_url=None, openapi_url=None)
    turns = app.state.turns = RequestExecutor(engine)
    started = int(time.time())
    model = {"id": name, "object": "model", "created": started, "owned_by": "llmworks"}

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok", "model": name}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{model_id:path}")
    def one_model(model_id: str) -> Any:
        return model if model_id == name else build_unknown_model_response(model_id, name)

    @app.post("/v1/chat/completions")
    async def completions(http: Request) -> Any:
        try:
            body = ChatRequest.model_validate(json.loads(await http.body()))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            return JSONResponse(build_error(f"{field or 'request body'}: {first['msg']}", param=field or None), 400)
        except ValueError as error:
            return JSONResponse(build_error(f"the request body is not JSON: {error}"), 400)
        if body.model != name:
            return build_unknown_model_response(body.model, name)
        request = body.to_request(DEFAULT_MAX_TOKENS)
        identity, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        if not body.stream:
            answer = await turns.complete(request, http.is_disconnected)
            if not answer:
                return Response(status_code=499)
            return build_completion(identity, created, name, answer, bool(request.tools))
        deltas = turns.stream(request)
        opening = await deltas.__anext__()  # invalid requests are refused before the stream begins
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        lines = stream_chunks(identity, created, name, opening, deltas, bool(request.tools), with_usage)
        return StreamingResponse(
            stream_until_error(lines), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )

    @app.exception_handler(RequestError)
    async def report_request_error(http: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(build_error(str(error)), 400)

    @app.exception_handler(LlmworksError)
    async def report_server_error(http: Request, error: LlmworksError) -> JSONResponse:
        return JSONResponse(build_error(str(error), "server_error"), 500)

    @app.exception_handler(HTTPException)
    async def report_http_error(http: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(build_error(f"{http.method} {http.url.path}: {error.detail}"), error.status_code)

    return app


def check_port(host: str, port: int) -> None:
    """Raise UserError when the address cannot be bound."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot listen on {host}:{port} ({getattr(error, 'strerror', None) or error}); choose another --port"
            ) from None


def serve_forever(engine: Engine, name: str, host: str, port: int) -> None:
    """Serve until interrupted."""
    import uvicorn

    address = f"http://{host}:{port}/v1"
    print(
        f"{name} at {address}\nTry:\n  curl {address}/chat/completions -H 'Content-Type: application/json' -d"
        f" '{json.dumps({'model': name, 'messages': [{'role': 'user', 'content': 'Hi'}]})}'\nPress Ctrl-C to stop.",
        flush=True,
    )
    app = build_app(engine, name)

    class Server(uvicorn.Server):
        """A server that ends running requests as soon as it receives a stop signal."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            app.state.turns.stopping.set()
            super().handle_exit(sig, frame)

    with contextlib.suppress(KeyboardInterrupt):
        Server(uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=10)).run()
    app.state.turns.close()
