"""What a model computes beside its weights: the fields of config.json that decide it. Imports no torch.

Every field counts, also one of an unknown architecture, except those that only name, count, or configure training.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmworks.core.errors import ModelError
from llmworks.merge.plan.layout import COUNTS, CheckpointLayout

IGNORED = (
    *COUNTS,
    *("*_token_id", "*_token_ids", "*_token_index", "*name_or_path", "architectures", "model_type", "auto_map"),
    *("vocab_size", "max_position_embeddings", "n_positions", "n_ctx", "max_window_layers"),
    *("dtype", "torch_dtype", "*version*", "tie_word_embeddings", "*attn_implementation*"),
    *("*dropout*", "*_pdrop", "initializer_*", "*_coef", "use_cache", "output_*", "return_dict*", "chunk_size_*"),
    *("id2label", "label2id", "problem_type", "is_decoder", "is_encoder_decoder", "pretraining_tp", "generation*"),
    *("summary_*", "task_specific_params", "layers_block_type"),
)
EMPTY: tuple[Any, ...] = (None, False, [], {}, 0, "")


def read_computation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a config.json that decide what is computed, with the defaults of its architecture.

    Nested fields have dotted names; the RoPE parameters of older and newer files have the same names.
    """
    inner = config.get("text_config")
    text = dict(inner if isinstance(inner, Mapping) else config)
    flat = _flatten(_fill_defaults(text))
    scaling = text.get("rope_scaling")
    if "rope_parameters" not in text and isinstance(scaling, Mapping):  # of an unknown architecture
        flat |= {f"rope_parameters.{name}": value for name, value in scaling.items()}
    return {
        name: value for name, value in flat.items() if value not in EMPTY and not any(map(_is_ignored, name.split(".")))
    }


def _is_ignored(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in IGNORED)


def _fill_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config as transformers completes it; as it is for an architecture that transformers does not have."""
    from transformers import AutoConfig

    import llmworks.model.io.register  # noqa: F401  (registers our models with transformers)

    given = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    try:
        made: dict[str, Any] = AutoConfig.for_model(str(config.get("model_type")), **given).to_dict()
    except Exception:  # whatever an architecture's own class raises
        return config
    return made


def _flatten(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        path = f"{before}{'rope_parameters' if name == 'rope_scaling' else name}"
        if name == "rope_theta" and not before:
            path = "rope_parameters.rope_theta"
        if isinstance(value, Mapping):
            found |= _flatten(value, f"{path}.")
        elif not (isinstance(value, list) and name == "rope_scaling"):
            found[path] = value
    if before == "rope_parameters." and found.get("rope_parameters.rope_type", "default") == "default":
        found.pop("rope_parameters.rope_type", None)
    return found


def find_differences(one: CheckpointLayout, other: CheckpointLayout, *, sliced: bool) -> list[tuple[str, Any, Any]]:
    """Return (field, value, other value) of the fields in which two models compute differently.

    `sliced`: layers are chosen one by one, so that lists with an entry per layer may differ.
    """
    first, second = read_computation(one.config), read_computation(other.config)
    return [
        (name, first.get(name), second.get(name))
        for name in sorted({**first, **second})
        if not _is_equal(first.get(name), second.get(name))
        and not (sliced and (isinstance(first.get(name), list) or isinstance(second.get(name), list)))
    ]


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-9)
    return bool(one == other)


def require_same_computation(
    donor: str, layouts: Mapping[str, CheckpointLayout], *, ignored: Sequence[str] | None = None, sliced: bool = False
) -> None:
    """Raise ModelError for models that compute differently from the one whose config the result has.

    `ignored`: fields that may differ; None where the stage has no such option.
    """
    for name, layout in layouts.items():
        found = find_differences(layouts[donor], layout, sliced=sliced) if name != donor else []
        found = [one for one in found if one[0] not in (ignored or ())]
        if not found:
            continue
        differences = "; ".join(f"{field} is {there!r}, of {donor} {here!r}" for field, here, there in found[:4])
        more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
        hint = f". The result would have the values of {donor}; to allow it, name the fields in"
        raise ModelError(
            f"{name} computes differently from {donor}, so their weights cannot be combined: {differences}{more}"
            + (f"{hint} ignore_config_differences" if ignored is not None else "")
        )
