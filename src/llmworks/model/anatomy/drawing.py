"""Draw a model's architecture as SVG: embedding to head, with one block and its residual connections."""

from __future__ import annotations

import html
from dataclasses import dataclass, field

from llmworks.model.shape import RecurrentShape, Shape

WIDTH, BOX, LEFT, GAP = 440, 300, 75, 18
TINTS = {"table": "#d1fae5", "norm": "#e5e7eb", "attention": "#dbeafe", "feed": "#fef3c7", "state": "#ede9fe"}


@dataclass
class _Column:
    """A column of boxes."""

    x: float
    y: float = 0
    parts: list[str] = field(default_factory=list)

    @property
    def middle(self) -> float:
        return self.x + LEFT + BOX / 2

    def add_text(self, lines: list[str], *, bold: bool = False) -> None:
        """Add lines without a box."""
        for line in lines:
            style = 'font-size="13" font-weight="600"' if bold else 'font-size="11.5"'
            self.parts.append(
                f'<text x="{self.middle}" y="{self.y + 13}" text-anchor="middle" {style}>{html.escape(line)}</text>'
            )
            self.y += 17
        self.y += 3

    def add_arrow(self) -> None:
        """Add an arrow down to the next box."""
        self.parts.append(f'<path d="M{self.middle} {self.y}v{GAP - 4}" stroke="#475569" marker-end="url(#tip)"/>')
        self.y += GAP

    def add_box(self, title: str, lines: list[str], tint: str) -> None:
        """Add a box for one part."""
        height = 22 + 14 * len(lines)
        self.parts.append(
            f'<rect x="{self.x + LEFT}" y="{self.y}" width="{BOX}" height="{height}" rx="6" fill="{TINTS[tint]}"'
            ' stroke="#94a3b8"/>'
        )
        self.parts.append(
            f'<text x="{self.middle}" y="{self.y + 15}" text-anchor="middle" font-size="12.5"'
            f' font-weight="600">{html.escape(title)}</text>'
        )
        for i, line in enumerate(lines):
            self.parts.append(
                f'<text x="{self.middle}" y="{self.y + 29 + 14 * i}" text-anchor="middle" font-size="10.5"'
                f' fill="#475569">{html.escape(line)}</text>'
            )
        self.y += height

    def add_residual(self, begin: float) -> None:
        """Add a residual connection that starts at `begin` and is summed here."""
        self.add_arrow()
        y, side = self.y + 9, self.x + LEFT - 22
        self.parts.append(
            f'<circle cx="{self.middle}" cy="{y}" r="9" fill="#fff" stroke="#475569"/><path d="M{self.middle - 5}'
            f' {y}h10M{self.middle} {y - 5}v10" stroke="#475569"/>'
        )
        self.parts.append(
            f'<path d="M{self.middle} {begin}H{side}V{y}H{self.middle - 11}" fill="none" stroke="#475569"'
            ' marker-end="url(#tip)"/>'
        )
        self.y += 18


def _describe_positions(shape: Shape) -> list[str]:
    """Return the lines that describe the position encoding."""
    if shape.position_embedding_type != "rope":
        return [
            {
                "learned": f"learned positions, {shape.max_position_embeddings:,}",
                "sinusoidal": "sinusoidal positions",
                "alibi": "ALiBi: linear distance bias",
                "none": "no position encoding",
            }[shape.position_embedding_type]
        ]
    rope = shape.rope_parameters
    base = f"{rope.rope_theta:,.0f}" + (
        f", {shape.local_rope_theta:,.0f} in sliding-window layers" if shape.local_rope_theta else ""
    )
    return [f"RoPE, theta {base}"] + (
        [f"RoPE scaling {rope.rope_type}, factor {rope.factor:g}"] if rope.rope_type != "default" else []
    )


def _describe_attention(shape: Shape) -> list[str]:
    kind = (
        "multi-head"
        if shape.num_kv_heads == shape.num_attention_heads
        else "multi-query"
        if shape.num_kv_heads == 1
        else "grouped-query"
    )
    lines = [
        f"{shape.num_attention_heads} query heads of {shape.head_size}, {shape.num_kv_heads} key-value ({kind})",
        *(_describe_positions(shape) if shape.position_embedding_type in ("rope", "alibi") else []),
    ]
    if shape.sliding_window:
        lines.append(
            f"sliding window {shape.sliding_window:,} tokens"
            + (
                f", full attention every {shape.global_attn_every_n_layers} layers"
                if shape.global_attn_every_n_layers
                else ""
            )
        )
    return lines + (["QK-norm"] if shape.use_qk_norm else [])


