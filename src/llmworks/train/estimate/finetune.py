"""Estimate a fine-tuning before it starts.

Sequence lengths are estimated from characters until a trial run has tokenized the conversations.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from llmworks.core.artifact import Dataset
from llmworks.core.errors import UserError
from llmworks.model.anatomy.parts import list_parts
from llmworks.model.io.weights import read_header
from llmworks.model.shape import Shape
from llmworks.train.distill import DistillConfig
from llmworks.train.estimate.pretrain import (
    BASE_PROCESS_BYTES,
    BYTES_PER_NUMBER,
    TrialMeasurement,
    count_activations,
    require_memory,
    run_trial,
)
from llmworks.train.sft import SftConfig

CHARS_PER_TOKEN = 3.5  # characters per token, about: prose has more, code and JSON have fewer
NF4_BYTES = 4.127 / 8  # bytes per weight in NF4 with double quantization
LOGITS_BYTES = 2.0 * BYTES_PER_NUMBER * (1 << 25)  # bytes of a chunk of logits and their probabilities
TEMPLATE_CHARS = 20  # characters that a chat template adds per turn, about
MAX_CONVERSATIONS = 4096  # conversations whose characters are counted
LORA_LAYER_NAMES = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}


@dataclass(frozen=True)
class DatasetStats:
    """Size of a dataset: number of rows, mean and maximum characters per row, share of label characters."""

    count: int
    mean_chars: float
    max_chars: int
    label_share: float


def measure_dataset(data: Dataset) -> DatasetStats:
    """Measure a dataset without tokenizing it; the first rows stand for all.

    Errors: DataError for rows that cannot be trained on.
    """
    from llmworks.data.conversations.training_rows import read_training_rows
    from llmworks.data.store.rows import detect_schema, iter_table_rows, list_row_files, open_rows, read_row_tables

    if detect_schema(data) != "chat":
        lengths_by_part = [
            (len(str(row.get("prompt", ""))), len(str(row.get("text", row.get("completion", "")))))
            for row in read_training_rows(data)
        ]
        sizes = [sum(pair) for pair in lengths_by_part]
        return DatasetStats(
            len(sizes),
            sum(sizes) / len(sizes),
            max(sizes),
            sum(said for _, said in lengths_by_part) / max(1, sum(sizes)),
        )
    files = list_row_files(data, "chat")
    count = 0
    for file in files:
        with open_rows(file, "chat") as opened:
            count += opened.metadata.num_rows
    lengths, label_chars = [], 0
    for table in read_row_tables(files[0], "chat", 0, 1):
        for row in list(iter_table_rows(table, "chat"))[:MAX_CONVERSATIONS]:
            turns = [
                (
                    turn["role"],
                    TEMPLATE_CHARS + len(str(turn.get("content") or "")) + len(str(turn.get("tool_calls") or "")),
                )
                for turn in row["messages"]
            ]
            lengths.append(sum(size for _, size in turns) + len(str(row.get("tools") or "")))
            label_chars += sum(size for role, size in turns if role == "assistant")
    return DatasetStats(
        count, sum(lengths) / max(1, len(lengths)), max(lengths, default=0), label_chars / max(1, sum(lengths))
    )


@dataclass(frozen=True)
class FinetuneEstimate:
    """Estimate of a fine-tuning.

    `conversations`: if its data exists; `teacher` and its shape `teacher_shape`: if it is distilled from logits.
    """

    config: SftConfig
    model: Path
    shape: Shape
    conversations: DatasetStats | None = None
    data: Path | None = None
    held_out: Path | None = None
    teacher: Path | None = None
    teacher_shape: Shape | None = None

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(part.parameters for part in list_parts(self.shape, 1))

    @cached_property
    def trainable_parameters(self) -> int:
        """Number of trainable parameters.

        LoRA: rank times inputs plus outputs of each adapted layer. Full: all parameters, ignoring `freeze`.
        """
        if self.config.method == "full":
            return self.parameters
        if self.config.method in ("prompt_tuning", "prefix_tuning"):
            each = (
                self.shape.hidden_size
                if self.config.method == "prompt_tuning"
                else 2 * self.shape.num_hidden_layers * self.shape.num_kv_heads * self.shape.head_size
            )
            return self.config.soft_prompt.num_virtual_tokens * each
        targets = self.config.lora.target_modules
        sizes = [
            part.tensors["weight"]
            for part in list_parts(self.shape, 1)
            if part.block
            and part.name in LORA_LAYER_NAMES
            and (targets == "all-linear" or LORA_LAYER_NAMES[part.name] in targets)
        ]
        return self.config.lora.r * sum(sum(size) for size in sizes)

    @property
    def saved_parameters(self) -> int:
        """Number of parameters that are saved: the adapter's, or the model's."""
        return self.trainable_parameters

    @property
    def frozen_bytes(self) -> float:
        """Bytes of the base model's weights; with load_in_4bit the linear layers count in NF4."""
        if not self.config.lora.load_in_4bit:
            return float(self.parameters * BYTES_PER_NUMBER)
        inner = sum(
            part.parameters for part in list_parts(self.shape, 1) if part.block and part.name in LORA_LAYER_NAMES
        )
        return (self.parameters - inner) * BYTES_PER_NUMBER + inner * NF4_BYTES

    @property
    def can_try(self) -> bool:
        """Whether its conversations exist."""
        return self.data is not None

    def check(self) -> None:
        """Reject early what the training would reject at its start, as far as it is known. Errors: UserError."""
        targets = self.config.lora.target_modules
        if self.config.method == "lora" and isinstance(targets, list):
            known = sorted(
                {
                    name.split(".")[-2]
                    for file in self.model.glob("*.safetensors")
                    for name in read_header(file)
                    if name.endswith(".weight") and name.count(".") > 1
                }
            )
            unknown = next((name for name in targets if name not in known), None)
            if known and unknown is not None:
                near = difflib.get_close_matches(unknown, known, n=1)
                raise UserError(
                    f"lora.target_modules: the model has no layer {unknown!r}"
                    + (f", did you mean {near[0]!r}?" if near else f"; it has {', '.join(known)}")
                )
        if (
            isinstance(self.config, DistillConfig)
            and self.teacher is None
            and self.config.source != "text"
            and (self.config.ce_weight or self.config.divergence != "forward_kl" or self.config.temperature != 1.0)
        ):
            raise UserError(
                "temperature, ce_weight and divergence need logits, but this teacher only provides text (an"
                " adapter has to be merged first; or the vocabularies differ)"
            )

    @property
    def steps(self) -> int:
        """Number of steps, if no conversation is dropped; as in `examples.ExampleSteps`."""
        if self.conversations is None:
            return 0
        parts = max(1, round(self.config.num_train_epochs * -(-self.conversations.count // self.config.batch_size)))
        return -(-parts // self.config.gradient_accumulation_steps)

    @property
    def num_tokens(self) -> int:
        """Approximate number of tokens over all steps."""
        return (
            round(
                self.config.num_train_epochs
                * self.conversations.count
                * self._estimate_tokens(self.conversations.mean_chars)
            )
            if self.conversations
            else 0
        )

    def _estimate_tokens(self, letters: float) -> float:
        return min(self.config.max_length, letters / CHARS_PER_TOKEN)

    @property
    def flops(self) -> float:
        """FLOPs of all steps: forward, backward through frozen layers once; three times forward for the adapter.

        The LM head counts for label tokens only.
        """
        if self.conversations is None:
            return 0.0
        parts = list_parts(self.shape, round(self._estimate_tokens(self.conversations.mean_chars) / 2))
        layers, head = (
            sum(part.flops for part in parts if part.name != "head"),
            sum(part.flops for part in parts if part.name == "head"),
        )
        forward = layers + head * self.conversations.label_share
        guide = (
            sum(
                part.flops
                for part in list_parts(
                    self.teacher_shape, round(self._estimate_tokens(self.conversations.mean_chars) / 2)
                )
            )
            if self.teacher_shape
            else 0.0
        )
        return (
            (3.0 * forward if self.config.method == "full" else 2.0 * forward + 6.0 * self.trainable_parameters) + guide
        ) * self.num_tokens

    @property
    def memory(self) -> float:
        """Memory of one process in bytes.

        Frozen weights, adapter with gradients and moments, and the activations of the longest batch.
        """
        longest = self._estimate_tokens(self.conversations.max_chars) if self.conversations else self.config.max_length
        tokens = longest * self.config.batch_size
        held = (
            self.trainable_parameters * BYTES_PER_NUMBER * 3
            if self.config.method == "full"
            else self.trainable_parameters * BYTES_PER_NUMBER * 4
        )  # gradients, moments, and the adapter itself
        guide = (
            sum(part.parameters for part in list_parts(self.teacher_shape, 1)) * BYTES_PER_NUMBER
            if self.teacher_shape
            else 0
        )
        read = 2.0 * self.parameters * BYTES_PER_NUMBER  # while loading in fp32, before quantization
        return BASE_PROCESS_BYTES + max(
            read,
            self.frozen_bytes
            + guide
            + held
            + tokens * BYTES_PER_NUMBER * count_activations(self.shape) * self.shape.num_hidden_layers
            + LOGITS_BYTES,
        )

    def try_steps(self) -> TrialMeasurement:
        """Run a few steps here on its own model and conversations. Errors: LlmworksError when that fails."""
        require_memory(BASE_PROCESS_BYTES + self.frozen_bytes + BYTES_PER_NUMBER * 4 * self.trainable_parameters)
        return run_trial(
            "sft",
            {
                "config": self.config.model_dump(mode="json"),
                "model": str(self.model),
                "data": str(self.data or ""),
                "eval_data": str(self.held_out or ""),
                "teacher": str(self.teacher or ""),
            },
        )

    def estimate_seconds(self, trial: TrialMeasurement) -> float:
        """Estimate the duration of the stage: steps, sampling before and after, tokenizing the conversations."""
        count = self.conversations.count if self.conversations else 0
        return trial.around + self.steps * trial.step + 2 * trial.samples + count * trial.row
