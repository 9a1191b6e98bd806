"""Turn a request into the token ids of its prompt, for engines in this process."""

from __future__ import annotations

from typing import Any

from llmworks.core.errors import RequestError
from llmworks.core.types import Request
from llmworks.generate.decode.grammar import check_schema
from llmworks.tokenize.chat.templates import render_prompt


def render_prompt_ids(request: Request, tokenizer: Any, context_length: int, name: str, *, tools: bool) -> list[int]:
    """Return the prompt's token ids.

    RequestError for tools that the chat template ignores, an empty request, an invalid schema, or a prompt that fills
    the context.
    """
    if request.tools and not tools:
        raise RequestError(
            f"the chat template of {name} ignores tools; use a model whose template supports tools, or describe"
            " the functions in the system message"
        )
    if not request.ids and not request.messages:
        raise RequestError("the request is empty: it has neither messages nor token ids")
    if request.schema is not None:
        check_schema(request.schema)
    ids = list(request.ids) or list(render_prompt(tokenizer, request.messages, tools=request.tools))
    if len(ids) >= context_length:
        raise RequestError(f"the prompt has {len(ids)} tokens, the context of {name} is {context_length} here")
    return ids
