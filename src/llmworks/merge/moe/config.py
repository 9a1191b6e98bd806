"""Config fields of `merge.experts`. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from llmworks.merge.plan.config import Dtype, Ref, Written


class Expert(Written):
    """One expert."""

    source_model: Ref = Field(description="whose feed-forward layers it has")
    positive_prompts: list[str] = Field([], description="what it is to answer")
    negative_prompts: list[str] = Field([], description="what it is not to answer")
    noise_scale: float | None = Field(
        None,
        ge=0,
        description="standard deviation of noise on its weights, so that copies of one model can part in training",
    )
    residual_scale: float | None = Field(None, description="what its last matrix is multiplied by")


class ExpertsConfig(Written):
    """mergekit-moe's keys."""

    base_model: Ref = Field(
        description="the model that gives all but the feed-forward layers, and its states to the gates"
    )
    experts: list[Expert] = Field(
        min_length=1, description="each {source_model, positive_prompts, negative_prompts, noise_scale, residual_scale}"
    )
    shared_experts: list[Expert] | None = Field(
        None, max_length=1, description="one that all tokens go to, of the layout qwen"
    )
    gate_mode: Literal["hidden", "hidden_avg", "hidden_last", "cheap_embed", "random", "uniform_random"] = Field(
        "hidden",
        description=(
            "states of the last token of prompts (hidden, hidden_last), their mean (hidden_avg), the mean of tokens'"
            " embeddings (cheap_embed), or by chance"
        ),
    )
    experts_per_token: int = Field(2, gt=0, description="experts that a token goes to")
    dtype: Dtype = Field(None, description="number format of the result; default: that of the files")
    architecture: Literal["mixtral", "qwen", "qwen3"] | None = Field(
        None, description="layout: of Mixtral, Qwen2-MoE (with a shared expert), Qwen3-MoE; default: by the base"
    )
    max_shard_size: int = Field(4_000_000_000, ge=1_000_000, description="bytes of a file at most")

    @model_validator(mode="after")
    def _checked(self) -> ExpertsConfig:
        if self.experts_per_token > len(self.experts):
            raise ValueError(f"experts_per_token is {self.experts_per_token}, there are {len(self.experts)} experts")
        drawn = self.gate_mode in ("random", "uniform_random")
        without = next((at for at, one in enumerate(self.experts) if not one.positive_prompts), None)
        if not drawn and without is not None:
            raise ValueError(
                f"experts.{without}: has no positive_prompts, by which gate_mode {self.gate_mode} finds its row of the"
                " router"
            )
        said = [(tuple(one.positive_prompts), tuple(one.negative_prompts)) for one in self.experts]
        if not drawn and len(self.experts) > 1 and len(set(said)) == 1:
            raise ValueError(
                "all experts have the same prompts, so that the router could not tell them apart; give each its own, or"
                " gate_mode: random"
            )
        return self

    def named(self) -> list[str]:
        """Names of models, each once, the base first."""
        return list(dict.fromkeys([self.base_model, *(one.source_model for one in self.all())]))

    def all(self) -> Iterator[Expert]:
        """Experts, then the shared one."""
        yield from self.experts
        yield from self.shared_experts or ()
