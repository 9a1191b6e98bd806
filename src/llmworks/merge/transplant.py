"""Stage `merge.transplant`: a model gets another tokenizer.

Rows of tokens that both have are kept, those of new tokens are the mean of the rows of the pieces that the model's own
tokenizer makes of them.

As in Minixhofer et al. 2022 (WECHSEL, arXiv:2112.06598) and mergekit-tokensurgeon's `subword`; what it costs is
measured on texts, in bits a byte, which tokenizers can be compared by. The model is to be trained on.
"""

from __future__ import annotations

from llmworks.core.artifact import Dataset, Model, Tokenizer
from llmworks.core.context import Context
from llmworks.merge.vocabulary.config import TransplantConfig


def transplant(
    config: TransplantConfig, model: Model, tokenizer: Model | Tokenizer, ctx: Context, data: Dataset | None = None
) -> Model:
    """`model` with the tokenizer and template of `tokenizer`.

    Its golden tokens are recorded anew, since another vocabulary reads texts in other tokens.

    Errors: ModelError for tokenizers without a tokenizer.json, or with a vocabulary of a kind that is not known.
    """
    from llmworks.merge.vocabulary.transplant import run

    return run(config, model, tokenizer, ctx, data)
