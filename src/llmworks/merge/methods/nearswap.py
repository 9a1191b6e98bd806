"""NearSwap: take the other model's weight where it is close to the base's, and less of it the farther it is.

alchemonaut, QuartetAnemoi-70B.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llmworks.merge.execute.tensor_group import BlockFunction, TensorGroup


def nearswap(group: TensorGroup) -> BlockFunction:
    """Merge by NearSwap. `t`: similarity threshold; the interpolation ratio is t / |a - b|, at most 1."""
    assert group.base is not None
    first, second, t = group.base, 1 - group.base, float(group.tensor_parameters["t"])

    def piece(blocks: Sequence[Tensor], _: int) -> Tensor:
        a, b = blocks[first], blocks[second]
        share = (t / (a - b).abs().clamp(min=1e-6)).clamp(min=0, max=1)
        return share * b + (1 - share) * a

    return piece
