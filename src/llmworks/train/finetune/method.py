"""Interface of training methods to the training loop (`TrainMethod`) and their data (`TrainingData`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmworks.data.store.rows import Row


@dataclass(frozen=True)
class TrainingData:
    """Tokenized data of a training.

    `examples`: training examples; `dropped`: (id, reason) of rows that cannot be trained on; `eval_examples`: held-out
    examples; `prompt_rows`: held-out rows to generate completions for before and after.
    """

    tokenizer: Any
    stop_ids: Sequence[int]
    examples: Sequence[Any]
    dropped: list[tuple[str, str]]
    eval_examples: Sequence[Any]
    prompt_rows: list[Row]


@dataclass(frozen=True)
class TrainMethod:
    """What differs between training methods.

    `collate`: make a batch of some examples, given all examples of the step; `evaluate`: metrics of held-out examples,
    and `format_metrics` formats them for the log; `step_metrics`: further metrics of a step, beside its loss.

    `steps`: replaces batches of the data's examples; a step may be made on demand. `needs_final_evaluation`: whether to
    evaluate the saved weights once more, since the last evaluation may be of other weights; `on_train_end`: called when
    training ends, before anything is saved.
    """

    loss: Callable[[Any, Any], Any]
    collate: Callable[[Sequence[Any], Sequence[Any]], Any]
    evaluate: Callable[[Any, Sequence[Any]], dict[str, float]]
    format_metrics: Callable[[Mapping[str, float]], str]
    step_metrics: Callable[[], Mapping[str, float]] | None = None
    steps: Sequence[Any] | None = None
    needs_final_evaluation: Callable[[], bool] | None = None
    on_train_end: Callable[[], None] | None = None
