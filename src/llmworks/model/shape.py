"""Define the architecture of a Transformer decoder: one field per design choice.

Torch-free. The defaults are a current decoder: pre-norm RMSNorm, RoPE, grouped-query attention, SwiGLU, tied
embeddings. `RecurrentShape` describes RNNs and fixed-window models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Config


class Rope(Config):
    """Rotary position embeddings (RoPE; Su et al. 2021, arXiv:2104.09864) and their scaling to longer contexts."""

    rope_theta: float = Field(10_000.0, gt=1, description="RoPE theta: base of the wavelengths")
    rope_type: Literal["default", "linear", "ntk", "yarn", "llama3"] = Field(
        "default",
        description=(
            "RoPE scaling. linear: positions divided by factor; ntk: larger base; yarn: short wavelengths kept, long"
            " ones divided; llama3: the same with its own bounds"
        ),
    )
    factor: float = Field(1.0, ge=1, description="ratio of the extended to the trained context")
    original_max_position_embeddings: int = Field(
        0, ge=0, description="trained context length (yarn, llama3); 0 = max_position_embeddings / factor"
    )
    beta_fast: float = Field(
        32.0,
        gt=0,
        description=(
            "yarn: pairs with at least this many rotations within the trained context are not scaled; llama3:"
            " high_freq_factor, 4 in Llama 3.1"
        ),
    )
    beta_slow: float = Field(
        1.0, gt=0, description="yarn: pairs with fewer rotations are divided by factor; llama3: low_freq_factor"
    )

    @model_validator(mode="after")
    def _check_factor(self) -> Self:
        if self.rope_type == "default" and self.factor != 1:
            raise ValueError(f"rope_parameters.factor {self.factor} needs a rope_parameters.rope_type")
        return self


class Experts(Config):
    """Mixture of experts (MoE): a router sends each token to a few of many feed-forward layers.

    Shazeer et al. 2017 (arXiv:1701.06538); Switch Transformer, Fedus et al. 2021.
    """

    num_experts: int = Field(8, gt=1, description="experts per layer")
    num_experts_per_tok: int = Field(2, gt=0, description="experts each token is routed to (top-k)")
    router_aux_loss_coef: float = Field(0.01, ge=0, description="coefficient of the router's load-balancing loss")


class Shape(Config):
    """Architecture of a Transformer decoder."""

    vocab_size: int = Field(32_000, gt=0, description="vocabulary size in tokens")
    hidden_size: int = Field(512, gt=0, le=1 << 20, description="hidden size")
    num_hidden_layers: int = Field(8, gt=0, le=1000, description="Transformer blocks")
    num_attention_heads: int = Field(8, gt=0, description="query heads")
    num_key_value_heads: int = Field(
        0,
        ge=0,
        description=(
            "key and value heads: 0 = as many as query heads (multi-head), fewer = grouped-query, 1 ="
            " multi-query attention"
        ),
    )
    head_dim: int = Field(0, ge=0, description="dimensions per head; 0 = hidden_size / num_attention_heads")
    intermediate_size: int = Field(
        0,
        ge=0,
        description=(
            "feed-forward inner size; 0 = 8/3 of hidden_size when gated, else 4 times, rounded up to a multiple of 64"
        ),
    )
    max_position_embeddings: int = Field(2048, gt=0, description="maximum sequence length in tokens")
    norm: Literal["rms", "layer"] = Field("rms", description="RMSNorm, or LayerNorm with bias")
    norm_position: Literal["pre", "post", "sandwich"] = Field(
        "pre", description="pre-norm; post-norm (2017); sandwich: before and after each sublayer, as Gemma 3"
    )
    norm_eps: float = Field(1e-5, gt=0, description="epsilon added to the variance")
    norm_unit_offset: bool = Field(False, description="RMSNorm gain is 1 + weight, as in Gemma")
    use_qk_norm: bool = Field(False, description="QK-norm: RMSNorm on each query and key")
    position_embedding_type: Literal["rope", "learned", "sinusoidal", "alibi", "none"] = Field(
        "rope", description="position encoding"
    )
    rope_parameters: Rope = Field(Rope(), description="RoPE parameters")
    sliding_window: int = Field(
        0, ge=0, description="sliding-window attention: window in tokens, the current one included; 0 = full attention"
    )
    global_attn_every_n_layers: int = Field(
        0, ge=0, description="with a sliding window: every n-th layer uses full attention; 0 = none"
    )
    local_rope_theta: float = Field(
        0.0, ge=0, description="RoPE theta of sliding-window layers; 0 = the same as in the other layers"
    )
    hidden_act: Literal["silu", "gelu", "gelu_pytorch_tanh"] = Field(
        "silu", description="activation function of the feed-forward layer"
    )
    gated_mlp: bool = Field(True, description="gated feed-forward layer: SwiGLU with silu, GeGLU with gelu")
    bias: Literal["none", "qkv", "all"] = Field("none", description="which linear layers have a bias")
    tie_word_embeddings: bool = Field(
        True, description="tied embeddings: output head and input embedding share one matrix"
    )
    scale_embedding: bool = Field(False, description="multiply embeddings by sqrt(hidden_size)")
    attention_multiplier: float = Field(
        0.0, ge=0, description="attention scale, multiplies the query-key products; 0 = 1 / sqrt(head_dim)"
    )
    experts: Experts | None = Field(None, description="mixture of experts (MoE) in place of the feed-forward layer")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """Check that the fields fit together.

        Code reads fields whose 0 means "derived" through `head_size`, `num_kv_heads` and `inner_size`.
        """
        if not self.head_dim and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads};"
                " give head_dim, or"
                " change one of them"
            )
        if self.num_attention_heads % (self.num_key_value_heads or self.num_attention_heads):
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by num_key_value_heads"
                f" {self.num_key_value_heads}"
            )
        if self.position_embedding_type == "rope" and self.head_size % 2:
            raise ValueError(f"RoPE rotates pairs of dimensions, but head_dim {self.head_size} is odd")
        if self.experts and self.experts.num_experts_per_tok > self.experts.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.experts.num_experts_per_tok} is larger than num_experts"
                f" {self.experts.num_experts}"
            )
        if (self.global_attn_every_n_layers or self.local_rope_theta) and not self.sliding_window:
            raise ValueError(
                f"{'global_attn_every_n_layers' if self.global_attn_every_n_layers else 'local_rope_theta'} needs a"
                " sliding_window"
            )
        if self.norm_unit_offset and self.norm != "rms":
            raise ValueError(f"norm_unit_offset needs norm 'rms', norm is {self.norm!r}")
        if self.position_embedding_type == "rope" and self.rope_parameters.rope_type == "ntk" and self.head_size < 4:
            raise ValueError(f"rope_type ntk needs a head_dim of 4 or more, it is {self.head_size}")
        return self

    @property
    def head_size(self) -> int:
        """Dimensions per head, with 0 resolved."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        """Number of key and value heads, with 0 resolved."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def inner_size(self) -> int:
        """Feed-forward inner size, with 0 resolved."""
        if self.intermediate_size:
            return self.intermediate_size
        return -(-(self.hidden_size * 8 // 3 if self.gated_mlp else self.hidden_size * 4) // 64) * 64

    def get_sliding_window(self, layer: int) -> int:
        """Return a layer's sliding window in tokens; 0 = full attention."""
        return (
            0
            if self.global_attn_every_n_layers and (layer + 1) % self.global_attn_every_n_layers == 0
            else self.sliding_window
        )

    def get_rope_parameters(self, layer: int) -> Rope:
        """Return a layer's RoPE parameters; sliding-window layers with their own theta are not scaled (Gemma 3)."""
        return (
            Rope(rope_theta=self.local_rope_theta)
            if self.local_rope_theta and self.get_sliding_window(layer)
            else self.rope_parameters
        )

    def resolve(self) -> dict[str, object]:
        """Return all fields with derived values resolved; equal results mean the same model."""
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
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
            "intermediate_size": self.inner_size,
            "attention_multiplier": self.attention_multiplier or self.head_size**-0.5,
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
    """Architecture of a language model without attention: a fixed-window MLP or a recurrent network."""

    rnn_type: Literal["mlp", "rnn", "lstm", "gru"] = Field(
        "lstm",
        description="mlp: fixed window of tokens through one layer; rnn, lstm, gru: recurrent state",
    )
    vocab_size: int = Field(32_000, gt=0, description="vocabulary size in tokens")
    embedding_dim: int = Field(512, gt=0, le=1 << 20, description="embedding size")
    hidden_size: int = Field(0, ge=0, description="size of the recurrent state or of the MLP layer; 0 = embedding_dim")
    num_hidden_layers: int = Field(1, gt=0, le=100, description="stacked layers (rnn, lstm, gru)")
    window_size: int = Field(0, ge=0, le=10_000, description="window of mlp in tokens, the current one included; 0 = 8")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on embeddings and layer outputs in training")
    tie_word_embeddings: bool = Field(
        True, description="tied embeddings: output head and input embedding share one matrix"
    )
    max_position_embeddings: int = Field(
        2048, gt=0, description="maximum sequence length in training and inference; the state itself has no limit"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.rnn_type == "mlp" and self.num_hidden_layers > 1:
            raise ValueError(f"rnn_type mlp has one layer, not {self.num_hidden_layers}; increase hidden_size instead")
        if self.rnn_type != "mlp" and self.window_size:
            raise ValueError(f"window_size needs rnn_type mlp; {self.rnn_type} has no window")
        return self

    @property
    def inner_size(self) -> int:
        """Size of the state, with 0 resolved."""
        return self.hidden_size or self.embedding_dim

    @property
    def window_tokens(self) -> int:
        """Window in tokens, with 0 resolved."""
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

    def rename_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
        found = {
            before.get(key, key): rename_fields(value) if isinstance(value, Mapping) else value
            for key, value in fields.items()
        }
        return {
            key: VALUES_BEFORE.get(key, {}).get(value, value) if isinstance(value, str) else value
            for key, value in found.items()
        }

    return rename_fields(shape)
