"""Stage `model.new`: initialize an untrained decoder of any architecture with a tokenizer, for pretraining.

A decoder whose shape matches Llama, Mistral, Qwen, Gemma or GPT-2 is saved as that architecture. Does not train.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from llmworks.core.artifact import Adapter, Model, Tokenizer
from llmworks.core.context import Context
from llmworks.model.io.untrained import TokenIds, save_untrained
from llmworks.model.shape import Shape


class NewConfig(Shape):
    """Architecture of an untrained decoder."""

    vocab_size: int = Field(
        0, ge=0, description="embedding rows; 0 = number of tokenizer tokens, rounded up to a multiple of 64"
    )


def new(config: NewConfig, tokenizer: Tokenizer | Model | Adapter, ctx: Context) -> Model:
    """Initialize a decoder's weights from the run's seed and save them with the tokenizer.

    Normal initialization with std 0.02, smaller for projections into the residual stream.

    Errors: UserError for a vocab_size smaller than the tokenizer's; ModelError for a tokenizer that cannot be read.
    """

    def create_model(vocabulary: int, ids: TokenIds) -> tuple[Any, str]:
        from llmworks.model.io.decoder_files import save_decoder
        from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM

        model = DecoderForCausalLM(DecoderConfig(shape=config.model_dump() | {"vocab_size": vocabulary}))
        return model, save_decoder(model, ctx.out, token_ids=ids) or "decoder"

    return save_untrained(config, tokenizer, ctx, create_model)
