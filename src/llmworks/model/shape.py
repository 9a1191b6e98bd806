"""The shape of a Transformer: every switch of the architecture, with a name that says what it does.

Torch-free; knows no weights.

The defaults are today's usual decoder: RMSNorm before each part, rotary positions, grouped queries, SwiGLU, tied
embeddings. `RecurrentShape` is that of what came before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Config


class Rope(Config):
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), and how they are stretched to a longer context than was
    trained.
    """

    rope_theta: float = Field(10_000.0, gt=1, description="base of the wavelengths")
    rope_type: Literal["default", "linear", "ntk", "yarn", "llama3"] = Field(
        "default",
        description=(
            "linear: positions divided by factor; ntk: a larger base; yarn: short waves kept, long ones divided;"
            " llama-3: the same with its own bounds"
        ),
    )
    factor: float = Field(1.0, ge=1, description="how many times the trained context")
    original_max_position_embeddings: int = Field(
        0, ge=0, description="context that was trained (yarn, llama-3); 0: context / factor"
    )
    beta_fast: float = Field(
        32.0,
        gt=0,
        description=(
            "yarn: waves that turn so often within the trained context are kept; llama-3: its high_freq_factor, 4 in"
            " Llama 3.1"
        ),
    )
    beta_slow: float = Field(
        1.0, gt=0, description="yarn: those that turn less often are divided; llama-3: its low_freq_factor"
    )

    @model_validator(mode="after")
    def _stretched(self) -> Self:
        if self.rope_type == "default" and self.factor != 1:
            raise ValueError(f"rope.factor {self.factor} needs a rope.scaling")
        return self


class Experts(Config):
    """Mixture of experts (Shazeer et al. 2017, arXiv:1701.06538; Switch, Fedus et al. 2021): each token goes to a few
    of many feed-forward layers.
    """

    num_experts: int = Field(8, gt=1, description="experts of a layer")
    num_experts_per_tok: int = Field(2, gt=0, description="experts that a token goes to")
    router_aux_loss_coef: float = Field(0.01, ge=0, description="weight of the loss that keeps experts evenly used")


