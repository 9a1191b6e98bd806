"""Config fields of `merge.experts`. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from llmworks.merge.plan.config import Dtype, IgnoredFields, Ref, YamlConfig


class Expert(YamlConfig):
    """An expert of the mixture."""

    source_model: Ref = Field(description="the model that provides its feed-forward layers")
    positive_prompts: list[str] = Field([], description="prompts this expert should handle")
    negative_prompts: list[str] = Field([], description="prompts this expert should not handle")
    noise_scale: float | None = Field(
        None,
        ge=0,
        description="standard deviation of noise added to its weights, so that copies of one model can diverge in"
        " training",
    )
    residual_scale: float | None = Field(None, description="factor on its down projection")


class ExpertsConfig(YamlConfig):
    """Config of `merge.experts`: mergekit-moe's keys."""

    base_model: Ref = Field(
        description="the model that provides everything but the feed-forward layers, and the hidden states for the"
        " router"
    )
    experts: list[Expert] = Field(
        min_length=1, description="each {source_model, positive_prompts, negative_prompts, noise_scale, residual_scale}"
    )
    shared_experts: list[Expert] | None = Field(
        None, max_length=1, description="an expert that all tokens are routed to, in the layout qwen"
    )
    gate_mode: Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"] = Field(
        "hidden",
        description=(
            "router rows: hidden state of the prompts' last token (hidden, hidden_last), mean over tokens"
            " (hidden_avg), mean of token embeddings (cheap_embed), or random"
        ),
    )
    experts_per_token: int = Field(2, gt=0, description="number of experts per token (top-k)")
    dtype: Dtype = Field(None, description="dtype of the result; default: that of the files")
    architecture: Literal["mixtral", "qwen", "qwen3"] | None = Field(
        None, description="layout: Mixtral, Qwen2-MoE (with a shared expert) or Qwen3-MoE; default: by the base"
    )
    max_shard_size: int = Field(4_000_000_000, ge=1_000_000, description="maximum bytes of a file")
    ignore_config_differences: IgnoredFields = Field([])

    @model_validator(mode="after")
    def _check(self) -> ExpertsConfig:
        if self.experts_per_token > len(self.experts):
            raise ValueError(
                f"experts_per_token is {self.experts_per_token}, but there are {len(self.experts)} experts"
            )
        drawn = self.gate_mode in ("random", "uniform_random")
        without = next((at for at, one in enumerate(self.experts) if not one.positive_prompts), None)
        if not drawn and without is not None:
            raise ValueError(
                f"experts.{without}: has no positive_prompts, which gate_mode {self.gate_mode} needs for its router row"
            )
        said = [(tuple(one.positive_prompts), tuple(one.negative_prompts)) for one in self.experts]
        if not drawn and len(self.experts) > 1 and len(set(said)) == 1:
            raise ValueError(
                "all experts have the same prompts, so the router could not distinguish them; give each its own, or"
                " set gate_mode: random"
            )
        return self

    def model_names(self) -> list[str]:
        """Return the names of models, each once, the base first."""
        return list(dict.fromkeys([self.base_model, *(one.source_model for one in self.iter_all_experts())]))

    def iter_all_experts(self) -> Iterator[Expert]:
        """Yield the experts, then the shared one."""
        yield from self.experts
        yield from self.shared_experts or ()
