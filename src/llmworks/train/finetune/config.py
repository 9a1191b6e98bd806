"""Fields shared by all fine-tuning and alignment stages. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Adapter, Config, Model
from llmworks.tokenize.chat.named import TEMPLATE_DESCRIPTION, Template
from llmworks.train.distributed.config import DataParallelConfig
from llmworks.train.finetune.lora_config import LoraConfig
from llmworks.train.loop.schedule import OptimizerConfig

if TYPE_CHECKING:
    pass


class TuneConfig(Config):
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
    num_train_epochs: float = Field(2.0, gt=0, description="number of training epochs; may be a fraction")
    batch_size: int = Field(4, gt=0, description="rows per micro-batch")
    gradient_accumulation_steps: int = Field(
        1, gt=0, description="micro-batches per optimizer step; the loss is normalized over all of them"
    )
    max_length: int = Field(2048, gt=1, description="maximum sequence length in tokens")
    chat_template: Template = Field(
        "keep", description=f"chat template used for training and saved with the model. {TEMPLATE_DESCRIPTION}"
    )
    golden: str = Field(
        "keep",
        pattern=r"^(keep|renew: .+)$",
        description=(
            "keep: the base model's golden tokens must replay; 'renew: REASON' when the template or vocabulary changes"
        ),
    )
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer and learning rate schedule")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description=(
            "mixed precision under autocast; trained weights stay fp32. auto: bf16 on a GPU that supports it, fp16"
            " on an older one, fp32 on a CPU, where the others are many times slower"
        ),
    )
    gradient_checkpointing: bool = Field(
        False,
        description=(
            "gradient checkpointing: recompute activations in the backward pass; less memory, about a third slower"
        ),
    )
    eval_steps: int = Field(0, ge=0, description="steps between evaluations on the eval set; 0 = only at the end")
    eval_samples: int = Field(64, gt=0, description="held-out rows per evaluation")
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
    save_steps: int = Field(20, gt=0, description="steps between checkpoints")

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
            raise ValueError("early_stopping_patience needs metric_for_best_model, the metric that is to improve")
        return self

    @property
    def parallelism(self) -> DataParallelConfig:
        """How training is parallelized over processes; a single process here."""
        return DataParallelConfig()

    @property
    def artifact_type(self) -> type[Adapter] | type[Model]:
        """The kind of artifact that is made."""
        return Model if self.method == "full" else Adapter


class WriterConfig(TuneConfig):
    """Fields for training a model that generates text."""

    num_sample_prompts: int = Field(
        4, ge=0, description="held-out prompts to generate completions for before and after training"
    )
