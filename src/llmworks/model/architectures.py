"""Makes the decoder, encoders, n-grams and recurrent models known to transformers, so that their directories load by its `Auto` classes. Nothing else."""

from __future__ import annotations

import llmworks.model.decoder
import llmworks.model.encoder
import llmworks.model.ngram
import llmworks.model.recurrent  # noqa: F401
