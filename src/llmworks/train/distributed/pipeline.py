"""Pipeline parallelism with the 1F1B schedule (Narayanan et al. 2019, arXiv:1806.03377).

Each process holds a stage: consecutive layers of the decoder. Uses torch's `PipelineStage` and `Schedule1F1B`. The
first stage has the embedding, the last the LM head; if they are tied, each keeps a copy and their gradients are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmworks.core.errors import UserError
from llmworks.model.loss.linear_cross_entropy import head_loss
from llmworks.train.distributed.config import DataParallel, Parallel
from llmworks.train.distributed.sharding import Loss, add_partial, cast, clip, full, local, place
from llmworks.train.distributed.world import World


class Piece(nn.Module):
    """Consecutive layers of a decoder, with the parameter names of the full model."""

    def __init__(self, network: Any, first: bool, last: bool, layers: range) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.shape = network.shape
        self.decoder = network.decoder
        self.decoder.blocks = nn.ModuleDict({str(layer): network.decoder.blocks[layer] for layer in layers})
        self.head = network.head if last else None
        if not last:
            self.decoder.norm = nn.Identity()
        if not first:
            self.decoder.position = None
            if not (last and self.shape.tie_word_embeddings):
                self.decoder.embedding = None

    def forward(self, x: Tensor, position_ids: Tensor, segment_ids: Tensor) -> Tensor:
        """Map token ids [rows, length] (first stage) or hidden states [rows, length, hidden size] to hidden states."""
        state = self.decoder.begin(self.decoder.embedding(x), position_ids) if self.first else x
        state = self.decoder.through(state, position_ids, segments=segment_ids)
        finished: Tensor = self.decoder.norm(state)
        return finished


class Pipelined:
    """The pipeline stage of this process. `parameters` as in `DistributedModel`."""

    def __init__(
        self,
        network: Any,
        parallel: Parallel | DataParallel,
        world: World,
        *,
        precision: str = "fp32",
        compiled: bool = False,
    ) -> None:
        shape, pieces, at = network.shape, world.count("pipeline"), world.at("pipeline")
        if shape.num_hidden_layers < pieces:
            raise UserError(
                f"parallel.pipeline_parallel_size {pieces} exceeds the model's {shape.num_hidden_layers} layers"
            )
        if shape.experts or precision == "fp16":
            raise UserError(
                "parallel.pipeline_parallel_size: not supported"
                f" with {'experts' if shape.experts else 'precision fp16'}"
            )
        self.world, self.first, self.last = world, at == 0, at == pieces - 1
        each, more = divmod(shape.num_hidden_layers, pieces)
        begin = at * each + min(at, more)
        self.names = [name for name, _ in network.named_parameters()]
        piece = Piece(network, self.first, self.last, range(begin, begin + each + (at < more)))
        self.replicated = parallel.data_parallel == "ddp" and world.count("data") > 1
        alone = parallel.data_parallel == "ddp" and parallel.tensor_parallel_size == 1
        called: Any = piece if alone else place(piece, parallel, world, precision=precision, compiled=compiled).forward
        if alone and compiled:
            called.compile()
        self.piece = self.network = piece
        from torch.distributed.pipelining import PipelineStage

        self.stage = PipelineStage(called, at, pieces, world.device, group=world.group("pipeline"))
        self.schedule: Any = None
        self.parameters = {name: p for name, p in piece.named_parameters() if p.requires_grad}
        self.twin = piece.decoder.embedding.weight if shape.tie_word_embeddings and (self.first or self.last) else None
        self.ends = _ends(world) if shape.tie_word_embeddings else None

    def backward(self, batches: Sequence[Any], loss: Loss, labels: float, scaler: Any, precision: str) -> float:
        """As in `DistributedModel`; micro-batches go through the pipeline. The last stage broadcasts the loss."""
        from torch.distributed.pipelining import Schedule1F1B

        shares, head = self.world.count("data"), self.piece.head

        def scored(state: Tensor, label_ids: Tensor) -> Tensor:
            learned = (label_ids[:, 1:] != -100).sum()
            loss = head_loss(state[:, :-1], head, label_ids[:, 1:])  # type: ignore[arg-type]
            return loss * (learned * shares / self._labels)

        self._labels = labels
        if self.schedule is None:
            if len(batches) < self.world.count("pipeline"):
                raise UserError(
                    f"a step has {len(batches)} micro-batches per process, but the pipeline"
                    f" has {self.world.count('pipeline')} stages; raise gradient_accumulation_steps"
                )
            self.schedule = Schedule1F1B(self.stage, len(batches), loss_fn=scored, scale_grads=False)
        ids, positions, segments, label_ids = (
            torch.cat([getattr(b, name) for b in batches]) for name in ("ids", "positions", "segments", "label_ids")
        )
        losses: list[Tensor] = []
        with cast(self.world.device, precision):
            self.schedule.step(
                *((ids,) if self.first else ()),
                position_ids=positions,
                segment_ids=segments,
                target=label_ids if self.last else None,
                losses=losses if self.last else None,
            )
        add_partial(self.parameters, self.world)
        if self.replicated:
            average([p.grad for p in self.parameters.values() if p.grad is not None], self.world.group("data"), shares)
        if self.twin is not None:
            if self.twin.grad is None:
                self.twin.grad = torch.zeros_like(self.twin)
            dist.all_reduce(local(self.twin.grad), group=self.ends)
        total = sum(float(x.detach()) for x in losses) / shares
        return self.world.total([total], "pipeline")[0]

    def clip(self, most: float) -> float:
        """As in `DistributedModel`."""
        return clip(
            self.parameters.values(),
            most,
            self.world,
            twice=[self.twin] if self.twin is not None and not self.first else [],
        )

    def gather(self, into: nn.Module | None) -> None:
        """As in `DistributedModel`: every stage sends the parameters that the first process does not hold."""
        own = dict(self.piece.named_parameters())
        held: list[Any] = [None] * self.world.size
        dist.all_gather_object(held, sorted(own))
        targets = dict(into.named_parameters()) if into is not None else {}
        for name in self.names:
            whole = full(own[name]).contiguous() if name in own else None
            owner = next(rank for rank, names in enumerate(held) if name in names)
            if self.world.rank == owner != 0:
                dist.send(whole, 0)  # type: ignore[arg-type]
            if into is not None:
                if owner:
                    whole = torch.empty_like(targets[name])
                    dist.recv(whole, owner)
                with torch.no_grad():
                    targets[name].copy_(whole)  # type: ignore[arg-type]


def average(gradients: Sequence[Tensor], group: Any, shares: int) -> None:
    """Average the gradients over a group in one all-reduce.

    DDP cannot be combined with a pipeline: it takes each micro-batch for a step.
    """
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat, group=group)
    flat /= shares
    for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _ends(world: World) -> Any:
    """Create the groups of first and last stages; return that of this process's pipeline. A collective operation."""
    ranks = world.mesh.mesh  # [pipeline, data, tensor]
    mine = None
    for at in range(ranks.shape[1]):
        for way in range(ranks.shape[2]):
            pair = [int(ranks[0, at, way]), int(ranks[-1, at, way])]
            group = dist.new_group(pair)
            if world.at("data") == at and world.at("tensor") == way:
                mine = group
    return mine
