"""Decoder-only Transformer: embeddings, blocks of attention and feed-forward layers, language-model head.

`TransformerStack` is the network; `DecoderForCausalLM` wraps it in the interface of transformers, so that saving,
adapters and `generate` work. Loading and saving as Llama, Mistral, Qwen, Gemma or GPT-2 is in `families.py`;
`encoder.py` builds other models from the same blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmworks.core.errors import ModelError
from llmworks.model.loss.linear_cross_entropy import head_loss, is_plain_linear
from llmworks.model.nn.attention import Attention, AttentionMask, build_attention_mask, get_alibi_slopes
from llmworks.model.nn.cpu_attention import get_query_block_size
from llmworks.model.nn.feed_forward import FeedForward, MixtureOfExperts
from llmworks.model.nn.norm import make_norm
from llmworks.model.nn.positions import compute_cos_sin, rope_frequencies, sinusoidal_embeddings
from llmworks.model.nn.residual_linear import ResidualLinear
from llmworks.model.nn.segments import check_ids, get_segment_ids
from llmworks.model.shape import Rope, Shape, read_stored


@dataclass(frozen=True)
class EncoderMemory:
    """Encoder states [batch, length, hidden_size] for cross-attention, and their attention mask."""

    states: Tensor
    attention_mask: AttentionMask


class TransformerBlock(nn.Module):
    """Transformer block: attention, then feed-forward, each with a residual connection.

    `cross_attention`: with cross-attention between them.
    """

    def __init__(self, shape: Shape, layer: int, *, cross_attention: bool = False) -> None:
        super().__init__()
        self.norm_position = shape.norm_position
        self.attention_norm, self.feed_forward_norm = make_norm(shape), make_norm(shape)
        self.after_attention_norm, self.after_feed_forward_norm = (
            make_norm(shape) if self.norm_position == "sandwich" else None for _ in range(2)
        )
        self.attention = Attention(shape, layer)
        self.crossing = Attention(shape, layer) if cross_attention else None
        self.crossing_norm = make_norm(shape) if cross_attention else None
        self.feed_forward: nn.Module = MixtureOfExperts(shape) if shape.experts else FeedForward(shape)

    def forward(
        self,
        x: Tensor,
        attention_mask: AttentionMask,
        rotation: tuple[Tensor, Tensor] | None,
        cache: Any,
        memory: EncoderMemory | None = None,
    ) -> Tensor:
        """Run the block: [batch, length, hidden_size] -> the same shape."""
        x = self.attention_residual(x, self.attention(self.attention_input(x), attention_mask, rotation, cache))
        if memory is not None and self.crossing is not None and self.crossing_norm is not None:
            post = self.norm_position == "post"
            x = x + self.crossing(x if post else self.crossing_norm(x), memory.attention_mask, memory=memory.states)
            x = self.crossing_norm(x) if post else x
        return self.mlp_residual(x, self.feed_forward(self.mlp_input(x)))

    def attention_input(self, x: Tensor) -> Tensor:
        """Return the attention sublayer's input: normalized, unless post-norm."""
        hidden: Tensor = x if self.norm_position == "post" else self.attention_norm(x)
        return hidden

    def attention_residual(self, x: Tensor, attention_output: Tensor) -> Tensor:
        """Add the attention output to the residual stream."""
        if self.norm_position == "post":
            normed: Tensor = self.attention_norm(x + attention_output)
            return normed
        return x + (
            attention_output if self.after_attention_norm is None else self.after_attention_norm(attention_output)
        )

    def mlp_input(self, x: Tensor) -> Tensor:
        """Return the feed-forward sublayer's input: normalized, unless post-norm."""
        hidden: Tensor = x if self.norm_position == "post" else self.feed_forward_norm(x)
        return hidden

    def mlp_residual(self, x: Tensor, mlp_output: Tensor) -> Tensor:
        """Add the feed-forward output to the residual stream."""
        if self.norm_position == "post":
            normed: Tensor = self.feed_forward_norm(x + mlp_output)
            return normed
        return x + (mlp_output if self.after_feed_forward_norm is None else self.after_feed_forward_norm(mlp_output))


