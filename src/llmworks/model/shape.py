"""The shape of a Transformer: every switch of the architecture, with a name that says what it does.

Torch-free; knows no weights.

The defaults are today's usual decoder: RMSNorm before each part, rotary positions, grouped queries, SwiGLU, tied
embeddings. `RecurrentShape` is that of what came before.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Config


class Rope(Config):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), and how they are stretched to a longer context than was
    trained.
    """

    theta: float = Field(10_000.0, gt=1, description="base of the wavelengths")
    scaling: Literal["none", "linear", "ntk", "yarn", "llama-3"] = Field(
        "none",
        description=(
            "linear: positions divided by factor; ntk: a larger base; yarn: short waves kept, long ones divided;"
            " llama-3: the same with its own bounds"
        ),
    )
    factor: float = Field(1.0, ge=1, description="how many times the trained context")
    trained: int = Field(0, ge=0, description="context that was trained (yarn, llama-3); 0: context / factor")
    fast: float = Field(
        32.0,
        gt=0,
        description=(
            "yarn: waves that turn so often within the trained context are kept; llama-3: its high_freq_factor, 4 in"
            " Llama 3.1"
        ),
    )
    slow: float = Field(
        1.0, gt=0, description="yarn: those that turn less often are divided; llama-3: its low_freq_factor"
    )

    @model_validator(mode="after")
    def _stretched(self) -> Self:
        if self.scaling == "none" and self.factor != 1:
            raise ValueError(f"rope.factor {self.factor} needs a rope.scaling")
        return self


class Experts(Config):
    """Mixture of experts (Shazeer et al. 2017, arXiv:1701.06538; Switch, Fedus et al. 2021): each token goes to a few
    of many feed-forward layers.
    """

    count: int = Field(8, gt=1, description="experts of a layer")
    chosen: int = Field(2, gt=0, description="experts that a token goes to")
    balance: float = Field(0.01, ge=0, description="weight of the loss that keeps experts evenly used")


