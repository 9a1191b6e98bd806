"""Control tokens that stand in somebody's text: whoever writes `<|im_end|>` there ends a turn and speaks for others.

Knows no template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from llmworks.core.types import Json, Message


class ControlTokens:
    """A tokenizer's special tokens, and where they are found."""

    def __init__(self, tokenizer: Any) -> None:
        added = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.tokens = sorted({*map(str, tokenizer.all_special_tokens), *added} - {""}, key=len, reverse=True)
        self._any = re.compile("|".join(map(re.escape, self.tokens)) or "(?!)")
        self._first = "".join(sorted({token[0] for token in self.tokens}))

    def within(self, text: str) -> list[str]:
        """The control tokens in a text, in their order, each once."""
        for first in self._first:  # most texts end here, which is much faster
            if first in text:
                return list(dict.fromkeys(self._any.findall(text)))
        return []

    def of_turn(self, message: Message) -> list[str]:
        """Those in a turn's text and in its calls."""
        calls = [
            text for call in message.tool_calls for text in (call.name, json.dumps(call.arguments, ensure_ascii=False))
        ]
        return list(dict.fromkeys(token for text in (message.content, *calls) for token in self.within(text)))

    def of_tools(self, tools: Sequence[Json]) -> list[str]:
        """Those in the descriptions of tools."""
        return self.within(json.dumps(list(tools), ensure_ascii=False)) if tools else []
