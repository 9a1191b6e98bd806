"""Stage `quantize.hqq`: weights as whole numbers with zero points such that few weights are far off, in place of all a little; nothing has to be calibrated.

Badri and Shaji 2023, half-quadratic quantization. Zero points are whole numbers here, as compressed-tensors and its engines have them; the package hqq keeps real ones, in files of its own.
"""

from __future__ import annotations

from llmworks.artifact import Dataset, Model
from llmworks.context import Context
from llmworks.quantize.config import WholeConfig


class HqqConfig(WholeConfig):
    """Nothing beside what all are told."""


def hqq(config: HqqConfig, model: Model, ctx: Context, data: Dataset | None = None) -> Model:
    """Write a directory in the form of compressed-tensors; `data`: what the damage is measured on. Errors: those of `rounding.run`."""
    from llmworks.model.grid import Grid
    from llmworks.quantize.nearest import Nearest
    from llmworks.quantize.rounding import run
    from llmworks.quantize.solvers.hqq import solve

    return run(config, model, ctx, data, Nearest(solve), Grid(config.bits, config.group, symmetric=False), {"method": "hqq"}, config.form)
