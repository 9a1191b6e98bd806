"""Stage `merge.transplant`: replace a model's tokenizer.

Embedding rows of tokens that both tokenizers have are kept; a new token's row is the mean of the rows of the pieces
into which the model's own tokenizer splits it.

As in Minixhofer et al. 2022 (WECHSEL, arXiv:2112.06598) and mergekit-tokensurgeon's `subword`. The loss is measured in
bits per byte, which is comparable across tokenizers. The model should be trained further.
"""

from __future__ import annotations

from llmworks.core.artifact import Dataset, Model, Tokenizer
from llmworks.core.context import Context
from llmworks.merge.vocabulary.config import TransplantConfig


def transplant(
    config: TransplantConfig, model: Model, tokenizer: Model | Tokenizer, ctx: Context, data: Dataset | None = None
) -> Model:
    """Give `model` the tokenizer and chat template of `tokenizer`.

    Its golden tokens are recorded anew, since another vocabulary tokenizes text differently.

    Errors: ModelError for tokenizers without a tokenizer.json, or with an unsupported kind of vocabulary.
    """
    from llmworks.merge.vocabulary.transplant import run

    return run(config, model, tokenizer, ctx, data)
