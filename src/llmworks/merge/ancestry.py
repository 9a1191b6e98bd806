"""Find a model's parents from its weights: how similar its layers are to those of candidates, and with which
coefficients candidates' layers add up to them.

Reads some thousands of values of each tensor.

Layers of models that were not trained from one another are nearly orthogonal. A fine-tuned layer is nearly its
parent's, a merged layer a weighted sum of its parents', so a least-squares fit of a layer by the same layer of all
similar candidates recovers the merge weights (task vectors: Ilharco et al. 2023, arXiv:2212.04089). The thresholds are
the constants below. The direction (parent or child) cannot be determined, only that two models are related.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmworks.core.errors import ModelError
from llmworks.merge.plan.layout import CheckpointLayout
from llmworks.model.io.safetensors_io import DTYPE_BYTES, FLOAT_DTYPES, TORCH_DTYPES

RUNS, RUN = 24, 128  # 24 runs of 128 consecutive values are read of each tensor
PIECE = 1 << 20  # values compared per read
READABLE = (*FLOAT_DTYPES, "F8_E4M3", "F8_E5M2")
NEAR = 0.3  # cosine similarity above which layers are related; unrelated layers have a few hundredths
SAME = 0.99999999  # cosine above which layers are checked for exact equality
SHARE = 0.04  # smallest coefficient of a candidate in a fit
SURE = 8.0  # standard errors by which a coefficient must differ from 0
EXPERT = re.compile(r"(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
DENSE = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True)
class LayerMatch:
    """The match of one layer of the child: coefficients of candidates' layers by (model, layer), cosine similarity
    with the nearest one, the relative residual of the fit, and whether all values read equal the nearest layer's.
    """

    index: int
    coefficients: Mapping[tuple[str, int], float]
    cosine_similarity: float
    residual: float
    is_equal: bool = False


@dataclass(frozen=True)
class Ancestry:
    """The parents that were found.

    `relation`: same, tuned, merged, layers, experts, or unknown; `parents`: coefficients averaged over layers;
    `experts`: by expert, the model its layers come from.
    """

    relation: str
    parents: Mapping[str, float]
    layers: Sequence[LayerMatch]
    experts: Mapping[int, str] = field(default_factory=dict)
    num_values_read: int = 0

    @property
    def summary(self) -> str:
        """Return a sentence that describes the result."""
        names = ", ".join(f"{name} ({share:.2f})" for name, share in self.parents.items())
        equal = sum(layer.is_equal for layer in self.layers)
        left = sum(layer.residual for layer in self.layers) / len(self.layers) if self.layers else 1.0
        return {
            "same": f"has the weights of {', '.join(self.parents)}",
            "tuned": f"was fine-tuned from {', '.join(self.parents)}, or the other way round: {left:.1%} of its"
            " weights is its own",
            "merged": f"is a merge of {names}; {left:.1%} of its weights comes from none of them",
            "layers": (
                f"has layers of {', '.join(self.parents)}; {equal} of {len(self.layers)} are bit-identical"
                + ("" if equal else ", as after a change of dtype")
            ),
            "experts": (
                "is a mixture of experts whose experts are"
                f" {', '.join(f'{at} {name}' for at, name in self.experts.items())}"
            ),
            "unknown": "is not related to any of the candidates",
        }[self.relation]


def infer_ancestry(child: CheckpointLayout, candidates: Mapping[str, CheckpointLayout]) -> Ancestry:
    """Determine which of the candidates a model was made of."""
    layers = get_largest_stack(child)
    if not layers:
        return Ancestry("unknown", {}, [])
    names = [
        rest
        for rest, tensor in layers[0].items()
        if len(child.places[tensor].shape) == 2 and child.places[tensor].num_elements
    ]
    unreadable = next((rest for rest in names if child.places[layers[0][rest]].dtype not in READABLE), None)
    if unreadable is not None:
        tensor = layers[0][unreadable]
        raise ModelError(f"{child.name}: {tensor} has dtype {child.places[tensor].dtype}, which cannot be compared")
    if not names:
        raise ModelError(f"{child.name}: its layers have no matrices to compare")
    experts = [rest for rest in names if EXPERT.fullmatch(rest)]
    plain = [rest for rest in names if rest not in experts and not rest.endswith("gate.weight")] or names
    own = [sample_layer(child, layer, plain) for layer in layers]
    theirs = {
        name: [sample_layer(layout, layer, plain) for layer in get_largest_stack(layout)]
        for name, layout in candidates.items()
    }
    matches = [match_layer(number, vector, theirs) for number, vector in enumerate(own) if vector is not None]
    expert_sources = _match_experts(layers, child, experts, candidates)
    ancestry = _classify(
        matches,
        expert_sources,
        {name: len(vectors) for name, vectors in theirs.items()},
        sum(len(one) for one in own if one is not None),
    )
    if ancestry.relation == "same" and not is_identical(child, candidates[next(iter(ancestry.parents))]):
        return replace(ancestry, relation="tuned")
    return ancestry


def get_largest_stack(layout: CheckpointLayout) -> list[dict[str, str]]:
    """Return the layers of a model's largest stack, whatever its name."""
    return max(layout.stacks.values(), key=len, default=[])


