"""Read a model directory layer by layer: the tensors of one block, or those outside of the blocks."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmworks.core.errors import ModelError
from llmworks.model.io.decoder_files import check_tied_head, from_standard, make_rename
from llmworks.model.io.families import parse_shape
from llmworks.model.io.weights import check_weights, read_header, require_causal_model, weight_files
from llmworks.model.lowbit.checkpoint import apply_input_quantization, iter_weights, to_dense
from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM, TransformerBlock
from llmworks.tokenize.load import read_json, summarize_error

BLOCK_NUMBER = re.compile(r"(?:layers|blocks|h)\.(\d+)\.")


class LayerReader:
    """Decoder in a directory, read on demand, so that only requested layers are in memory.

    `quantized`: accept a directory quantized here; its weights are dequantized on reading.
    Errors: ModelError for a broken directory, a quantized one, or an unsupported architecture.
    """

    def __init__(self, path: Path, *, quantized: bool = False) -> None:
        check_weights(path)
        require_causal_model(path)
        self.path, self.config = path, read_json(path / "config.json")
        self.quantization_config: dict[str, Any] = self.config.get("quantization_config") or {}
        if self.quantization_config and not quantized:
            raise ModelError(
                f"{path}: is already quantized ({self.quantization_config.get('quant_method')}); give the original"
                " model"
            )
        self.kind, self.shape = parse_shape(self.config)
        self.rename = make_rename(self.kind)
        self.quantized_layers: set[str] = set()  # layers read so far with quantized weights
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in weight_files(path):
            for name, entry in read_header(file).items():
                if name != "__metadata__":
                    self.files[name], self.shapes[name] = file, tuple(entry["shape"])

    def get_block_number(self, name: str) -> int:
        """Return the block number of a tensor; -1: outside of the blocks."""
        found = BLOCK_NUMBER.search(name)
        return int(found[1]) if found else -1

    def iter_tensors(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor); files are reopened each time, so that nothing stays memory-mapped."""
        from safetensors import safe_open

        wanted: dict[Path, list[str]] = {}
        for name in names:
            wanted.setdefault(self.files[name], []).append(name)
        for file, inside in wanted.items():
            try:
                opened: Any = safe_open(file, framework="pt")
            except Exception as error:  # safetensors raises its own kind
                raise ModelError(f"{file}: cannot be read ({summarize_error(error)}); copy or fetch it again") from None
            with opened as tensors:
                for name in inside:
                    yield name, tensors.get_tensor(name)

    def read_tensors(self, number: int) -> dict[str, Tensor]:
        """Return the stored tensors of a block (-1: outside of the blocks), under their names in the directory.

        ModelError for values that are NaN or infinite.
        """
        found = dict(self.iter_tensors(name for name in self.files if self.get_block_number(name) == number))
        for name, tensor in found.items():
            if (
                tensor.is_floating_point()
                and (tensor.element_size() < 2 or not math.isfinite(float(tensor.sum(dtype=torch.float64))))
                and not torch.isfinite(tensor).all()
            ):  # the sum is a fast check
                raise ModelError(
                    f"{self.path}: {name} holds {int((~torch.isfinite(tensor)).sum())} values that are NaN or infinite"
                )
        return found

    def read_decoder_tensors(self, number: int) -> dict[str, Tensor]:
        """Return a block's tensors under the decoder's names, fp32."""
        tensors: dict[str, Tensor] = {}
        for name, what in (
            iter_weights(self.read_tensors(number), self.quantization_config)
            if self.quantization_config
            else self.read_tensors(number).items()
        ):
            if not isinstance(what, Tensor):
                self.quantized_layers.add(name.removesuffix(".weight"))
            tensors[name] = to_dense(what) if self.quantization_config else what.float()
        return from_standard(tensors, self.kind) if self.kind else tensors

    def load_block(self, number: int) -> TransformerBlock:
        """Build one block. ModelError where tensors are missing or unexpected."""
        head = f"decoder.blocks.{number}."
        with torch.device("meta"):
            block = TransformerBlock(self.shape, number)
        state = {name.removeprefix(head): tensor for name, tensor in self.read_decoder_tensors(number).items()}
        try:
            block.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise ModelError(f"{self.path}: block {number}: {' '.join(str(error).split())[:200]}") from None
        block.train(False)
        if self.quantization_config:
            apply_input_quantization(block, self.quantization_config, self.rename, self.quantized_layers, head)
        return block

    def load_without_blocks(self) -> DecoderForCausalLM:
        """Build the decoder without blocks: embedding, final norm, head."""
        with torch.device("meta"):
            model = DecoderForCausalLM(DecoderConfig(shape=self.shape.model_dump()))
        model.decoder.blocks = torch.nn.ModuleList()
        outside = self.read_decoder_tensors(-1)
        if self.shape.tie_word_embeddings and "decoder.embedding.weight" in outside:
            check_tied_head(self.path, outside)
            outside["head.weight"] = outside["decoder.embedding.weight"]
        try:
            model.load_state_dict(outside, assign=True)
        except RuntimeError as error:
            raise ModelError(f"{self.path}: embedding, norm or head: {' '.join(str(error).split())[:200]}") from None
        model.train(False)
        return model

    @contextlib.contextmanager
    def mount_block(self, stack: Any, block: TransformerBlock) -> Iterator[Any]:
        """Put one block into the stack for the duration of the context."""
        stack.blocks = torch.nn.ModuleDict({str(block.attention.layer): block})
        try:
            yield stack
        finally:
            stack.blocks = torch.nn.ModuleDict()


def concatenate_files(parts: list[Path], target: Path) -> None:
    """Concatenate safetensors files into one by copying bytes, without holding tensors in memory."""
    import json
    import shutil

    headers = [{name: entry for name, entry in read_header(part).items() if name != "__metadata__"} for part in parts]
    whole: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for header in headers:
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            whole[name] = entry | {"data_offsets": [at + start, at + end]}
        at += max((entry["data_offsets"][1] for entry in header.values()), default=0)
    text = json.dumps(whole, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for part in parts:
            with part.open("rb") as stream:
                stream.seek(8 + int.from_bytes(stream.read(8), "little"))
                shutil.copyfileobj(stream, out, 1 << 22)
