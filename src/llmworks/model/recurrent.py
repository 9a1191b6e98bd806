"""Stage `model.recurrent`: initialize an untrained RNN, LSTM, GRU or fixed-window MLP model with a tokenizer."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from llmworks.core.artifact import Adapter, Model, Tokenizer
from llmworks.core.context import Context
from llmworks.model.io.untrained import TokenIds, save_untrained
from llmworks.model.shape import RecurrentShape


class RecurrentConfig(RecurrentShape):
    """Architecture of a language model without attention."""

    vocab_size: int = Field(
        0, ge=0, description="embedding rows; 0 = number of tokenizer tokens, rounded up to a multiple of 64"
    )


def recurrent(config: RecurrentConfig, tokenizer: Tokenizer | Model | Adapter, ctx: Context) -> Model:
    """Initialize an RNN, LSTM, GRU or fixed-window MLP model from the run's seed and save it with the tokenizer.

    Errors: UserError for a vocab_size smaller than the tokenizer's; ModelError for a tokenizer that cannot be read.
    """

    def create_model(vocabulary: int, ids: TokenIds) -> tuple[Any, str]:
        from llmworks.model.nn import recurrent
        from llmworks.tokenize.load import silence_transformers

        silence_transformers()
        model = recurrent.RecurrentForCausalLM(
            recurrent.RecurrentModelConfig(shape=config.model_dump() | {"vocab_size": vocabulary}, **ids)
        )
        model.save_pretrained(ctx.out)
        return model, config.rnn_type

    return save_untrained(config, tokenizer, ctx, create_model)
