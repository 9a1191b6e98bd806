"""Registry of merge methods: their parameters and where they are implemented. A literal table; imports no method.

`needs_whole_tensors`: the method needs a tensor of all models in memory; otherwise it reads blocks.
`copies_by_default`: it copies a tensor unchanged if none of its parameters is given. Defaults are mergekit's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from llmworks.merge.plan.parameters import Parameter


@dataclass(frozen=True)
class MergeMethod:
    """A merge method. `base`: whether a base model is required, optional, or treated like any other; inputs are
    counted including the base.
    """

    target: str
    reference: str
    base: Literal["required", "optional", "none"]
    parameters: tuple[Parameter, ...] = ()
    min_models: int = 1
    max_models: int | None = None
    min_others: int = 0
    max_others: int | None = None
    needs_whole_tensors: bool = False
    copies_by_default: bool = False
    nanoseconds_per_value: float = 3.0  # about how many nanoseconds per input value (benchmarks/merge.py)

    @property
    def name(self) -> str:
        """Return the name as in mergekit's files."""
        return self.target.partition(":")[2]

    def load_function(self) -> Callable[..., Any]:
        """Import the method: a function of a `tensor_group.TensorGroup` that returns a function from blocks of the
        inputs to a block of the result.
        """
        module, _, name = self.target.partition(":")
        made: Callable[..., Any] = getattr(import_module(f"llmworks.merge.methods.{module}"), name)
        return made


def _make_task_vector_method(
    name: str,
    source: str,
    *more: Parameter,
    normalize: bool = False,
    rescale: bool = False,
    needs_whole_tensors: bool = False,
    nanoseconds_per_value: float = 8.0,
) -> MergeMethod:
    """Define a method on task vectors."""
    shared = (
        Parameter("int8_mask", bool, default=False),
        Parameter("normalize", bool, default=normalize),
        Parameter("rescale", bool, default=rescale),
        Parameter("lambda", float, default=1.0),
    )
    return MergeMethod(
        name,
        source,
        "required",
        (*shared, Parameter("weight", float, "other"), Parameter("density", float, "other", 1.0, 0, 1), *more),
        needs_whole_tensors=needs_whole_tensors,
        nanoseconds_per_value=12.0 if needs_whole_tensors else nanoseconds_per_value,
    )


