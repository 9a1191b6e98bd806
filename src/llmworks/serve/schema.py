"""The OpenAI chat completions request that this server accepts, and its conversion to a `Request`.

Does not depend on an HTTP framework.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from llmworks.core.errors import RequestError
from llmworks.core.types import Request, Sampling, messages_from_json

# API fields that would change the completion, with their neutral values. Any other value is refused, not
# ignored.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "frequency_penalty": (None, 0, 0.0),
    "presence_penalty": (None, 0, 0.0),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "response_format": (None, {"type": "text"}),
    "audio": (None,),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "web_search_options": (None,),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
}


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="allow")
    include_usage: bool = False


class ChatRequest(BaseModel):
    """Body of POST /v1/chat/completions. Unknown fields are kept, so that unsupported ones are refused by name."""

    model_config = ConfigDict(extra="allow")
    model: str
    messages: list[dict[str, Any]] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, gt=0)
    max_completion_tokens: int | None = Field(None, gt=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = None
    stop: str | list[str] | None = None

    def to_request(self, default_max_tokens: int) -> Request:
        """Return the engine's request. RequestError for unsupported fields."""
        for name, harmless in NEUTRAL_VALUES.items():
            value = (self.model_extra or {}).get(name)
            if value not in harmless:
                raise RequestError(f"{name}: {value!r} is not supported by this server")
        try:
            messages = messages_from_json(self.messages)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"messages: {error}") from None
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > 4:
            raise RequestError("stop: at most 4 strings are allowed")
        sampling = Sampling(
            max_tokens=self.max_completion_tokens or self.max_tokens or default_max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            seed=self.seed,
            stop=stop,
        )
        return Request(messages, tools=self._tools(), sampling=sampling)

    def _tools(self) -> tuple[dict[str, Any], ...]:
        if self.tool_choice not in (None, "auto", "none"):
            raise RequestError(
                f"tool_choice: {self.tool_choice!r} is not supported by this server, only 'auto' and 'none'"
            )
        for i, tool in enumerate(self.tools or ()):
            if (
                tool.get("type") != "function"
                or not isinstance(tool.get("function"), dict)
                or not isinstance(tool["function"].get("name"), str)
            ):
                raise RequestError(
                    f"tools[{i}]: must be {{'type': 'function', 'function': {{'name': ..., 'parameters': ...}}}}"
                )
        return () if self.tool_choice == "none" else tuple(self.tools or ())
