"""Data and tensor parallelism: a model that is whole, replicated (DDP), or sharded (FSDP2, tensor parallel).

Uses torch's own modules. `pipeline.py` implements pipeline parallelism.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmworks.core.errors import UserError
from llmworks.train.distributed.config import DataParallelConfig, ParallelConfig
from llmworks.train.distributed.world import World

Loss = Callable[[Any, Any], Tensor]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: str, device: torch.device, *, sharded: bool = False) -> str:
    """Resolve precision `auto`: bf16 on a GPU of compute capability 8.0 or newer, fp16 on an older one, fp32 on a CPU.

    `sharded`: fp16 is not an option, since its gradient scaler does not support shards.
    """
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32" if sharded else "fp16"


def autocast(device: torch.device, precision: str) -> Any:
    """Return the autocast context of a precision."""
    return torch.autocast(device.type, DTYPES[precision]) if precision != "fp32" else contextlib.nullcontext()


class DistributedModel:
    """The model of this process, ready for training.

    `parameters`: the trainable ones, by their names in the full model.
    """

    def __init__(self, network: nn.Module, world: World, forward: Any = None) -> None:
        self.network, self.world, self.forward = network, world, forward if forward is not None else network
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}

    def backward(self, batches: Sequence[Any], loss: Loss, num_labels: float, scaler: Any, precision: str) -> float:
        """Accumulate the gradients of all micro-batches; return this process's share of the mean loss.

        `num_labels`: label tokens of the step over all processes.
        """
        shares, total = self.world.get_axis_size("data"), 0.0
        for number, batch in enumerate(batches):
            with self._sync_gradients(last=number + 1 == len(batches)):
                with autocast(self.world.device, precision):
                    part = loss(self.forward, batch) / num_labels
                    if shares > 1:
                        part = part * shares  # DDP and FSDP average gradients; a sum is needed
                scaler.scale(part).backward()
            total += float(part.detach()) / shares
        reduce_norm_gradients(self.parameters, self.world)
        return total

    def clip_gradients(self, max_norm: float) -> float:
        """Clip the gradients to `max_norm`; return their norm before clipping."""
        if self.world.size == 1:
            return float(nn.utils.clip_grad_norm_(self.parameters.values(), max_norm))
        return clip_sharded_gradients(self.parameters.values(), max_norm, self.world)

    def gather_weights(self, into: nn.Module | None) -> None:
        """Copy all weights into a full model in the first process. A collective operation."""
        if into is self.network:
            return
        targets = dict(into.named_parameters()) if into is not None else {}
        for name, p in self.network.named_parameters():
            whole = to_full(p)
            if name in targets:
                with torch.no_grad():
                    targets[name].copy_(whole)

    @contextlib.contextmanager
    def _sync_gradients(self, last: bool) -> Iterator[None]:
        """Synchronize gradients only after the last micro-batch of a step."""
        if isinstance(self.forward, nn.parallel.DistributedDataParallel) and not last:
            with self.forward.no_sync():
                yield
            return
        sync: Any = getattr(self.network, "set_requires_gradient_sync", None)  # FSDP2's
        if sync is not None:
            sync(last)
        yield


def distribute_model(
    network: nn.Module,
    parallel: ParallelConfig | DataParallelConfig,
    world: World,
    *,
    precision: str = "fp32",
    compiled: bool = False,
) -> DistributedModel:
    """Prepare the model for this process. Errors: UserError for a model that cannot be parallelized so."""
    blocks: Any = get_layers(network)
    sharded = parallel.data_parallel == "fsdp" or parallel.tensor_parallel_size > 1
    if world.size == 1 or not sharded:
        forward: Any = torch.compile(network) if compiled else network
        if world.size > 1:
            experts = bool(getattr(getattr(network, "shape", None), "experts", None))
            forward = nn.parallel.DistributedDataParallel(
                forward,
                process_group=world.get_axis_group("data"),
                forward_sync_buffers=False,
                find_unused_parameters=experts,
                gradient_as_bucket_view=True,
            )
        return DistributedModel(network, world, forward)
    if blocks is None:
        raise UserError(
            "parallel: only decoders can be sharded or tensor-parallel; set parallel.data_parallel to ddp,"
            " and parallel.tensor_parallel_size to 1"
        )
    if precision == "fp16":
        raise UserError(
            "precision fp16 cannot be combined with sharding (gradient scaling); use bf16 with"
            " parallel.data_parallel shard or parallel.tensor_parallel_size"
        )
    if parallel.tensor_parallel_size > 1:
        apply_tensor_parallel(network, blocks, world)
    if compiled:
        for block in blocks:
            block.compile()
    if parallel.data_parallel == "fsdp":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = (
            MixedPrecisionPolicy(param_dtype=DTYPES[precision], reduce_dtype=torch.float32)
            if precision != "fp32"
            else MixedPrecisionPolicy()
        )
        for module in (*blocks, network):
            fully_shard(module, mesh=world.mesh["data"], mp_policy=policy)
    return DistributedModel(network, world)


def get_layers(network: nn.Module) -> Any:
    """Return the decoder layers that this process holds; None for other architectures."""
    blocks = getattr(getattr(network, "decoder", None), "blocks", None)
    return None if blocks is None else list(blocks.children())


def reduce_norm_gradients(parameters: Mapping[str, nn.Parameter], world: World) -> None:
    """Sum the gradients of query and key norms over the tensor parallel group.

    These norms are replicated, but each process computes gradients of its own heads only.
    """
    if world.get_axis_size("tensor") > 1:
        for name, p in parameters.items():
            if p.grad is not None and ("query_norm" in name or "key_norm" in name):
                dist.all_reduce(to_local(p.grad), group=world.get_axis_group("tensor"))


def apply_tensor_parallel(network: Any, blocks: Any, world: World) -> None:
    """Apply tensor parallelism: split the heads and the MLP hidden dimension of each layer along `tensor`.

    Embedding, LM head and norms are replicated. Errors: UserError for a shape that cannot be divided.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

    shape, tensor_size = network.shape, world.get_axis_size("tensor")
    for name, number in (
        ("num_attention_heads", shape.num_attention_heads),
        ("num_key_value_heads", shape.num_kv_heads),
        ("intermediate_size", shape.inner_size),
    ):
        if number % tensor_size:
            raise UserError(f"parallel.tensor_parallel_size {tensor_size} does not divide the model's {name} {number}")
    if shape.experts or shape.position_embedding_type == "alibi":
        raise UserError(
            f"parallel.tensor_parallel_size: a model with {'experts' if shape.experts else 'ALiBi'} cannot be"
            " tensor-parallel; set it to 1"
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
        block.attention.num_heads, block.attention.num_kv_heads = (
            shape.num_attention_heads // tensor_size,
            shape.num_kv_heads // tensor_size,
        )


def to_local(x: Any) -> Tensor:
    """Return the local shard of a tensor."""
    return x.to_local() if hasattr(x, "to_local") else x  # type: ignore[no-any-return]


def to_full(x: Any) -> Tensor:
    """Return the full tensor; a collective operation of all processes that share it."""
    return x.detach().full_tensor() if hasattr(x, "full_tensor") else x.detach()  # type: ignore[no-any-return]


def clip_sharded_gradients(
    parameters: Any, max_norm: float, world: World, *, duplicates: Sequence[nn.Parameter] = ()
) -> float:
    """Clip sharded gradients to `max_norm`; return their global norm before clipping.

    `duplicates`: parameters that another process counts, too.
    """
    squares: dict[tuple[str, ...], Tensor] = {}
    found = [p for p in parameters if p.grad is not None]
    for p in found:
        if not any(p is other for other in duplicates):
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
                squares.get(axes, torch.zeros((), device=world.device)) + to_local(p.grad).float().square().sum()
            )
    total = torch.zeros((), device=world.device)
    # the same collectives in the same order in all processes
    for axes in sorted({*squares, (), ("data",), ("tensor",), ("data", "tensor")}):
        here = squares.get(axes, torch.zeros((), device=world.device))
        for axis in axes:
            dist.all_reduce(here, group=world.get_axis_group(axis))
        total = total + here
    if world.get_axis_size("pipeline") > 1:
        dist.all_reduce(total, group=world.get_axis_group("pipeline"))
    norm = float(total.sqrt())
    if norm > max_norm:
        for p in found:
            to_local(p.grad).mul_(max_norm / (norm + 1e-6))
    return norm
