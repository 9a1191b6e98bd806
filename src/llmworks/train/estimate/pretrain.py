"""Estimate a training before it starts: parameters, FLOPs, memory per process, and time from a trial run.

Counting needs no weights and no torch; `trial.py` runs a few steps in its own process. Pretraining is here, fine-tuning
in `finetune.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from llmworks.core import errors
from llmworks.core.errors import LlmworksError, UserError
from llmworks.core.machine import get_thread_count
from llmworks.model.anatomy.parts import list_parts
from llmworks.model.shape import RecurrentShape, Shape
from llmworks.train.distributed.config import get_micro_batch_rows
from llmworks.train.pretrain import PretrainConfig

BYTES_PER_NUMBER = 4  # bytes per fp32 weight, gradient or optimizer moment
BASE_PROCESS_BYTES = 700_000_000  # bytes of Python, torch and transformers with no model loaded
LAYERS, WHOLE = 8, 60_000_000  # larger decoders are tried with one and with two layers, then extrapolated


@dataclass(frozen=True)
class TrialMeasurement:
    """Measurements of a trial run.

    Seconds per step, per held-out row, of all samples, and of startup and saving; peak memory in bytes.
    """

    step: float
    row: float
    samples: float
    around: float
    memory: float

    def deeper(self, other: TrialMeasurement, times: int) -> TrialMeasurement:
        """Extrapolate from a trial with one layer (`self`) and one with two (`other`) to `extra_layers` more than one.

        A layer never counts as negative, even if timing noise says so.
        """
        return TrialMeasurement(
            *(
                one + max(0.0, two - one) * times
                for one, two in zip(asdict(self).values(), asdict(other).values(), strict=True)
            )
        )


class TrainingEstimate(Protocol):
    """What `plan` needs to know of a training."""

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        ...

    @property
    def trainable_parameters(self) -> int:
        """Number of trainable parameters."""
        ...

    @property
    def saved_parameters(self) -> int:
        """Number of parameters that are saved at the end."""
        ...

    @property
    def steps(self) -> int:
        """Number of steps; 0 if the data is not known."""
        ...

    @property
    def num_tokens(self) -> int:
        """Number of tokens over all steps."""
        ...

    @property
    def flops(self) -> float:
        """FLOPs of all steps."""
        ...

    @property
    def memory(self) -> float:
        """Memory of one process in bytes."""
        ...

    @property
    def can_try(self) -> bool:
        """Whether a trial run is possible now."""
        ...

    def check(self) -> None:
        """Reject early what the training would reject at its start, as far as it is known. Errors: UserError."""
        ...

    def try_steps(self) -> TrialMeasurement:
        """Run a few steps here. Errors: LlmworksError when that fails."""
        ...

    def estimate_seconds(self, trial: TrialMeasurement) -> float:
        """Estimate the duration of the stage from a trial run."""
        ...


def count_activations(shape: Shape) -> int:
    """Return the activations that a token keeps per layer for the backward pass.

    Inputs of each matrix product and activation function (Korthikanti et al. 2022, arXiv:2205.05198, section 4, for our
    layers).
    """
    inner = shape.inner_size * (shape.experts.num_experts_per_tok if shape.experts else 1)
    return (
        shape.hidden_size * 6
        + (shape.num_attention_heads * 4 + shape.num_kv_heads * 4) * shape.head_size
        + inner * (4 if shape.gated_mlp else 2)
    )


@dataclass(frozen=True)
class PretrainEstimate:
    """Estimate of a pretraining: `rows` and `tokens` of its data, held-out rows; 0 if they do not exist yet."""

    config: PretrainConfig
    shape: Shape | RecurrentShape
    length: int
    rows: int = 0
    tokens: int = 0
    held_out: int = 0
    processes: int = 1
    data: Path | None = None  # folder of the packed tokens, if they exist

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, all trainable."""
        return sum(part.parameters for part in list_parts(self.shape, self.length))

    @property
    def trainable_parameters(self) -> int:
        """All parameters."""
        return self.parameters

    @property
    def saved_parameters(self) -> int:
        """All parameters."""
        return self.parameters

    @property
    def can_try(self) -> bool:
        """Whether a trial run is possible now."""
        return True

    def check(self) -> None:
        """Reject early what the training would reject at its start, as far as it is known. Errors: UserError."""
        parallel, shape = self.config.parallel, self.shape
        if self.rows and self.rows < self.per_step:
            raise UserError(
                f"the data has {self.rows:,} rows, a step needs {self.per_step:,} (batch_size {self.config.batch_size},"
                f" gradient_accumulation_steps {self.config.gradient_accumulation_steps}); provide more data, or"
                " make the step"
                " smaller"
            )
        if self.length > shape.max_position_embeddings:
            raise UserError(
                f"rows have {self.length:,} tokens, but the context length of the model is"
                f" {shape.max_position_embeddings:,}; pack"
                " shorter rows, or create a model with a longer context"
            )
        if parallel.pipeline_parallel_size > 1 and (
            isinstance(shape, RecurrentShape) or shape.experts or self.config.precision == "fp16"
        ):
            raise UserError(
                "parallel.pipeline_parallel_size: not supported with experts, precision fp16, or models"
                " other than the decoder"
            )
        if parallel.pipeline_parallel_size > 1 and shape.num_hidden_layers < parallel.pipeline_parallel_size:
            raise UserError(
                f"parallel.pipeline_parallel_size {parallel.pipeline_parallel_size} exceeds the model's"
                f" {shape.num_hidden_layers} layers"
            )
        if parallel.tensor_parallel_size > 1 and (
            isinstance(shape, RecurrentShape)
            or shape.num_attention_heads % parallel.tensor_parallel_size
            or shape.num_kv_heads % parallel.tensor_parallel_size
        ):
            raise UserError(
                f"parallel.tensor_parallel_size {parallel.tensor_parallel_size} does not divide the model's heads"
            )

    @property
    def per_step(self) -> int:
        """Rows per step."""
        return self.config.batch_size * self.config.gradient_accumulation_steps

    @property
    def steps(self) -> int:
        """Number of steps; 0 if the data is not known. As in `pretrain.count_steps`."""
        if self.config.num_train_tokens:
            each = self.tokens / self.rows if self.rows else self.length
            return max(1, round(self.config.num_train_tokens / (each * self.per_step)))
        return max(1, round(self.config.num_train_epochs * (self.rows // self.per_step or 1))) if self.rows else 0

    @property
    def num_tokens(self) -> int:
        """Number of tokens over all steps."""
        return round(self.steps * self.per_step * (self.tokens / self.rows if self.rows else self.length))

    @property
    def flops(self) -> float:
        """FLOPs of all steps: the backward pass is twice the forward; gradient checkpointing adds one forward."""
        each = sum(part.flops for part in list_parts(self.shape, self.length // 2))
        return (4.0 if self.config.gradient_checkpointing else 3.0) * each * self.num_tokens

    @property
    def memory(self) -> float:
        """Memory of one process in bytes.

        Its share of weights, gradients, optimizer moments and EMA, and the activations of one micro-batch.
        """
        parallel = self.config.parallel
        share = (
            parallel.pipeline_parallel_size
            * parallel.tensor_parallel_size
            * (
                self.processes // (parallel.pipeline_parallel_size * parallel.tensor_parallel_size)
                if parallel.data_parallel == "fsdp"
                else 1
            )
        )
        moments = {"adamw": 2.0, "lion": 1.0, "muon": 1.0, "adamw_8bit": 0.5}[self.config.optimizer.name]
        states = self.parameters * BYTES_PER_NUMBER * (2 + moments + (1 if self.config.ema_decay else 0)) / share
        return BASE_PROCESS_BYTES + states + self.estimate_activations()

    def estimate_activations(self) -> float:
        """Bytes of activations that a micro-batch keeps for the backward pass."""
        shape, parallel = self.shape, self.config.parallel
        rows = get_micro_batch_rows(
            self.per_step,
            max(1, self.processes // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)),
            self.config.batch_size,
        )
        tokens, number = rows * self.length, 2 if self.config.precision in ("bf16", "fp16") else BYTES_PER_NUMBER
        logits = min(tokens, 512) * shape.vocab_size * BYTES_PER_NUMBER * 2
        if isinstance(shape, RecurrentShape):
            gates = {"mlp": 1, "rnn": 2, "gru": 6, "lstm": 8}[shape.rnn_type]
            return (
                tokens
                * BYTES_PER_NUMBER
                * (
                    4 * shape.embedding_dim
                    + gates * shape.inner_size * (shape.num_hidden_layers if shape.rnn_type != "mlp" else 1)
                )
                + logits
            )
        layer = count_activations(shape)
        layers = -(-shape.num_hidden_layers // parallel.pipeline_parallel_size)
        kept = shape.hidden_size * layers + layer if self.config.gradient_checkpointing else layer * layers
        return (
            tokens * number * kept / parallel.tensor_parallel_size
            + tokens * BYTES_PER_NUMBER * shape.hidden_size * 4
            + logits
        )

    def estimate_seconds(self, trial: TrialMeasurement) -> float:
        """Estimate the duration of the stage: steps, evaluations during training, and the final evaluation."""
        evaluations = self.steps // self.config.eval_steps + 1
        rows = evaluations * min(self.config.eval_samples, self.held_out) + self.held_out
        return trial.around + self.steps * trial.step + (evaluations + 2) * trial.samples + rows * trial.row

    def try_steps(self) -> TrialMeasurement:
        """Run a few steps here in one process, on its first rows if they exist, else on random ids.

        Large models are tried with one and with two layers.
        """
        if isinstance(self.shape, RecurrentShape) or (
            self.shape.num_hidden_layers <= LAYERS and self.parameters <= WHOLE
        ):
            return self._try_shape(self.shape)
        one, two = (self._try_shape(self.shape.model_copy(update={"num_hidden_layers": n})) for n in (1, 2))
        return one.deeper(two, self.shape.num_hidden_layers - 1)

    def _try_shape(self, shape: Shape | RecurrentShape) -> TrialMeasurement:
        recurrent = isinstance(shape, RecurrentShape)
        require_memory(replace(self, shape=shape, processes=1).memory)
        return run_trial(
            "pretrain",
            {
                "shape": shape.model_dump(),
                "recurrent": recurrent,
                "config": self.config.model_dump(mode="json"),
                "length": self.length,
                "data": str(self.data or ""),
            },
        )


def run_trial(kind: str, request: dict[str, Any]) -> TrialMeasurement:
    """Run a trial in its own process. Errors: LlmworksError when that fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    message = {"threads": get_thread_count(), **request}
    done = subprocess.run(
        [sys.executable, "-m", "llmworks.train.estimate.trial", kind],
        input=json.dumps(message),
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise LlmworksError(f"the trial run failed ({(done.stderr.strip().splitlines() or ['killed'])[-1]})")
    found = json.loads(done.stdout.splitlines()[-1])
    if "error" in found:
        raise getattr(errors, found["kind"], LlmworksError)(found["error"])
    return TrialMeasurement(**found)


def require_memory(needed: float) -> None:
    """Reject a trial run that does not fit in this machine's memory. Errors: UserError."""
    free = (
        next(
            (
                int(line.split()[1]) * 1024
                for line in Path("/proc/meminfo").read_text().splitlines()
                if line.startswith("MemAvailable")
            ),
            0,
        )
        if Path("/proc/meminfo").exists()
        else 0
    )
    if 0 < free < needed:
        raise UserError(
            f"a trial run needs about {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free; leave out"
            " --measure, or reduce the batch size"
        )
