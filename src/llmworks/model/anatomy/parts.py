"""Compute a model's parts from its shape: tensors, parameters, FLOPs per token, KV cache per token. Torch-free.

FLOPs count matrix products only, a multiply-add as two (Kaplan et al. 2020, section 2.1), for one token with a context
of `context` tokens, itself included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from llmworks.model.shape import RecurrentShape, Shape

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class ModelPart:
    """One part of a model.

    `tensors`: name to shape; `flops`: FLOPs per token; `cache_elements`: KV cache elements per token;
    `active_fraction`: fraction of its parameters active for a token.
    """

    block: str  # block number, "" outside of the blocks
    name: str
    tensors: dict[str, Sizes]
    flops: int = 0
    cache_elements: int = 0
    active_fraction: float = 1.0
    tied_to: str = ""  # the part whose matrix is tied to this one

    @property
    def parameters(self) -> int:
        """Number of parameters; 0 for a tied matrix."""
        return 0 if self.tied_to else sum(prod(sizes) for sizes in self.tensors.values())

    @property
    def active_parameters(self) -> int:
        """Number of parameters active for a token."""
        return round(self.parameters * self.active_fraction)


def list_parts(shape: Shape | RecurrentShape, context: int) -> list[ModelPart]:
    """Return all parts in forward order."""
    return list(_recurrent(shape) if isinstance(shape, RecurrentShape) else _decoder(shape, context))


def _decoder(shape: Shape, context: int) -> Iterator[ModelPart]:
    width = shape.hidden_size
    yield ModelPart("", "embedding", {"weight": (shape.vocab_size, width)})
    if shape.position_embedding_type == "learned":
        yield ModelPart("", "position", {"weight": (shape.max_position_embeddings, width)})
    for layer in range(shape.num_hidden_layers):
        where = str(layer)
        names = ("norm", "after norm") if shape.norm_position == "sandwich" else ("norm", "")
        first = shape.norm_position != "post"
        if first:
            yield _norm(shape, where, f"attention {names[0]}")
        yield from _attention(shape, where, min(context, shape.get_sliding_window(layer) or context))
        if not first:
            yield _norm(shape, where, "attention norm")
        if names[1]:
            yield _norm(shape, where, f"attention {names[1]}")
        if first:
            yield _norm(shape, where, f"feed-forward {names[0]}")
        yield from _feed_forward(shape, where)
        if not first:
            yield _norm(shape, where, "feed-forward norm")
        if names[1]:
            yield _norm(shape, where, f"feed-forward {names[1]}")
    if shape.norm_position != "post":
        yield _norm(shape, "", "norm")
    yield ModelPart(
        "",
        "head",
        {"weight": (shape.vocab_size, width)},
        2 * shape.vocab_size * width,
        tied_to="embedding" if shape.tie_word_embeddings else "",
    )


def _norm(shape: Shape, where: str, name: str) -> ModelPart:
    return ModelPart(
        where,
        name,
        {"weight": (shape.hidden_size,), **({"bias": (shape.hidden_size,)} if shape.norm == "layer" else {})},
    )


def _linear(where: str, name: str, inputs: int, outputs: int, bias: bool, cache: int = 0) -> ModelPart:
    return ModelPart(
        where,
        name,
        {"weight": (outputs, inputs), **({"bias": (outputs,)} if bias else {})},
        2 * inputs * outputs,
        cache,
    )


def _attention(shape: Shape, where: str, context: int) -> Iterator[ModelPart]:
    queries, keys = shape.num_attention_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    biased = shape.bias != "none"
    yield _linear(where, "query", shape.hidden_size, queries, biased)
    yield _linear(where, "key", shape.hidden_size, keys, biased, cache=keys)
    yield _linear(where, "value", shape.hidden_size, keys, biased, cache=keys)
    if shape.use_qk_norm:
        yield ModelPart(where, "query norm", {"weight": (shape.head_size,)})
        yield ModelPart(where, "key norm", {"weight": (shape.head_size,)})
    yield ModelPart(where, "attention", {}, 4 * queries * context)  # QK' and attention weights times V
    yield _linear(where, "out", queries, shape.hidden_size, shape.bias == "all")


def _feed_forward(shape: Shape, where: str) -> Iterator[ModelPart]:
    bias, matrices = shape.bias == "all", [("gate", shape.hidden_size, shape.inner_size)] if shape.gated_mlp else []
    matrices += [("up", shape.hidden_size, shape.inner_size), ("down", shape.inner_size, shape.hidden_size)]
    if not shape.experts:
        for name, inputs, outputs in matrices:
            yield _linear(where, name, inputs, outputs, bias)
        return
    count, chosen = shape.experts.num_experts, shape.experts.num_experts_per_tok
    yield _linear(where, "router", shape.hidden_size, count, bias=False)
    for name, inputs, outputs in matrices:
        yield ModelPart(
            where,
            f"{name} ({count} experts)",
            {"weight": (count, outputs, inputs), **({"bias": (count, outputs)} if bias else {})},
            2 * inputs * outputs * chosen,
            active_fraction=chosen / count,
        )


def _recurrent(shape: RecurrentShape) -> Iterator[ModelPart]:
    width, inner = shape.embedding_dim, shape.inner_size
    yield ModelPart("", "embedding", {"weight": (shape.vocab_size, width)})
    if shape.rnn_type == "mlp":
        yield _linear("", "window", shape.window_tokens * width, inner, bias=True)
    else:
        gates = {"rnn": 1, "gru": 3, "lstm": 4}[shape.rnn_type]
        for layer in range(shape.num_hidden_layers):
            inputs = width if layer == 0 else inner
            sizes: dict[str, Sizes] = {
                "input": (gates * inner, inputs),
                "state": (gates * inner, inner),
                "input bias": (gates * inner,),
                "state bias": (gates * inner,),
            }
            yield ModelPart(str(layer), shape.rnn_type, sizes, 2 * gates * inner * (inputs + inner))
    if inner != width:
        yield _linear("", "to width", inner, width, bias=False)
    yield ModelPart(
        "",
        "head",
        {"weight": (shape.vocab_size, width)},
        2 * shape.vocab_size * width,
        tied_to="embedding" if shape.tie_word_embeddings else "",
    )


def count_state_elements(shape: Shape | RecurrentShape) -> int:
    """Return the elements of the recurrent state, which is independent of the sequence length."""
    if isinstance(shape, Shape):
        return 0
    return (
        (shape.window_tokens - 1) * shape.embedding_dim
        if shape.rnn_type == "mlp"
        else shape.num_hidden_layers * shape.inner_size * (2 if shape.rnn_type == "lstm" else 1)
    )


def count_cache_elements(shape: Shape | RecurrentShape, tokens: int) -> int:
    """Return the KV cache elements for `tokens` tokens; sliding-window layers keep no more than their window."""
    if isinstance(shape, RecurrentShape):
        return count_state_elements(shape)
    return sum(
        2 * shape.num_kv_heads * shape.head_size * min(tokens, shape.get_sliding_window(layer) or tokens)
        for layer in range(shape.num_hidden_layers)
    )
