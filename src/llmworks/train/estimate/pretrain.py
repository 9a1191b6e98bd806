"""What a training will take, before it starts: parameters, operations, memory of a process, and time where a few steps
were tried here.

Counting needs no weights and no torch; `trial.py` runs the steps in a process of its own. Here pre-training, in
`finetune.py` fine-tuning. Knows no recipe.
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
from llmworks.model.anatomy.parts import parts_of
from llmworks.model.shape import RecurrentShape, Shape
from llmworks.train.distributed.config import share_of
from llmworks.train.pretrain import PretrainConfig

NUMBER = 4  # bytes of weights, gradients and moments
PROCESS = 700_000_000  # bytes of Python, torch and transformers, with nothing loaded
LAYERS, WHOLE = 8, 60_000_000  # decoders of more layers, or parameters, are tried with one and with two layers


@dataclass(frozen=True)
class Trial:
    """What a few steps took: seconds of a step and of a held-out row, of all samples, and of what comes before and
    after; the most bytes of the process.
    """

    step: float
    row: float
    samples: float
    around: float
    memory: float

    def deeper(self, other: Trial, times: int) -> Trial:
        """`self` with one layer and `other` with two give what it is with `times` more than one; no layer takes less
        than nothing, whatever else the machine did.
        """
        return Trial(
            *(
                one + max(0.0, two - one) * times
                for one, two in zip(asdict(self).values(), asdict(other).values(), strict=True)
            )
        )


class Estimate(Protocol):
    """What `plan` asks of a training, whatever is trained."""

    @property
    def parameters(self) -> int:
        """Numbers of the model."""
        ...

    @property
    def learned(self) -> int:
        """Numbers that are learned."""
        ...

    @property
    def saved(self) -> int:
        """Numbers that are written at the end."""
        ...

    @property
    def steps(self) -> int:
        """How many steps there are; 0 where the data are not known."""
        ...

    @property
    def read(self) -> int:
        """Tokens that are read in all steps."""
        ...

    @property
    def work(self) -> float:
        """Operations of all steps."""
        ...

    @property
    def memory(self) -> float:
        """Bytes of one process."""
        ...

    @property
    def ready(self) -> bool:
        """Whether all that a trial needs is there."""
        ...

    def check(self) -> None:
        """Refuse what the training would refuse at its beginning, as far as it is known. Errors: UserError."""
        ...

    def attempt(self) -> Trial:
        """Run a few steps of it here. Errors: LlmworksError when that fails."""
        ...

    def seconds(self, trial: Trial) -> float:
        """Of the whole stage, from what was tried."""
        ...


def kept_of(shape: Shape) -> int:
    """Numbers that a token leaves in a layer for the way back: the inputs of each product and bend (Korthikanti et al.
    2022, arXiv:2205.05198, section 4, with our blocks).
    """
    inner = shape.inner * (shape.experts.num_experts_per_tok if shape.experts else 1)
    return (
        shape.hidden_size * 6
        + (shape.num_attention_heads * 4 + shape.groups * 4) * shape.per_head
        + inner * (4 if shape.gated_mlp else 2)
    )


@dataclass(frozen=True)
class Training:
    """A pre-training as far as it is known: `rows` and `tokens` of its data, `held_out` rows; 0 where they are not made
    yet.
    """

    config: PretrainConfig
    shape: Shape | RecurrentShape
    length: int
    rows: int = 0
    tokens: int = 0
    held_out: int = 0
    processes: int = 1
    data: Path | None = None  # of the packed tokens, where they are made

    @cached_property
    def parameters(self) -> int:
        """Numbers that are learned."""
        return sum(part.parameters for part in parts_of(self.shape, self.length))

    @property
    def learned(self) -> int:
        """All of them."""
        return self.parameters

    @property
    def saved(self) -> int:
        """All of them."""
        return self.parameters

    @property
    def ready(self) -> bool:
        """Whether all that a trial needs is there."""
        return True

    def check(self) -> None:
        """Refuse what the training would refuse at its beginning, as far as it is known. Errors: UserError."""
        parallel, shape = self.config.parallel, self.shape
        if self.rows and self.rows < self.per_step:
            raise UserError(
                f"the data has {self.rows:,} rows, a step takes {self.per_step:,} (batch {self.config.batch_size},"
                f" accumulation {self.config.gradient_accumulation_steps}); give more data, or make the step smaller"
            )
        if self.length > shape.max_position_embeddings:
            raise UserError(
                f"rows have {self.length:,} tokens, the model reads {shape.max_position_embeddings:,}; pack shorter rows, or make a"
                " model with more context"
            )
        if parallel.pipeline_parallel_size > 1 and (
            isinstance(shape, RecurrentShape) or shape.experts or self.config.precision == "fp16"
        ):
            raise UserError("parallel.pipeline: not with experts, precision fp16, or models other than the decoder")
        if parallel.pipeline_parallel_size > 1 and shape.num_hidden_layers < parallel.pipeline_parallel_size:
            raise UserError(
                f"parallel.pipeline {parallel.pipeline_parallel_size} is more than the model's {shape.num_hidden_layers} layers"
            )
        if parallel.tensor_parallel_size > 1 and (
            isinstance(shape, RecurrentShape)
            or shape.num_attention_heads % parallel.tensor_parallel_size
            or shape.groups % parallel.tensor_parallel_size
        ):
            raise UserError(f"parallel.tensor {parallel.tensor_parallel_size} does not divide the model's heads")

    @property
    def per_step(self) -> int:
        """Rows of a step."""
        return self.config.batch_size * self.config.gradient_accumulation_steps

    @property
    def steps(self) -> int:
        """How many steps there are; 0 where the data are not known. As `pretrain.steps_of` has it."""
        if self.config.num_train_tokens:
            each = self.tokens / self.rows if self.rows else self.length
            return max(1, round(self.config.num_train_tokens / (each * self.per_step)))
        return max(1, round(self.config.num_train_epochs * (self.rows // self.per_step or 1))) if self.rows else 0

    @property
    def read(self) -> int:
        """Tokens that are read in all steps."""
        return round(self.steps * self.per_step * (self.tokens / self.rows if self.rows else self.length))

    @property
    def work(self) -> float:
        """Operations of all steps: matrix products forward, twice as much backward; once more forward where blocks are
        computed again.
        """
        each = sum(part.work for part in parts_of(self.shape, self.length // 2))
        return (4.0 if self.config.gradient_checkpointing else 3.0) * each * self.read

    @property
    def memory(self) -> float:
        """Bytes of one process: weights, gradients, moments and average of its share, and activations of one part of a
        step.
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
        states = self.parameters * NUMBER * (2 + moments + (1 if self.config.ema_decay else 0)) / share
        return PROCESS + states + self.activations()

    def activations(self) -> float:
        """Bytes that a part of a step keeps for the way back."""
        shape, parallel = self.shape, self.config.parallel
        rows = share_of(
            self.per_step,
            max(1, self.processes // (parallel.tensor_parallel_size * parallel.pipeline_parallel_size)),
            self.config.batch_size,
        )
        tokens, number = rows * self.length, 2 if self.config.precision in ("bf16", "fp16") else NUMBER
        logits = min(tokens, 512) * shape.vocab_size * NUMBER * 2
        if isinstance(shape, RecurrentShape):
            gates = {"mlp": 1, "rnn": 2, "gru": 6, "lstm": 8}[shape.rnn_type]
            return (
                tokens
                * NUMBER
                * (
                    4 * shape.embedding_dim
                    + gates * shape.inner * (shape.num_hidden_layers if shape.rnn_type != "mlp" else 1)
                )
                + logits
            )
        layer = kept_of(shape)
        layers = -(-shape.num_hidden_layers // parallel.pipeline_parallel_size)
        kept = shape.hidden_size * layers + layer if self.config.gradient_checkpointing else layer * layers
        return tokens * number * kept / parallel.tensor_parallel_size + tokens * NUMBER * shape.hidden_size * 4 + logits

    def seconds(self, trial: Trial) -> float:
        """Of the whole stage, from what was tried here: steps, looks on the way, and the held-out rows at the end."""
        looks = self.steps // self.config.eval_steps + 1
        rows = looks * min(self.config.eval_samples, self.held_out) + self.held_out
        return trial.around + self.steps * trial.step + (looks + 2) * trial.samples + rows * trial.row

    def attempt(self) -> Trial:
        """Run a few steps of it here, of one process, on its own first rows where they are made, else on ids by chance;
        large models with one layer and with two.
        """
        if isinstance(self.shape, RecurrentShape) or (
            self.shape.num_hidden_layers <= LAYERS and self.parameters <= WHOLE
        ):
            return self._tried(self.shape)
        one, two = (self._tried(self.shape.model_copy(update={"num_hidden_layers": n})) for n in (1, 2))
        return one.deeper(two, self.shape.num_hidden_layers - 1)

    def _tried(self, shape: Shape | RecurrentShape) -> Trial:
        recurrent = isinstance(shape, RecurrentShape)
        has_room(replace(self, shape=shape, processes=1).memory)
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


def run_trial(kind: str, given: dict[str, Any]) -> Trial:
    """Try a training in a process of its own. Errors: LlmworksError when that fails."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    asked = {"threads": int(os.environ.get("LLMWORKS_THREADS") or os.cpu_count() or 1), **given}
    done = subprocess.run(
        [sys.executable, "-m", "llmworks.train.estimate.trial", kind],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise LlmworksError(
            f"a few steps of the training cannot be tried here ({(done.stderr.strip().splitlines() or ['killed'])[-1]})"
        )
    found = json.loads(done.stdout.splitlines()[-1])
    if "error" in found:
        raise getattr(errors, found["kind"], LlmworksError)(found["error"])
    return Trial(**found)


def has_room(needed: float) -> None:
    """Refuse a trial that this machine's memory cannot hold. Errors: UserError."""
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
            f"a few steps of the training need about {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free here; leave out"
            " --measure, or make batch smaller"
        )
