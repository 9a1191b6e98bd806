"""Stage `model.new`: an untrained decoder of any shape, with a tokenizer: what pre-training begins with.

A decoder whose shape is Llama's, Mistral's, Qwen's, Gemma's or GPT-2's is saved as that. Trains nothing.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from llmworks.core.artifact import Adapter, Model, Tokenizer
from llmworks.core.context import Context
from llmworks.model.io.untrained import Ids, save_untrained
from llmworks.model.shape import Shape


class NewConfig(Shape):
    """What a decoder is made of."""

    vocab_size: int = Field(0, ge=0, description="rows of the embedding; 0: the tokenizer's tokens, rounded up to 64")


def new(config: NewConfig, tokenizer: Tokenizer | Model | Adapter, ctx: Context) -> Model:
    """Draw a decoder's weights by the run's seed (normal, 0.02; less where a layer adds to the state) and save them
    beside the tokenizer.

    Errors: UserError for a vocabulary that is smaller than the tokenizer's; ModelError for a tokenizer that cannot be
    read.
    """

    def draw(vocabulary: int, ids: Ids) -> tuple[Any, str]:
        from llmworks.model.io.decoder_files import save_decoder
        from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM

        model = DecoderForCausalLM(DecoderConfig(shape=config.model_dump() | {"vocab_size": vocabulary}))
        return model, save_decoder(model, ctx.out, token_ids=ids) or "decoder"

    return save_untrained(config, tokenizer, ctx, draw)
