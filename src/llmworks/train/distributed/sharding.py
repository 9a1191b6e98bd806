"""A model as one process holds it: whole, replicated (DDP), or sharded (FSDP2) with matrices shared out (tensor
parallel); how its gradients come about.

torch's own modules do it. `pipeline.py` holds one that has some of the blocks. Knows no loop and no optimizer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmworks.core.errors import UserError
from llmworks.train.distributed.config import DataParallel, Parallel
from llmworks.train.distributed.world import World

Loss = Callable[[Any, Any], Tensor]
WIDTHS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolved(precision: str, device: torch.device, *, spread: bool = False) -> str:
    """What `auto` is: bf16 on a GPU that computes it (8.0 and newer), fp16 on an older one, fp32 on a CPU.

    `spread`: weights are sharded, so that nothing can be scaled for fp16.
    """
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32" if spread else "fp16"


def cast(device: torch.device, precision: str) -> Any:
    """The context in which products are computed."""
    return torch.autocast(device.type, WIDTHS[precision]) if precision != "fp32" else contextlib.nullcontext()


class Placed:
    """A model that this process can call. `parameters`: those that are trained, by their names in the whole model."""

    def __init__(self, network: nn.Module, world: World, forward: Any = None) -> None:
        self.network, self.world, self.forward = network, world, forward if forward is not None else network
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}

    def backward(self, batches: Sequence[Any], loss: Loss, labels: float, scaler: Any, precision: str) -> float:
        """Add up the gradients of all parts; returns this process's share of the mean loss.

        `labels`: of the step, in all processes.
        """
        shares, total = self.world.count("data"), 0.0
        for number, batch in enumerate(batches):
            with self._in_step(last=number + 1 == len(batches)):
                with cast(self.world.device, precision):
                    part = loss(self.forward, batch) / labels
                    if shares > 1:
                        part = part * shares  # gradients are averaged over shares; they should be summed
                scaler.scale(part).backward()
            total += float(part.detach()) / shares
        add_partial(self.parameters, self.world)
        return total

    def clip(self, most: float) -> float:
        """The norm of all gradients, which are scaled down to `most`."""
        if self.world.size == 1:
            return float(nn.utils.clip_grad_norm_(self.parameters.values(), most))
        return clip(self.parameters.values(), most, self.world)

    def gather(self, into: nn.Module | None) -> None:
        """Put all weights into a whole model, at the first process. All take part."""
        if into is self.network:
            return
        targets = dict(into.named_parameters()) if into is not None else {}
        for name, p in self.network.named_parameters():
            whole = full(p)
            if name in targets:
                with torch.no_grad():
                    targets[name].copy_(whole)

    @contextlib.contextmanager
    def _in_step(self, last: bool) -> Iterator[None]:
        """Gradients are exchanged once in a step: after its last part."""
        if isinstance(self.forward, nn.parallel.DistributedDataParallel) and not last:
            with self.forward.no_sync():
                yield
            return
        sync: Any = getattr(self.network, "set_requires_gradient_sync", None)  # FSDP2's
        if sync is not None:
            sync(last)
        yield


def place(
    network: nn.Module,
    parallel: Parallel | DataParallel,
    world: World,
    *,
    precision: str = "fp32",
    compiled: bool = False,
) -> Placed:
    """The model as this process holds it. Errors: UserError for one that cannot be spread so."""
    blocks: Any = blocks_of(network)
    spread = parallel.data_parallel == "fsdp" or parallel.tensor_parallel_size > 1
    if world.size == 1 or not spread:
        forward: Any = torch.compile(network) if compiled else network
        if world.size > 1:
            experts = bool(getattr(getattr(network, "shape", None), "experts", None))
            forward = nn.parallel.DistributedDataParallel(
                forward,
                process_group=world.group("data"),
                forward_sync_buffers=False,
                find_unused_parameters=experts,
                gradient_as_bucket_view=True,
            )
        return Placed(network, world, forward)
    if blocks is None:
        raise UserError(
            "parallel: only decoders can be sharded or share matrices; set parallel.data to replicate, and tensor to 1"
        )
    if precision == "fp16":
        raise UserError("precision fp16 is scaled in one piece; take bf16 with parallel.data shard or parallel.tensor")
    if parallel.tensor_parallel_size > 1:
        share_matrices(network, blocks, world)
    if compiled:
        for block in blocks:
            block.compile()
    if parallel.data_parallel == "fsdp":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = (
            MixedPrecisionPolicy(param_dtype=WIDTHS[precision], reduce_dtype=torch.float32)
            if precision != "fp32"
            else MixedPrecisionPolicy()
        )
        for module in (*blocks, network):
            fully_shard(module, mesh=world.mesh["data"], mp_policy=policy)
    return Placed(network, world)


def blocks_of(network: nn.Module) -> Any:
    """The blocks of our decoder that are here; None for other models."""
    blocks = getattr(getattr(network, "decoder", None), "blocks", None)
    return None if blocks is None else list(blocks.children())


def add_partial(parameters: Mapping[str, nn.Parameter], world: World) -> None:
    """Norms of queries and keys are whole in processes that share heads, and their gradients are of their own heads:
    they are summed.
    """
    if world.count("tensor") > 1:
        for name, p in parameters.items():
            if p.grad is not None and ("query_norm" in name or "key_norm" in name):
                dist.all_reduce(local(p.grad), group=world.group("tensor"))


def share_matrices(network: Any, blocks: Any, world: World) -> None:
    """Heads and inner numbers of each block are divided among the processes along `tensor`; embedding, head and norms
    are whole in each.

    Errors: UserError for a shape that cannot be divided.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

    shape, ways = network.shape, world.count("tensor")
    for name, number in (("heads", shape.num_attention_heads), ("kv_heads", shape.groups), ("hidden", shape.inner)):
        if number % ways:
            raise UserError(f"parallel.tensor {ways} does not divide the model's {name} {number}")
    if shape.experts or shape.position_embedding_type == "alibi":
        raise UserError(
            f"parallel.tensor: a model with {'experts' if shape.experts else 'ALiBi'} cannot share its matrices; set it"
            " to 1"
        )
    for block in blocks:
        plan: dict[str, ParallelStyle] = {f"attention.{name}": ColwiseParallel() for name in ("query", "key", "value")}
        plan |= {
            "attention.out": RowwiseParallel(),
            "feed_forward.up": ColwiseParallel(),
            "feed_forward.down": RowwiseParallel(),
        }
        if shape.gated_mlp:
            plan["feed_forward.gate"] = ColwiseParallel()
        parallelize_module(block, world.mesh["tensor"], plan)
        block.attention.heads, block.attention.groups = shape.num_attention_heads // ways, shape.groups // ways


