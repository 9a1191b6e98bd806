"""Options of a remote model in its reference:
`https://HOST/v1#MODEL?key=GROQ_API_KEY&concurrency=8&requests_per_minute=30`.

Four hosts have an API of their own (see `HOSTS`); every other host is assumed to be OpenAI-compatible, unless `api`
says otherwise: `https://api.anthropic.com/v1#MODEL`, `https://generativelanguage.googleapis.com/v1beta#MODEL`,
`https://api.cohere.com/v2#MODEL`.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
from typing import Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import Field, ValidationError

from llmworks.core.artifact import Config
from llmworks.core.errors import UserError

Api = Literal["openai", "anthropic", "google", "cohere"]
HOSTS: dict[str, Api] = {
    "api.anthropic.com": "anthropic",
    "generativelanguage.googleapis.com": "google",
    "api.cohere.com": "cohere",
    "api.cohere.ai": "cohere",
}


class RemoteOptions(Config):
    """Options after the `?` of a remote reference. Only `sampling` changes what a model generates."""

    api: Literal["", "openai", "anthropic", "google", "cohere"] = Field(
        "", description="API of the server; default: that of a known host, else openai"
    )
    key: str = Field(
        "",
        pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$",
        description=(
            "environment variable that holds the API key; default: OPENAI_API_KEY, ANTHROPIC_API_KEY,"
            " GEMINI_API_KEY or CO_API_KEY, sent only over https or to localhost; a variable named here is sent"
            " to any host"
        ),
    )
    sampling: Literal["", "explicit", "default"] = Field(
        "",
        description=(
            "`default`: omit temperature, top_p and top_k, for models that refuse them; `explicit`: send them;"
            " unset: explicit, except for Anthropic's API, which takes none today"
        ),
    )
    tokenizer: str = Field(
        "",
        description=(
            "directory of the model's own tokenizer; enables scoring of given text where the server has OpenAI's"
            " completions API with `echo` (vLLM)"
        ),
    )
    concurrency: int = Field(4, gt=0, le=256, description="parallel requests")
    requests_per_minute: int = Field(0, ge=0, description="request rate limit; 0: no limit")
    tokens_per_minute: int = Field(0, ge=0, description="token rate limit, prompt and completion together; 0: no limit")
    timeout: float = Field(
        600.0, gt=0, description="seconds without a byte after which a request is aborted and retried"
    )
    retries: int = Field(
        6, ge=0, le=50, description="attempts after the first, on 429, 5xx, timeouts, broken and malformed replies"
    )
    input_price: float = Field(0.0, ge=0, description="price per million prompt tokens")
    output_price: float = Field(0.0, ge=0, description="price per million completion tokens")
    budget: float = Field(0.0, ge=0, description="maximum cost; stop when it is reached; 0: no limit")


def parse_remote(ref: str) -> tuple[str, str, RemoteOptions]:
    """Return (URL, model, options) of a remote reference. UserError for a missing model or an unknown option."""
    url, _, rest = ref.partition("#")
    model, _, query = rest.partition("?")
    if not model:
        raise UserError(f"{ref}: no model; append it to the URL: {url}#MODEL")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"{url}: not a valid URL ({error})") from None
    if not host:
        raise UserError(f"{ref}: no host; write https://HOST/v1#MODEL")
    if parts.username or parts.password:
        raise UserError(
            f"{parts.scheme}://...@{host}: a URL with a password would be stored in every manifest; put the key in"
            " an environment variable and use ?key=NAME"
        )
    try:
        return url, model, RemoteOptions.model_validate(dict(parse_qsl(query, keep_blank_values=True)))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, RemoteOptions.model_fields, n=1)
            raise UserError(
                f"{ref}: unknown option {field!r}"
                + (f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(RemoteOptions.model_fields)}")
            ) from None
        if field == "key":
            raise UserError(
                f"{url}#{model}: option 'key' is the name of an environment variable, not the key itself"
            ) from None
        raise UserError(f"{ref}: option {field!r}: {first['msg']}") from None


def get_api(url: str, options: RemoteOptions) -> Api:
    """Return the API a server speaks."""
    return options.api or HOSTS.get(urlsplit(url).hostname or "", "openai")


def get_remote_identity(url: str, model: str, options: RemoteOptions) -> str:
    """Return the string that identifies a remote model."""
    return f"{url}#{model}" + (f"?sampling={options.sampling}" if options.sampling else "")


def get_api_key(url: str, options: RemoteOptions, default_variable: str) -> str:
    """Return the key to send, or ""; `default_variable` is the API's own environment variable.

    UserError when the variable named in the options is not set.
    """
    if options.key:
        if not os.environ.get(options.key):
            raise UserError(f"{url}: the environment variable {options.key} is not set; put the API key there")
        return os.environ[options.key]
    return os.environ.get(default_variable, "") if _is_safe(url) else ""


def _is_safe(url: str) -> bool:
    """Return whether the connection cannot be read by others: https or loopback."""
    parts = urlsplit(url)
    if parts.scheme == "https" or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False