class TransformerStack(nn.Module):
    """Transformer stack from embedded tokens to hidden states: a decoder if `causal`, else an encoder."""

    def __init__(self, shape: Shape, *, causal: bool = True, cross_attention: bool = False) -> None:
        super().__init__()
        self.shape, self.causal = shape, causal
        self.embedding = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.position = (
            nn.Embedding(shape.max_position_embeddings, shape.hidden_size)
            if shape.position_embedding_type == "learned"
            else None
        )
        self.blocks = nn.ModuleList(
            TransformerBlock(shape, layer, cross_attention=cross_attention) for layer in range(shape.num_hidden_layers)
        )
        self.norm = make_norm(shape) if shape.norm_position != "post" else nn.Identity()
        self.gradient_checkpointing = False  # transformers sets both when gradient checkpointing is enabled
        self._gradient_checkpointing_func: Any = None

    def forward(
        self,
        embedded: Tensor,
        positions: Tensor,
        *,
        padding: Tensor | None = None,
        segments: Tensor | None = None,
        branches: Tensor | None = None,
        cache: Any = None,
        memory: EncoderMemory | None = None,
    ) -> Tensor:
        """Compute the final hidden states.

        embedded: output of `embedding`, [batch, length, hidden_size]; positions: [batch, length]; padding: [batch,
        keys], 1 where there is a token; segments: segment ids [batch, length], without a cache.

        branches [batch, length], with segments: continuations of a shared prefix in one segment: 0 for the prefix, then
        the number of each continuation, whose positions continue from the prefix.
        Errors: ModelError for a sequence beyond the learned positions.
        """
        x = self.run_blocks(
            self.add_positions(embedded, positions),
            positions,
            padding=padding,
            segments=segments,
            branches=branches,
            cache=cache,
            memory=memory,
        )
        state: Tensor = self.norm(x)
        return state

    def add_positions(self, embedded: Tensor, positions: Tensor) -> Tensor:
        """Return the input of the first block: embeddings scaled and with positions added, where the shape has them."""
        shape, x = self.shape, embedded
        if shape.scale_embedding:
            x = x * torch.tensor(shape.hidden_size**0.5, dtype=x.dtype)
        if self.position is not None:
            if positions.numel() and int(positions.max()) >= shape.max_position_embeddings:
                raise ModelError(
                    f"the sequence has {int(positions.max()) + 1} tokens, the model has"
                    f" {shape.max_position_embeddings} position"
                    " embeddings"
                )
            x = x + self.position(positions)
        return (
            x + sinusoidal_embeddings(positions, shape.hidden_size).to(x.dtype)
            if shape.position_embedding_type == "sinusoidal"
            else x
        )

    def run_blocks(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        padding: Tensor | None = None,
        segments: Tensor | None = None,
        branches: Tensor | None = None,
        cache: Any = None,
        memory: EncoderMemory | None = None,
    ) -> Tensor:
        """Run the loaded blocks; each knows its layer number, so a subset computes what it does in the whole model."""
        for block, attention_mask, rotation in self.iter_block_inputs(
            x, positions, padding=padding, segments=segments, branches=branches, cache=cache
        ):
            block_inputs = (x, attention_mask, rotation, cache, memory)
            x = (
                self._gradient_checkpointing_func(block.__call__, *block_inputs)
                if self.gradient_checkpointing and self.training and cache is None
                else block(*block_inputs)
            )
        return x

    def iter_block_inputs(
        self,
        x: Tensor,
        positions: Tensor,
        *,
        padding: Tensor | None = None,
        segments: Tensor | None = None,
        branches: Tensor | None = None,
        cache: Any = None,
    ) -> Iterator[tuple[Any, AttentionMask, tuple[Tensor, Tensor] | None]]:
        """Yield each loaded block with its attention mask and RoPE cosine and sine."""
        shape = self.shape
        before = cache.get_seq_length() if cache is not None else 0
        # indices in the row, since positions may restart within it; windows and ALiBi only need differences, and
        # segments mask the rest
        keys = torch.arange(before + x.shape[1], device=x.device)[None] if branches is None else positions
        queries = keys[:, before:]
        pair = (segments, segments) if segments is not None else None
        slopes = get_alibi_slopes(shape)
        masks_by_window: dict[int, AttentionMask] = {}
        rotations: dict[Rope, tuple[Tensor, Tensor] | None] = {}
        for number, block in self.blocks.named_children():
            window, rope = shape.get_sliding_window(int(number)), shape.get_rope_parameters(int(number))
            if window not in masks_by_window:
                masks_by_window[window] = build_attention_mask(
                    queries,
                    keys,
                    causal=self.causal,
                    window=window,
                    padding=padding,
                    segments=pair,
                    branches=branches,
                    alibi=slopes,
                    dtype=x.dtype,
                    block=get_query_block_size(x.shape[0] * shape.num_attention_heads),
                )
            if rope not in rotations:
                rotations[rope] = (
                    compute_cos_sin(positions, *rope_frequencies(rope, shape.head_size, shape.max_position_embeddings))
                    if shape.position_embedding_type == "rope"
                    else None
                )
            yield block, masks_by_window[window], rotations[rope]


class DecoderConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """A `Shape` as a transformers configuration."""

    model_type = "llmworks_decoder"

    def __init__(self, shape: dict[str, Any] | None = None, **kwargs: Any) -> None:
        made = Shape.model_validate(read_stored(shape or {}))
        self.shape = made.model_dump()
        self.vocab_size, self.hidden_size, self.num_hidden_layers, self.num_attention_heads = (
            made.vocab_size,
            made.hidden_size,
            made.num_hidden_layers,
            made.num_attention_heads,
        )
        self.num_key_value_heads, self.head_dim, self.intermediate_size, self.max_position_embeddings = (
            made.num_kv_heads,
            made.head_size,
            made.inner_size,
            made.max_position_embeddings,
        )
        kwargs["tie_word_embeddings"] = made.tie_word_embeddings
        super().__init__(**kwargs)


class DecoderForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """Decoder with a language-model head."""

    config_class = DecoderConfig
    base_model_prefix = "decoder"
    _tied_weights_keys = {"head.weight": "decoder.embedding.weight"}  # noqa: RUF012
    head_on_labels = True  # the loss computes logits only at label positions
    supports_gradient_checkpointing = True

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.shape = Shape.model_validate(config.shape)
        self.decoder = TransformerStack(self.shape)
        self.head = nn.Linear(self.shape.hidden_size, self.shape.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Return the input embedding."""
        return self.decoder.embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the input embedding."""
        self.decoder.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the language-model head."""
        return self.head

    def set_output_embeddings(self, value: Any) -> None:
        """Replace the language-model head."""
        self.head = value

    def _init_weights(self, module: nn.Module) -> None:
        init_weights(module, self.shape)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        segment_ids: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Compute next-token logits [batch, length, vocab_size]; with labels only their mean cross-entropy.

        labels: [batch, length], -100 = ignored. Position ids that restart within a row separate packed documents, which
        do not attend to one another; not with a filled cache.
        Errors: ModelError for ids beyond the vocabulary, or a sequence beyond the learned positions.
        """
        check_ids(input_ids, self.shape.vocab_size)
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds = self._embed(input_ids, labelled=labels is not None)
        assert inputs_embeds is not None
        x = inputs_embeds
        cache = past_key_values if past_key_values is not None else DynamicCache() if use_cache else None
        padding = attention_mask if attention_mask is not None and not attention_mask.all() else None
        if position_ids is None:
            before = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(before, before + x.shape[1], device=x.device)[None]
            if padding is not None:
                position_ids = (padding.cumsum(-1) - 1).clamp(min=0)[:, -x.shape[1] :]
        elif segment_ids is None and (cache is None or not cache.get_seq_length()):
            segment_ids = get_segment_ids(position_ids)
        state = self.decoder(x, position_ids, padding=padding, segments=segment_ids, cache=cache)
        if labels is not None:
            return CausalLMOutputWithPast(loss=self.loss(state, labels))
        return CausalLMOutputWithPast(
            logits=self.head(state[:, -logits_to_keep:] if logits_to_keep else state), past_key_values=cache
        )

    def _embed(self, ids: Tensor, *, labelled: bool) -> Tensor:
        """Embed token ids.

        With tied embeddings and labels the lookup has a sparse gradient: only the looked-up rows are added to the
        head's gradient, not a second dense matrix.
        """
        table = self.decoder.embedding
        if (
            labelled
            and is_plain_linear(self.head)
            and type(table) is nn.Embedding
            and table.weight is self.head.weight
            and not (table._forward_hooks or table._forward_pre_hooks)
        ):
            return nn.functional.embedding(ids, table.weight, sparse=True)
        embedded: Tensor = table(ids)
        return embedded

    def loss(self, state: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of the labels; in training plus the router's load-balancing loss."""
        loss = head_loss(state[:, :-1], self.head, labels[:, 1:])
        if self.shape.experts and self.training:
            mixtures = [m for m in self.modules() if isinstance(m, MixtureOfExperts)]
            loss = (
                loss
                + self.shape.experts.router_aux_loss_coef
                * torch.stack([m.load_balancing_loss for m in mixtures]).mean()
            )
            for mixture in mixtures:
                mixture.load_balancing_loss = (
                    mixture.load_balancing_loss.detach()
                )  # else the module keeps the autograd graph alive
        return loss


def init_weights(module: nn.Module, shape: Shape) -> None:
    """Initialize weights with std 0.02, smaller for projections into the residual stream (GPT-2).

    Scaled by 1 / sqrt(2 * layers): two residual additions per block; cross-attention, a third one, is not counted.
    """
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(
            module.weight,
            std=0.02 / (2 * shape.num_hidden_layers) ** 0.5 if isinstance(module, ResidualLinear) else 0.02,
        )
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


AutoConfig.register(DecoderConfig.model_type, DecoderConfig)
AutoModelForCausalLM.register(DecoderConfig, DecoderForCausalLM)
