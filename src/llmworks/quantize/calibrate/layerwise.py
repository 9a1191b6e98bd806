"""Layerwise calibration: run calibration sequences through a model block by block, with the blocks before already
quantized, and yield the inputs of its layers.

Memory holds one block and the hidden states before and after it; they are memory-mapped files, so an interrupted run
resumes at its block. Does not know methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmworks.model.io.layer_reader import LayerReader
from llmworks.model.nn.decoder import TransformerBlock
from llmworks.quantize.calibrate.divergence import Divergence
from llmworks.quantize.calibrate.memmap import open_memmap, release

CHUNK = 4096  # tokens per forward pass of a block
SAMPLE = 64  # tokens per chunk whose inputs are kept
LOGITS = 64  # tokens whose logits are in memory at a time
PIECE = 192  # columns of moments computed at a time: only on and above the diagonal


@dataclass(frozen=True)
class BlockPart:
    """Layers of a block with the same input: their names in the block."""

    layers: tuple[str, ...]


def get_block_parts(block: TransformerBlock) -> tuple[BlockPart, ...]:
    """Return the parts of a block that are quantized, in order of computation."""
    gate = ("feed_forward.gate",) if getattr(block.feed_forward, "gate", None) is not None else ()
    return (
        BlockPart(("attention.query", "attention.key", "attention.value")),
        BlockPart(("attention.out",)),
        BlockPart((*gate, "feed_forward.up")),
        BlockPart(("feed_forward.down",)),
    )


def get_layer(block: TransformerBlock, name: str) -> nn.Linear:
    """Return a layer of a block by its name."""
    found = block.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


class InputStatistics:
    """Statistics of the inputs [tokens, columns] of some layers: sums of x'x and |x| (the latter if `with_abs_mean`),
    the largest |x| of each column, and a sample of the inputs.
    """

    def __init__(self, columns: int, *, with_abs_mean: bool = False) -> None:
        self.second_moment_sum = torch.zeros(columns, columns, dtype=torch.float64)
        self.abs_sum = torch.zeros(columns, dtype=torch.float64) if with_abs_mean else None
        self.max_abs, self.num_tokens = torch.zeros(columns), 0
        self.samples: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Add more inputs."""
        for start in range(0, x.shape[1], PIECE):
            self.second_moment_sum[start : start + PIECE, start:] += x[:, start : start + PIECE].T @ x[:, start:]
        if self.abs_sum is not None:
            self.abs_sum += x.abs().sum(0)
        self.max_abs = torch.maximum(self.max_abs, torch.maximum(x.amax(0), -x.amin(0)))
        self.num_tokens += len(x)
        self.samples.append(x[:: max(1, len(x) // SAMPLE)].clone())

    @property
    def hessian(self) -> Tensor:
        """Return the second moments [columns, columns], averaged over tokens."""
        whole = self.second_moment_sum / max(1, self.num_tokens)
        for start in range(0, len(whole), PIECE):
            end = start + PIECE
            whole[end:, start:end] = whole[start:end, end:].T
        return whole

    @property
    def sample(self) -> Tensor:
        """Return a sample of the inputs [tokens, columns]."""
        return torch.cat(self.samples)

    @property
    def abs_mean(self) -> Tensor:
        """Return the mean of |x| [columns]."""
        assert self.abs_sum is not None
        return self.abs_sum / max(1, self.num_tokens)


class LayerwiseCalibration:
    """ids: calibration sequences [sequences, length]; eval_ids: held-out sequences [sequences, length], on which the
    quantized model is compared with the original.

    `folder`: where hidden states are stored; `stored`: dtype of what is not quantized.
    """

    def __init__(
        self, source: LayerReader, ids: Tensor, eval_ids: Tensor, folder: Path, stored: torch.dtype = torch.float32
    ) -> None:
        self.source, self.ids, self.folder = source, ids, folder
        self.frame = source.load_without_blocks()
        self.stack: Any = self.frame.decoder
        self.num_samples, self.seq_length, self.hidden_size = len(ids), ids.shape[1], source.shape.hidden_size
        folder.mkdir(parents=True, exist_ok=True)
        self.num_done, self.eval_ids = (
            0,
            eval_ids,
        )  # finished blocks; one file holds their number and the held-out hidden states after them
        if (folder / "walk.pt").exists():
            self.num_done, self.original_states, self.quantized_states = torch.load(
                folder / "walk.pt", weights_only=True
            )
        else:
            self.num_done = 0
            self.original_states = (
                self.embed(eval_ids) if len(eval_ids) else torch.zeros(0, self.seq_length, self.hidden_size)
            )
        for tensor in self.frame.state_dict().values():
            tensor.copy_(tensor.to(stored))
        if not self.num_done:
            self.quantized_states = self.embed(eval_ids) if len(eval_ids) else self.original_states
            for at, some in self.iter_chunks():
                self.open_states(0)[at : at + len(some)] = self.embed(some)

    def embed(self, ids: Tensor) -> Tensor:
        """Return the hidden states before the first block, for [sequences, length]."""
        made: Tensor = self.stack.add_positions(self.stack.embedding(ids), self.make_positions(len(ids)))
        return made

    def make_positions(self, num_sequences: int) -> Tensor:
        """Return positions [sequences, length]."""
        return torch.arange(self.seq_length)[None].expand(num_sequences, -1)

    def iter_chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (start index, ids) of chunks of sequences."""
        each = max(1, CHUNK // self.seq_length)
        for at in range(0, self.num_samples, each):
            yield at, self.ids[at : at + each]

    def open_states(self, parity: int, width: int = 0, name: str = "states") -> Tensor:
        """Return a memory-mapped file of values [sequences, length, width]."""
        width = width or self.hidden_size
        return open_memmap(self.folder / f"{name}-{parity % 2}.bin", (self.num_samples, self.seq_length, width))

    def iter_blocks(self) -> Iterator[BlockInputs]:
        """Yield the remaining blocks."""
        for number in range(self.num_done, self.source.shape.num_hidden_layers):
            yield BlockInputs(self, number)

    def run_block(self, block: TransformerBlock, states: Tensor) -> Tensor:
        """Return the hidden states [sequences, length, hidden size] after a block."""
        if not len(states):
            return states
        with self.source.mount_block(self.stack, block) as stack:
            found = [
                stack.run_blocks(some, self.make_positions(len(some)))
                for some in torch.split(states, max(1, CHUNK // self.seq_length))
            ]
        return torch.cat(found)

    def mark_done(self, number: int, block: TransformerBlock) -> None:
        """Record that a block is finished, and the held-out hidden states after it."""
        self.quantized_states = self.run_block(block, self.quantized_states)
        self.num_done = number + 1
        torch.save((self.num_done, self.original_states, self.quantized_states), self.folder / "walk.pt.new")
        (self.folder / "walk.pt.new").replace(self.folder / "walk.pt")

    def measure_divergence(self) -> dict[str, float]:
        """Compare the current model with the original on the held-out sequences: KL divergence in nats per token, top-1
        agreement, perplexities.

        Both use the head as it is stored.
        """
        found = Divergence()
        for ids, was, now in zip(self.eval_ids, self.original_states, self.quantized_states, strict=True):
            for some in torch.split(torch.arange(len(ids)), LOGITS):
                found.add(
                    self.compute_logits(was[some]), self.compute_logits(now[some]), ids[some[0] + 1 : some[-1] + 2]
                )
        return found.compute_metrics()

    def compute_logits(self, states: Tensor) -> Tensor:
        """Return logits [tokens, vocabulary] of hidden states after the last block."""
        made: Tensor = self.frame.head(self.stack.norm(states))
        return made


class BlockInputs:
    """One block and its inputs. Its parts are requested in order; each is replaced before the next is read."""

    def __init__(self, calibration: LayerwiseCalibration, index: int) -> None:
        self.calibration, self.index, self.block = calibration, index, calibration.source.load_block(index)
        self.parts = get_block_parts(self.block)
        calibration.original_states = calibration.run_block(self.block, calibration.original_states)
        if calibration.num_samples:
            self.input_states, self.output_states = calibration.open_states(index), calibration.open_states(index + 1)
        self.outlier_ratios: dict[
            str, float
        ] = {}  # by the first layer of a part: ratio of its largest input column to the median
        self.intermediate: Tensor | None = None  # input of the output projection, or of the down projection

    def iter_inputs(self, part: BlockPart) -> Iterator[Tensor]:
        """Yield the inputs of a part's layers [tokens, columns], chunk by chunk."""
        kind = self.parts.index(part)
        block: Any = self.block
        if kind in (1, 3):
            width = get_layer(block, part.layers[0]).in_features
            self.intermediate = self.calibration.open_states(0, width, f"middle-{width}")
        with self.calibration.source.mount_block(self.calibration.stack, block) as stack:
            for at, ids in self.calibration.iter_chunks():
                some = slice(at, at + len(ids))
                made = self.compute_inputs(kind, some, ids, stack)
                if kind in (1, 3):
                    assert self.intermediate is not None
                    self.intermediate[some] = made
                yield made.flatten(0, 1)
                release(self.input_states, self.output_states, self.intermediate)

    def compute_inputs(self, kind: int, some: slice, ids: Tensor, stack: Any) -> Tensor:
        """Return the inputs of a part's layers, by the part's index, for some sequences."""
        block: Any = self.block
        if kind == 0:
            made: Tensor = block.attention_input(self.input_states[some])
        elif kind == 1:
            _, look, turned = next(
                iter(stack.iter_block_inputs(self.input_states[some], self.calibration.make_positions(len(ids))))
            )
            made = block.attention.compute_heads(block.attention_input(self.input_states[some]), look, turned)
        elif kind == 2:
            assert self.intermediate is not None
            self.output_states[some] = block.attention_residual(
                self.input_states[some], block.attention.out(self.intermediate[some])
            )
            made = block.mlp_input(self.output_states[some])
        else:
            made = block.feed_forward.compute_hidden(block.mlp_input(self.output_states[some]))
        return made

    def collect_statistics(self, part: BlockPart, *, with_abs_mean: bool = False) -> InputStatistics:
        """Return statistics of the inputs of a part's layers; `with_abs_mean`: with mean |x|."""
        found: InputStatistics | None = None
        for x in self.iter_inputs(part):
            found = found or InputStatistics(x.shape[1], with_abs_mean=with_abs_mean)
            found.add(x)
        assert found is not None
        self.outlier_ratios.setdefault(
            part.layers[0], float(found.max_abs.max() / found.max_abs.median().clamp(min=1e-12))
        )
        return found

    def compute_outputs(self) -> None:
        """Compute the hidden states after the block, once all its parts are final."""
        block: Any = self.block
        for at, ids in self.calibration.iter_chunks():
            some = slice(at, at + len(ids))
            assert self.intermediate is not None
            self.output_states[some] = block.mlp_residual(
                self.output_states[some], block.feed_forward.down(self.intermediate[some])
            )
            release(self.output_states, self.intermediate)

    def mark_done(self) -> None:
        """Mark the block as finished, so that it is not repeated."""
        self.calibration.mark_done(self.index, self.block)
