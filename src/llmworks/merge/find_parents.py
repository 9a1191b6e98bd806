"""Stage `merge.find_parents`: find a model's parents among candidates from its weights: the model it was fine-tuned
from, the models merged into it and their weights, or the models its layers come from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from llmworks.core.artifact import Config, Model, Report
from llmworks.core.context import Context

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder
    from llmworks.merge.ancestry import Ancestry


class FindParentsConfig(Config):
    """Config of `merge.find_parents`."""

    max_rows: int = Field(200, gt=0, description="maximum number of layers in the table")


def find_parents(config: FindParentsConfig, child: Model, candidates: list[Model], ctx: Context) -> Report:
    """Find the parents of `child` among `candidates`; reads some thousands of values of each matrix.

    The lineage tree shows the result.
    Errors: ModelError for a directory without weights, or one that is quantized.
    """
    from llmworks.merge.ancestry import estimate_rank
    from llmworks.merge.ancestry import infer_ancestry as found_in
    from llmworks.merge.plan.layout import read_layout

    names = [
        model.name if [one.name for one in candidates].count(model.name) == 1 else f"{model.name} {model.digest[:8]}"
        for model in candidates
    ]
    layouts = {name: read_layout(name, model.path) for name, model in zip(names, candidates, strict=True)}
    own = read_layout(child.name, child.path)
    found = found_in(own, layouts)
    digests = {name: model.digest for name, model in zip(names, candidates, strict=True)}
    page = ctx.report
    page.title = f"Parents of {child.name}"
    page.subtitle = f"{child.name} {found.summary}."
    if found.relation == "tuned":
        rank, energy = estimate_rank(own, layouts[next(iter(found.parents))])
        if rank:
            page.subtitle += (
                f" In the matrix that was sampled, {energy:.1%} of the difference has rank {rank}: a LoRA adapter was"
                " merged in."
            )
    page.add_table(
        "Parents",
        ("model", "weight", "digest"),
        [(name, f"{share:.3f}", digests[name][:12]) for name, share in found.parents.items()],
        "For a merge: the model's merge weight, averaged over layers, by least squares.",
    )
    _describe_layers(found, config, page)
    page.data = {
        "child": child.digest,
        "relation": found.relation,
        "said": found.summary,
        "parents": [
            {"name": name, "digest": digests[name], "share": round(share, 6)} for name, share in found.parents.items()
        ],
        "experts": {str(at): name for at, name in found.experts.items()},
        "layers": [
            {
                "layer": layer.index,
                "shares": [[name, at, round(share, 6)] for (name, at), share in layer.coefficients.items()],
                "cosine": round(layer.cosine_similarity, 6),
                "left": round(layer.residual, 6),
                "equal": layer.is_equal,
            }
            for layer in found.layers
        ],
    }
    for layout in (own, *layouts.values()):
        layout.shards.close()
    ctx.progress.log(page.subtitle)
    return Report(
        ctx.out, metrics={"relation": found.relation, "parents": len(found.parents), "models": len(candidates)}
    )


def _describe_layers(ancestry: Ancestry, config: FindParentsConfig, page: ReportBuilder) -> None:
    """Add the table of layers with their coefficients."""
    rows = [
        (
            str(layer.index),
            ", ".join(f"{name} {at}: {share:.3f}" for (name, at), share in layer.coefficients.items()) or "none",
            f"{layer.cosine_similarity:.4f}",
            "equal" if layer.is_equal else f"{layer.residual:.2%}",
        )
        for layer in ancestry.layers[: config.max_rows]
    ]
    page.add_table(
        "Layers",
        ("layer", "model and layer: weight", "cosine with the nearest", "relative residual"),
        rows,
        f"{ancestry.num_values_read:,} values of the model were read. Layers of models that were not trained from"
        " one another"
        " have cosines of some hundredths.",
    )