def _describe_feed_forward(shape: Shape) -> tuple[str, list[str]]:
    activation = {"silu": "SiLU", "gelu": "GELU", "gelu_pytorch_tanh": "GELU (tanh)"}[shape.hidden_act]
    kind = {"silu": "SwiGLU"}.get(shape.hidden_act, "GeGLU") if shape.gated_mlp else activation
    lines = [f"{shape.hidden_size:,} → {shape.inner_size:,} → {shape.hidden_size:,}, {kind}"]
    return (
        (
            "Mixture of experts",
            [f"{shape.experts.num_experts} experts, {shape.experts.num_experts_per_tok} per token", *lines],
        )
        if shape.experts
        else ("Feed-forward", lines)
    )


def _draw_block(column: _Column, shape: Shape) -> None:
    norm = {"rms": "RMSNorm", "layer": "LayerNorm"}[shape.norm]
    feed = _describe_feed_forward(shape)
    for title, lines, tint in (("Attention", _describe_attention(shape), "attention"), (*feed, "feed")):
        begin = column.y + 4
        column.add_arrow()
        if shape.norm_position != "post":
            column.add_box(norm, [], "norm")
            column.add_arrow()
        column.add_box(title, lines, tint)
        if shape.norm_position == "sandwich":
            column.add_arrow()
            column.add_box(norm, [], "norm")
        column.add_residual(begin)
        if shape.norm_position == "post":
            column.add_arrow()
            column.add_box(norm, [], "norm")


def _draw_column(name: str, shape: Shape | RecurrentShape, x: float) -> _Column:
    width = shape.hidden_size if isinstance(shape, Shape) else shape.embedding_dim
    column = _Column(x, 6)
    column.add_text([name], bold=True)
    column.add_arrow()
    column.add_box(
        "Embedding",
        [
            f"{shape.vocab_size:,} tokens → {width:,} dimensions",
            *(
                _describe_positions(shape)
                if isinstance(shape, Shape) and shape.position_embedding_type not in ("rope", "alibi")
                else []
            ),
        ],
        "table",
    )
    if isinstance(shape, Shape):
        top = column.y + 8
        column.y += 8
        _draw_block(column, shape)
        column.y += 10
        column.parts.insert(
            0,
            f'<rect x="{x + 28}" y="{top}" width="{WIDTH - 50}" height="{column.y - top}" rx="10" fill="none"'
            ' stroke="#64748b" stroke-dasharray="5 4"/>',
        )
        column.parts.append(
            f'<text x="{x + WIDTH - 52}" y="{top + 16}" font-size="13" font-weight="600">×'
            f" {shape.num_hidden_layers}</text>"
        )
        if shape.norm_position != "post":
            column.add_arrow()
            column.add_box({"rms": "RMSNorm", "layer": "LayerNorm"}[shape.norm], [], "norm")
    elif shape.rnn_type == "mlp":
        column.add_arrow()
        column.add_box(
            "Window",
            [
                f"the last {shape.window_tokens} tokens: {shape.window_tokens * shape.embedding_dim:,} →"
                f" {shape.inner_size:,}, tanh"
            ],
            "state",
        )
    else:
        for _ in range(shape.num_hidden_layers):
            column.add_arrow()
            column.add_box(
                shape.rnn_type.upper(),
                [f"{'two states' if shape.rnn_type == 'lstm' else 'state'} of {shape.inner_size:,} dimensions"],
                "state",
            )
    column.add_arrow()
    column.add_box(
        "Head",
        [f"{width:,} → {shape.vocab_size:,} logits" + (", tied to the embedding" if shape.tie_word_embeddings else "")],
        "table",
    )
    return column


def draw(shapes: dict[str, Shape | RecurrentShape]) -> str:
    """Draw models side by side as one SVG."""
    columns = [_draw_column(name, shape, i * WIDTH) for i, (name, shape) in enumerate(shapes.items())]
    wide, high = WIDTH * len(columns), max(column.y for column in columns) + 10
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
        ' orient="auto"><path d="M0 0L8 4L0 8z" fill="#475569"/></marker></defs>'
    )
    body = "".join("".join(column.parts) for column in columns)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high:g}" width="{wide}"'
        f' font-family="system-ui,sans-serif" fill="#1b1f24">{tip}{body}</svg>'
    )
