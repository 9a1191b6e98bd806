"""Fields that all fine-tunings and alignments share. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Adapter, Config, Model
from llmworks.tokenize.chat.named import CHOICES, Template
from llmworks.train.distributed.config import DataParallel
from llmworks.train.finetune.lora_config import LoraConfig
from llmworks.train.loop.schedule import OptimizerConfig

if TYPE_CHECKING:
    pass


class TuneConfig(Config):
    """What is trained, and on how much."""

    rates: ClassVar[Mapping[str, float]] = {
        "full": 5e-5
    }  # of methods where none is given: an adapter's would break all weights

    method: Literal["lora", "full"] = Field(
        "lora",
        description="lora: an adapter, all else is frozen; full: the weights themselves, those that `freeze` leaves",
    )
    lora: LoraConfig = Field(LoraConfig(), description="the adapter")
    freeze: list[str] = Field(
        [],
        description=(
            "full: weights that stay as they are, by names in the model's files with * and [0-9], as"
            " model.embed_tokens.* or model.layers.[0-9].*"
        ),
    )
    num_train_epochs: float = Field(2.0, gt=0, description="passes over the data; may be a fraction")
    batch_size: int = Field(4, gt=0, description="rows of data per part of a step")
    gradient_accumulation_steps: int = Field(
        1, gt=0, description="parts per step; the step's loss is normalised over all of them"
    )
    max_length: int = Field(2048, gt=1, description="the longest row that is read whole")
    chat_template: Template = Field("keep", description=f"the chat template that is trained with and saved. {CHOICES}")
    golden: str = Field(
        "keep",
        pattern=r"^(keep|renew: .+)$",
        description=(
            "keep: the base's golden tokens must replay; 'renew: REASON' when the template or vocabulary changes"
        ),
    )
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="learning rate schedule and optimizer")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description=(
            "of products, under autocast; weights that are trained stay fp32. auto: bf16 on a GPU that has it, fp16 on"
            " an older one, fp32 on a CPU, where the others are many times slower"
        ),
    )
    gradient_checkpointing: bool = Field(
        False, description="keep no activations of blocks, compute them again backward: less memory, a third more time"
    )
    eval_steps: int = Field(
        0, ge=0, description="steps between two looks at how well held-out rows are done; 0: at the end only"
    )
    eval_samples: int = Field(64, gt=0, description="held-out rows of a look")
    metric_for_best_model: Literal["", "eval_loss", "accuracy"] = Field(
        "",
        description=(
            "which look's weights are saved: the one with the lowest loss (held_out), or with the most that is right"
            " (accuracy); empty: the last step's"
        ),
    )
    early_stopping_patience: int = Field(
        0, ge=0, description="end after so many looks that are no better than the best; 0: never"
    )
    save_steps: int = Field(20, gt=0, description="steps between two checkpoints")

    @model_validator(mode="before")
    @classmethod
    def _rate(cls, values: Any) -> Any:
        given = values.get("optimizer", {}) if isinstance(values, dict) else None
        rate = (
            cls.rates.get(values.get("method", cls.model_fields["method"].default)) if isinstance(given, dict) else None
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
            raise ValueError(f"lora is for method lora; with {self.method} there is no adapter")
        if self.early_stopping_patience and not self.metric_for_best_model:
            raise ValueError("patience needs `best`, the metric that is to get better")
        return self

    @property
    def spread(self) -> DataParallel:
        """How the training is spread over processes; here it is not."""
        return DataParallel()

    @property
    def makes(self) -> type[Adapter] | type[Model]:
        """The kind of artifact that is made."""
        return Model if self.method == "full" else Adapter


class WriterConfig(TuneConfig):
    """Fields of trainings of a model that writes answers."""

    num_sample_prompts: int = Field(4, ge=0, description="held-out questions answered before and after")
