"""Which models a model was made of, told by its weights: how near its layers are to theirs, and by which shares of them
they can be had.

Reads some thousands of numbers of each tensor.

Layers of models that were not trained from one another are as good as orthogonal; a tuned layer is nearly its parent's,
a merged one a sum of its parents', so that a least-squares fit of a layer by the same layer of all near candidates has
their weights as its solution (task vectors: Ilharco et al. 2023, arXiv:2212.04089). What is near, and what a share has
to be, stands below. Direction cannot be seen: candidates are asked about.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llmworks.core.errors import ModelError
from llmworks.merge.plan.layout import Layout
from llmworks.model.io.safetensors_io import BYTES, FLOATS, TORCH

RUNS, RUN = 24, 128  # of each tensor so many runs of so many numbers are read
PIECE = 1 << 20  # numbers that are compared at once
READABLE = (*FLOATS, "F8_E4M3", "F8_E5M2")
NEAR = 0.3  # cosine of a layer with a candidate's, above which they are kin; of strangers it is a few hundredths
SAME = 0.99999999  # and as good as one, where all that was read is equal
SHARE = 0.04  # of a candidate in a fit, below which it counts as none
SURE = 8.0  # how many standard errors a share has to be away from 0
EXPERT = re.compile(r"(?:block_sparse_moe|mlp)\.experts\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
DENSE = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True)
class Layer:
    """A layer of the child: shares of candidates' layers by (model, number), how near the nearest one is, what no share
    explains, as a part of the layer, and whether all that was read is equal to the nearest's.
    """

    number: int
    shares: Mapping[tuple[str, int], float]
    cosine: float
    left: float
    equal: bool = False


@dataclass(frozen=True)
class Kinship:
    """What was found.

    `relation`: same, tuned, merged, layers, experts, or unknown; `parents`: shares on average over layers; `experts`:
    by expert, whose layers it has.
    """

    relation: str
    parents: Mapping[str, float]
    layers: Sequence[Layer]
    experts: Mapping[int, str] = field(default_factory=dict)
    numbers: int = 0

    @property
    def said(self) -> str:
        """In a sentence."""
        names = ", ".join(f"{name} ({share:.2f})" for name, share in self.parents.items())
        equal = sum(layer.equal for layer in self.layers)
        left = sum(layer.left for layer in self.layers) / len(self.layers) if self.layers else 1.0
        return {
            "same": f"has the weights of {', '.join(self.parents)}",
            "tuned": f"was tuned from {', '.join(self.parents)}, or that from it: {left:.1%} of its weights is its own",
            "merged": f"is a merge of {names}; {left:.1%} of its weights is in none of them",
            "layers": (
                f"has layers of {', '.join(self.parents)}; {equal} of {len(self.layers)} are theirs to the last bit"
                + ("" if equal else ", as after another number format")
            ),
            "experts": (
                f"is a mixture whose experts are {', '.join(f'{at} {name}' for at, name in self.experts.items())}"
            ),
            "unknown": "is kin of none of them",
        }[self.relation]


def kinship(child: Layout, candidates: Mapping[str, Layout]) -> Kinship:
    """Which of the candidates a model was made of."""
    layers = deepest(child)
    if not layers:
        return Kinship("unknown", {}, [])
    names = [
        rest
        for rest, tensor in layers[0].items()
        if len(child.places[tensor].shape) == 2 and child.places[tensor].count
    ]
    unreadable = next((rest for rest in names if child.places[layers[0][rest]].dtype not in READABLE), None)
    if unreadable is not None:
        tensor = layers[0][unreadable]
        raise ModelError(f"{child.name}: {tensor} is in {child.places[tensor].dtype}, which cannot be compared")
    if not names:
        raise ModelError(f"{child.name}: its layers have no matrices, which cannot be compared")
    experts = [rest for rest in names if EXPERT.fullmatch(rest)]
    plain = [rest for rest in names if rest not in experts and not rest.endswith("gate.weight")] or names
    own = [read(child, layer, plain) for layer in layers]
    theirs = {name: [read(layout, layer, plain) for layer in deepest(layout)] for name, layout in candidates.items()}
    found = [explained(number, vector, theirs) for number, vector in enumerate(own) if vector is not None]
    mixed = _experts(layers, child, experts, candidates)
    made = _judged(
        found,
        mixed,
        {name: len(vectors) for name, vectors in theirs.items()},
        sum(len(one) for one in own if one is not None),
    )
    if made.relation == "same" and not identical(child, candidates[next(iter(made.parents))]):
        return replace(made, relation="tuned")
    return made


def deepest(layout: Layout) -> list[dict[str, str]]:
    """The layers of a model's largest stack, whatever it is called."""
    return max(layout.stacks.values(), key=len, default=[])


