"""Language models without attention: Bengio's fixed-window MLP, and RNN, LSTM and GRU with a recurrent state.

The same interface as the decoder: loss from labels, logits, a cache (the state, of constant size), packed documents
that do not see one another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmworks.model.loss.linear_cross_entropy import head_loss
from llmworks.model.nn.recurrent_state import State, StateCache
from llmworks.model.nn.segments import check_ids, get_segment_ids, index_sequences
from llmworks.model.shape import RecurrentShape, read_stored


class WindowMLP(nn.Module):
    """Fixed-window MLP: tanh(d + H x), x the concatenated embeddings of the last `window` tokens.

    Bengio et al. 2003, section 2, without direct connections. Padded with zeros before a sequence. The state is the
    embeddings of the last `window` - 1 tokens.
    """

    def __init__(self, shape: RecurrentShape) -> None:
        super().__init__()
        self.window = shape.window_tokens
        self.layer = nn.Linear(self.window * shape.embedding_dim, shape.inner_size)

    def forward(self, x: Tensor, lengths: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Compute from x [sequences, length, embedding_dim] with `lengths` valid: ([..., hidden_size], state)."""
        before = x.new_zeros(len(x), self.window - 1, x.shape[2]) if state is None else state[0].transpose(0, 1)
        whole = torch.cat((before, x), 1)
        views = whole.unfold(1, self.window, 1)  # [sequences, length, embedding_dim, window]
        last = lengths[:, None].to(x.device) + torch.arange(self.window - 1, device=x.device)
        kept = whole.gather(1, last[..., None].expand(-1, -1, x.shape[2]))
        return torch.tanh(self.layer(views.transpose(2, 3).flatten(2))), (kept.transpose(0, 1),)


