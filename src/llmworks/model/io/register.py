"""Register the decoder, encoders, n-gram and recurrent models with transformers' `Auto` classes, by import."""

from __future__ import annotations

import llmworks.model.ngram.ngram
import llmworks.model.nn.decoder
import llmworks.model.nn.encoder
import llmworks.model.nn.recurrent  # noqa: F401
