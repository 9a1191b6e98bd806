"""Stage `model.new`: an untrained model of any shape, with a tokenizer: what pre-training begins with.

A shape that is Llama's, Mistral's, Qwen's, Gemma's or GPT-2's is saved as that.
"""

from __future__ import annotations

import json

from pydantic import Field

from llmworks.artifact import Adapter, Model, Tokenizer
from llmworks.context import Context
from llmworks.errors import UserError
from llmworks.model.shape import Shape

ROUND = 64  # rows of an embedding compute fastest in multiples of it


class NewConfig(Shape):
    """What the model is made of."""

    vocabulary: int = Field(0, ge=0, description="rows of the embedding; 0: the tokenizer's tokens, rounded up to 64")


def new(config: NewConfig, tokenizer: Tokenizer | Model | Adapter, ctx: Context) -> Model:
    """Draw the weights by the run's seed (normal, 0.02; less where a layer adds to the state) and save them beside the tokenizer.

    Errors: UserError for a vocabulary that is smaller than the tokenizer's; ModelError for a tokenizer that cannot be read.
    """
    import torch

    from llmworks.model.decoder import DecoderConfig, DecoderForCausalLM
    from llmworks.model.golden import record
    from llmworks.model.standard import save_decoder
    from llmworks.tokenize.named import tokenizer_of

    loaded = tokenizer_of(tokenizer)
    if config.vocabulary and config.vocabulary < len(loaded):
        raise UserError(f"config.vocabulary is {config.vocabulary:,}, the tokenizer has {len(loaded):,} tokens")
    shape = Shape.model_validate(config.model_dump() | {"vocabulary": config.vocabulary or -(-len(loaded) // ROUND) * ROUND})
    torch.manual_seed(ctx.seed)
    model = DecoderForCausalLM(DecoderConfig(shape=shape.model_dump()))
    ids = {name: getattr(loaded, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id") if getattr(loaded, name) is not None}
    kind = save_decoder(model, ctx.out, token_ids=ids) or "decoder"
    loaded.model_max_length = shape.context
    loaded.save_pretrained(ctx.out)
    (ctx.out / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
    parameters = sum(p.numel() for p in model.parameters())
    ctx.progress.say(f"{parameters:,} parameters, saved as {kind}")
    return Model(ctx.out, golden=record(ctx.out), metrics={"parameters": parameters}, about={"format": "hf", "dtype": "float32", "architecture": kind})
