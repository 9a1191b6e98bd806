"""Save an untrained model with its tokenizer, special token ids and golden tokens, after checking memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from llmworks.core.artifact import Adapter, Model, Tokenizer
from llmworks.core.context import Context
from llmworks.core.errors import MissingDependency, UserError
from llmworks.model.shape import RecurrentShape, Shape

VOCAB_MULTIPLE = 64  # vocabulary sizes are padded to a multiple of this for speed
TokenIds = dict[str, int]


def save_untrained(
    config: Shape | RecurrentShape,
    tokenizer: Tokenizer | Model | Adapter,
    ctx: Context,
    create_model: Callable[[int, TokenIds], tuple[Any, str]],
) -> Model:
    """Save a model that `create_model(vocab_size, special ids)` creates and saves; it returns the architecture name."""
    import torch

    from llmworks.model.golden import record_golden
    from llmworks.tokenize.chat.named_templates import load_model_tokenizer
    from llmworks.tokenize.load import count_embedding_rows

    loaded = load_model_tokenizer(tokenizer)
    needed = count_embedding_rows(loaded)
    if config.vocab_size and config.vocab_size < needed:
        raise UserError(f"config.vocab_size is {config.vocab_size:,}, but the tokenizer has {needed:,} tokens")
    vocabulary = config.vocab_size or -(-needed // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    require_memory(config.model_copy(update={"vocab_size": vocabulary}))
    torch.manual_seed(ctx.seed)
    ids = {
        name: getattr(loaded, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if getattr(loaded, name) is not None
    }
    model, kind = create_model(vocabulary, ids)
    loaded.model_max_length = config.max_position_embeddings
    loaded.save_pretrained(ctx.out)
    (ctx.out / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
    parameters = sum(p.numel() for p in model.parameters())
    ctx.progress.log(f"{parameters:,} parameters, saved as architecture {kind}")
    return Model(
        ctx.out,
        golden=record_golden(ctx.out),
        metrics={"parameters": parameters},
        about={"format": "hf", "dtype": "float32", "architecture": kind},
    )


def require_memory(shape: Shape | RecurrentShape) -> None:
    """Check that twice the weights (in memory and for writing) fit into memory. Errors: MissingDependency."""
    import os

    from llmworks.model.anatomy.parts import list_parts

    needed = 8 * sum(part.parameters for part in list_parts(shape, 1))
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise MissingDependency(
            f"the model has {needed // 8:,} parameters; creating it needs {needed / 1e9:,.0f} GB of memory, this"
            f" machine has {available / 1e9:,.0f} GB"
        )
