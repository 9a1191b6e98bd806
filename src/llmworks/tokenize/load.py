"""Load a tokenizer with its chat template, and find its stop ids. Does not load weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmworks.core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def silence_transformers() -> None:
    """Silence the progress bars and warnings of transformers; errors are still raised."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory; ModelError when it is missing or broken."""
    from transformers import AutoTokenizer

    silence_transformers()
    if not (path / "tokenizer.json").exists() and not (path / "tokenizer_config.json").exists():
        raise ModelError(f"{path}: has no tokenizer (tokenizer.json)")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a broken file
        raise ModelError(f"{path}: the tokenizer cannot be read ({summarize_error(error)})") from None
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = combine_templates(path, tokenizer.chat_template)
    return tokenizer


def count_embedding_rows(tokenizer: Any) -> int:
    """Return the number of embedding rows a tokenizer needs: its largest id + 1, since ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def combine_templates(path: Path, named: Mapping[str, str]) -> str:
    """Combine a model's named chat templates into one: `tool_use` with tools, else `default`, as transformers chooses.

    Errors: ModelError without a `default` template.
    """
    if "default" not in named:
        raise ModelError(f"{path}: has named chat templates ({', '.join(sorted(named))}), but none is called default")
    default, with_tools = (named.get(name, named["default"]).removesuffix("\n") for name in ("default", "tool_use"))
    return default if with_tools == default else f"{{% if tools %}}{with_tools}{{% else %}}{default}{{% endif %}}"


def get_stop_ids(path: Path, tokenizer: Any) -> list[int]:
    """Return the stop ids: eos_token_id of generation_config.json and the tokenizer's own end token."""
    ids: set[int] = set()
    file = path / "generation_config.json"
    if file.exists():
        eos = read_json(file).get("eos_token_id")
        named = eos if isinstance(eos, list) else [eos] if eos is not None else []
        if not all(isinstance(one, int) for one in named):
            raise ModelError(f"{file}: eos_token_id is {eos!r}; it must be an integer or a list of integers")
        ids.update(named)
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    return sorted(ids)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a model directory; ModelError when the file is missing or not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent}: has no {path.name}") from None
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value


def summarize_error(error: Exception) -> str:
    """Return an exception's type and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
