"""A checkpoint's tensors by their names: stacks of layers, and tensors outside of them.

Works for any architecture; does not know merging.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmworks.core.errors import ModelError
from llmworks.model.io.safetensors_io import ShardReader, TensorLocation
from llmworks.tokenize.load import read_json

LAYER = re.compile(r"(.*?)\.(\d+)\.(.+)")
BEFORE = re.compile(r"embed|wte|wpe|tok_")
HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output)\.weight$")
UNUSED_BUFFERS = re.compile(
    r"rotary_emb\.inv_freq$|\.attn\.(?:masked_)?bias$|\.attention\.(?:masked_)?bias$"
)  # buffers that old files contain and no model reads
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@dataclass
class CheckpointLayout:
    """The tensor names of one model.

    `stacks`: by the name prefix before the layer number, each layer's tensors by the rest of their name; `loose`:
    tensors of no layer.
    """

    name: str
    path: Path
    shards: ShardReader
    config: dict[str, Any]
    stacks: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    loose: list[str] = field(default_factory=list)

    @property
    def places(self) -> Mapping[str, TensorLocation]:
        """Return where its tensors are stored."""
        return self.shards.locations

    @property
    def text_config(self) -> dict[str, Any]:
        """Return the text part of its config."""
        inner = self.config.get("text_config")
        return inner if isinstance(inner, dict) else self.config

    @property
    def vocab_size(self) -> int:
        """Return the rows of the embedding according to its config; 0 if not given."""
        found = self.text_config.get("vocab_size") or 0
        if not isinstance(found, int):
            raise ModelError(f"{self.path}/config.json: vocab_size is {found!r}, it must be an integer")
        return found

    @property
    def architecture(self) -> str:
        """Return its architecture, as named in config.json."""
        found = self.config.get("architectures") or [""]
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise ModelError(f"{self.path}/config.json: architectures is {found!r}, it must be a list of names")
        return str(found[0])

    def has_token_rows(self, tensor: str) -> bool:
        """Return whether a tensor has one row per token."""
        shape = self.places[tensor].shape
        return (
            bool(shape)
            and LAYER.match(tensor) is None
            and shape[0] == self.vocab_size
            and not re.search(r"position|wpe", tensor)
        )

    def find_embedding(self) -> str | None:
        """Return the name of its input embedding."""
        return next((name for name in self.loose if BEFORE.search(name) and self.has_token_rows(name)), None)

    def resolve_tied(self, tensor: str) -> str | None:
        """Return a tensor's name, or its substitute: a head that is not in the files is tied to the embedding."""
        return tensor if tensor in self.places else self.find_embedding() if HEAD.search(tensor) else None


def read_layout(name: str, path: Path) -> CheckpointLayout:
    """Read the headers of a directory.

    ModelError for a broken directory, a quantized one, or layers that are not numbered from 0.
    """
    config = read_json(path / "config.json")
    if config.get("quantization_config"):
        raise ModelError(f"{name}: is quantized and cannot be merged; give the unquantized model")
    made = CheckpointLayout(name, path, ShardReader(path), config)
    found: dict[str, dict[int, dict[str, str]]] = {}
    for tensor in made.places:
        if UNUSED_BUFFERS.search(tensor):
            continue
        match = LAYER.match(tensor)
        if match is None:
            made.loose.append(tensor)
        else:
            found.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = tensor
    for stack, layers in found.items():
        if sorted(layers) != list(range(len(layers))):
            raise ModelError(
                f"{name}: has {len(layers)} layers {stack}.N, numbered up to {max(layers)}; tensors are missing"
            )
        made.stacks[stack] = [layers[number] for number in range(len(layers))]
    return made