METHODS: dict[str, MergeMethod] = {
    "linear": MergeMethod(
        "linear:linear",
        "Wortsman et al. 2022, arXiv:2203.05482",
        "none",
        (Parameter("weight", float, "input"), Parameter("normalize", bool, default=True)),
    ),
    "slerp": MergeMethod(
        "slerp:slerp",
        "Shoemake 1985",
        "required",
        (Parameter("t", float),),
        min_models=2,
        max_models=2,
        nanoseconds_per_value=6.0,
    ),
    "nuslerp": MergeMethod(
        "nuslerp:nuslerp",
        "mergekit, NuSLERP",
        "optional",
        (
            Parameter("weight", float, "other"),
            Parameter("nuslerp_row_wise", bool, default=False),
            Parameter("nuslerp_flatten", bool, default=True),
        ),
        min_others=2,
        max_others=2,
        needs_whole_tensors=True,
        nanoseconds_per_value=12.0,
    ),
    "multislerp": MergeMethod(
        "multislerp:multislerp",
        "Goddard 2025, goddard.blog",
        "optional",
        (
            Parameter("weight", float, "other"),
            Parameter("normalize_weights", bool, default=True),
            Parameter("eps", float, default=1e-8),
        ),
        min_others=1,
        needs_whole_tensors=True,
        nanoseconds_per_value=12.0,
    ),
    "task_arithmetic": _make_task_vector_method(
        "task_arithmetic:task_arithmetic", "Ilharco et al. 2023, arXiv:2212.04089", nanoseconds_per_value=2.5
    ),
    "ties": _make_task_vector_method("ties:ties", "Yadav et al. 2023, arXiv:2306.01708", normalize=True),
    "dare_linear": _make_task_vector_method("dare:dare_linear", "Yu et al. 2024, arXiv:2311.03099", rescale=True),
    "dare_ties": _make_task_vector_method("dare:dare_ties", "Yu et al. 2024, arXiv:2311.03099", rescale=True),
    "della": _make_task_vector_method(
        "della:della",
        "Deep et al. 2024, arXiv:2406.11617",
        Parameter("epsilon", float, "other", 0.15, 0, 1),
        normalize=True,
        rescale=True,
        needs_whole_tensors=True,
        nanoseconds_per_value=12.0,
    ),
    "della_linear": _make_task_vector_method(
        "della:della_linear",
        "Deep et al. 2024, arXiv:2406.11617",
        Parameter("epsilon", float, "other", 0.15, 0, 1),
        rescale=True,
        needs_whole_tensors=True,
        nanoseconds_per_value=12.0,
    ),
    "breadcrumbs": _make_task_vector_method(
        "breadcrumbs:breadcrumbs",
        "Davari and Belilovsky 2023, arXiv:2312.06795",
        Parameter("gamma", float, "other", 0.01, 0, 1),
    ),
    "breadcrumbs_ties": _make_task_vector_method(
        "breadcrumbs:breadcrumbs_ties",
        "Davari and Belilovsky 2023, arXiv:2312.06795",
        Parameter("gamma", float, "other", 0.01, 0, 1),
    ),
    "model_stock": MergeMethod(
        "model_stock:model_stock",
        "Jang et al. 2024, arXiv:2403.19522",
        "required",
        (Parameter("filter_wise", bool, default=False),),
        min_models=3,
        needs_whole_tensors=True,
        nanoseconds_per_value=12.0,
    ),
    "sce": MergeMethod(
        "sce:sce",
        "Wan et al. 2024, arXiv:2408.07990",
        "required",
        (Parameter("int8_mask", bool, default=False), Parameter("select_topk", float, default=1.0, low=0, high=1)),
        needs_whole_tensors=True,
        nanoseconds_per_value=12.0,
    ),
    "arcee_fusion": MergeMethod(
        "arcee_fusion:arcee_fusion",
        "arcee.ai",
        "required",
        min_models=2,
        max_models=2,
        needs_whole_tensors=True,
        nanoseconds_per_value=12.0,
    ),
    "nearswap": MergeMethod(
        "nearswap:nearswap",
        "alchemonaut, QuartetAnemoi-70B",
        "required",
        (Parameter("t", float),),
        min_models=2,
        max_models=2,
    ),
    "karcher": MergeMethod(
        "karcher:karcher",
        "Karcher 1977; mergekit",
        "none",
        (Parameter("max_iter", int, default=10, low=1), Parameter("tol", float, default=1e-5, low=0)),
        needs_whole_tensors=True,
        nanoseconds_per_value=12.0,
    ),
    "ram": MergeMethod(
        "ram:ram",
        "arXiv:2601.13572",
        "required",
        (Parameter("epsilon", float, default=1e-5, low=0),),
        needs_whole_tensors=True,
        nanoseconds_per_value=12.0,
    ),
    "ramplus_tl": MergeMethod(
        "ram:ramplus_tl",
        "arXiv:2601.13572",
        "required",
        (
            Parameter("r", float, default=0.1, low=0),
            Parameter("alpha", float, default=0.2, low=0),
            Parameter("epsilon", float, default=1e-5, low=0),
        ),
        needs_whole_tensors=True,
        nanoseconds_per_value=12.0,
    ),
    "passthrough": MergeMethod(
        "passthrough:passthrough",
        "",
        "none",
        (Parameter("scale", float, "input", None),),
        max_models=1,
        copies_by_default=True,
        nanoseconds_per_value=0.7,
    ),
}
