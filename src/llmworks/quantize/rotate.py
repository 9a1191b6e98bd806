"""Stage `quantize.rotate`: a model that computes the same, its states turned so that no column of weights or inputs is
much larger than others; to be quantized next, by any method.

Ashkboos et al. 2024, QuaRot (arXiv:2404.00456), section 4: the state by one rotation, folded into all that reads and
writes it; values by another, folded into the matrix after them. What would have to be computed anew at every token is
left out, so that every engine runs the result.
"""

from __future__ import annotations

from llmworks.core.artifact import Model
from llmworks.core.context import Context
from llmworks.quantize.algorithms.config import RotateConfig


def rotate(config: RotateConfig, model: Model, ctx: Context) -> Model:
    """Write a Hugging Face directory with a head of its own; its golden logits are replayed.

    Errors: ModelError for a model that is quantized already, whose norms do not only scale (LayerNorm), or whose width
    has no known Hadamard matrix; GoldenMismatch when it computes something else.
    """
    from llmworks.quantize.algorithms.rotation import turned

    return turned(config, model, ctx)