class Shape(Config):
    """What a decoder is made of."""

    vocab_size: int = Field(32_000, gt=0, description="tokens")
    hidden_size: int = Field(512, gt=0, le=1 << 20, description="numbers of a token's state")
    num_hidden_layers: int = Field(8, gt=0, le=1000, description="blocks")
    num_attention_heads: int = Field(8, gt=0, description="query heads")
    num_key_value_heads: int = Field(
        0,
        ge=0,
        description=(
            "key and value heads: as many as heads (0) is multi-head, fewer grouped-query, one multi-query attention"
        ),
    )
    head_dim: int = Field(0, ge=0, description="numbers of a head; 0: width / heads")
    intermediate_size: int = Field(
        0,
        ge=0,
        description=(
            "inner width of the feed-forward layer; 0: 8/3 of the width when gated, else 4 times, rounded up to 64"
        ),
    )
    max_position_embeddings: int = Field(2048, gt=0, description="longest text, in tokens")
    norm: Literal["rms", "layer"] = Field("rms", description="RMSNorm, or LayerNorm with bias")
    norm_position: Literal["pre", "post", "sandwich"] = Field(
        "pre", description="before each part; after it is added, as in 2017; or before and after each part, as Gemma 3"
    )
    norm_eps: float = Field(1e-5, gt=0, description="added to the variance")
    norm_unit_offset: bool = Field(False, description="RMSNorm's gain is 1 + weight, as Gemma has it")
    use_qk_norm: bool = Field(False, description="RMSNorm of each query and key")
    position_embedding_type: Literal["rope", "learned", "sinusoidal", "alibi", "none"] = Field(
        "rope", description="how order is known"
    )
    rope_parameters: Rope = Field(Rope(), description="rotary positions")
    sliding_window: int = Field(0, ge=0, description="tokens that attention looks back, itself included; 0: all")
    global_attn_every_n_layers: int = Field(
        0, ge=0, description="with a window: every so many-th layer looks back without one; 0: none does"
    )
    local_rope_theta: float = Field(
        0.0, ge=0, description="base of rotary positions in layers with a window; 0: the same"
    )
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh"] = Field("silu", description="of the feed-forward layer")
    gated_mlp: bool = Field(True, description="feed-forward layer with a gate: SwiGLU with silu, GeGLU with gelu")
    bias: Literal["none", "qkv", "all"] = Field("none", description="linear layers with a bias")
    tie_word_embeddings: bool = Field(True, description="output head and embedding are one matrix")
    scale_embedding: bool = Field(False, description="embeddings are multiplied by the root of the width")
    attention_multiplier: float = Field(
        0.0, ge=0, description="queries times keys are multiplied by it; 0: 1 / root of the head's width"
    )
    experts: Experts | None = Field(None, description="mixture of experts in place of the feed-forward layer")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """Where a field may be 0 for what follows from others, the mathematics uses `per_head`, `groups` and
        `inner`.
        """
        if not self.head_dim and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"width {self.hidden_size} is not divided by heads {self.num_attention_heads}; give head_width, or change one of them"
            )
        if self.num_attention_heads % (self.num_key_value_heads or self.num_attention_heads):
            raise ValueError(f"heads {self.num_attention_heads} is not divided by kv_heads {self.num_key_value_heads}")
        if self.position_embedding_type == "rope" and self.per_head % 2:
            raise ValueError(f"rotary positions turn pairs, a head of width {self.per_head} is odd")
        if self.experts and self.experts.num_experts_per_tok > self.experts.num_experts:
            raise ValueError(
                f"experts.chosen {self.experts.num_experts_per_tok} is more than experts.count {self.experts.num_experts}"
            )
        if (self.global_attn_every_n_layers or self.local_rope_theta) and not self.sliding_window:
            raise ValueError(f"{'full_every' if self.global_attn_every_n_layers else 'window_theta'} needs a window")
        if self.norm_unit_offset and self.norm != "rms":
            raise ValueError(f"norm_from_zero is RMSNorm's, norm is {self.norm!r}")
        if self.position_embedding_type == "rope" and self.rope_parameters.rope_type == "ntk" and self.per_head < 4:
            raise ValueError(f"rope.scaling ntk needs heads of 4 numbers or more, they have {self.per_head}")
        return self

    @property
    def per_head(self) -> int:
        """Numbers of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def groups(self) -> int:
        """Key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def inner(self) -> int:
        """Inner width of the feed-forward layer."""
        if self.intermediate_size:
            return self.intermediate_size
        return -(-(self.hidden_size * 8 // 3 if self.gated_mlp else self.hidden_size * 4) // 64) * 64

    def window_of(self, layer: int) -> int:
        """How far a layer looks back; 0: all the way."""
        return (
            0
            if self.global_attn_every_n_layers and (layer + 1) % self.global_attn_every_n_layers == 0
            else self.sliding_window
        )

    def rope_of(self, layer: int) -> Rope:
        """A layer's rotary positions: with a base of their own, layers with a window are not stretched (Gemma 3)."""
        return (
            Rope(rope_theta=self.local_rope_theta)
            if self.local_rope_theta and self.window_of(layer)
            else self.rope_parameters
        )

    def settled(self) -> dict[str, object]:
        """All fields, with what 0 stands for; two shapes that settle to the same are the same model."""
        rope = self.rope_parameters if self.position_embedding_type == "rope" else Rope()
        used: dict[str, object] = {"rope_theta": rope.rope_theta, "rope_type": rope.rope_type}
        if rope.rope_type != "default":
            used["factor"] = rope.factor
        if rope.rope_type in ("yarn", "llama3"):
            used |= {
                "original_max_position_embeddings": rope.original_max_position_embeddings
                or int(self.max_position_embeddings / rope.factor),
                "beta_fast": rope.beta_fast,
                "beta_slow": rope.beta_slow,
            }
        resolved = {
            "num_key_value_heads": self.groups,
            "head_dim": self.per_head,
            "intermediate_size": self.inner,
            "attention_multiplier": self.attention_multiplier or self.per_head**-0.5,
            "rope_parameters": used,
        }
        return (
            self.model_dump()
            | resolved
            | {
                "local_rope_theta": self.local_rope_theta or rope.rope_theta,
                "global_attn_every_n_layers": 0
                if self.global_attn_every_n_layers > self.num_hidden_layers
                else self.global_attn_every_n_layers,
            }
        )


class RecurrentShape(Config):
    """What a model is made of that reads through a window, or one token after the other, without attention."""

    rnn_type: Literal["mlp", "rnn", "lstm", "gru"] = Field(
        "lstm",
        description="mlp: a window of tokens through one layer; rnn, lstm, gru: a state that every token changes",
    )
    vocab_size: int = Field(32_000, gt=0, description="tokens")
    embedding_dim: int = Field(512, gt=0, le=1 << 20, description="numbers of an embedding")
    hidden_size: int = Field(0, ge=0, description="numbers of the state, or of mlp's layer; 0: the width")
    num_hidden_layers: int = Field(1, gt=0, le=100, description="one above the other (rnn, lstm, gru)")
    window_size: int = Field(0, ge=0, le=10_000, description="tokens that mlp looks back, itself included; 0: 8")
    dropout: float = Field(0.0, ge=0, lt=1, description="of embeddings and of what each layer gives, in training")
    tie_word_embeddings: bool = Field(True, description="output head and embedding are one matrix")
    max_position_embeddings: int = Field(
        2048, gt=0, description="longest text, in tokens, that is trained and asked; the state itself has no limit"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.rnn_type == "mlp" and self.num_hidden_layers > 1:
            raise ValueError(f"kind mlp has one layer, not {self.num_hidden_layers}; give hidden more")
        if self.rnn_type != "mlp" and self.window_size:
            raise ValueError(f"window_size is of rnn_type mlp; {self.rnn_type} has no window")
        return self

    @property
    def inner(self) -> int:
        """Numbers of the state."""
        return self.hidden_size or self.embedding_dim

    @property
    def reach(self) -> int:
        """Tokens that the window looks back."""
        return self.window_size or 8


BEFORE: dict[str, str] = {  # names of fields in config.json of models made before 0.3
    "vocabulary": "vocab_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_width": "head_dim",
    "context": "max_position_embeddings",
    "norm_place": "norm_position",
    "norm_epsilon": "norm_eps",
    "norm_from_zero": "norm_unit_offset",
    "qk_norm": "use_qk_norm",
    "position": "position_embedding_type",
    "rope": "rope_parameters",
    "full_every": "global_attn_every_n_layers",
    "window_theta": "local_rope_theta",
    "activation": "hidden_act",
    "gated": "gated_mlp",
    "tied": "tie_word_embeddings",
    "embedding_scaled": "scale_embedding",
    "attention_scale": "attention_multiplier",
    "kind": "rnn_type",
    "theta": "rope_theta",
    "scaling": "rope_type",
    "trained": "original_max_position_embeddings",
    "fast": "beta_fast",
    "slow": "beta_slow",
    "count": "num_experts",
    "chosen": "num_experts_per_tok",
    "balance": "router_aux_loss_coef",
}
BEFORE_DECODER = {"width": "hidden_size", "hidden": "intermediate_size", "window": "sliding_window"}
BEFORE_RECURRENT = {"width": "embedding_dim", "hidden": "hidden_size", "window": "window_size"}
VALUES_BEFORE = {
    "norm_position": {"around": "sandwich"},
    "hidden_act": {"gelu-tanh": "gelu_pytorch_tanh"},
    "rope_type": {"none": "default", "llama-3": "llama3"},
}


def read_stored(shape: Mapping[str, Any]) -> dict[str, Any]:
    """Return a shape as config.json holds it, with names before 0.3 replaced.

    A stored shape holds all its fields, so that `width` tells old names.
    """
    if "width" not in shape:
        return dict(shape)
    before = BEFORE | (BEFORE_RECURRENT if "kind" in shape else BEFORE_DECODER)

    def renamed(fields: Mapping[str, Any]) -> dict[str, Any]:
        found = {
            before.get(key, key): renamed(value) if isinstance(value, Mapping) else value
            for key, value in fields.items()
        }
        return {
            key: VALUES_BEFORE.get(key, {}).get(value, value) if isinstance(value, str) else value
            for key, value in found.items()
        }

    return renamed(shape)