def is_identical(one: CheckpointLayout, other: CheckpointLayout) -> bool:
    """Return whether two models have bit-identical tensors; name prefixes before layer numbers may differ."""
    both = [
        {
            **{
                (at, rest): tensor
                for at, layer in enumerate(get_largest_stack(layout))
                for rest, tensor in layer.items()
            },
            **{(-1, tensor.rpartition(".")[0].rpartition(".")[2]): tensor for tensor in layout.loose},
        }
        for layout in (one, other)
    ]
    if both[0].keys() != both[1].keys():
        return False
    for key, tensor in both[0].items():
        mine, theirs = one.places[tensor], other.places[both[1][key]]
        if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
            return False
        for start in range(0, mine.num_elements, PIECE):
            count = min(PIECE, mine.num_elements - start)
            pair = []
            for layout, name, place in ((one, tensor, mine), (other, both[1][key], theirs)):
                octets = bytearray(count * DTYPE_BYTES[place.dtype])
                layout.shards.read(name, start, memoryview(octets))
                pair.append(octets)
            if pair[0] != pair[1]:
                return False
    return True


def sample_layer(layout: CheckpointLayout, layer: Mapping[str, str], names: Sequence[str]) -> Tensor | None:
    """Return sampled values of a layer's matrices in fp64, at positions that depend on their shapes alone; None if a
    matrix is missing or unreadable.
    """
    tensors = [layer.get(rest) for rest in names]
    if not all(
        tensor is not None and layout.places[tensor].dtype in READABLE and layout.places[tensor].num_elements
        for tensor in tensors
    ):
        return None
    return torch.cat([sample_tensor(layout, tensor) for tensor in tensors if tensor is not None])