class Shape(Config):
    """What a decoder is made of."""

    vocabulary: int = Field(32_000, gt=0, description="tokens")
    width: int = Field(512, gt=0, le=1 << 20, description="numbers of a token's state")
    layers: int = Field(8, gt=0, le=1000, description="blocks")
    heads: int = Field(8, gt=0, description="query heads")
    kv_heads: int = Field(
        0,
        ge=0,
        description=(
            "key and value heads: as many as heads (0) is multi-head, fewer grouped-query, one multi-query attention"
        ),
    )
    head_width: int = Field(0, ge=0, description="numbers of a head; 0: width / heads")
    hidden: int = Field(
        0,
        ge=0,
        description=(
            "inner width of the feed-forward layer; 0: 8/3 of the width when gated, else 4 times, rounded up to 64"
        ),
    )
    context: int = Field(2048, gt=0, description="longest text, in tokens")
    norm: Literal["rms", "layer"] = Field("rms", description="RMSNorm, or LayerNorm with bias")
    norm_place: Literal["pre", "post", "around"] = Field(
        "pre", description="before each part; after it is added, as in 2017; or before and after each part, as Gemma 3"
    )
    norm_epsilon: float = Field(1e-5, gt=0, description="added to the variance")
    norm_from_zero: bool = Field(False, description="RMSNorm's gain is 1 + weight, as Gemma has it")
    qk_norm: bool = Field(False, description="RMSNorm of each query and key")
    position: Literal["rope", "learned", "sinusoidal", "alibi", "none"] = Field(
        "rope", description="how order is known"
    )
    rope: Rope = Field(Rope(), description="rotary positions")
    window: int = Field(0, ge=0, description="tokens that attention looks back, itself included; 0: all")
    full_every: int = Field(
        0, ge=0, description="with a window: every so many-th layer looks back without one; 0: none does"
    )
    window_theta: float = Field(0.0, ge=0, description="base of rotary positions in layers with a window; 0: the same")
    activation: Literal["silu", "gelu", "gelu-tanh"] = Field("silu", description="of the feed-forward layer")
    gated: bool = Field(True, description="feed-forward layer with a gate: SwiGLU with silu, GeGLU with gelu")
    bias: Literal["none", "qkv", "all"] = Field("none", description="linear layers with a bias")
    tied: bool = Field(True, description="output head and embedding are one matrix")
    embedding_scaled: bool = Field(False, description="embeddings are multiplied by the root of the width")
    attention_scale: float = Field(
        0.0, ge=0, description="queries times keys are multiplied by it; 0: 1 / root of the head's width"
    )
    experts: Experts | None = Field(None, description="mixture of experts in place of the feed-forward layer")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """Where a field may be 0 for what follows from others, the mathematics uses `per_head`, `groups` and
        `inner`.
        """
        if not self.head_width and self.width % self.heads:
            raise ValueError(
                f"width {self.width} is not divided by heads {self.heads}; give head_width, or change one of them"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} is not divided by kv_heads {self.kv_heads}")
        if self.position == "rope" and self.per_head % 2:
            raise ValueError(f"rotary positions turn pairs, a head of width {self.per_head} is odd")
        if self.experts and self.experts.chosen > self.experts.count:
            raise ValueError(f"experts.chosen {self.experts.chosen} is more than experts.count {self.experts.count}")
        if (self.full_every or self.window_theta) and not self.window:
            raise ValueError(f"{'full_every' if self.full_every else 'window_theta'} needs a window")
        if self.norm_from_zero and self.norm != "rms":
            raise ValueError(f"norm_from_zero is RMSNorm's, norm is {self.norm!r}")
        if self.position == "rope" and self.rope.scaling == "ntk" and self.per_head < 4:
            raise ValueError(f"rope.scaling ntk needs heads of 4 numbers or more, they have {self.per_head}")
        return self

    @property
    def per_head(self) -> int:
        """Numbers of a head."""
        return self.head_width or self.width // self.heads

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return self.kv_heads or self.heads

    @property
    def inner(self) -> int:
        """Inner width of the feed-forward layer."""
        if self.hidden:
            return self.hidden
        return -(-(self.width * 8 // 3 if self.gated else self.width * 4) // 64) * 64

    def window_of(self, layer: int) -> int:
        """How far a layer looks back; 0: all the way."""
        return 0 if self.full_every and (layer + 1) % self.full_every == 0 else self.window

    def rope_of(self, layer: int) -> Rope:
        """A layer's rotary positions: with a base of their own, layers with a window are not stretched (Gemma 3)."""
        return Rope(theta=self.window_theta) if self.window_theta and self.window_of(layer) else self.rope

    def settled(self) -> dict[str, object]:
        """All fields, with what 0 stands for; two shapes that settle to the same are the same model."""
        rope = self.rope if self.position == "rope" else Rope()
        used: dict[str, object] = {"theta": rope.theta, "scaling": rope.scaling}
        if rope.scaling != "none":
            used["factor"] = rope.factor
        if rope.scaling in ("yarn", "llama-3"):
            used |= {"trained": rope.trained or int(self.context / rope.factor), "fast": rope.fast, "slow": rope.slow}
        resolved = {
            "kv_heads": self.groups,
            "head_width": self.per_head,
            "hidden": self.inner,
            "attention_scale": self.attention_scale or self.per_head**-0.5,
            "rope": used,
        }
        return (
            self.model_dump()
            | resolved
            | {
                "window_theta": self.window_theta or rope.theta,
                "full_every": 0 if self.full_every > self.layers else self.full_every,
            }
        )


class RecurrentShape(Config):
    """What a model is made of that reads through a window, or one token after the other, without attention."""

    kind: Literal["mlp", "rnn", "lstm", "gru"] = Field(
        "lstm",
        description="mlp: a window of tokens through one layer; rnn, lstm, gru: a state that every token changes",
    )
    vocabulary: int = Field(32_000, gt=0, description="tokens")
    width: int = Field(512, gt=0, le=1 << 20, description="numbers of an embedding")
    hidden: int = Field(0, ge=0, description="numbers of the state, or of mlp's layer; 0: the width")
    layers: int = Field(1, gt=0, le=100, description="one above the other (rnn, lstm, gru)")
    window: int = Field(0, ge=0, le=10_000, description="tokens that mlp looks back, itself included; 0: 8")
    dropout: float = Field(0.0, ge=0, lt=1, description="of embeddings and of what each layer gives, in training")
    tied: bool = Field(True, description="output head and embedding are one matrix")
    context: int = Field(
        2048, gt=0, description="longest text, in tokens, that is trained and asked; the state itself has no limit"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kind == "mlp" and self.layers > 1:
            raise ValueError(f"kind mlp has one layer, not {self.layers}; give hidden more")
        if self.kind != "mlp" and self.window:
            raise ValueError(f"window is mlp's; kind {self.kind} has no window")
        return self

    @property
    def inner(self) -> int:
        """Numbers of the state."""
        return self.hidden or self.width

    @property
    def reach(self) -> int:
        """Tokens that the window looks back."""
        return self.window or 8