def identical(one: Layout, other: Layout) -> bool:
    """Whether two models have the same tensors, to the last byte; names before layers' numbers may differ."""
    both = [
        {
            **{(at, rest): tensor for at, layer in enumerate(deepest(layout)) for rest, tensor in layer.items()},
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
        for start in range(0, mine.count, PIECE):
            count = min(PIECE, mine.count - start)
            pair = []
            for layout, name, place in ((one, tensor, mine), (other, both[1][key], theirs)):
                octets = bytearray(count * BYTES[place.dtype])
                layout.shards.read(name, start, memoryview(octets))
                pair.append(octets)
            if pair[0] != pair[1]:
                return False
    return True


def read(layout: Layout, layer: Mapping[str, str], names: Sequence[str]) -> Tensor | None:
    """Numbers of a layer's matrices, fp64, at places that depend on their shapes alone; None where a matrix is missing,
    or cannot be read.
    """
    tensors = [layer.get(rest) for rest in names]
    if not all(
        tensor is not None and layout.places[tensor].dtype in READABLE and layout.places[tensor].count
        for tensor in tensors
    ):
        return None
    return torch.cat([sample(layout, tensor) for tensor in tensors if tensor is not None])


def sample(layout: Layout, tensor: str) -> Tensor:
    """Some runs of a tensor's numbers, evenly spread, each begun at a place by chance that its shape decides."""
    place = layout.places[tensor]
    count = min(RUN, place.count)
    step = max(1, (place.count - count) // RUNS)
    drawn = int.from_bytes(hashlib.sha256(repr(place.shape).encode()).digest()[:4], "little")
    starts = sorted({min(place.count - count, at * step + drawn % step) for at in range(RUNS)})
    made = torch.empty(len(starts) * count, dtype=getattr(torch, TORCH[place.dtype]))
    octets = memoryview(made.view(torch.uint8).numpy())  # type: ignore[arg-type]
    width = BYTES[place.dtype] * count
    for at, start in enumerate(starts):
        layout.shards.read(tensor, start, octets[at * width : (at + 1) * width])
    return made.double()


def explained(number: int, vector: Tensor, theirs: Mapping[str, Sequence[Tensor | None]]) -> Layer:
    """A layer by shares of candidates' layers: of each candidate the layer that is nearest, where it is near at all."""
    length = float(vector.norm())
    near: dict[tuple[str, int], float] = {}
    vectors: dict[tuple[str, int], Tensor] = {}
    for name, layers in theirs.items():
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
        return Layer(number, {}, max(near.values(), default=0.0), 1.0)
    best = max(near, key=lambda one: near[one])
    equal = next((one for one in near if near[one] > SAME and torch.equal(vectors[one], vector)), None)
    if equal is not None:
        return Layer(number, {equal: 1.0}, 1.0, 0.0, equal=True)
    shares, left = shares_of(vector, vectors)
    return Layer(number, shares or {best: 1.0}, near[best], left)


def shares_of(vector: Tensor, others: Mapping[tuple[str, int], Tensor]) -> tuple[dict[tuple[str, int], float], float]:
    """(shares of those that count, what is left as a part of the vector), by least squares; those whose share is small,
    or not sure, are left out one after the other.
    """
    chosen = _distinct(others)
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


def _distinct(others: Mapping[tuple[str, int], Tensor]) -> list[tuple[str, int]]:
    """One of those that are equal: copies cannot be told apart."""
    kept: list[tuple[str, int]] = []
    for one, vector in others.items():
        if not any(torch.equal(vector, others[other]) for other in kept):
            kept.append(one)
    return kept


def _experts(
    layers: Sequence[Mapping[str, str]], child: Layout, names: Sequence[str], candidates: Mapping[str, Layout]
) -> dict[int, str]:
    """Whose feed-forward layers each expert has, by all layers."""
    found: dict[int, list[str]] = {}
    for number, layer in enumerate(layers if names else ()):
        for rest in names:
            match = EXPERT.fullmatch(rest)
            if match is None or rest not in layer:
                continue
            dense = f"mlp.{DENSE.get(match[2], match[2])}.weight"
            vector = sample(child, layer[rest])
            near = []
            for name, layout in candidates.items():
                tensor = deepest(layout)[number].get(dense) if number < len(deepest(layout)) else None
                if tensor is not None and layout.places[tensor].shape == child.places[layer[rest]].shape:
                    other = sample(layout, tensor)
                    near.append((float(vector @ other / (vector.norm() * other.norm()).clamp(min=1e-30)), name))
            if near and max(near)[0] > NEAR:
                found.setdefault(int(match[1]), []).append(max(near)[1])
    return {at: max(set(names_), key=names_.count) for at, names_ in sorted(found.items())}


def _judged(layers: Sequence[Layer], experts: Mapping[int, str], depths: Mapping[str, int], numbers: int) -> Kinship:
    """What layers, taken together, say."""
    kin = [layer for layer in layers if layer.shares]
    totals: dict[str, float] = {}
    for layer in kin:
        for (name, _), share in layer.shares.items():
            totals[name] = totals.get(name, 0.0) + share / len(kin)
    often = {name: sum(any(who == name for who, _ in layer.shares) for layer in kin) for name in totals}
    if experts:
        return Kinship(
            "experts",
            dict.fromkeys([*experts.values(), *(name for name in totals if often[name] > len(kin) / 2)], 1.0),
            layers,
            experts,
            numbers,
        )
    if not kin or len(kin) < max(1, len(layers) // 4):
        return Kinship("unknown", {}, layers, {}, numbers)
    moved = any(at != layer.number for layer in kin for _, at in layer.shares) or any(
        depths[name] != len(layers) for name in totals
    )
    single = all(len(layer.shares) == 1 for layer in kin)
    sources = {name for layer in kin for name, _ in layer.shares}
    if single and (moved or len(sources) > 1):
        return Kinship("layers", {name: often[name] / len(kin) for name in totals if often[name]}, layers, {}, numbers)
    parents = {name: share for name, share in totals.items() if often[name] * 3 >= len(kin)}
    if all(layer.equal for layer in kin) and len(parents) == 1:
        return Kinship("same", parents, layers, {}, numbers)
    return Kinship("tuned" if len(parents) == 1 else "merged", parents, layers, {}, numbers)


def rank_of(child: Layout, parent: Layout) -> tuple[int, float]:
    """(rank, share of the sum of squares that it holds) of the difference in a matrix of the middle layer; (0, 0) where
    it is of no low rank.
    """
    layers = deepest(child)
    for name in sorted(layers[len(layers) // 2].values(), key=lambda one: child.places[one].count):
        place, other = child.places[name], parent.places.get(name)
        if len(place.shape) != 2 or min(place.shape) < 32 or other is None or other.shape != place.shape:
            continue
        both = []
        for layout in (child, parent):
            made = torch.empty(place.count, dtype=getattr(torch, TORCH[layout.places[name].dtype]))
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
