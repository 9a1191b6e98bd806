"""Makes the decoder, encoders, n-grams and recurrent models known to transformers, so that their directories load by
its `Auto` classes.

Nothing else.
"""

from __future__ import annotations

import llmworks.model.ngram.ngram
import llmworks.model.nn.decoder
import llmworks.model.nn.encoder
import llmworks.model.nn.recurrent  # noqa: F401
