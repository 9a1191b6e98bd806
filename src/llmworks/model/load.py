"""Load a Hugging Face directory as torch modules, and say in one line what is wrong with one that cannot be loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmworks.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
        raise ModelError(f"{path}: the tokenizer cannot be read ({_first_line(error)})") from None
    return tokenizer


def load_model(path: Path, dtype: str = "float32") -> PreTrainedModel:
    """A causal language model in evaluation mode, on the CPU, in `dtype`. ModelError, in one line, for a broken directory."""
    import torch
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    check_weights(path)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise ModelError(f"{path}: the model cannot be loaded ({_first_line(error)})") from None
    model: Any = loaded[0]
    missing = [name for name in loaded[1]["missing_keys"] if not name.endswith("lm_head.weight") or not model.config.tie_word_embeddings]
    if missing:
        raise ModelError(f"{path}: weights are missing for {len(missing)} parameters, the first is {sorted(missing)[0]}")
    evaluating: PreTrainedModel = model.eval()
    return evaluating


def check_weights(path: Path) -> None:
    """Check that a directory holds a config and whole safetensors files, without reading the tensors."""
    if not path.is_dir():
        raise ModelError(f"{path}: no such model directory")
    if not (path / "config.json").exists():
        raise ModelError(f"{path}: is not a Hugging Face model directory (no config.json)")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{path}: has no .safetensors weights")
    for file in files:
        header = read_header(file)
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
        if size != start + end:
            raise ModelError(f"{file}: truncated, {size} bytes of {start + end}; copy or fetch it again")


def read_header(file: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: name to dtype, shape and offsets."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > file.stat().st_size:
            raise ModelError(f"{file}: not a safetensors file, or truncated; copy or fetch it again")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except ValueError:
            raise ModelError(f"{file}: its safetensors header is broken; copy or fetch it again") from None
    return header


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


def stop_ids(path: Path, tokenizer: Any) -> list[int]:
    """Ids that end a turn: those of generation_config.json and the tokenizer's own end token."""
    ids: set[int] = set()
    file = path / "generation_config.json"
    if file.exists():
        eos = read_json(file).get("eos_token_id")
        ids.update(eos if isinstance(eos, list) else [eos] if eos is not None else [])
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    return sorted(ids)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200]}" if text else type(error).__name__
