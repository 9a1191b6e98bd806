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

from llmworks.model.io.layer_reader import Source
from llmworks.model.nn.decoder import Block
from llmworks.quantize.calibrate.divergence import Damage
from llmworks.quantize.calibrate.memmap import mapped, release

CHUNK = 4096  # tokens per forward pass of a block
SAMPLE = 64  # tokens per chunk whose inputs are kept
LOGITS = 64  # tokens whose logits are in memory at a time
PIECE = 192  # columns of moments computed at a time: only on and above the diagonal


@dataclass(frozen=True)
class Part:
    """Layers of a block with the same input: their names in the block."""

    layers: tuple[str, ...]


def parts_of(block: Block) -> tuple[Part, ...]:
    """Return the parts of a block that are quantized, in order of computation."""
    gate = ("feed_forward.gate",) if getattr(block.feed_forward, "gate", None) is not None else ()
    return (
        Part(("attention.query", "attention.key", "attention.value")),
        Part(("attention.out",)),
        Part((*gate, "feed_forward.up")),
        Part(("feed_forward.down",)),
    )


def layer_of(block: Block, name: str) -> nn.Linear:
    """Return a layer of a block by its name."""
    found = block.get_submodule(name)
    assert isinstance(found, nn.Linear)
    return found


class Moments:
    """Statistics of the inputs [tokens, columns] of some layers: sums of x'x and |x| (the latter if `with_abs_mean`),
    the largest |x| of each column, and a sample of the inputs.
    """

    def __init__(self, columns: int, *, sizes: bool = False) -> None:
        self.square = torch.zeros(columns, columns, dtype=torch.float64)
        self.size = torch.zeros(columns, dtype=torch.float64) if sizes else None
        self.most, self.tokens = torch.zeros(columns), 0
        self.kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Add more inputs."""
        for start in range(0, x.shape[1], PIECE):
            self.square[start : start + PIECE, start:] += x[:, start : start + PIECE].T @ x[:, start:]
        if self.size is not None:
            self.size += x.abs().sum(0)
        self.most = torch.maximum(self.most, torch.maximum(x.amax(0), -x.amin(0)))
        self.tokens += len(x)
        self.kept.append(x[:: max(1, len(x) // SAMPLE)].clone())

    @property
    def hessian(self) -> Tensor:
        """Return the second moments [columns, columns], averaged over tokens."""
        whole = self.square / max(1, self.tokens)
        for start in range(0, len(whole), PIECE):
            end = start + PIECE
            whole[end:, start:end] = whole[start:end, end:].T
        return whole

    @property
    def sample(self) -> Tensor:
        """Return a sample of the inputs [tokens, columns]."""
        return torch.cat(self.kept)

    @property
    def mean(self) -> Tensor:
        """Return the mean of |x| [columns]."""
        assert self.size is not None
        return self.size / max(1, self.tokens)


class Walk:
    """ids: calibration sequences [sequences, length]; eval_ids: held-out sequences [sequences, length], on which the
    quantized model is compared with the original.

    `folder`: where hidden states are stored; `stored`: dtype of what is not quantized.
    """

    def __init__(
        self, source: Source, ids: Tensor, held: Tensor, folder: Path, stored: torch.dtype = torch.float32
    ) -> None:
        self.source, self.ids, self.folder = source, ids, folder
        self.frame = source.frame()
        self.stack: Any = self.frame.decoder
        self.count, self.length, self.width = len(ids), ids.shape[1], source.shape.hidden_size
        folder.mkdir(parents=True, exist_ok=True)
        self.done, self.held = (
            0,
            held,
        )  # finished blocks; one file holds their number and the held-out hidden states after them
        if (folder / "walk.pt").exists():
            self.done, self.as_was, self.as_is = torch.load(folder / "walk.pt", weights_only=True)
        else:
            self.done = 0
            self.as_was = self.begin(held) if len(held) else torch.zeros(0, self.length, self.width)
        for tensor in self.frame.state_dict().values():
            tensor.copy_(tensor.to(stored))
        if not self.done:
            self.as_is = self.begin(held) if len(held) else self.as_was
            for at, some in self.chunks():
                self.states(0)[at : at + len(some)] = self.begin(some)

    def begin(self, ids: Tensor) -> Tensor:
        """Return the hidden states before the first block, for [sequences, length]."""
        made: Tensor = self.stack.begin(self.stack.embedding(ids), self.positions(len(ids)))
        return made

    def positions(self, texts: int) -> Tensor:
        """Return positions [sequences, length]."""
        return torch.arange(self.length)[None].expand(texts, -1)

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (start index, ids) of chunks of sequences."""
        each = max(1, CHUNK // self.length)
        for at in range(0, self.count, each):
            yield at, self.ids[at : at + each]

    def states(self, parity: int, width: int = 0, name: str = "states") -> Tensor:
        """Return a memory-mapped file of values [sequences, length, width]."""
        width = width or self.width
        return mapped(self.folder / f"{name}-{parity % 2}.bin", (self.count, self.length, width))

    def blocks(self) -> Iterator[Passing]:
        """Yield the remaining blocks."""
        for number in range(self.done, self.source.shape.num_hidden_layers):
            yield Passing(self, number)

    def through(self, block: Block, states: Tensor) -> Tensor:
        """Return the hidden states [sequences, length, hidden size] after a block."""
        if not len(states):
            return states
        with self.source.only(self.stack, block) as stack:
            found = [
                stack.through(some, self.positions(len(some)))
                for some in torch.split(states, max(1, CHUNK // self.length))
            ]
        return torch.cat(found)

    def advanced(self, number: int, block: Block) -> None:
        """Record that a block is finished, and the held-out hidden states after it."""
        self.as_is = self.through(block, self.as_is)
        self.done = number + 1
        torch.save((self.done, self.as_was, self.as_is), self.folder / "walk.pt.new")
        (self.folder / "walk.pt.new").replace(self.folder / "walk.pt")

    def damage(self) -> dict[str, float]:
        """Compare the current model with the original on the held-out sequences: KL divergence in nats per token, top-1
        agreement, perplexities.

        Both use the head as it is stored.
        """
        found = Damage()
        for ids, was, now in zip(self.held, self.as_was, self.as_is, strict=True):
            for some in torch.split(torch.arange(len(ids)), LOGITS):
                found.add(self.logits(was[some]), self.logits(now[some]), ids[some[0] + 1 : some[-1] + 2])
        return found.figures()

    def logits(self, states: Tensor) -> Tensor:
        """Return logits [tokens, vocabulary] of hidden states after the last block."""
        made: Tensor = self.frame.head(self.stack.norm(states))
        return made


class Passing:
    """One block and its inputs. Its parts are requested in order; each is replaced before the next is read."""

    def __init__(self, walk: Walk, number: int) -> None:
        self.walk, self.number, self.block = walk, number, walk.source.block(number)
        self.parts = parts_of(self.block)
        walk.as_was = walk.through(self.block, walk.as_was)
        if walk.count:
            self.before, self.after = walk.states(number), walk.states(number + 1)
        self.apart: dict[
            str, float
        ] = {}  # by the first layer of a part: ratio of its largest input column to the median
        self.middle: Tensor | None = None  # input of the output projection, or of the down projection

    def inputs(self, part: Part) -> Iterator[Tensor]:
        """Yield the inputs of a part's layers [tokens, columns], chunk by chunk."""
        kind = self.parts.index(part)
        block: Any = self.block
        if kind in (1, 3):
            width = layer_of(block, part.layers[0]).in_features
            self.middle = self.walk.states(0, width, f"middle-{width}")
        with self.walk.source.only(self.walk.stack, block) as stack:
            for at, ids in self.walk.chunks():
                some = slice(at, at + len(ids))
                made = self.read(kind, some, ids, stack)
                if kind in (1, 3):
                    assert self.middle is not None
                    self.middle[some] = made
                yield made.flatten(0, 1)
                release(self.before, self.after, self.middle)

    def read(self, kind: int, some: slice, ids: Tensor, stack: Any) -> Tensor:
        """Return the inputs of a part's layers, by the part's index, for some sequences."""
        block: Any = self.block
        if kind == 0:
            made: Tensor = block.heard(self.before[some])
        elif kind == 1:
            _, look, turned = next(iter(stack.sights(self.before[some], self.walk.positions(len(ids)))))
            made = block.attention.attend(block.heard(self.before[some]), look, turned)
        elif kind == 2:
            assert self.middle is not None
            self.after[some] = block.attended(self.before[some], block.attention.out(self.middle[some]))
            made = block.read(self.after[some])
        else:
            made = block.feed_forward.think(block.read(self.after[some]))
        return made

    def moments(self, part: Part, *, sizes: bool = False) -> Moments:
        """Return statistics of the inputs of a part's layers; `with_abs_mean`: with mean |x|."""
        found: Moments | None = None
        for x in self.inputs(part):
            found = found or Moments(x.shape[1], sizes=sizes)
            found.add(x)
        assert found is not None
        self.apart.setdefault(part.layers[0], float(found.most.max() / found.most.median().clamp(min=1e-12)))
        return found

    def finish(self) -> None:
        """Compute the hidden states after the block, once all its parts are final."""
        block: Any = self.block
        for at, ids in self.walk.chunks():
            some = slice(at, at + len(ids))
            assert self.middle is not None
            self.after[some] = block.thought(self.after[some], block.feed_forward.down(self.middle[some]))
            release(self.after, self.middle)

    def done(self) -> None:
        """Mark the block as finished, so that it is not repeated."""
        self.walk.advanced(self.number, self.block)
