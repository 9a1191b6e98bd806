"""The types that stages exchange, and the Engine protocol. Does not depend on files, tensors or HTTP.

Requests carry messages or token ids; completions carry the sampled ids, so that text is never tokenized again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from llmworks.core.errors import LlmworksError, RequestError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = frozenset({"role", "content", "tool_calls", "tool_call_id", "name", "weight", "function_call"})
FinishReason = Literal["stop", "length", "cancelled", "filtered"]
Json = dict[str, Any]


@dataclass(frozen=True)
class ToolCall:
    """A function call by a model; `arguments` is the parsed JSON object."""

    name: str
    arguments: Json
    id: str = ""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    `content` is text; an assistant turn may have tool calls instead of it, or in addition.

    `weight` 0: an assistant turn that is not trained on (as in OpenAI's fine-tuning format). `extra`: its other fields
    as a JSON object, such as reasoning_content, or ""; a chat template may read them.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""
    weight: int = 1
    extra: str = ""

    @property
    def extra_fields(self) -> Json:
        """The other fields of the turn."""
        import json

        return dict(json.loads(self.extra)) if self.extra else {}


@dataclass(frozen=True)
class Document:
    """A text to train on. `source`: the file it came from; `metadata`: its other fields there (plain JSON values)."""

    id: str
    text: str
    source: str
    metadata: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 are off; `seed` None is random."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}, it must be greater than 0")
        if not self.temperature >= 0:
            raise RequestError(f"temperature is {self.temperature}, it must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}, it must be greater than 0 and at most 1")


@dataclass(frozen=True)
class Request:
    """One prompt: messages (rendered with the model's chat template and `tools`), or token `ids` as they are.

    `schema`: JSON schema that constrains the completion (needs "schema").
    """

    messages: tuple[Message, ...] = ()
    ids: tuple[int, ...] = ()
    tools: tuple[Json, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    schema: Json | None = None

    def __post_init__(self) -> None:
        """Raise RequestError unless `messages` is a sequence of Message, not a string or a single Message."""
        if isinstance(self.messages, (str, Message)) or not all(isinstance(one, Message) for one in self.messages):
            raise RequestError(f"messages takes a tuple of Message, not {self.messages!r:.80}")


@dataclass(frozen=True)
class Completion:
    """A completion: its text, sampled ids (stop token excluded), their log-probabilities in nats, the finish reason.

    `ids` and `logprobs` are empty where an engine does not return them (remote HTTP). `ended`: the stop token, where
    the completion ended with one and the engine returns it.
    """

    text: str
    finish: FinishReason
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    ended: int | None = None


@dataclass(frozen=True)
class Scored:
    """Given tokens: their log-probabilities in nats, and whether greedy decoding would have generated them."""

    logprobs: tuple[float, ...]
    greedy: bool


@dataclass(frozen=True)
class Delta:
    """A piece of a stream: new text; the last piece also carries the whole completion."""

    text: str
    done: Completion | None = None


class Engine(Protocol):
    """Generates completions. Batch first. `can` lists its other capabilities:

    ids: requests of token ids, and the ids of completions · score: log-probabilities of given tokens (loglikelihood) ·
    logits: all logits of given tokens · tools: functions in a request · schema: completions constrained to a JSON
    schema · embed: embeddings · parallel: several requests in parallel are faster.

    Errors: RequestError for an unsupported request, AccessError when no request can succeed, EngineError when
    generation failed.
    """

    name: str
    can: frozenset[str]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Return the completions of all requests, in order. The first error is raised."""
        ...

    def each(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion | LlmworksError]]:
        """Yield (index, completion or that request's error) as they finish; closing the iterator stops the work."""
        ...

    def stream(self, request: Request) -> Iterator[Delta]:
        """Stream one completion; closing the iterator cancels it."""
        ...

    def score(self, ids: Sequence[Sequence[int]], begins: Sequence[int] = ()) -> list[Scored]:
        """Compute log-probabilities of given tokens, per sequence from its begin on, or all after the first.

        Needs "score".
        """
        ...

    def logits(self, ids: Sequence[int]) -> Any:
        """Return next-token logits after every position: numpy [len(ids), vocabulary] (needs "logits")."""
        ...

    def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """Return one embedding per text (needs "embed")."""
        ...

    def close(self) -> None:
        """Free memory and threads."""
        ...


@dataclass(frozen=True)
class Score:
    """A score function's result for one completion: a value in [0, 1] and, when it is not 1, the reason."""

    value: float
    reason: str = ""


