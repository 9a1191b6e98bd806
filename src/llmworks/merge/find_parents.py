"""Stage `merge.find_parents`: which of some models a model was made of, told by its weights: what it was tuned from, what
was merged into it and by which shares, whose layers it has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from llmworks.core.artifact import Config, Model, Report
from llmworks.core.context import Context

if TYPE_CHECKING:
    from llmworks.core.report import ReportBuilder
    from llmworks.merge.ancestry import Kinship


class FindParentsConfig(Config):
    """What is shown."""

    max_rows: int = Field(200, gt=0, description="layers in the table at most")


def find_parents(config: FindParentsConfig, child: Model, candidates: list[Model], ctx: Context) -> Report:
    """Look for the parents of `child` among models; reads some thousands of numbers of each matrix.

    The family tree shows what was found.

    Errors: ModelError for a directory without weights, or one that is quantized.
    """
    from llmworks.merge.ancestry import kinship as found_in
    from llmworks.merge.ancestry import rank_of
    from llmworks.merge.plan.layout import layout_of

    names = [
        model.name if [one.name for one in candidates].count(model.name) == 1 else f"{model.name} {model.digest[:8]}"
        for model in candidates
    ]
    layouts = {name: layout_of(name, model.path) for name, model in zip(names, candidates, strict=True)}
    own = layout_of(child.name, child.path)
    found = found_in(own, layouts)
    digests = {name: model.digest for name, model in zip(names, candidates, strict=True)}
    page = ctx.report
    page.title = f"Of what {child.name} was made"
    page.lead = f"{child.name} {found.said}."
    if found.relation == "tuned":
        rank, energy = rank_of(own, layouts[next(iter(found.parents))])
        if rank:
            page.lead += (
                f" In the matrix that was looked at, {energy:.1%} of the difference has rank {rank}: an adapter was"
                " folded in."
            )
    page.table(
        "Parents",
        ("model", "share", "digest"),
        [(name, f"{share:.3f}", digests[name][:12]) for name, share in found.parents.items()],
        "Of a merge: the weight by which the model is in it, on average over layers, by least squares.",
    )
    _describe_layers(found, config, page)
    page.data = {
        "child": child.digest,
        "relation": found.relation,
        "said": found.said,
        "parents": [
            {"name": name, "digest": digests[name], "share": round(share, 6)} for name, share in found.parents.items()
        ],
        "experts": {str(at): name for at, name in found.experts.items()},
        "layers": [
            {
                "layer": layer.number,
                "shares": [[name, at, round(share, 6)] for (name, at), share in layer.shares.items()],
                "cosine": round(layer.cosine, 6),
                "left": round(layer.left, 6),
                "equal": layer.equal,
            }
            for layer in found.layers
        ],
    }
    for layout in (own, *layouts.values()):
        layout.shards.close()
    ctx.progress.say(page.lead)
    return Report(
        ctx.out, metrics={"relation": found.relation, "parents": len(found.parents), "models": len(candidates)}
    )


def _describe_layers(found: Kinship, config: FindParentsConfig, page: ReportBuilder) -> None:
    """The table of layers with their shares."""
    rows = [
        (
            str(layer.number),
            ", ".join(f"{name} {at}: {share:.3f}" for (name, at), share in layer.shares.items()) or "none",
            f"{layer.cosine:.4f}",
            "equal" if layer.equal else f"{layer.left:.2%}",
        )
        for layer in found.layers[: config.max_rows]
    ]
    page.table(
        "Layers",
        ("layer", "model and layer: share", "cosine with the nearest", "in none of them"),
        rows,
        f"{found.numbers:,} numbers of the model were read. Layers of models that were not trained from one another"
        " have cosines of some hundredths.",
    )
