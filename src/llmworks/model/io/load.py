"""Load a Hugging Face directory as torch modules, with one-line errors for what cannot be loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmworks.core.errors import ModelError
from llmworks.model.io.decoder_files import load_decoder, make_rename
from llmworks.model.io.families import parse_shape
from llmworks.model.io.weights import check_weights, require_causal_model
from llmworks.tokenize.load import read_json, silence_transformers, summarize_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(path: Path, dtype: str = "float32", *, low_bit: bool = False) -> PreTrainedModel:
    """Load a causal language model in evaluation mode, on the CPU, in `dtype`.

    ModelError, in one line, for a broken directory. `low_bit`: see `load_decoder`.
    """
    from transformers import AutoModelForCausalLM

    import llmworks.model.io.register  # noqa: F401  (registers our models with transformers)

    silence_transformers()
    check_weights(path)
    require_causal_model(path)
    if read_json(path / "config.json").get("quantization_config"):
        decoder: Any = load_decoder(path, low_bit=low_bit)
        return decoder if dtype == "float32" else decoder.to(getattr(torch, dtype))  # type: ignore[no-any-return]
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True
        )
    except Exception as error:
        raise ModelError(f"{path}: the model cannot be loaded ({summarize_error(error)})") from None
    model: Any = loaded[0]
    missing = [
        name
        for name in loaded[1]["missing_keys"]
        if not name.endswith("lm_head.weight") or not model.config.tie_word_embeddings
    ]
    if missing:
        raise ModelError(
            f"{path}: weights are missing for {len(missing)} parameters, the first is {sorted(missing)[0]}"
        )
    evaluating: PreTrainedModel = model.eval()
    return evaluating


def load_adaptable(path: Path) -> tuple[Any, Callable[[str], str]]:
    """Load (a model in fp32, a function from its layer names to those in the directory's files) for adapters.

    Our decoder where its layers map one to one to the files', else the transformers model.
    Errors: ModelError for a broken directory.
    """
    try:
        kind, _ = parse_shape(read_json(path / "config.json"))
    except ModelError:
        return load_model(path), str
    if kind == "gpt2":  # queries, keys and values are one matrix in its files
        return load_model(path), str
    return load_decoder(path), make_rename(kind)


def load_trainable(path: Path) -> Any:
    """Load a model in fp32: our decoder where the architecture is supported, else the transformers model.

    Errors: ModelError for a broken directory.
    """
    try:
        parse_shape(read_json(path / "config.json"))
    except ModelError:
        return load_model(path)
    return load_decoder(path)
