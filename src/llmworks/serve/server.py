"""An OpenAI-compatible HTTP server over one engine: /v1/models, /v1/chat/completions (whole or streamed), /health.

Requests that cannot be answered as asked get the API's error body, never a silent change. Knows the Engine protocol, no model.
"""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException

from llmworks.errors import LlmworksError, RequestError, UserError
from llmworks.serve.answer import chunks, whole
from llmworks.serve.schema import ChatRequest
from llmworks.types import Completion, Delta, Engine
from llmworks.types import Request as EngineRequest

DEFAULT_MAX_TOKENS = 512


def error_body(message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The API's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Turns:
    """Lets one request at a time use an engine, or all at once where it can answer in parallel."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.turn: AbstractContextManager[Any] = nullcontext() if "parallel" in engine.can else threading.Lock()

    def answer(self, request: EngineRequest) -> Completion:
        """A whole answer."""
        with self.turn:
            return self.engine.generate([request])[0]

    def stream(self, request: EngineRequest) -> Iterator[Delta]:
        """A streamed answer; the turn lasts until it ends or the client goes away."""
        with self.turn:
            yield from self.engine.stream(request)


def build_app(engine: Engine, name: str) -> FastAPI:
    """The application. `name` is the model's name in the API."""
    app = FastAPI(title="llmworks", docs_url=None, redoc_url=None, openapi_url=None)
    turns = Turns(engine)
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
        return (
            model
            if model_id == name
            else JSONResponse(
                error_body(f"The model {model_id!r} does not exist; this server has {name!r}", code="model_not_found", param="model"), 404
            )
        )

    @app.post("/v1/chat/completions")
    async def completions(http: Request) -> Any:
        try:
            body = ChatRequest.model_validate(json.loads(await http.body()))
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            return JSONResponse(error_body(f"{field}: {first['msg']}", param=field), 400)
        except ValueError as error:
            return JSONResponse(error_body(f"the body is not JSON: {error}"), 400)
        if body.model != name:
            return JSONResponse(
                error_body(f"The model {body.model!r} does not exist; this server has {name!r}", code="model_not_found", param="model"), 404
            )
        request = body.request(DEFAULT_MAX_TOKENS)
        identity, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        if not body.stream:
            return whole(identity, created, name, await run_in_threadpool(turns.answer, request), bool(request.tools))
        deltas = turns.stream(request)
        first = await run_in_threadpool(lambda: next(deltas))  # what cannot be answered is refused before the stream begins
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        lines = chunks(identity, created, name, chain([first], deltas), bool(request.tools), with_usage)
        return StreamingResponse(_until_gone(lines, deltas), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    @app.exception_handler(RequestError)
    async def refused(http: Request, error: RequestError) -> JSONResponse:
        return JSONResponse(error_body(str(error)), 400)

    @app.exception_handler(LlmworksError)
    async def failed(http: Request, error: LlmworksError) -> JSONResponse:
        return JSONResponse(error_body(str(error), "server_error"), 500)

    @app.exception_handler(HTTPException)
    async def http_error(http: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(error_body(f"{http.method} {http.url.path}: {error.detail}"), error.status_code)

    return app


async def _until_gone(lines: Iterator[str], deltas: Iterator[Delta]) -> AsyncIterator[str]:
    """Lines of a stream; when the client goes away the engine stops and the next request gets its turn."""
    try:
        async for line in iterate_in_threadpool(lines):
            yield line
    finally:
        deltas.close()  # type: ignore[attr-defined]


def check_port(host: str, port: int) -> None:
    """UserError in one line when the address cannot be listened on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"{host}:{port} cannot be listened on ({getattr(error, 'strerror', None) or error}); choose another --port"
            ) from None


def serve_forever(engine: Engine, name: str, host: str, port: int) -> None:
    """Answer until interrupted."""
    import uvicorn

    address = f"http://{host}:{port}/v1"
    print(
        f"{name} at {address}\nTry:\n  curl {address}/chat/completions -H 'Content-Type: application/json' -d '{json.dumps({'model': name, 'messages': [{'role': 'user', 'content': 'Hi'}]})}'\nCtrl-C stops.",
        flush=True,
    )
    uvicorn.run(build_app(engine, name), host=host, port=port, log_level="warning")
