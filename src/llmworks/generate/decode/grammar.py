"""Answers held to a JSON schema: which tokens may come next. The automaton is llguidance's; knows no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmworks.core.errors import RequestError
from llmworks.core.types import Json

if TYPE_CHECKING:
    from torch import Tensor

FORM: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}  # else a model may write spaces for ever


def check_schema(schema: Json) -> None:
    """RequestError for what is no JSON schema, or is not whole by itself."""
    import jsonschema_rs

    try:
        jsonschema_rs.validator_for(schema, offline=True)
    except jsonschema_rs.ValidationError as error:
        raise RequestError(f"this is no JSON schema: {error.message}") from None


class Grammars:
    """Makes masks for one tokenizer. `vocabulary`: width of the logits, which may be above the tokenizer's size."""

    def __init__(self, tokenizer: Any, stops: Sequence[int], vocabulary: int) -> None:
        import llguidance.hf

        self.vocabulary = vocabulary
        self.tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=sorted(stops))

    def start(self, schema: Json) -> Grammar:
        """One answer's state. RequestError for a schema that is none, or asks for what cannot be enforced."""
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(
                self.tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=FORM), log_level=0
            )
        except ValueError as error:
            raise RequestError(f"the JSON schema cannot be held to: {' '.join(str(error).split())[:200]}") from None
        if matcher.is_error():
            raise RequestError(f"the JSON schema cannot be held to: {' '.join(matcher.get_error().split())[:200]}")
        return Grammar(matcher, self.vocabulary)


class Grammar:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self.matcher, self.vocabulary = matcher, vocabulary

    def allow(self, logits: Tensor) -> Tensor:
        """Logits [vocabulary] with -inf for every token that may not come next."""
        import numpy as np
        import torch

        bits = np.unpackbits(
            np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8), count=self.vocabulary, bitorder="little"
        )
        return logits.masked_fill(torch.from_numpy(bits == 0), float("-inf"))

    def take(self, token: int) -> None:
        """Go on with a token that was allowed."""
        self.matcher.consume_token(token)
