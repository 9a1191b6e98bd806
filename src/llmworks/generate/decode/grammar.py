"""Constrained decoding to a JSON schema: masks the tokens that may not come next. The automaton is llguidance's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmworks.core.errors import RequestError
from llmworks.core.types import Json

if TYPE_CHECKING:
    from torch import Tensor

JSON_STYLE: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}  # else a model may generate whitespace without end


def check_schema(schema: Json) -> None:
    """Raise RequestError for an invalid JSON schema, or one with external references."""
    import jsonschema_rs

    try:
        jsonschema_rs.validator_for(schema, offline=True)
    except jsonschema_rs.ValidationError as error:
        raise RequestError(f"this is not a valid JSON schema: {error.message}") from None


class GrammarCompiler:
    """Compiles schemas for one tokenizer. `vocabulary`: size of the logits, which may exceed the tokenizer's."""

    def __init__(self, tokenizer: Any, stops: Sequence[int], vocabulary: int) -> None:
        import llguidance.hf

        self.vocabulary = vocabulary
        self.tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(stops))

    def compile(self, schema: Json) -> GrammarState:
        """Return the initial state of one completion. RequestError for an invalid or unsupported schema."""
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(
                self.tokenizer,
                LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=JSON_STYLE),
                log_level=0,
            )
        except ValueError as error:
            raise RequestError(f"the JSON schema cannot be enforced: {' '.join(str(error).split())[:200]}") from None
        if matcher.is_error():
            raise RequestError(f"the JSON schema cannot be enforced: {' '.join(matcher.get_error().split())[:200]}")
        return GrammarState(matcher, self.vocabulary)


class GrammarState:
    """State of one completion in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self.matcher, self.vocabulary = matcher, vocabulary

    def mask_logits(self, logits: Tensor) -> Tensor:
        """Return logits [vocabulary] with -inf for every token that may not come next."""
        import numpy as np
        import torch

        bits = np.unpackbits(
            np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8), count=self.vocabulary, bitorder="little"
        )
        return logits.masked_fill(torch.from_numpy(bits == 0), float("-inf"))

    def advance(self, token: int) -> None:
        """Advance by a generated token."""
        self.matcher.consume_token(token)
