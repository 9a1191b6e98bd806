"""Fields shared by all fine-tuning and alignment stages. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Adapter, Model
from llmworks.tokenize.chat.named_templates import TEMPLATE_DESCRIPTION, Template
from llmworks.train.distributed.config import DataParallelConfig
from llmworks.train.finetune.lora_config import LoraConfig
from llmworks.train.forgetting.check import FIELD_DESCRIPTION
from llmworks.train.loop.trainer_config import TrainerConfig


class FinetuneConfig(TrainerConfig):
    """What is trained, and on how much data."""

    default_learning_rates: ClassVar[Mapping[str, float]] = {
        "full": 5e-5
    }  # default learning rates by method: the one for adapters is too large for all weights

    method: Literal["lora", "full"] = Field(
        "lora",
        description=(
            "lora: train an adapter on frozen weights; full: train the weights themselves, except those that"
            " `freeze` matches"
        ),
    )
    lora: LoraConfig = Field(LoraConfig(), description="LoRA adapter settings")
    freeze: list[str] = Field(
        [],
        description=(
            "full: weights to freeze, by their names in the model's files, with wildcards * and [0-9], e.g."
            " model.embed_tokens.* or model.layers.[0-9].*"
        ),
    )
    max_length: int = Field(2048, gt=1, description="maximum sequence length in tokens")
    chat_template: Template = Field(
        "keep", description=f"chat template used for training and saved with the model. {TEMPLATE_DESCRIPTION}"
    )
    control_tokens: Literal["text", "keep"] = Field(
        "text",
        description=(
            "special tokens in the text of messages, prompts and documents. text: encode them as text; keep: encode"
            " them as control tokens, as other trainers do"
        ),
    )
    golden: str = Field(
        "keep",
        pattern=r"^(keep|renew: .+)$",
        description=(
            "keep: the base model's golden tokens must replay; 'renew: REASON' when the template or vocabulary changes"
        ),
    )
    metric_for_best_model: Literal["", "eval_loss", "accuracy"] = Field(
        "",
        description=(
            "save the weights of the evaluation with the lowest loss (eval_loss) or the highest accuracy"
            " (accuracy); empty = the weights of the last step"
        ),
    )
    early_stopping_patience: int = Field(
        0, ge=0, description="early stopping: stop after this many evaluations without improvement; 0 = never"
    )

    @model_validator(mode="before")
    @classmethod
    def _rate(cls, values: Any) -> Any:
        given = values.get("optimizer", {}) if isinstance(values, dict) else None
        rate = (
            cls.default_learning_rates.get(values.get("method", cls.model_fields["method"].default))
            if isinstance(given, dict)
            else None
        )
        return (
            {**values, "optimizer": {**given, "learning_rate": rate}}
            if isinstance(given, dict) and rate is not None and "learning_rate" not in given
            else values
        )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.freeze and self.method != "full":
            raise ValueError("freeze is for method full; an adapter freezes all weights")
        if self.method != "lora" and self.lora != LoraConfig():
            raise ValueError(f"lora is for method lora; method {self.method} has no adapter")
        if self.early_stopping_patience and not self.metric_for_best_model:
            raise ValueError("early_stopping_patience needs metric_for_best_model: eval_loss or accuracy")
        return self

    @property
    def parallelism(self) -> DataParallelConfig:
        """How training is parallelized over processes; a single process here."""
        return DataParallelConfig()

    @property
    def artifact_type(self) -> type[Adapter] | type[Model]:
        """The kind of artifact that is made."""
        return Model if self.method == "full" else Adapter


class GenerativeFinetuneConfig(FinetuneConfig):
    """Fields for training a model that generates text."""

    num_sample_prompts: int = Field(
        4, ge=0, description="held-out prompts to generate completions for before and after training"
    )
    num_general_prompts: int = Field(8, ge=0, le=40, description=FIELD_DESCRIPTION)
