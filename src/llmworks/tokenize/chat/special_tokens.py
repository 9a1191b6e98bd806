"""Special tokens in message text, which would let a user who writes `<|im_end|>` end a turn and speak for others.

They are detected, and encoded as the text that they are: only the template's own special tokens are control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from llmworks.core.errors import ModelError, RequestError
from llmworks.core.types import Json, Message


class SpecialTokenDetector:
    """Detector of a tokenizer's special tokens in text."""

    def __init__(self, tokenizer: Any) -> None:
        added = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.tokens = sorted({*map(str, tokenizer.all_special_tokens), *added} - {""}, key=len, reverse=True)
        self._regex = re.compile("|".join(map(re.escape, self.tokens)) or "(?!)")
        self._first_characters = "".join(sorted({token[0] for token in self.tokens}))

    def find_in_text(self, text: str) -> list[str]:
        """Return the distinct special tokens in a text, in order."""
        for first in self._first_characters:  # most texts contain none of these characters, so the regex is not run
            if first in text:
                return list(dict.fromkeys(self._regex.findall(text)))
        return []

    def split(self, text: str) -> list[str]:
        """Split a text at its special tokens, which are parts of their own."""
        return re.split(f"({self._regex.pattern})", text) if self.tokens else [text]

    def find_in_turn(self, message: Message) -> list[str]:
        """Return the special tokens in a turn's content and tool calls."""
        calls = [
            text for call in message.tool_calls for text in (call.name, json.dumps(call.arguments, ensure_ascii=False))
        ]
        return list(dict.fromkeys(token for text in (message.content, *calls) for token in self.find_in_text(text)))

    def find_in_tools(self, tools: Sequence[Json]) -> list[str]:
        """Return the special tokens in tool definitions."""
        return self.find_in_text(json.dumps(list(tools), ensure_ascii=False)) if tools else []


# A noncharacter that is written into special tokens of message text before a template is rendered, so that they differ
# from the template's own.
ESCAPE = "\ufdd0"
PLACEHOLDER = 0xF0000  # first of the private characters that stand for the template's own special tokens
CALL_MARKS = ("<tool_call>", "</tool_call>")  # written into system and assistant turns for templates without tools
KEEP = "_llmworks_control_tokens"  # attribute of a tokenizer for which special tokens in text are control tokens


def keep_control_tokens(tokenizer: Any) -> None:
    """Let special tokens in message text become control tokens, as other programs do."""
    setattr(tokenizer, KEEP, True)


class TextEscaper:
    """Escapes special tokens in message text, and encodes rendered text in which some are escaped."""

    def __init__(self, tokenizer: Any) -> None:
        self.detector = SpecialTokenDetector(tokenizer)
        self._tokenizer = tokenizer
        self._renamed: tuple[Any, dict[str, str]] | None = None

    def escape(self, text: str, role: str = "user") -> str:
        """Return a text whose special tokens no longer are such; the same text if it has none.

        Errors: RequestError for a text that contains the noncharacter U+FDD0.
        """
        if ESCAPE in text:
            raise RequestError("the text contains the noncharacter U+FDD0; remove it")
        found = self.detector.find_in_text(text)
        own = CALL_MARKS if role in ("system", "assistant") else ()
        for token in sorted((token for token in found if token not in own), key=len, reverse=True):
            text = text.replace(token, token[0] + ESCAPE + token[1:])
        return text

    def escape_value(self, value: Any, role: str = "user") -> Any:
        """Escape all texts of a JSON value."""
        if isinstance(value, str):
            return self.escape(value, role)
        if isinstance(value, dict):
            return {self.escape_value(key, role): self.escape_value(one, role) for key, one in value.items()}
        return [self.escape_value(one, role) for one in value] if isinstance(value, (list, tuple)) else value

    def encode(self, text: str) -> tuple[int, ...]:
        """Encode rendered text: escaped special tokens as text, the template's own as control tokens.

        A copy of the tokenizer is used that knows the control tokens by private characters, so that what surrounds them
        is encoded as always.
        """
        if self._renamed is None:
            self._renamed = _rename_special_tokens(self._tokenizer, self.detector.tokens)
        renamed, placeholders = self._renamed
        parts = self.detector.split(text)
        text = "".join(placeholders.get(part, part) for part in parts).replace(ESCAPE, "")
        return tuple(renamed.encode(text, add_special_tokens=False).ids)


def _rename_special_tokens(tokenizer: Any, tokens: Sequence[str]) -> tuple[Any, dict[str, str]]:
    """Return (a copy of the backend tokenizer with other names for special tokens, name -> other name).

    Errors: ModelError for a tokenizer without a fast backend.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("special tokens in message text need a tokenizer with tokenizer.json (a fast tokenizer)")
    names = {token: chr(PLACEHOLDER + i) for i, token in enumerate(tokens)}
    state = json.loads(backend.to_str())
    state |= {"post_processor": None, "truncation": None, "padding": None}
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(piece, piece): id for piece, id in model["vocab"].items()}
    elif isinstance(model.get("vocab"), list):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    renamed = Tokenizer.from_str(json.dumps(state))
    wrong = next((one for one, name in names.items() if renamed.token_to_id(name) != backend.token_to_id(one)), None)
    if wrong is not None:
        raise ModelError(f"the special token {wrong!r} has no single id in tokenizer.json")
    return renamed, names


_ESCAPERS: WeakKeyDictionary[Any, TextEscaper] = WeakKeyDictionary()


def get_escaper(tokenizer: Any) -> TextEscaper | None:
    """Return a tokenizer's escaper; None where special tokens in text are control tokens (`keep_control_tokens`)."""
    if getattr(tokenizer, KEEP, False):
        return None
    if tokenizer not in _ESCAPERS:
        _ESCAPERS[tokenizer] = TextEscaper(tokenizer)
    return _ESCAPERS[tokenizer]
