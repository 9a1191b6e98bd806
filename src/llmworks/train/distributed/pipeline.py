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
from llmworks.train.distributed.config import DataParallelConfig, ParallelConfig
from llmworks.train.distributed.sharding import (
    Loss,
    autocast,
    clip_sharded_gradients,
    distribute_model,
    reduce_norm_gradients,
    to_full,
    to_local,
)
from llmworks.train.distributed.world import World


class PipelineStageModule(nn.Module):
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
        state = self.decoder.add_positions(self.decoder.embedding(x), position_ids) if self.first else x
        state = self.decoder.run_blocks(state, position_ids, segments=segment_ids)
        finished: Tensor = self.decoder.norm(state)
        return finished


class PipelinedModel:
    """The pipeline stage of this process. `parameters` as in `DistributedModel`."""

    def __init__(
        self,
        network: Any,
        parallel: ParallelConfig | DataParallelConfig,
        world: World,
        *,
        precision: str = "fp32",
        compiled: bool = False,
    ) -> None:
        shape, pieces, at = network.shape, world.get_axis_size("pipeline"), world.get_axis_rank("pipeline")
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
        piece = PipelineStageModule(network, self.first, self.last, range(begin, begin + each + (at < more)))
        self.replicated = parallel.data_parallel == "ddp" and world.get_axis_size("data") > 1
        alone = parallel.data_parallel == "ddp" and parallel.tensor_parallel_size == 1
        called: Any = (
            piece if alone else distribute_model(piece, parallel, world, precision=precision, compiled=compiled).forward
        )
        if alone and compiled:
            called.compile()
        self.stage_module = self.network = piece
        from torch.distributed.pipelining import PipelineStage

        self.stage = PipelineStage(called, at, pieces, world.device, group=world.get_axis_group("pipeline"))
        self.schedule: Any = None
        self.parameters = {name: p for name, p in piece.named_parameters() if p.requires_grad}
        self.tied_weight = (
            piece.decoder.embedding.weight if shape.tie_word_embeddings and (self.first or self.last) else None
        )
        self.tied_group = _create_tied_groups(world) if shape.tie_word_embeddings else None

    def backward(self, batches: Sequence[Any], loss: Loss, num_labels: float, scaler: Any, precision: str) -> float:
        """As in `DistributedModel`; micro-batches go through the pipeline. The last stage broadcasts the loss."""
        from torch.distributed.pipelining import Schedule1F1B

        shares, head = self.world.get_axis_size("data"), self.stage_module.head

        def score_tokens(state: Tensor, label_ids: Tensor) -> Tensor:
            learned = (label_ids[:, 1:] != -100).sum()
            loss = head_loss(state[:, :-1], head, label_ids[:, 1:])  # type: ignore[arg-type]
            return loss * (learned * shares / self._labels)

        self._labels = num_labels
        if self.schedule is None:
            if len(batches) < self.world.get_axis_size("pipeline"):
                raise UserError(
                    f"a step has {len(batches)} micro-batches per process, but the pipeline"
                    f" has {self.world.get_axis_size('pipeline')} stages; raise gradient_accumulation_steps"
                )
            self.schedule = Schedule1F1B(self.stage, len(batches), loss_fn=score_tokens, scale_grads=False)
        ids, positions, segments, label_ids = (
            torch.cat([getattr(b, name) for b in batches]) for name in ("ids", "positions", "segments", "label_ids")
        )
        losses: list[Tensor] = []
        with autocast(self.world.device, precision):
            self.schedule.step(
                *((ids,) if self.first else ()),
                position_ids=positions,
                segment_ids=segments,
                target=label_ids if self.last else None,
                losses=losses if self.last else None,
            )
        reduce_norm_gradients(self.parameters, self.world)
        if self.replicated:
            average_gradients(
                [p.grad for p in self.parameters.values() if p.grad is not None],
                self.world.get_axis_group("data"),
                shares,
            )
        if self.tied_weight is not None:
            if self.tied_weight.grad is None:
                self.tied_weight.grad = torch.zeros_like(self.tied_weight)
            dist.all_reduce(to_local(self.tied_weight.grad), group=self.tied_group)
        total = sum(float(x.detach()) for x in losses) / shares
        return self.world.sum_over_axis([total], "pipeline")[0]

    def clip_gradients(self, max_norm: float) -> float:
        """As in `DistributedModel`."""
        return clip_sharded_gradients(
            self.parameters.values(),
            max_norm,
            self.world,
            duplicates=[self.tied_weight] if self.tied_weight is not None and not self.first else [],
        )

    def gather_weights(self, into: nn.Module | None) -> None:
        """As in `DistributedModel`: every stage sends the parameters that the first process does not hold."""
        own = dict(self.stage_module.named_parameters())
        held: list[Any] = [None] * self.world.size
        dist.all_gather_object(held, sorted(own))
        targets = dict(into.named_parameters()) if into is not None else {}
        for name in self.names:
            whole = to_full(own[name]).contiguous() if name in own else None
            owner = next(rank for rank, names in enumerate(held) if name in names)
            if self.world.rank == owner != 0:
                dist.send(whole, 0)  # type: ignore[arg-type]
            if into is not None:
                if owner:
                    whole = torch.empty_like(targets[name])
                    dist.recv(whole, owner)
                with torch.no_grad():
                    targets[name].copy_(whole)  # type: ignore[arg-type]


def average_gradients(gradients: Sequence[Tensor], group: Any, shares: int) -> None:
    """Average the gradients over a group in one all-reduce.

    DDP cannot be combined with a pipeline: it takes each micro-batch for a step.
    """
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat, group=group)
    flat /= shares
    for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _create_tied_groups(world: World) -> Any:
    """Create the groups of first and last stages; return that of this process's pipeline. A collective operation."""
    ranks = world.mesh.mesh  # [pipeline, data, tensor]
    mine = None
    for at in range(ranks.shape[1]):
        for tensor_rank in range(ranks.shape[2]):
            pair = [int(ranks[0, at, tensor_rank]), int(ranks[-1, at, tensor_rank])]
            group = dist.new_group(pair)
            if world.get_axis_rank("data") == at and world.get_axis_rank("tensor") == tensor_rank:
                mine = group
    return mine
