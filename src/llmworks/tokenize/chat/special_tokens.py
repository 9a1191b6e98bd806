"""Detect special tokens in message text: a user who writes `<|im_end|>` ends a turn and can speak for others."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

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

    def find_in_turn(self, message: Message) -> list[str]:
        """Return the special tokens in a turn's content and tool calls."""
        calls = [
            text for call in message.tool_calls for text in (call.name, json.dumps(call.arguments, ensure_ascii=False))
        ]
        return list(dict.fromkeys(token for text in (message.content, *calls) for token in self.find_in_text(text)))

    def find_in_tools(self, tools: Sequence[Json]) -> list[str]:
        """Return the special tokens in tool definitions."""
        return self.find_in_text(json.dumps(list(tools), ensure_ascii=False)) if tools else []
