"""Fields shared by all trainings, named as in transformers' TrainingArguments. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Config
from llmworks.train.loop.schedule import OptimizerConfig


class TrainerConfig(Config):
    """Length of the training, batch size, optimizer, memory, evaluation and checkpoints."""

    num_train_epochs: float = Field(2.0, gt=0, description="number of training epochs; may be a fraction")
    batch_size: int = Field(4, gt=0, description="rows per micro-batch")
    gradient_accumulation_steps: int = Field(
        1, gt=0, description="micro-batches per optimizer step; the loss is normalized over all of them"
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
    save_steps: int = Field(20, gt=0, description="steps between checkpoints")
