"""Stages `model.new` and `model.recurrent`: an untrained model of any shape, with a tokenizer: what pre-training begins with.

A decoder whose shape is Llama's, Mistral's, Qwen's, Gemma's or GPT-2's is saved as that. Trains nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pydantic import Field

from llmworks.artifact import Adapter, Model, Tokenizer
from llmworks.context import Context
from llmworks.errors import MissingDependency, UserError
from llmworks.model.shape import RecurrentShape, Shape

ROUND = 64  # rows of an embedding compute fastest in multiples of it
Ids = dict[str, int]


class NewConfig(Shape):
    """What a decoder is made of."""

    vocabulary: int = Field(0, ge=0, description="rows of the embedding; 0: the tokenizer's tokens, rounded up to 64")


class RecurrentConfig(RecurrentShape):
    """What a model without attention is made of."""

    vocabulary: int = Field(0, ge=0, description="rows of the embedding; 0: the tokenizer's tokens, rounded up to 64")


def new(config: NewConfig, tokenizer: Tokenizer | Model | Adapter, ctx: Context) -> Model:
    """Draw a decoder's weights by the run's seed (normal, 0.02; less where a layer adds to the state) and save them beside the tokenizer.

    Errors: UserError for a vocabulary that is smaller than the tokenizer's; ModelError for a tokenizer that cannot be read.
    """

    def draw(vocabulary: int, ids: Ids) -> tuple[Any, str]:
        from llmworks.model.decoder import DecoderConfig, DecoderForCausalLM
        from llmworks.model.standard import save_decoder

        model = DecoderForCausalLM(DecoderConfig(shape=config.model_dump() | {"vocabulary": vocabulary}))
        return model, save_decoder(model, ctx.out, token_ids=ids) or "decoder"

    return _save(config, tokenizer, ctx, draw)


def recurrent(config: RecurrentConfig, tokenizer: Tokenizer | Model | Adapter, ctx: Context) -> Model:
    """Draw the weights of an RNN, LSTM, GRU or window model by the run's seed and save them beside the tokenizer.

    Errors: UserError for a vocabulary that is smaller than the tokenizer's; ModelError for a tokenizer that cannot be read.
    """

    def draw(vocabulary: int, ids: Ids) -> tuple[Any, str]:
        from llmworks.model import recurrent
        from llmworks.tokenize.load import quiet_transformers

        quiet_transformers()
        model = recurrent.RecurrentForCausalLM(recurrent.RecurrentConfig(shape=config.model_dump() | {"vocabulary": vocabulary}, **ids))
        model.save_pretrained(ctx.out)
        return model, config.kind

    return _save(config, tokenizer, ctx, draw)


def _save(config: NewConfig | RecurrentConfig, tokenizer: Tokenizer | Model | Adapter, ctx: Context, draw: Callable[[int, Ids], tuple[Any, str]]) -> Model:
    """`draw` (vocabulary, special ids) makes the model, saves it, and says what it was saved as."""
    import torch

    from llmworks.model.golden import record
    from llmworks.tokenize.load import ids_of
    from llmworks.tokenize.named import tokenizer_of

    loaded = tokenizer_of(tokenizer)
    needed = ids_of(loaded)
    if config.vocabulary and config.vocabulary < needed:
        raise UserError(f"config.vocabulary is {config.vocabulary:,}, the tokenizer has {needed:,} tokens")
    vocabulary = config.vocabulary or -(-needed // ROUND) * ROUND
    require_memory(config.model_copy(update={"vocabulary": vocabulary}))
    torch.manual_seed(ctx.seed)
    ids = {name: getattr(loaded, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id") if getattr(loaded, name) is not None}
    model, kind = draw(vocabulary, ids)
    loaded.model_max_length = config.context
    loaded.save_pretrained(ctx.out)
    (ctx.out / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
    parameters = sum(p.numel() for p in model.parameters())
    ctx.progress.say(f"{parameters:,} parameters, saved as {kind}")
    return Model(ctx.out, golden=record(ctx.out), metrics={"parameters": parameters}, about={"format": "hf", "dtype": "float32", "architecture": kind})


def require_memory(shape: Shape | RecurrentShape) -> None:
    """Whether the weights fit into this machine, twice, since they are written too. Errors: MissingDependency."""
    import os

    from llmworks.model.anatomy import parts_of

    wanted = 8 * sum(part.parameters for part in parts_of(shape, 1))
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if wanted > there:
        raise MissingDependency(f"the model has {wanted // 8:,} parameters; making it takes {wanted / 1e9:,.0f} GB of memory, this machine has {there / 1e9:,.0f} GB")