class RecurrentNetwork(nn.Module):
    """Recurrent network: a state h is updated by each token x.

    s is the logistic function, * elementwise.

    rnn: h' = tanh(W x + U h + b) (Elman 1990; as a language model Mikolov et al. 2010).
    lstm: c' = f * c + i * tanh(W x + U h + b), h' = o * tanh(c'), with gates i, f, o = s(W_. x + U_. h + b_.)
    (Hochreiter & Schmidhuber 1997; forget gate Gers et al. 2000): c is scaled by f and added to, so with f near one
    gradients do not vanish over long distances.
    gru: h' = (1 - z) * n + z * h, n = tanh(W x + r * (U h + b)), with gates r, z: the same with one state (Cho et al.
    2014; r applied after U, as in cuDNN). Computed by PyTorch's kernels.
    """

    def __init__(self, shape: RecurrentShape) -> None:
        super().__init__()
        kind = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}[shape.rnn_type]
        self.cells = kind(
            shape.embedding_dim,
            shape.inner_size,
            shape.num_hidden_layers,
            batch_first=True,
            dropout=shape.dropout if shape.num_hidden_layers > 1 else 0.0,
        )

    def forward(self, x: Tensor, lengths: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Compute from x [sequences, length, embedding_dim] with `lengths` valid: ([..., hidden_size], state)."""
        ragged = bool((lengths < x.shape[1]).any())
        given: Tensor | PackedSequence = (
            pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False) if ragged else x
        )
        start = None if state is None else tuple(s.contiguous() for s in state)
        made, left = self.cells(given, start[0] if start is not None and len(start) == 1 else start)
        if ragged:
            made = pad_packed_sequence(made, batch_first=True, total_length=x.shape[1])[0]
        return made, left if isinstance(left, tuple) else (left,)


class RecurrentModelConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """A `RecurrentShape` as a transformers configuration."""

    model_type = "llmworks_recurrent"

    def __init__(self, shape: dict[str, Any] | None = None, **kwargs: Any) -> None:
        made = RecurrentShape.model_validate(read_stored(shape or {}))
        self.shape = made.model_dump()
        self.vocab_size, self.hidden_size, self.num_hidden_layers, self.max_position_embeddings = (
            made.vocab_size,
            made.embedding_dim,
            made.num_hidden_layers,
            made.max_position_embeddings,
        )
        kwargs["tie_word_embeddings"] = made.tie_word_embeddings
        super().__init__(**kwargs)


class RecurrentForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """Language model of embedding, recurrent network or fixed-window MLP, and head."""

    config_class = RecurrentModelConfig
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012
    head_on_labels = True  # the loss computes logits only at label positions

    def __init__(self, config: RecurrentModelConfig) -> None:
        super().__init__(config)
        self.shape = shape = RecurrentShape.model_validate(config.shape)
        self.embedding = nn.Embedding(shape.vocab_size, shape.embedding_dim)
        self.body = WindowMLP(shape) if shape.rnn_type == "mlp" else RecurrentNetwork(shape)
        self.to_width = (
            nn.Linear(shape.inner_size, shape.embedding_dim, bias=False)
            if shape.inner_size != shape.embedding_dim
            else None
        )
        self.head = nn.Linear(shape.embedding_dim, shape.vocab_size, bias=False)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Return the input embedding."""
        return self.embedding

    def set_input_embeddings(self, value: Any) -> None:
        """Replace the input embedding."""
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the language-model head."""
        return self.head

    def set_output_embeddings(self, value: Any) -> None:
        """Replace the language-model head."""
        self.head = value

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` uses the cache created by the first pass

    @staticmethod
    def new_cache() -> StateCache:
        """Create an empty cache for this model."""
        return StateCache()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialize embeddings normal (std 0.1), recurrent matrices orthogonal, input matrices Xavier (Glorot).

        Tied embeddings have std 1 / sqrt(embedding_dim). An LSTM's forget gate bias is 1 (Jozefowicz et al. 2015).
        """
        if isinstance(module, nn.Embedding):
            nn.init.normal_(
                module.weight, std=0.1 if not self.shape.tie_word_embeddings else self.shape.embedding_dim**-0.5
            )
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.RNNBase):
            for name, weight in module.named_parameters():
                if name.startswith("bias"):
                    nn.init.zeros_(weight)
                    if self.shape.rnn_type == "lstm" and name.startswith("bias_ih"):
                        nn.init.ones_(weight[self.shape.inner_size : 2 * self.shape.inner_size])
                else:
                    for gate in torch.split(weight, self.shape.inner_size):
                        nn.init.orthogonal_(gate) if name.startswith("weight_hh") else nn.init.xavier_uniform_(gate)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        segment_ids: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Compute next-token logits [batch, length, vocab_size]; with labels only their mean cross-entropy.

        labels: [batch, length], -100 = ignored. Position ids that restart within a row separate packed documents; not
        with a cache.
        Errors: ModelError for ids beyond the vocabulary.
        """
        check_ids(input_ids, self.shape.vocab_size)
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if past_key_values is not None else StateCache() if use_cache else None
        valid = (
            attention_mask[:, -x.shape[1] :].bool()
            if attention_mask is not None and not attention_mask[:, -x.shape[1] :].all()
            else None
        )
        if segment_ids is None and position_ids is not None and cache is None and valid is None:
            segment_ids = get_segment_ids(position_ids.expand(x.shape[:2]))
        states, state = self._compute_states(
            F.dropout(x, self.shape.dropout, self.training),
            valid,
            segment_ids,
            cache.state if cache is not None else None,
        )
        if cache is not None:
            cache.state, cache.tokens = state or None, cache.tokens + x.shape[1]
        states = F.dropout(states, self.shape.dropout, self.training)
        if self.to_width is not None:
            states = self.to_width(states)
        if labels is not None:
            return CausalLMOutputWithPast(loss=head_loss(states[:, :-1], self.head, labels[:, 1:]))
        logits = self.head(states[:, -logits_to_keep:] if logits_to_keep else states)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)  # type: ignore[arg-type]

    def _compute_states(
        self, x: Tensor, valid: Tensor | None, segments: Tensor | None, state: State | None
    ) -> tuple[Tensor, State]:
        """Compute states [batch, length, hidden_size] after each token.

        Each packed document is computed as a row of its own, so its state starts anew.
        """
        if valid is None and segments is None:
            states, last_state = self.body(x, torch.full((len(x),), x.shape[1]), state)
            return states, last_state
        before = state
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
        segments = torch.zeros(x.shape[:2], dtype=torch.long, device=x.device) if segments is None else segments
        nonempty = valid.any(1)  # a row without tokens keeps its state
        if not nonempty.any():
            return x.new_zeros(*x.shape[:2], self.shape.inner_size), state or ()
        if state is not None and not nonempty.all():
            state = tuple(s[:, nonempty] for s in state)
        sequence_ids, offsets, lengths = index_sequences(valid, segments)
        sequences = x.new_zeros(len(lengths), int(lengths.max()), x.shape[2])
        sequences[sequence_ids, offsets] = x[valid]
        states, last_state = self.body(sequences, lengths.cpu(), state)
        whole = states.new_zeros(*x.shape[:2], states.shape[2])
        whole[valid] = states[sequence_ids, offsets]
        if not nonempty.all() and last_state[0].shape[1] == int(nonempty.sum()):
            kept = before or tuple(s.new_zeros(s.shape[0], len(x), s.shape[2]) for s in last_state)
            last_state = tuple(
                torch.where(nonempty[None, :, None], torch.zeros_like(k).index_copy_(1, nonempty.nonzero()[:, 0], s), k)
                for k, s in zip(kept, last_state, strict=True)
            )
        return whole, last_state


AutoConfig.register(RecurrentModelConfig.model_type, RecurrentModelConfig)
AutoModelForCausalLM.register(RecurrentModelConfig, RecurrentForCausalLM)