class ScoreFunction(Protocol):
    """(prompt messages, completion text, row) -> Score. Pure; used by evaluation, RL rewards and data synthesis."""

    def __call__(self, prompt: Sequence[Message], completion: str, row: Mapping[str, Any]) -> Score:
        """Score one completion."""
        ...


def messages_from_json(items: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Parse messages from their JSON form (role, content and optional OpenAI-style tool_calls).

    ValueError names the turn.
    """
    out: list[Message] = []
    for turn, item in enumerate(items, 1):
        role, content = item.get("role"), item.get("content")
        role = "system" if role == "developer" else role  # OpenAI's newer name
        if role not in ROLES:
            raise ValueError(f"message {turn} has the unknown role {role!r}; known: {', '.join(ROLES)}")
        calls = _parse_calls(item.get("tool_calls"), turn)
        if isinstance(content, list):  # OpenAI content parts
            if any(not isinstance(part, Mapping) or part.get("type") != "text" for part in content):
                raise ValueError(f"message {turn} has content that is not text; only text is supported")
            if any(not isinstance(part.get("text"), str) for part in content):
                raise ValueError(f"message {turn} has a content part without text")
            content = "".join(part["text"] for part in content)
        if content is None and not calls:
            raise ValueError(f"message {turn} ({role}) has neither content nor tool calls")
        if content is not None and not isinstance(content, str):
            raise ValueError(f"message {turn} ({role}): content must be a string, not {type(content).__name__}")
        weight = item.get("weight")
        if weight not in (None, 0, 1):
            raise ValueError(f"message {turn}: weight is {weight!r}, it must be 0 or 1")
        out.append(
            Message(
                role=role,
                content=content or "",
                tool_calls=tuple(calls),
                tool_call_id=str(item.get("tool_call_id") or ""),
                name=str(item.get("name") or ""),
                weight=1 if weight is None else int(weight),
                extra=get_extra_fields(item),
            )
        )
    return tuple(out)


def _parse_calls(given: Any, turn: int) -> list[ToolCall]:
    """Parse the tool calls of a message. ValueError names the turn."""
    if given is not None and not isinstance(given, (list, tuple)):
        raise ValueError(f"message {turn}: tool_calls must be a list, not {type(given).__name__}")
    calls: list[ToolCall] = []
    for call in given or ():
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not (function.get("name") and isinstance(function["name"], str)):
            raise ValueError(f"message {turn}: a tool call must be an object with the name of a function")
        arguments = parse_arguments(function.get("arguments"), turn)
        calls.append(ToolCall(function["name"], arguments, str(call.get("id") or "")))
    return calls


def parse_arguments(given: Any, turn: int) -> Json:
    """Parse the arguments of a tool call: an object, or its JSON text; null and "" are none. ValueError names the
    turn.
    """
    import json

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not valid JSON")

    try:
        parsed = json.loads(given, parse_constant=refuse) if isinstance(given, str) and given.strip() else given or {}
    except ValueError as error:
        raise ValueError(f"message {turn}: the arguments of a tool call are not JSON: {error}") from None
    if not isinstance(parsed, Mapping):
        raise ValueError(f"message {turn}: the arguments of a tool call must be a JSON object")
    return dict(parsed)


def get_extra_fields(item: Mapping[str, Any]) -> str:
    """Return the fields of a JSON message that Message has no place for, as JSON; "" without any that has a value."""
    import json

    found = {key: item[key] for key in item if key not in MESSAGE_KEYS and item[key] not in (None, "", [], {})}
    return json.dumps(found, ensure_ascii=False, sort_keys=True) if found else ""


def messages_to_json(messages: Sequence[Message]) -> list[Json]:
    """Return the JSON form of messages: the inverse of `messages_from_json` for text turns and tool calls."""
    import json

    out: list[Json] = []
    for message in messages:
        item: Json = {"role": message.role, "content": message.content}
        if message.tool_calls:
            item["tool_calls"] = [
                {
                    "id": c.id,
                    "type": "function",
                    "function": {"name": c.name, "arguments": json.dumps(c.arguments, ensure_ascii=False)},
                }
                for c in message.tool_calls
            ]
        if message.tool_call_id:
            item["tool_call_id"] = message.tool_call_id
        if message.name:
            item["name"] = message.name
        if not message.weight:
            item["weight"] = 0
        out.append(message.extra_fields | item)
    return out
