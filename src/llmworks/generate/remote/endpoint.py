"""How a remote model is asked, as its reference says:
`https://HOST/v1#MODEL?key=GROQ_API_KEY&concurrency=8&requests_per_minute=30`.

Three hosts are known to speak an API of their own; every other is taken to speak OpenAI's, unless `api` says otherwise:
`https://api.anthropic.com/v1#MODEL`, `https://generativelanguage.googleapis.com/v1beta#MODEL`,
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
    """What stands behind the `?` of a remote reference. Nothing of it but `sampling` changes what a model answers."""

    api: Literal["", "openai", "anthropic", "google", "cohere"] = Field(
        "", description="what the server speaks; default: what its host is known for, else openai"
    )
    key: str = Field(
        "",
        pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$",
        description=(
            "environment variable that holds the API key; default that of the API (OPENAI_API_KEY, ANTHROPIC_API_KEY,"
            " GEMINI_API_KEY, CO_API_KEY), which is sent over https or to this machine only; one that is named here is"
            " sent wherever the reference leads"
        ),
    )
    sampling: Literal["", "asked", "default"] = Field(
        "",
        description=(
            "`default` sends no temperature, top_p and top_k, for models that refuse them, `asked` sends them; default:"
            " asked, but for Anthropic's API, which takes none today"
        ),
    )
    tokenizer: str = Field(
        "",
        description=(
            "directory of the model's own tokenizer: then given text can be scored, where the server has OpenAI's"
            " completions API with `echo` (vLLM)"
        ),
    )
    concurrency: int = Field(4, gt=0, le=256, description="requests at once")
    requests_per_minute: int = Field(0, ge=0, description="at most; 0: no limit")
    tokens_per_minute: int = Field(0, ge=0, description="prompt and answer together, at most; 0: no limit")
    timeout: float = Field(
        600.0, gt=0, description="seconds without a byte after which a request is given up and sent again"
    )
    retries: int = Field(
        6, ge=0, le=50, description="attempts after the first, after 429, 5xx, timeouts, broken and senseless replies"
    )
    input_price: float = Field(0.0, ge=0, description="price of a million prompt tokens")
    output_price: float = Field(0.0, ge=0, description="price of a million answer tokens")
    budget: float = Field(0.0, ge=0, description="stop when so much is spent; 0: no bound")


def parse_remote(ref: str) -> tuple[str, str, RemoteOptions]:
    """(URL, model, options) of a remote reference. UserError for a missing model or an unknown option."""
    url, _, rest = ref.partition("#")
    model, _, query = rest.partition("?")
    if not model:
        raise UserError(f"{ref}: name the model behind the URL, as in {url}#MODEL")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"{url}: is no address ({error})") from None
    if not host:
        raise UserError(f"{ref}: has no host; write https://HOST/v1#MODEL")
    if parts.username or parts.password:
        raise UserError(
            f"{parts.scheme}://...@{host}: an address with a password would stand in every manifest; put the key into"
            " an environment variable and name it: ?key=NAME"
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


def api_of(url: str, options: RemoteOptions) -> Api:
    """What a server speaks."""
    return options.api or HOSTS.get(urlsplit(url).hostname or "", "openai")


def identity(url: str, model: str, options: RemoteOptions) -> str:
    """What tells a remote model from another."""
    return f"{url}#{model}" + (f"?sampling={options.sampling}" if options.sampling else "")


def api_key(url: str, options: RemoteOptions, usual: str) -> str:
    """The key to send, or ""; `usual` is the API's own variable.

    UserError when the variable that was named is not set.
    """
    if options.key:
        if not os.environ.get(options.key):
            raise UserError(f"{url}: the environment variable {options.key} is not set; put the API key there")
        return os.environ[options.key]
    return os.environ.get(usual, "") if _is_safe(url) else ""


def _is_safe(url: str) -> bool:
    """Whether nobody on the way can read what is sent."""
    parts = urlsplit(url)
    if parts.scheme == "https" or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False
