"""Task arithmetic: add task vectors to the base; also the last step of TIES, DARE, DELLA and breadcrumbs.

Ilharco et al. 2023 (arXiv:2212.04089).

Signs and masks operate on the bits of floats, which is many times faster than on booleans.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmworks.core.errors import UserError
from llmworks.merge.execute.copies import finite
from llmworks.merge.execute.tensor_group import Group, Piece, deltas
from llmworks.model.io.safetensors_io import FLOATS, TORCH

NAMES = {getattr(torch, TORCH[name]): name for name in FLOATS}
INTS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a float


def task_arithmetic(group: Group) -> Piece:
    """Return base + lambda sum w (x - base)."""
    check(group)
    return lambda blocks, _: added(group, blocks, deltas(group, blocks), elect=False)


def check(group: Group) -> None:
    """Check the weights: UserError if `normalize` would divide by zero."""
    weights = group.weights()
    if group.shared["normalize"] and weights and all(weight == 0 for weight in weights):
        raise UserError(
            f"{group.name}: all weights are zero, so their mean is undefined; change them, or set normalize: false"
        )


def added(
    group: Group,
    blocks: Sequence[Tensor],
    changes: Sequence[Tensor],
    *,
    elect: bool,
    larger: Sequence[float] | None = None,
) -> Tensor:
    """Return a block of the base plus the weighted task vectors, which are changed in place.

    elect: only changes of the majority sign count (TIES, section 3; the mean is over those that have it). rescale:
    additional factor of each task vector, not counted by the mean.
    """
    assert group.base is not None
    base = blocks[group.base]
    if not changes:
        return base
    weights, once = torch.tensor(group.weights(), dtype=base.dtype), float(group.shared["lambda"])
    factors = weights if larger is None else torch.tensor(group.weights()).mul(torch.tensor(larger)).to(base.dtype)
    if larger is not None and float(factors.min()) == float(factors.max()) > 0 and not group.shared["normalize"]:
        once *= float(factors[0])  # random masks need not match mergekit bit for bit: one product serves all
    else:
        for change, factor in zip(changes, factors, strict=True):
            change.mul_(factor)
    moved = total(changes)
    divisor = _whole(weights)
    if elect:
        sign = (
            moved.view(INTS[moved.element_size()]) & SIGN[moved.element_size()]
        )  # a sum is -0 only where all changes are 0
        numbers = finite(moved.view(torch.uint8).numpy(), NAMES[moved.dtype])
        changes = [
            _positive(_turned(change, sign), numbers=numbers) for change in changes
        ]  # those of the other sign become 0
        moved = total(changes)
        if group.shared["normalize"]:
            moved, divisor = moved.clone() if len(changes) == 1 else moved, _agreeing(changes, weights)
        moved = _turned(moved, sign)
    if group.shared["normalize"]:
        moved = moved / divisor
    if larger is not None:
        return torch.add(base, moved, alpha=once)
    if once != 1:
        moved = moved * group.shared["lambda"]
    return base + moved


SIGN = {2: -(1 << 15), 4: -(1 << 31), 8: -(1 << 63)}


def total(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors, rounded once, as torch sums over a dimension."""
    if len(parts) < 3 or parts[0].element_size() > 2:
        made = parts[0]
        for one in parts[1:]:
            made = made + one
        return made
    wide = parts[0].float()
    for one in parts[1:]:
        wide += one
    return wide.to(parts[0].dtype)


def kept(change: Tensor, mask: Tensor) -> Tensor:
    """Zero a change where the bit mask is not set, in place."""
    return (
        change.view(INTS[change.element_size()]).bitwise_and_(mask.to(INTS[change.element_size()])).view(change.dtype)
    )


def _turned(change: Tensor, sign: Tensor) -> Tensor:
    """Flip the sign where a bit is set, in place."""
    return change.view(sign.dtype).bitwise_xor_(sign).view(change.dtype)


def _positive(change: Tensor, *, numbers: bool) -> Tensor:
    """Clamp below 0 to 0, in place; on the bits if there is no NaN, which that would lose."""
    (change.view(INTS[change.element_size()]) if numbers else change).clamp_(min=0)
    return change


def _whole(weights: Tensor) -> Tensor:
    """Return the sum of weights to divide by; 1 where it would be 0."""
    found = weights.sum()
    return torch.ones_like(found) if float(found.abs()) < 1e-8 else found


def _agreeing(changes: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return the sum of weights of nonzero changes, for a block; 1 where it is 0."""
    found = total([torch.sign(change) * weight for change, weight in zip(changes, weights, strict=True)])
    if bool((weights > 0).all()):
        return found.clamp_(
            min=float(weights.min())
        )  # at least this where any change is nonzero; elsewhere the numerator is 0
    return found.masked_fill_(found == 0, 1)
