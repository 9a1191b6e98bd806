"""Stage `merge.transplant`: a model gets another tokenizer. Rows of tokens that both have are kept, those of new tokens are the mean of the rows of the pieces that the model's own tokenizer makes of them.

As in Minixhofer et al. 2022 (WECHSEL, arXiv:2112.06598) and mergekit-tokensurgeon's `subword`; what it costs is measured on texts, in bits a byte, which tokenizers can be compared by. The model is to be trained on.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.artifact import Config, Dataset, Model, Tokenizer
from llmworks.context import Context


class TransplantConfig(Config):
    """What new tokens begin as, and what is looked at."""

    new: Literal["pieces", "mean", "zero"] = Field("pieces", description="rows of tokens that the model has not: the mean of their pieces' rows, the mean of all rows, or zeros")
    texts: int = Field(64, gt=0, description="rows of `data` on which the model is measured before and after")
    shard_bytes: int = Field(4_000_000_000, ge=1_000_000, description="bytes of a file at most")


def transplant(config: TransplantConfig, model: Model, tokenizer: Model | Tokenizer, ctx: Context, data: Dataset | None = None) -> Model:
    """`model` with the tokenizer and template of `tokenizer`. Its golden tokens are recorded anew, since another vocabulary reads texts in other tokens.

    Errors: ModelError for tokenizers without a tokenizer.json, or with a vocabulary of a kind that is not known.
    """
    from llmworks.merge.tokens import run

    return run(config, model, tokenizer, ctx, data)
