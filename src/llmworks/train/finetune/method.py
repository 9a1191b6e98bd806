"""What a training method gives to the one loop (`Way`), and what it trains on (`Material`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmworks.data.store.rows import Row

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Material:
    """What is learned from: the rows as examples, those set aside with the reason, the held-out rows that are looked
    at, and questions that are answered.
    """

    tokenizer: Any
    stops: Sequence[int]
    examples: Sequence[Any]
    set_aside: list[tuple[str, str]]
    unseen: Sequence[Any]
    questions: list[Row]


@dataclass(frozen=True)
class Way:
    """What differs between methods.

    `join`: some examples, of the step's, as one batch; `look`: figures of held-out examples, and `said` of them in
    words; `told`: of a step, beside its loss.

    `steps`: in place of batches of the material's examples; a step may be made when it is asked for. `again`: whether
    the weights that are saved have to be looked at once more, since what they were looked at for is not known; `done`:
    is told when training ends, before anything is saved.
    """

    loss: Callable[[Any, Any], Any]
    join: Callable[[Sequence[Any], Sequence[Any]], Any]
    look: Callable[[Any, Sequence[Any]], dict[str, float]]
    said: Callable[[Mapping[str, float]], str]
    told: Callable[[], Mapping[str, float]] | None = None
    steps: Sequence[Any] | None = None
    again: Callable[[], bool] | None = None
    done: Callable[[], None] | None = None
