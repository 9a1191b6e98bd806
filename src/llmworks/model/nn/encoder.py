"""Other models of the decoder's blocks: an encoder that guesses hidden tokens, and an encoder-decoder that writes what
was hidden.

BERT-like (Devlin et al. 2019) and T5-like (Raffel et al. 2020) in what they do, with the shape's norms, positions and
feed-forward layers. What is hidden is chosen in `masking.py`; knows no other architecture.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, Seq2SeqLMOutput

from llmworks.model.loss.linear_cross_entropy import IGNORED, head_loss
from llmworks.model.nn.attention import seen
from llmworks.model.nn.decoder import DecoderConfig, Memory, Stack, begin
from llmworks.model.shape import Shape


class EncoderConfig(DecoderConfig):  # type: ignore[no-untyped-call]
    """The shape of an encoder."""

    model_type = "llmworks_encoder"


class Seq2SeqConfig(DecoderConfig):  # type: ignore[no-untyped-call]
    """The shape of an encoder and of a decoder beside it."""

    model_type = "llmworks_encoder_decoder"

    def __init__(self, shape: dict[str, Any] | None = None, **kwargs: Any) -> None:
        kwargs["is_encoder_decoder"] = True
        kwargs.setdefault("decoder_start_token_id", 0)  # as T5, where it is the padding
        super().__init__(shape, **kwargs)


def places(ids: Tensor, before: int = 0) -> Tensor:
    """Positions [1, length] of ids that follow `before` others."""
    return torch.arange(before, before + ids.shape[1], device=ids.device)[None]


class EncoderForMaskedLM(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Every token sees every other; a head guesses those that were hidden."""

    config_class = EncoderConfig
    base_model_prefix = "encoder"
    _tied_weights_keys = {"head.weight": "encoder.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.shape = Shape.model_validate(config.shape)
        self.encoder = Stack(self.shape, causal=False)
        self.head = nn.Linear(self.shape.hidden_size, self.shape.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.encoder.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def _init_weights(self, module: nn.Module) -> None:
        begin(module, self.shape)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> MaskedLMOutput:
        """Logits [batch, length, vocabulary] of the tokens themselves; with labels (-100: none) their mean
        cross-entropy instead.
        """
        states = self.encoder(self.encoder.embedding(input_ids), places(input_ids), padding=attention_mask)
        if labels is not None:
            return MaskedLMOutput(loss=head_loss(states, self.head, labels))
        return MaskedLMOutput(logits=self.head(states), hidden_states=(states,))


class Reader(nn.Module):
    """Ids [batch, length] to the states that a decoder looks at; generation calls it once for a text."""

    main_input_name = "input_ids"

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.stack = Stack(shape, causal=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        """Read."""
        return BaseModelOutput(
            last_hidden_state=self.stack(self.stack.embedding(input_ids), places(input_ids), padding=attention_mask)
        )


class EncoderDecoderLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """An encoder reads a text whole; a decoder writes another, looking back at its own and across at all of the first.

    One embedding for both.
    """

    config_class = Seq2SeqConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    _tied_weights_keys = {  # noqa: RUF012 (as transformers declares it)
        "head.weight": "encoder.stack.embedding.weight",
        "decoder.embedding.weight": "encoder.stack.embedding.weight",
    }

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__(config)
        self.shape = Shape.model_validate(config.shape)
        self.encoder, self.decoder = Reader(self.shape), Stack(self.shape, crossing=True)
        self.head = nn.Linear(self.shape.hidden_size, self.shape.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of both."""
        return self.encoder.stack.embedding

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def _init_weights(self, module: nn.Module) -> None:
        begin(module, self.shape)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> Seq2SeqLMOutput:
        """Logits [batch, length, vocabulary] of what the decoder writes next; with labels (-100: none), of which all
        but the last are read, their loss instead.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask)
        states: Tensor = encoder_outputs[0]
        if labels is not None:
            start = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
            decoder_input_ids = torch.cat(
                (start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, self.config.decoder_start_token_id)), 1
            )
        assert decoder_input_ids is not None
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        cache = past_key_values.self_attention_cache if past_key_values is not None else None
        at = places(decoder_input_ids, cache.get_seq_length() if cache is not None else 0)
        memory = Memory(
            states,
            seen(
                at,
                torch.arange(states.shape[1], device=states.device)[None],
                causal=False,
                padding=attention_mask,
                dtype=states.dtype,
            ),
        )
        written = self.decoder(self.get_input_embeddings()(decoder_input_ids), at, cache=cache, memory=memory)
        if labels is not None:
            return Seq2SeqLMOutput(loss=head_loss(written, self.head, labels))
        return Seq2SeqLMOutput(logits=self.head(written), past_key_values=past_key_values)


for _config, _auto, _model in (
    (EncoderConfig, AutoModelForMaskedLM, EncoderForMaskedLM),
    (Seq2SeqConfig, AutoModelForSeq2SeqLM, EncoderDecoderLM),
):
    AutoConfig.register(_config.model_type, _config)
    _auto.register(_config, _model)