def sample_tensor(layout: CheckpointLayout, tensor: str) -> Tensor:
    """Sample evenly spread runs of a tensor's values, at an offset derived from its shape."""
    place = layout.places[tensor]
    count = min(RUN, place.num_elements)
    step = max(1, (place.num_elements - count) // RUNS)
    offset = int.from_bytes(hashlib.sha256(repr(place.shape).encode()).digest()[:4], "little")
    starts = sorted({min(place.num_elements - count, at * step + offset % step) for at in range(RUNS)})
    made = torch.empty(len(starts) * count, dtype=getattr(torch, TORCH_DTYPES[place.dtype]))
    octets = memoryview(made.view(torch.uint8).numpy())  # type: ignore[arg-type]
    width = DTYPE_BYTES[place.dtype] * count
    for at, start in enumerate(starts):
        layout.shards.read(tensor, start, octets[at * width : (at + 1) * width])
    return made.double()


def match_layer(number: int, vector: Tensor, candidate_layers: Mapping[str, Sequence[Tensor | None]]) -> LayerMatch:
    """Fit a layer by candidates' layers: of each candidate its most similar layer, if similar enough."""
    length = float(vector.norm())
    near: dict[tuple[str, int], float] = {}
    vectors: dict[tuple[str, int], Tensor] = {}
    for name, layers in candidate_layers.items():
        fit = {
            at: one
            for at, one in enumerate(layers)
            if one is not None and len(one) == len(vector) and bool(torch.isfinite(one).all())
        }
        cosines = {at: float(vector @ one) / max(1e-30, length * float(one.norm())) for at, one in fit.items()}
        at = max(cosines, key=lambda i: (round(cosines[i], 9), i == number), default=-1)
        if at >= 0 and cosines[at] > NEAR:
            near[name, at], vectors[name, at] = cosines[at], fit[at]
    if not near or not length:
        return LayerMatch(number, {}, max(near.values(), default=0.0), 1.0)
    best = max(near, key=lambda one: near[one])
    equal = next((one for one in near if near[one] > SAME and torch.equal(vectors[one], vector)), None)
    if equal is not None:
        return LayerMatch(number, {equal: 1.0}, 1.0, 0.0, is_equal=True)
    shares, left = fit_coefficients(vector, vectors)
    return LayerMatch(number, shares or {best: 1.0}, near[best], left)


def fit_coefficients(
    vector: Tensor, others: Mapping[tuple[str, int], Tensor]
) -> tuple[dict[tuple[str, int], float], float]:
    """Return (coefficients that count, relative residual) of a least-squares fit; candidates with small or
    insignificant coefficients are eliminated one by one.
    """
    chosen = _drop_duplicates(others)
    while chosen:
        columns = torch.stack([others[one] for one in chosen], dim=1)
        gram = columns.T @ columns
        solved = torch.linalg.solve(
            gram + 1e-12 * gram.diagonal().mean() * torch.eye(len(chosen), dtype=gram.dtype), columns.T @ vector
        )
        rest = vector - columns @ solved
        spread = float(rest.square().sum()) / max(1, len(vector) - len(chosen))
        errors = (torch.linalg.pinv(gram).diagonal().clamp(min=0) * spread).sqrt()
        doubt = [
            min(float(abs(share)) / SHARE, float(abs(share) / error.clamp(min=1e-30)) / SURE)
            for share, error in zip(solved, errors, strict=True)
        ]
        worst = min(range(len(doubt)), key=lambda i: doubt[i])
        if doubt[worst] >= 1 or len(chosen) == 1:
            return {one: float(share) for one, share in zip(chosen, solved, strict=True)}, float(
                rest.norm() / vector.norm()
            )
        chosen.pop(worst)
    return {}, 1.0


def _drop_duplicates(others: Mapping[tuple[str, int], Tensor]) -> list[tuple[str, int]]:
    """Keep one of equal candidates: copies cannot be distinguished."""
    kept: list[tuple[str, int]] = []
    for one, vector in others.items():
        if not any(torch.equal(vector, others[other]) for other in kept):
            kept.append(one)
    return kept


def _match_experts(
    layers: Sequence[Mapping[str, str]],
    child: CheckpointLayout,
    names: Sequence[str],
    candidates: Mapping[str, CheckpointLayout],
) -> dict[int, str]:
    """Find the model whose feed-forward layers each expert has, over all layers."""
    found: dict[int, list[str]] = {}
    for number, layer in enumerate(layers if names else ()):
        for rest in names:
            match = EXPERT.fullmatch(rest)
            if match is None or rest not in layer:
                continue
            dense = f"mlp.{DENSE.get(match[2], match[2])}.weight"
            vector = sample_tensor(child, layer[rest])
            near = []
            for name, layout in candidates.items():
                tensor = (
                    get_largest_stack(layout)[number].get(dense) if number < len(get_largest_stack(layout)) else None
                )
                if tensor is not None and layout.places[tensor].shape == child.places[layer[rest]].shape:
                    other = sample_tensor(layout, tensor)
                    near.append((float(vector @ other / (vector.norm() * other.norm()).clamp(min=1e-30)), name))
            if near and max(near)[0] > NEAR:
                found.setdefault(int(match[1]), []).append(max(near)[1])
    return {at: max(set(names_), key=names_.count) for at, names_ in sorted(found.items())}


def _classify(
    layers: Sequence[LayerMatch], experts: Mapping[int, str], depths: Mapping[str, int], num_values_read: int
) -> Ancestry:
    """Classify the relation from all layers together."""
    kin = [layer for layer in layers if layer.coefficients]
    totals: dict[str, float] = {}
    for layer in kin:
        for (name, _), share in layer.coefficients.items():
            totals[name] = totals.get(name, 0.0) + share / len(kin)
    often = {name: sum(any(who == name for who, _ in layer.coefficients) for layer in kin) for name in totals}
    if experts:
        return Ancestry(
            "experts",
            dict.fromkeys([*experts.values(), *(name for name in totals if often[name] > len(kin) / 2)], 1.0),
            layers,
            experts,
            num_values_read,
        )
    if not kin or len(kin) < max(1, len(layers) // 4):
        return Ancestry("unknown", {}, layers, {}, num_values_read)
    moved = any(at != layer.index for layer in kin for _, at in layer.coefficients) or any(
        depths[name] != len(layers) for name in totals
    )
    single = all(len(layer.coefficients) == 1 for layer in kin)
    sources = {name for layer in kin for name, _ in layer.coefficients}
    if single and (moved or len(sources) > 1):
        return Ancestry(
            "layers", {name: often[name] / len(kin) for name in totals if often[name]}, layers, {}, num_values_read
        )
    parents = {name: share for name, share in totals.items() if often[name] * 3 >= len(kin)}
    if all(layer.is_equal for layer in kin) and len(parents) == 1:
        return Ancestry("same", parents, layers, {}, num_values_read)
    return Ancestry("tuned" if len(parents) == 1 else "merged", parents, layers, {}, num_values_read)


def estimate_rank(child: CheckpointLayout, parent: CheckpointLayout) -> tuple[int, float]:
    """Return (rank, share of the squared norm it holds) of the difference in a matrix of the middle layer; (0, 0) if
    it is not of low rank.
    """
    layers = get_largest_stack(child)
    for name in sorted(layers[len(layers) // 2].values(), key=lambda one: child.places[one].num_elements):
        place, other = child.places[name], parent.places.get(name)
        if len(place.shape) != 2 or min(place.shape) < 32 or other is None or other.shape != place.shape:
            continue
        both = []
        for layout in (child, parent):
            made = torch.empty(place.num_elements, dtype=getattr(torch, TORCH_DTYPES[layout.places[name].dtype]))
            layout.shards.read(name, 0, memoryview(made.view(torch.uint8).numpy()))  # type: ignore[arg-type]
            both.append(made.double().view(place.shape))
        change = both[0] - both[1]
        if not float(change.abs().max()):
            continue
        values = (
            torch.linalg.eigvalsh(change @ change.T if change.shape[0] <= change.shape[1] else change.T @ change)
            .flip(0)
            .clamp(min=0)
        )
        sums = values.cumsum(0) / values.sum()
        rank = int((sums < 0.97).sum()) + 1
        return (rank, float(sums[rank - 1])) if rank <= min(place.shape) // 4 else (0, 0.0)
    return 0, 0.0
