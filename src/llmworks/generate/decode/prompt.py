"""A request as the token ids that a model in this process reads. Knows no engine."""

from __future__ import annotations

from typing import Any

from llmworks.core.errors import RequestError
from llmworks.core.types import Request
from llmworks.generate.decode.grammar import check_schema
from llmworks.tokenize.chat.templates import render_prompt


def ids_of_request(request: Request, tokenizer: Any, longest: int, name: str, *, tools: bool) -> list[int]:
    """The prompt's ids.

    RequestError for tools that the template drops, an empty request, a schema that is none, or a prompt that leaves no
    room.
    """
    if request.tools and not tools:
        raise RequestError(
            f"the chat template of {name} ignores tools; use a model with a tool-aware template, or put the functions"
            " into the system message"
        )
    if not request.ids and not request.messages:
        raise RequestError("the request is empty: it has neither messages nor ids")
    if request.schema is not None:
        check_schema(request.schema)
    ids = list(request.ids) or list(render_prompt(tokenizer, request.messages, tools=request.tools))
    if len(ids) >= longest:
        raise RequestError(f"the prompt has {len(ids)} tokens, {name} reads {longest} at most here")
    return ids
