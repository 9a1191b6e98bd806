"""Task arithmetic: add task vectors to the base; also the last step of TIES, DARE, DELLA and breadcrumbs.

Ilharco et al. 2023 (arXiv:2212.04089).

Signs and masks operate on the bits of floats, which is many times faster than on booleans.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmworks.core.errors import UserError
from llmworks.merge.execute.copies import is_finite
from llmworks.merge.execute.tensor_group import BlockFunction, TensorGroup, task_vectors
from llmworks.model.io.safetensors_io import FLOAT_DTYPES, TORCH_DTYPES

NAMES = {getattr(torch, TORCH_DTYPES[name]): name for name in FLOAT_DTYPES}
INTS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a float


def task_arithmetic(group: TensorGroup) -> BlockFunction:
    """Return base + lambda sum w (x - base)."""
    check_weights(group)
    return lambda blocks, _: add_task_vectors(group, blocks, task_vectors(group, blocks), elect=False)


def check_weights(group: TensorGroup) -> None:
    """Check the weights: UserError if `normalize` would divide by zero."""
    weights = group.get_parameter()
    if group.tensor_parameters["normalize"] and weights and all(weight == 0 for weight in weights):
        raise UserError(
            f"{group.name}: all weights are zero, so their mean is undefined; change them, or set normalize: false"
        )


def add_task_vectors(
    group: TensorGroup,
    blocks: Sequence[Tensor],
    changes: Sequence[Tensor],
    *,
    elect: bool,
    rescale: Sequence[float] | None = None,
) -> Tensor:
    """Return a block of the base plus the weighted task vectors, which are changed in place.

    elect: only changes of the majority sign count (TIES, section 3; the mean is over those that have it). rescale:
    additional factor of each task vector, not counted by the mean.
    """
    assert group.base is not None
    base = blocks[group.base]
    if not changes:
        return base
    weights, once = torch.tensor(group.get_parameter(), dtype=base.dtype), float(group.tensor_parameters["lambda"])
    factors = (
        weights if rescale is None else torch.tensor(group.get_parameter()).mul(torch.tensor(rescale)).to(base.dtype)
    )
    if (
        rescale is not None
        and float(factors.min()) == float(factors.max()) > 0
        and not group.tensor_parameters["normalize"]
    ):
        once *= float(factors[0])  # random masks need not match mergekit bit for bit: one product serves all
    else:
        for change, factor in zip(changes, factors, strict=True):
            change.mul_(factor)
    moved = sum_rounded_once(changes)
    divisor = _sum_weights(weights)
    if elect:
        sign = (
            moved.view(INTS[moved.element_size()]) & SIGN[moved.element_size()]
        )  # a sum is -0 only where all changes are 0
        numbers = is_finite(moved.view(torch.uint8).numpy(), NAMES[moved.dtype])
        changes = [
            _clamp_positive(_flip_sign(change, sign), on_bits=numbers) for change in changes
        ]  # those of the other sign become 0
        moved = sum_rounded_once(changes)
        if group.tensor_parameters["normalize"]:
            moved, divisor = moved.clone() if len(changes) == 1 else moved, _sum_agreeing_weights(changes, weights)
        moved = _flip_sign(moved, sign)
    if group.tensor_parameters["normalize"]:
        moved = moved / divisor
    if rescale is not None:
        return torch.add(base, moved, alpha=once)
    if once != 1:
        moved = moved * group.tensor_parameters["lambda"]
    return base + moved


SIGN = {2: -(1 << 15), 4: -(1 << 31), 8: -(1 << 63)}


def sum_rounded_once(parts: Sequence[Tensor]) -> Tensor:
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


def apply_bit_mask(change: Tensor, mask: Tensor) -> Tensor:
    """Zero a change where the bit mask is not set, in place."""
    return (
        change.view(INTS[change.element_size()]).bitwise_and_(mask.to(INTS[change.element_size()])).view(change.dtype)
    )


def _flip_sign(change: Tensor, sign: Tensor) -> Tensor:
    """Flip the sign where a bit is set, in place."""
    return change.view(sign.dtype).bitwise_xor_(sign).view(change.dtype)


def _clamp_positive(change: Tensor, *, on_bits: bool) -> Tensor:
    """Clamp below 0 to 0, in place; on the bits if there is no NaN, which that would lose."""
    (change.view(INTS[change.element_size()]) if on_bits else change).clamp_(min=0)
    return change


def _sum_weights(weights: Tensor) -> Tensor:
    """Return the sum of weights to divide by; 1 where it would be 0."""
    found = weights.sum()
    return torch.ones_like(found) if float(found.abs()) < 1e-8 else found


def _sum_agreeing_weights(changes: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return the sum of weights of nonzero changes, for a block; 1 where it is 0."""
    found = sum_rounded_once([torch.sign(change) * weight for change, weight in zip(changes, weights, strict=True)])
    if bool((weights > 0).all()):
        return found.clamp_(
            min=float(weights.min())
        )  # at least this where any change is nonzero; elsewhere the numerator is 0
    return found.masked_fill_(found == 0, 1)
