"""Load a tokenizer with its template, and tell which ids end a turn. Knows no weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmworks.core.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def quiet_transformers() -> None:
    """Keep transformers from printing bars and advice over ours; errors still reach us as exceptions."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory. ModelError when there is none or it is broken."""
    from transformers import AutoTokenizer

    quiet_transformers()
    if not (path / "tokenizer.json").exists() and not (path / "tokenizer_config.json").exists():
        raise ModelError(f"{path}: has no tokenizer (tokenizer.json)")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a broken file
        raise ModelError(f"{path}: the tokenizer cannot be read ({first_line(error)})") from None
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = one_template(path, tokenizer.chat_template)
    return tokenizer


def ids_of(tokenizer: Any) -> int:
    """How many rows an embedding needs for a tokenizer's ids: one more than the largest, since some leave gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def one_template(path: Path, named: Mapping[str, str]) -> str:
    """Several templates, which some models have by name, as one: `tool_use` with tools, else `default`, as transformers
    chooses.

    ModelError without a default.
    """
    if "default" not in named:
        raise ModelError(f"{path}: has chat templates by name ({', '.join(sorted(named))}), but none is called default")
    default, with_tools = (named.get(name, named["default"]).removesuffix("\n") for name in ("default", "tool_use"))
    return default if with_tools == default else f"{{% if tools %}}{with_tools}{{% else %}}{default}{{% endif %}}"


def stop_ids(path: Path, tokenizer: Any) -> list[int]:
    """Ids that end a turn: those of generation_config.json and the tokenizer's own end token."""
    ids: set[int] = set()
    file = path / "generation_config.json"
    if file.exists():
        eos = read_json(file).get("eos_token_id")
        named = eos if isinstance(eos, list) else [eos] if eos is not None else []
        if not all(isinstance(one, int) for one in named):
            raise ModelError(f"{file}: eos_token_id is {eos!r}, it must be a whole number, or a list of such")
        ids.update(named)
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    return sorted(ids)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object beside a model. ModelError, in one line, when the file is missing or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent}: has no {path.name}") from None
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error}); copy it again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: must hold a JSON object")
    return value


def first_line(error: Exception) -> str:
    """An exception's kind and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
