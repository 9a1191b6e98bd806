"""Masked-language-model encoder and encoder-decoder, built from the decoder's blocks.

Like BERT (Devlin et al. 2019) and T5 (Raffel et al. 2020) in function, with the shape's norms, positions and
feed-forward layers. Masking and span corruption are in `masking.py`.
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

from llmworks.model.loss.linear_cross_entropy import IGNORE_INDEX, head_loss
from llmworks.model.nn.attention import build_attention_mask
from llmworks.model.nn.decoder import DecoderConfig, EncoderMemory, TransformerStack, init_weights
from llmworks.model.shape import Shape


class EncoderConfig(DecoderConfig):  # type: ignore[no-untyped-call]
    """Configuration of an encoder."""

    model_type = "llmworks_encoder"


class Seq2SeqConfig(DecoderConfig):  # type: ignore[no-untyped-call]
    """Configuration of an encoder-decoder."""

    model_type = "llmworks_encoder_decoder"

    def __init__(self, shape: dict[str, Any] | None = None, **kwargs: Any) -> None:
        kwargs["is_encoder_decoder"] = True
        kwargs.setdefault("decoder_start_token_id", 0)  # the padding token, as in T5
        super().__init__(shape, **kwargs)


def make_positions(ids: Tensor, before: int = 0) -> Tensor:
    """Return positions [1, length] of ids after `before` cached tokens."""
    return torch.arange(before, before + ids.shape[1], device=ids.device)[None]


class EncoderForMaskedLM(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Bidirectional encoder with a masked-language-model head."""

    config_class = EncoderConfig
    base_model_prefix = "encoder"
    _tied_weights_keys = {"head.weight": "encoder.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.shape = Shape.model_validate(config.shape)
        self.encoder = TransformerStack(self.shape, causal=False)
        self.head = nn.Linear(self.shape.hidden_size, self.shape.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Return the input embedding."""
        return self.encoder.embedding

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.head

    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.shape)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> MaskedLMOutput:
        """Compute logits [batch, length, vocab_size] of the tokens at their own positions.

        With labels (-100 = ignored) only their mean cross-entropy.
        """
        states = self.encoder(self.encoder.embedding(input_ids), make_positions(input_ids), padding=attention_mask)
        if labels is not None:
            return MaskedLMOutput(loss=head_loss(states, self.head, labels))
        return MaskedLMOutput(logits=self.head(states), hidden_states=(states,))


class EncoderStack(nn.Module):
    """Encoder: ids [batch, length] to the states for cross-attention; `generate` calls it once per sequence."""

    main_input_name = "input_ids"

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.stack = TransformerStack(shape, causal=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        """Encode the ids."""
        return BaseModelOutput(
            last_hidden_state=self.stack(
                self.stack.embedding(input_ids), make_positions(input_ids), padding=attention_mask
            )
        )


class EncoderDecoderLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """Encoder-decoder: the decoder attends causally to its own tokens and to all encoder states.

    Both share one embedding.
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
        self.encoder, self.decoder = EncoderStack(self.shape), TransformerStack(self.shape, cross_attention=True)
        self.head = nn.Linear(self.shape.hidden_size, self.shape.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Return the shared embedding."""
        return self.encoder.stack.embedding

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.head

    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.shape)

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
        """Compute next-token logits [batch, length, vocab_size] of the decoder.

        With labels (-100 = ignored), which are shifted right as decoder input, only their mean cross-entropy.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask)
        states: Tensor = encoder_outputs[0]
        if labels is not None:
            start = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
            decoder_input_ids = torch.cat(
                (start, labels[:, :-1].masked_fill(labels[:, :-1] == IGNORE_INDEX, self.config.decoder_start_token_id)),
                1,
            )
        assert decoder_input_ids is not None
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        cache = past_key_values.self_attention_cache if past_key_values is not None else None
        positions = make_positions(decoder_input_ids, cache.get_seq_length() if cache is not None else 0)
        memory = EncoderMemory(
            states,
            build_attention_mask(
                positions,
                torch.arange(states.shape[1], device=states.device)[None],
                causal=False,
                padding=attention_mask,
                dtype=states.dtype,
            ),
        )
        decoder_states = self.decoder(
            self.get_input_embeddings()(decoder_input_ids), positions, cache=cache, memory=memory
        )
        if labels is not None:
            return Seq2SeqLMOutput(loss=head_loss(decoder_states, self.head, labels))
        return Seq2SeqLMOutput(logits=self.head(decoder_states), past_key_values=past_key_values)


for _config, _auto, _model in (
    (EncoderConfig, AutoModelForMaskedLM, EncoderForMaskedLM),
    (Seq2SeqConfig, AutoModelForSeq2SeqLM, EncoderDecoderLM),
):
    AutoConfig.register(_config.model_type, _config)
    _auto.register(_config, _model)
