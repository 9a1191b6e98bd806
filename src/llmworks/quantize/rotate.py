"""Stage `quantize.rotate`: rotate a model's hidden states by Hadamard matrices so that weights and activations have no
outlier columns; the function is unchanged. Quantize the result by any method.

Ashkboos et al. 2024, QuaRot (arXiv:2404.00456), section 4: one rotation of the residual stream, folded into all layers
that read and write it; another of the value heads, folded into the matrix after them. Online rotations are left out, so
every engine can run the result.
"""

from __future__ import annotations

from llmworks.core.artifact import Model
from llmworks.core.context import Context
from llmworks.quantize.algorithms.config import RotateConfig


def rotate(config: RotateConfig, model: Model, ctx: Context) -> Model:
    """Write a Hugging Face directory with an untied head; its golden logits are replayed.

    Errors: ModelError for a model that is quantized already, has norms other than RMSNorm, or a hidden size without a
    known Hadamard matrix; GoldenMismatch when it computes something else.
    """
    from llmworks.quantize.algorithms.rotation import rotate_model

    return rotate_model(config, model, ctx)