def local(x: Any) -> Tensor:
    """What this process has of a tensor."""
    return x.to_local() if hasattr(x, "to_local") else x  # type: ignore[no-any-return]


def full(x: Any) -> Tensor:
    """The whole of a tensor; all processes that share it take part."""
    return x.detach().full_tensor() if hasattr(x, "full_tensor") else x.detach()  # type: ignore[no-any-return]


def clip(parameters: Any, most: float, world: World, *, twice: Sequence[nn.Parameter] = ()) -> float:
    """The norm of gradients that are spread over processes, which are scaled down to `most`.

    `twice`: those that another process counts, too.
    """
    squares: dict[tuple[str, ...], Tensor] = {}
    found = [p for p in parameters if p.grad is not None]
    for p in found:
        if not any(p is other for other in twice):
            axes = (
                tuple(
                    name
                    for name, placement in zip(p.grad.device_mesh.mesh_dim_names, p.grad.placements, strict=True)
                    if not placement.is_replicate()
                )
                if hasattr(p.grad, "placements")
                else ()
            )
            squares[axes] = (
                squares.get(axes, torch.zeros((), device=world.device)) + local(p.grad).float().square().sum()
            )
    total = torch.zeros((), device=world.device)
    for axes in sorted({*squares, (), ("data",), ("tensor",), ("data", "tensor")}):  # the same in all processes
        here = squares.get(axes, torch.zeros((), device=world.device))
        for axis in axes:
            dist.all_reduce(here, group=world.group(axis))
        total = total + here
    if world.count("pipeline") > 1:
        dist.all_reduce(total, group=world.group("pipeline"))
    norm = float(total.sqrt())
    if norm > most:
        for p in found:
            local(p.grad).mul_(most / (norm + 1e-6))
    return norm
