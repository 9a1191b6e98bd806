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
class Part:
    """One part of a model.

    `tensors`: name to shape; `flops`: FLOPs per token; `cache_elements`: KV cache elements per token;
    `active_fraction`: fraction of its parameters active for a token.
    """

    where: str  # block number, "" outside of the blocks
    name: str
    tensors: dict[str, Sizes]
    work: int = 0
    cache: int = 0
    used: float = 1.0
    shares: str = ""  # the part whose matrix is tied to this one

    @property
    def parameters(self) -> int:
        """Number of parameters; 0 for a tied matrix."""
        return 0 if self.shares else sum(prod(sizes) for sizes in self.tensors.values())

    @property
    def active(self) -> int:
        """Number of parameters active for a token."""
        return round(self.parameters * self.used)


def parts_of(shape: Shape | RecurrentShape, context: int) -> list[Part]:
    """Return all parts in forward order."""
    return list(_recurrent(shape) if isinstance(shape, RecurrentShape) else _decoder(shape, context))


def _decoder(shape: Shape, context: int) -> Iterator[Part]:
    width = shape.hidden_size
    yield Part("", "embedding", {"weight": (shape.vocab_size, width)})
    if shape.position_embedding_type == "learned":
        yield Part("", "position", {"weight": (shape.max_position_embeddings, width)})
    for layer in range(shape.num_hidden_layers):
        where = str(layer)
        names = ("norm", "after norm") if shape.norm_position == "sandwich" else ("norm", "")
        first = shape.norm_position != "post"
        if first:
            yield _norm(shape, where, f"attention {names[0]}")
        yield from _attention(shape, where, min(context, shape.window_of(layer) or context))
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
    yield Part(
        "",
        "head",
        {"weight": (shape.vocab_size, width)},
        2 * shape.vocab_size * width,
        shares="embedding" if shape.tie_word_embeddings else "",
    )


def _norm(shape: Shape, where: str, name: str) -> Part:
    return Part(
        where,
        name,
        {"weight": (shape.hidden_size,), **({"bias": (shape.hidden_size,)} if shape.norm == "layer" else {})},
    )


def _linear(where: str, name: str, inputs: int, outputs: int, bias: bool, cache: int = 0) -> Part:
    return Part(
        where,
        name,
        {"weight": (outputs, inputs), **({"bias": (outputs,)} if bias else {})},
        2 * inputs * outputs,
        cache,
    )


def _attention(shape: Shape, where: str, seen: int) -> Iterator[Part]:
    queries, keys = shape.num_attention_heads * shape.per_head, shape.groups * shape.per_head
    biased = shape.bias != "none"
    yield _linear(where, "query", shape.hidden_size, queries, biased)
    yield _linear(where, "key", shape.hidden_size, keys, biased, cache=keys)
    yield _linear(where, "value", shape.hidden_size, keys, biased, cache=keys)
    if shape.use_qk_norm:
        yield Part(where, "query norm", {"weight": (shape.per_head,)})
        yield Part(where, "key norm", {"weight": (shape.per_head,)})
    yield Part(where, "attention", {}, 4 * queries * seen)  # QK' and attention weights times V
    yield _linear(where, "out", queries, shape.hidden_size, shape.bias == "all")


def _feed_forward(shape: Shape, where: str) -> Iterator[Part]:
    bias, matrices = shape.bias == "all", [("gate", shape.hidden_size, shape.inner)] if shape.gated_mlp else []
    matrices += [("up", shape.hidden_size, shape.inner), ("down", shape.inner, shape.hidden_size)]
    if not shape.experts:
        for name, inputs, outputs in matrices:
            yield _linear(where, name, inputs, outputs, bias)
        return
    count, chosen = shape.experts.num_experts, shape.experts.num_experts_per_tok
    yield _linear(where, "router", shape.hidden_size, count, bias=False)
    for name, inputs, outputs in matrices:
        yield Part(
            where,
            f"{name} ({count} experts)",
            {"weight": (count, outputs, inputs), **({"bias": (count, outputs)} if bias else {})},
            2 * inputs * outputs * chosen,
            used=chosen / count,
        )


def _recurrent(shape: RecurrentShape) -> Iterator[Part]:
    width, inner = shape.embedding_dim, shape.inner
    yield Part("", "embedding", {"weight": (shape.vocab_size, width)})
    if shape.rnn_type == "mlp":
        yield _linear("", "window", shape.reach * width, inner, bias=True)
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
            yield Part(str(layer), shape.rnn_type, sizes, 2 * gates * inner * (inputs + inner))
    if inner != width:
        yield _linear("", "to width", inner, width, bias=False)
    yield Part(
        "",
        "head",
        {"weight": (shape.vocab_size, width)},
        2 * shape.vocab_size * width,
        shares="embedding" if shape.tie_word_embeddings else "",
    )


def state_of(shape: Shape | RecurrentShape) -> int:
    """Return the elements of the recurrent state, which is independent of the sequence length."""
    if isinstance(shape, Shape):
        return 0
    return (
        (shape.reach - 1) * shape.embedding_dim
        if shape.rnn_type == "mlp"
        else shape.num_hidden_layers * shape.inner * (2 if shape.rnn_type == "lstm" else 1)
    )


def cached(shape: Shape | RecurrentShape, tokens: int) -> int:
    """Return the KV cache elements for `tokens` tokens; sliding-window layers keep no more than their window."""
    if isinstance(shape, RecurrentShape):
        return state_of(shape)
    return sum(
        2 * shape.groups * shape.per_head * min(tokens, shape.window_of(layer) or tokens)
        for layer in range(shape.num_hidden_layers)
    )
