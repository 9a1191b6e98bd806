"""Find and check a directory's safetensors files, read their headers, and read tensors one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmworks.core.errors import ModelError
from llmworks.tokenize.load import read_json, summarize_error

if TYPE_CHECKING:
    from torch import Tensor


def check_weights(path: Path) -> None:
    """Check that a directory holds a config and whole safetensors files, without reading the tensors."""
    if not path.is_dir():
        raise ModelError(f"{path}: no such model directory")
    if not (path / "config.json").exists():
        raise ModelError(f"{path}: is not a Hugging Face model directory (no config.json)")
    files = weight_files(path)
    if not files:
        raise ModelError(f"{path}: has no .safetensors weights")
    for file in files:
        header = read_header(file)
        try:
            end = max(
                (int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"), default=0
            )
        except (KeyError, TypeError, ValueError, IndexError):
            raise ModelError(f"{file}: its safetensors header is broken; copy or fetch it again") from None
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
        if size != start + end:
            raise ModelError(f"{file}: truncated, {size} bytes of {start + end}; copy or fetch it again")


def weight_files(path: Path) -> list[Path]:
    """Return a directory's weight files: those in its index, else `model.safetensors`, else all but files of others.

    Such are `consolidated*`, with which Mistral's repositories hold the same weights under other names, and
    adapters. Errors: ModelError for an index with files that are missing, or beside a `model.safetensors` that it does
    not name: transformers reads the one, other programs the others.
    """
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    files = sorted(path.glob("*.safetensors"))
    if index.exists():
        named = read_json(index).get("weight_map")
        wanted = {str(name) for name in named.values()} if isinstance(named, dict) else set()
        missing = sorted(wanted - {file.name for file in files})
        if missing or not wanted:
            raise ModelError(
                f"{index}: {f'lists {missing[0]}, which is missing' if missing else 'lists no files'}; copy or fetch"
                " the directory again"
            )
        if single.exists() and single.name not in wanted:
            raise ModelError(
                f"{path}: has {single.name} and {index.name}, which does not name it; transformers reads the one, other"
                " programs the other: remove the older"
            )
        return [file for file in files if file.name in wanted]
    if single.exists():
        return [single]
    others = [file for file in files if not file.name.startswith(("consolidated", "adapter_"))]
    return others or [file for file in files if file.name.startswith("consolidated")]


class StoredTensors(Mapping[str, "Tensor"]):
    """The tensors of a directory's safetensors files by name, each read on access and not cached."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        files = weight_files(path)
        try:
            self._files: list[Any] = [safe_open(file, framework="pt") for file in files]
        except Exception as error:  # safetensors raises its own kind
            raise ModelError(
                f"{path}: its safetensors files cannot be read ({summarize_error(error)}); copy or fetch them again"
            ) from None
        self._places = {name: file for file in self._files for name in file.keys()}  # noqa: SIM118  (no mapping)

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._places[name].get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def require_causal_model(path: Path) -> None:
    """Check that a directory's model is a causal model.

    ModelError for a reward model or classifier, whose language-model head would be random.
    """
    names = read_json(path / "config.json").get("architectures") or []
    if any("Classification" in str(name) for name in names):
        raise ModelError(
            f"{path}: is a {names[0]}, which is a classifier or reward model; give a causal language model"
        )


def read_header(file: Path) -> dict[str, Any]:
    """Read the JSON header of a safetensors file: name to dtype, shape and offsets."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > file.stat().st_size:
            raise ModelError(f"{file}: not a safetensors file, or truncated; copy or fetch it again")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
        except ValueError:
            raise ModelError(f"{file}: its safetensors header is broken; copy or fetch it again") from None
    if not isinstance(header, dict):
        raise ModelError(f"{file}: its safetensors header is broken; copy or fetch it again")
    return header
