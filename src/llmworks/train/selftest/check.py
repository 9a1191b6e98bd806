"""Shared parts of the self-tests: a check, a config that records which fields are read, a shrunken model shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llmworks.core.errors import LlmworksError
from llmworks.model.shape import RecurrentShape, Shape

LENGTH, VOCABULARY = 64, 512
EXACT, LOOSE = 1e-4, 0.03  # relative tolerance of a loss in fp32, and under autocast


@dataclass(frozen=True)
class SelftestCheck:
    """What was checked, whether it passed, and details."""

    name: str
    passed: bool
    detail: str


class RecordingConfig:
    """A config that records which of its fields are read."""

    def __init__(self, config: Any, read: set[str], before: str = "") -> None:
        self.__dict__.update(_config=config, _read=read, _before=before)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._config, name)
        if name in type(self._config).model_fields:
            self._read.add(self._before + name)
            if hasattr(type(value), "model_fields"):
                return RecordingConfig(value, self._read, f"{self._before}{name}.")
        return value


def shrink_shape(shape: Shape | RecurrentShape) -> Shape | RecurrentShape:
    """Return the same architecture with small dimensions."""
    if isinstance(shape, RecurrentShape):
        return shape.model_copy(
            update={
                "vocab_size": VOCABULARY,
                "embedding_dim": 32,
                "hidden_size": 48 if shape.hidden_size else 0,
                "num_hidden_layers": min(2, shape.num_hidden_layers),
                "max_position_embeddings": LENGTH,
            }
        )
    heads = 4
    groups = 4 if shape.num_kv_heads == shape.num_attention_heads else 1 if shape.num_kv_heads == 1 else 2
    more: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "head_dim": 0,
        "intermediate_size": 0,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": LENGTH,
        "num_hidden_layers": min(shape.num_hidden_layers, max(2, shape.global_attn_every_n_layers)),
        "sliding_window": min(shape.sliding_window, LENGTH // 2),
    }
    if shape.experts:
        more["experts"] = shape.experts.model_dump() | {
            "num_experts": max(shape.experts.num_experts_per_tok, min(4, shape.experts.num_experts))
        }
    return Shape.model_validate(shape.model_dump() | more)


def get_tolerance(precision: str) -> float:
    """Return the relative tolerance for losses in the precision that this machine computes in."""
    from llmworks.train.distributed.sharding import resolve_precision
    from llmworks.train.distributed.world import get_device

    return EXACT if resolve_precision(precision, get_device()) == "fp32" else LOOSE


def run_checks(tests: Sequence[tuple[str, Callable[[], tuple[bool, str]]]]) -> Iterator[SelftestCheck]:
    """Run every check and yield its result; after one whose training fails the rest is skipped."""
    for number, (name, test) in enumerate(tests):
        try:
            passed, detail = test()
        except LlmworksError as error:
            yield SelftestCheck(name, False, str(error))
            yield from (SelftestCheck(other, False, "skipped") for other, _ in tests[number + 1 :])
            return
        yield SelftestCheck(name, passed, detail)


def check_fields_read(config: Any, default: Any, read: set[str]) -> tuple[bool, str]:
    """Check that every field that differs from its default was read."""
    usual = dict(_flatten_fields(default))
    given = [name for name, value in _flatten_fields(config) if value != usual.get(name)]
    unread = [name for name in given if name not in read]
    return (
        not unread,
        (
            f"set, but not read by this training: {', '.join(unread)}"
            if unread
            else f"{len(given)} fields differ from their defaults, all were read"
        ),
    )


def _flatten_fields(config: Any, before: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name in type(config).model_fields:
        value = getattr(config, name)
        found += (
            _flatten_fields(value, f"{before}{name}.")
            if hasattr(type(value), "model_fields")
            else [(before + name, value)]
        )
    return found
