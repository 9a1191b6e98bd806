"""Merging beyond mergekit's numbers: blocks and threads change nothing, what is drawn is drawn as it should be,
tokenizers stay honest, bad input is one line.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmworks.cli import main
from llmworks.core.artifact import Artifact, Model
from llmworks.core.context import Context
from llmworks.core.errors import GoldenMismatch, LlmworksError, UserError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.merge.execute import blocks, copies
from llmworks.merge.execute import tensor_group as groups
from llmworks.merge.execute.tensor_group import TensorGroup
from llmworks.merge.methods.dare import MAX_BINARY_DIGITS, DropMask, dare_linear, dare_ties
from llmworks.merge.methods.della import della_linear
from llmworks.merge.methods.ranks import select_ranks
from llmworks.merge.plan.catalogue import METHODS
from llmworks.merge.plan.config import MergeConfig
from llmworks.model.io.load import load_model
from llmworks.model.io.safetensors_io import TORCH_DTYPES
from llmworks.runtime.session import load
from tests.conftest import make_pico
from tests.merge.test_methods_conformance import merged
from tests.oracles.merge_models import save
from tests.oracles.merges import CASES, models, of, vectors, weighted


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("family")
    models(place)
    save(place / "half", "a", kind="BF16")
    save(place / "half-base", "base", kind="BF16")
    save(place / "half-b", "b", kind="BF16")
    return place


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in sorted(path.glob("*.safetensors")) for name, one in load_file(file).items()}


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(
        torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first
    )


BLOCKWISE = [
    "linear, gradients and filters",
    "ties",
    "ties, rescaled",
    "breadcrumbs",
    "task_arithmetic",
    "nearswap",
    "passthrough",
    "linear, bfloat16",
]


@pytest.mark.parametrize("name", BLOCKWISE)
def test_blocks_and_threads_change_nothing(
    name: str, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of 128 to 768 numbers in blocks of 50, on three threads; sums over blocks may differ in their last
    bits.
    """
    merged(CASES[name], family, tmp_path / "whole")
    for module in (blocks, copies, groups):
        monkeypatch.setattr(module, "BLOCK", 50)
    merged(CASES[name], family, tmp_path / "blocks", threads=3)
    if "rescaled" in name:
        first, second = weights(tmp_path / "whole"), weights(tmp_path / "blocks")
        assert all(torch.allclose(first[one], second[one], rtol=1e-5, atol=1e-6) for one in first)
    else:
        assert same(tmp_path / "whole", tmp_path / "blocks")


@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "F64"])
def test_what_is_copied_is_looked_at_as_torch_would(name: str) -> None:
    """All patterns of 16 bits, and of wider numbers those with each upper half."""
    dtype = getattr(torch, TORCH_DTYPES[name])
    numbers = torch.arange(1 << 16, dtype=torch.int32)
    patterns = (
        numbers.to(torch.int16).view(dtype)
        if dtype.itemsize == 2
        else ((numbers.to(torch.int64) << (8 * dtype.itemsize - 16)) + 1)
        .to({4: torch.int32, 8: torch.int64}[dtype.itemsize])
        .view(dtype)
    )
    finite = torch.isfinite(patterns)
    assert 0 < int(finite.sum()) < len(finite)
    for part, expected in ((patterns[finite], True), *((one[None], False) for one in patterns[~finite][::97])):
        assert copies.is_finite(part.clone().view(torch.uint8).numpy(), name) is expected


@pytest.mark.parametrize("method", ["dare_ties", "dare_linear", "della", "della_linear"])
def test_what_is_drawn_is_drawn_again(
    method: str, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On any number of threads, under one seed; otherwise under another."""
    monkeypatch.setattr(groups, "BLOCK", 64)
    monkeypatch.setattr(blocks, "BLOCK", 64)
    given = vectors(method, density=0.5)
    for name, seed, threads in (("one", 0, 1), ("three", 0, 3), ("other", 1, 1)):
        merged(given, family, tmp_path / name, seed=seed, threads=threads)
    assert same(tmp_path / "one", tmp_path / "three")
    assert not same(tmp_path / "one", tmp_path / "other")


def test_slerp_by_blocks(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged(CASES["slerp, far apart"], family, tmp_path / "whole")
    for module in (blocks, copies, groups):
        monkeypatch.setattr(module, "BLOCK", 50)
    merged(CASES["slerp, far apart"], family, tmp_path / "blocks", threads=2)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "blocks")
    assert all(torch.allclose(first[name], second[name], rtol=2e-6, atol=1e-6) for name in first)


def one_group(
    change: torch.Tensor,
    given: dict[str, Any],
    *,
    shape: tuple[int, ...] | None = None,
    shared: dict[str, Any] | None = None,
    seed: int = 0,
) -> TensorGroup:
    """A base of zeros and one model."""
    flat = change.flatten()
    shared = {"normalize": False, "rescale": False, "lambda": 1.0, **(shared or {})}
    return TensorGroup(
        "t",
        shape or tuple(change.shape),
        change.dtype,
        0,
        shared,
        [{}, {"weight": 1.0, **given}],
        lambda first, count: [torch.zeros(count, dtype=flat.dtype), flat[first : first + count]],
        seed,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("upward", [False, True])
@pytest.mark.parametrize("repeated", [False, True])
def test_ranks_are_those_of_a_sort(
    dtype: torch.dtype, upward: bool, repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stable sort; with numbers that stand many times, and zeros."""
    monkeypatch.setattr(groups, "BLOCK", 37)
    generator = torch.Generator().manual_seed(3)
    change = torch.randn(501, generator=generator)
    change = ((change * 4).round() / 4 if repeated else change).to(dtype)
    order = torch.sort(change.float().abs(), descending=not upward, stable=True).indices
    for left_out, kept in ((0, 1), (0, 250), (13, 200), (0, 501), (250, 0), (100, 401)):
        group = one_group(change, {})
        found = select_ranks(group, [(left_out, kept)], ascending=upward)[0]
        assert found is not None
        mask = (
            torch.cat(
                [found.mask(change[start : start + 37], number) for number, start in enumerate(range(0, 501, 37))]
            )
            == -1
        )
        wanted = torch.zeros(501, dtype=torch.bool)
        wanted[order[left_out : left_out + kept]] = True
        assert torch.equal(mask, wanted), (left_out, kept)


def test_what_is_tied_is_counted() -> None:
    """Of five changes of one size two are kept: five are tied, and no others."""
    change = torch.tensor([3.0, -1.0, 1.0, 1.0, -1.0, 1.0, 0.5, 0.0])
    group = one_group(change, {"density": 3 / 8})
    found = select_ranks(group, [(0, 3)])[0]
    assert found is not None
    assert found.mask(change, 0).tolist() == [-1, -1, -1, 0, 0, 0, 0, 0]
    assert group.notes == {"tied": 5}
    group = one_group(torch.tensor([3.0, 0.0, 0.0, -0.0]), {})
    assert select_ranks(group, [(0, 2)])[0] is not None
    assert group.notes == {"tied": 0}  # which of those of no size are kept is the same


@pytest.mark.parametrize("density", [0.3, 0.25, 1 / 128, 0.9, 1 / 4096])
def test_dare_keeps_its_share_and_the_mean(density: float) -> None:
    """A binomial share within five standard deviations; kept changes are larger by what was lost; another seed draws
    others, the same seed the same.
    """
    change = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    kept = {}
    for seed in (0, 1):
        for rescale in (False, True):
            piece = dare_linear(one_group(change, {"density": density}, shared={"rescale": rescale}, seed=seed))
            kept[seed, rescale] = piece([torch.zeros_like(change), change], 0)
    share = float((kept[0, False] != 0).float().mean())
    assert abs(share - density) < 5 * math.sqrt(density * (1 - density) / len(change))
    assert torch.equal(kept[0, False] != 0, kept[0, True] != 0)
    assert not torch.equal(kept[0, False], kept[1, False])
    assert float(kept[0, True].abs().sum()) == pytest.approx(
        float(change.abs().sum()), rel=6 / math.sqrt(density * len(change))
    )
    assert float((kept[0, True] / change)[kept[0, True] != 0].mean()) == pytest.approx(1 / density, rel=1e-5)


@pytest.mark.parametrize("density", [0.5, 0.75, 0.3, 3 / (1 << 15), 0.99999])
@pytest.mark.parametrize("count", [1, 63, 64, 20_001])
def test_places_of_a_density_are_compared_as_numbers_are(density: float, count: int) -> None:
    """The same words as numbers of so many binary places, one by one."""
    group = one_group(torch.ones(count), {})
    share, places = round(density * (1 << MAX_BINARY_DIGITS)), MAX_BINARY_DIGITS
    while places > 1 and share % 2 == 0:
        share, places = share // 2, places - 1
    mask = DropMask(group, 1, density).mask(7, count)
    if share == 1 << places:
        assert mask.tolist() == [-1] * count
        return
    size = -(-count // 64)
    zeros = group.random_words(1, 7, places * size).reshape(
        places, size
    )  # of each place, the lowest first, which numbers have 0 there
    for at in {0, count // 2, count - 1, *range(0, count, 997)}:
        number = sum((1 - (int(zeros[place, at // 64]) >> (at % 64) & 1)) << place for place in range(places))
        assert int(mask[at]) == (-1 if number < share else 0), at


@pytest.mark.parametrize("weights", [(0.6, 0.6), (0.6, 0.3), (0.5, -0.7)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_dare_of_two_is_what_the_paper_says_of_what_was_drawn(
    weights: tuple[float, float], dtype: torch.dtype, elect: bool, normalize: bool
) -> None:
    """By whole numbers and truth values in fp64, of the same draws; within the steps of the number format."""
    generator = torch.Generator().manual_seed(2)
    count, density = 4096, 0.5
    base = torch.randn(count, generator=generator).to(dtype)
    models = [(base.float() + torch.randn(count, generator=generator) / 4).to(dtype) for _ in weights]
    given = [{}, *({"weight": weight, "density": density} for weight in weights)]
    group = TensorGroup(
        "t",
        (count,),
        dtype,
        0,
        {"normalize": normalize, "rescale": True, "lambda": 0.9},
        given,
        lambda first, size: [one[first : first + size] for one in (base, *models)],
    )
    found = (dare_ties if elect else dare_linear)(group)(group.read(0, count), 0).double()
    drawn = torch.stack(
        [
            (one - base).double() * (DropMask(group, at + 1, density).mask(0, count) == -1) * 2
            for at, one in enumerate(models)
        ]
    )
    share = torch.tensor(weights, dtype=torch.float64)[:, None]
    weighted = drawn * share
    agree = (
        torch.sign(weighted) == torch.sign(weighted.sum(0)) if elect else torch.ones_like(weighted, dtype=torch.bool)
    )
    divisor = (share * (agree & (weighted != 0))).sum(0) if elect else share.sum()
    moved = (weighted * agree).sum(0) / (torch.where(divisor.abs() < 1e-8, 1.0, divisor) if normalize else 1.0)
    wanted = base.double() + 0.9 * moved
    step = torch.finfo(dtype).eps
    near = weighted.sum(0).abs() < 4 * step * weighted.abs().amax(0)  # whose sign rounding decides
    gap = (found - wanted).abs() / (
        step * (base.double().abs() + weighted.abs().sum(0) * (5 if normalize else 1) + 1e-3)
    )
    assert int(near.sum()) < 40
    assert float(gap[~near].max()) < 4


@pytest.mark.parametrize("method", ["ties", "dare_ties", "breadcrumbs_ties", "della", "task_arithmetic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("equal", [False, True])
def test_no_election_hides_what_is_no_number(method: str, dtype: torch.dtype, equal: bool) -> None:
    """At any place, also behind the last whole vector of the processor; of either sign, in any input."""
    generator = torch.Generator().manual_seed(2)
    for count in (77, 130):
        models = [torch.randn(count, generator=generator).to(dtype) for _ in range(4)]
        given = [
            {},
            *(
                {"weight": weight, "density": 1.0, "gamma": 0.0, "epsilon": 0.0}
                for weight in ((0.5,) * 3 if equal else (0.5, 0.4, 0.3))
            ),
        ]
        for others in (1, 2, 3):
            for which in range(others + 1):
                for place in (0, 33, 63, 64, count - 2, count - 1):
                    for value in (
                        torch.tensor(sign * size, dtype=dtype)
                        for sign in (1, -1)
                        for size in (float("nan"), float("inf"))
                    ):
                        inputs = [one.clone() for one in models[: others + 1]]
                        inputs[which][place] = value
                        group = TensorGroup(
                            "t",
                            (count,),
                            dtype,
                            0,
                            {"normalize": method == "ties", "rescale": False, "lambda": 1.0},
                            given[: others + 1],
                            lambda first, size, inputs=inputs: [one[first : first + size].clone() for one in inputs],
                        )  # type: ignore[misc]
                        assert not torch.isfinite(
                            METHODS[method].load_function()(group)(group.read(0, count), 0)
                        ).all(), (
                            others,
                            which,
                            place,
                            value,
                        )


def test_della_keeps_large_changes_oftener() -> None:
    """Chances run from density - epsilon for a row's smallest to density + epsilon for its largest (section 3.1)."""
    change = torch.arange(1, 101).float().repeat(4000, 1)
    piece = della_linear(one_group(change, {"density": 0.5, "epsilon": 0.2}))
    often = (piece([torch.zeros(change.numel()), change.flatten()], 0).view(4000, 100) != 0).float().mean(0)
    expected = 0.3 + 0.4 * torch.arange(100) / 99
    assert float((often - expected).abs().max()) < 5 * math.sqrt(0.25 / 4000)


def test_a_killed_merge_goes_on_at_its_file(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are whole are not read or written again; the bytes are those of a merge that was not killed."""
    given = MergeConfig.model_validate(CASES["linear"]).model_copy(update={"max_shard_size": 8000})
    found: dict[str, Artifact] = {name: load(str(family / name)) for name in given.model_names()}
    from llmworks.merge.merge import merge

    def attempt(name: str, scratch: str) -> Model:
        for folder in (tmp_path / name, tmp_path / scratch):
            folder.mkdir(exist_ok=True)
        made: Any = merge(
            given,
            found,
            Context(tmp_path / name, tmp_path / scratch, 0, Progress(quiet=True), ReportBuilder(), lambda _: None),
        )  # type: ignore[arg-type, return-value]
        assert isinstance(made, Model)
        return made

    attempt("straight", "s1")
    whole, count = blocks.BlockComputer.compute_block, 0

    def dies(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count > 12:
            raise KeyboardInterrupt
        return whole(self, *args)

    monkeypatch.setattr(blocks.BlockComputer, "compute_block", dies)
    with pytest.raises(KeyboardInterrupt):
        attempt("killed", "s2")
    kept = sorted((tmp_path / "s2" / "shards").glob("*.safetensors"))
    assert 0 < len(kept) < 4
    stamp = [file.stat().st_mtime_ns for file in kept]
    monkeypatch.setattr(blocks.BlockComputer, "compute_block", whole)
    attempt("killed", "s2")
    assert [(tmp_path / "killed" / file.name).stat().st_mtime_ns for file in kept] == stamp
    straight, again = (sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("straight", "killed"))
    assert straight == again
    assert all(
        (tmp_path / "straight" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes() for name in straight
    )
    load_model(tmp_path / "straight")


def broken(
    source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None, **config: Any
) -> Path:
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps({**json.loads((out / "config.json").read_text()), **config}))
    return out


Q = "model.layers.0.self_attn.q_proj.weight"
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": (
        {"merge_method": "tise", "base_model": "base", "models": of("a", weight=1)},
        "did you mean 'ties'",
    ),
    "no base": ({"merge_method": "ties", "models": of("a", weight=1)}, "requires a base_model"),
    "no weight": (
        {"merge_method": "linear", "models": of("a")},
        "the parameter weight is missing for model.embed_tokens.weight",
    ),
    "a word for a weight": (
        {"merge_method": "linear", "models": of("a", weight="much")},
        "weight is 'much', it must be a number",
    ),
    "three to slerp": (
        {"merge_method": "slerp", "base_model": "base", "models": of("a", "b"), "parameters": {"t": 0.5}},
        "takes 2 models, but 3 are given",
    ),
    "one to model_stock": (
        {"merge_method": "model_stock", "base_model": "base", "models": of("a")},
        "takes at least 3 models",
    ),
    "weights of zero": ({"merge_method": "linear", "models": weighted(("a", 1), ("b", -1))}, "sum to zero"),
    "all weights zero": (
        {"merge_method": "ties", "base_model": "base", "models": of("a", "b", weight=0)},
        "all weights are zero",
    ),
    "opposites": ({"merge_method": "multislerp", "models": weighted(("a", 1), ("b", -1))}, "sum to zero"),
    "too many layers": (
        {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [2, 6]}]}]},
        "the model has 4 layers",
    ),
    "base not in the slice": (
        {
            "merge_method": "slerp",
            "base_model": "base",
            "slices": [{"sources": [{"model": "a", "layer_range": [0, 4]}, {"model": "b", "layer_range": [0, 4]}]}],
            "parameters": {"t": 0.5},
        },
        "base_model base is not among the sources",
    ),
    "the same twice": ({"merge_method": "linear", "models": weighted(("a", 1), ("a", 1))}, "the model a occurs twice"),
    "strange module": (
        {"merge_method": "linear", "modules": {"x": {"models": of("a", weight=1)}, "y": {"models": of("a", weight=1)}}},
        "modules: 'x'; a has the stacks of layers model.layers",
    ),
    "NaN": (
        {"merge_method": "linear", "models": of("a", "nan", weight=1)},
        f"nan: {Q} holds NaN or infinite values",
    ),
    "NaN that would be copied": (
        {"merge_method": "passthrough", "models": of("nan")},
        f"nan: {Q} holds NaN or infinite values",
    ),
    "missing tensor": (
        {"merge_method": "linear", "models": of("a", "less", weight=1)},
        "less: has no tensor model.layers.0.self_attn.q_proj.weight, which other models have",
    ),
    "missing layer": (
        {"merge_method": "linear", "models": of("a", "gap", weight=1)},
        "gap: has 3 layers model.layers.N, numbered up to 3",
    ),
    "shapes": (
        {"merge_method": "linear", "models": of("a", "wide", weight=1)},
        "its shapes differ: a [16, 16], wide [8, 16]",
    ),
    "another architecture": (
        {"merge_method": "linear", "models": of("a", "gpt", weight=1)},
        "a is a LlamaForCausalLM, gpt is a GPT2LMHeadModel",
    ),
    "truncated": ({"merge_method": "linear", "models": of("a", "cut", weight=1)}, "truncated"),
    "too large for float16": (
        {
            "merge_method": "linear",
            "models": of("a", weight=1e6),
            "parameters": {"normalize": False},
            "out_dtype": "float16",
        },
        "float16 cannot represent",
    ),
    "vocabularies": (
        {"merge_method": "linear", "models": of("few", "swapped", weight=1)},
        "the token 'A' is 34 in few and 35 in swapped",
    ),
    "sizes of vocabularies": (
        {"merge_method": "linear", "models": of("few", "more", weight=1)},
        "Set tokenizer_source",
    ),
    "no tokenizer": (
        {"merge_method": "linear", "models": of("a", "few", weight=1), "tokenizer_source": "union"},
        "a: has no tokenizer.json",
    ),
    "unknown token": (
        {
            "merge_method": "linear",
            "models": of("few", weight=1),
            "tokenizer": {"source": "base", "tokens": {"<q>": {"source": "few"}}},
        },
        "few has no token '<q>'",
    ),
    "a template's tokens": (
        {"merge_method": "linear", "models": of("few", weight=1), "chat_template": "chatml"},
        "chatml uses <|im_start|>, which is not a token of few",
    ),
    "no template": (
        {"merge_method": "linear", "models": of("few", weight=1), "chat_template": "chatl"},
        "neither auto, nor a known name",
    ),
    "quantized": ({"merge_method": "linear", "models": of("a", "small", weight=1)}, "small: is quantized"),
}


@pytest.fixture(scope="module")
def faulty(family: Path) -> Path:
    broken(family / "a", family / "nan", lambda t: t[Q].view(-1)[3:4].fill_(float("nan")))
    broken(family / "a", family / "less", lambda t: t.pop(Q))
    broken(family / "a", family / "gap", lambda t: [t.pop(name) for name in list(t) if ".layers.2." in name])
    broken(family / "a", family / "wide", lambda t: t.update({Q: t[Q][:8].contiguous()}))
    broken(family / "a", family / "gpt", architectures=["GPT2LMHeadModel"])
    broken(family / "a", family / "small", quantization_config={"quant_method": "gptq"})
    shutil.copytree(family / "a", family / "cut")
    (family / "cut" / "model.safetensors").write_bytes((family / "a" / "model.safetensors").read_bytes()[:-100])
    shutil.copytree(family / "few", family / "swapped")
    text = (family / "few" / "tokenizer.json").read_text()
    (family / "swapped" / "tokenizer.json").write_text(
        text.replace('"A": 34', '"A": 0.5').replace('"B": 35', '"B": 34').replace('"A": 0.5', '"A": 35')
    )
    return family


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, faulty: Path, tmp_path: Path) -> None:
    given, said = BAD[name]
    with pytest.raises(LlmworksError) as error:
        merged(given, faulty, tmp_path / "out")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "a key of no meaning": ({"residual_weight": 1}, "residual_weight"),
    "in a slice": (
        {"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [0, 2], "wait": 1}]}]},
        "wait",
    ),
    "no models": ({"models": None}, "give exactly one of models, slices and modules"),
    "both": ({"slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}]}, "give exactly one of"),
    "lengths": (
        {
            "models": None,
            "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 3]}]}],
        },
        "2 and 3 layers",
    ),
    "no layer": (
        {"models": None, "slices": [{"sources": [{"model": "a", "layer_range": [2, 2]}]}]},
        "contains no layer",
    ),
    "a number format": ({"dtype": "int8"}, "'int8' is not a supported dtype"),
    "override": ({"models": [{"model": {"model": "a", "override_architecture": "x"}}]}, "model"),
    "two tokenizers": ({"tokenizer_source": "base", "tokenizer": {"source": "union"}}, "not both"),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_without_a_meaning_are_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    more, said = KEYS[name]
    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump({"merge_method": "linear", "models": of("a", weight=1), **more}))
    assert main(["merge", str(file), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.strip().splitlines()) == 1


def test_the_tokenizer_is_looked_at(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A planted end token and a planted vocabulary are caught where the result is written; an end that one parent has
    and the result has not is told.
    """
    from llmworks.merge.merge import merge
    from llmworks.merge.vocabulary import vocabulary

    pico, other = make_pico(tmp_path / "pico"), make_pico(tmp_path / "other")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5]}))
    config = MergeConfig.model_validate({"merge_method": "linear", "models": of("pico", "other", weight=1)})
    found = {"pico": load(str(pico)), "other": load(str(other))}

    def attempt(name: str) -> Model:
        for folder in (tmp_path / name, tmp_path / f"{name}-scratch"):
            folder.mkdir()
        made: Any = merge(
            config,
            found,
            Context(tmp_path / name, tmp_path / f"{name}-scratch", 0, Progress(), ReportBuilder(), lambda _: None),
        )  # type: ignore[arg-type, return-value]
        assert isinstance(made, Model)
        return made

    made = attempt("out")
    assert made.golden is not None
    assert made.golden.conversations[0].top_logits
    assert "other ends its replies with" in capsys.readouterr().err
    copied = vocabulary.copy_tokenizer

    def planted(change: Callable[[dict[str, Any]], Any], file: str) -> Callable[[Path, Path], None]:
        def copy(source: Path, out: Path) -> None:
            copied(source, out)
            if (out / file).exists() or file == "generation_config.json":
                values = json.loads((out / file).read_text()) if (out / file).exists() else {}
                change(values)
                (out / file).write_text(json.dumps(values))

        return copy

    from llmworks.merge.vocabulary import tokenizer_files as texts

    monkeypatch.setattr(
        texts, "copy_tokenizer", planted(lambda values: values.update(eos_token_id=7), "generation_config.json")
    )
    with pytest.raises(GoldenMismatch, match="stop ids"):
        attempt("eos")

    def swap(values: dict[str, Any]) -> None:
        vocab = values["model"]["vocab"]
        one, two = next((a, b) for a, b in zip(list(vocab)[20:], list(vocab)[21:], strict=False))
        for left, right in (("a", "e"), (one, two)):
            if left in vocab and right in vocab:
                vocab[left], vocab[right] = vocab[right], vocab[left]

    monkeypatch.setattr(texts, "copy_tokenizer", planted(swap, "tokenizer.json"))
    with pytest.raises(GoldenMismatch, match="token"):
        attempt("vocabulary")


def test_a_file_of_several_merges(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Later merges use earlier ones by name, in any order in the file; a circle is one line; --plan reads headers
    only.
    """
    monkeypatch.chdir(family)
    first = (
        "name: mean\nmerge_method: linear\nmodels:\n  - {model: a, parameters: {weight: 1}}\n  - {model: b, parameters:"
        " {weight: 1}}\n"
    )
    last = (
        "merge_method: ties\nbase_model: base\nmodels:\n  - {model: mean, parameters: {weight: 1.0, density: 0.5}}\n  -"
        " {model: {path: c}, parameters: {weight: 0.5}}\nparameters:\n"
    )
    file = tmp_path / "two.yml"
    file.write_text(f"{last}---\n{first}")
    assert (
        main(
            [
                "merge",
                str(file),
                "--out",
                str(tmp_path / "out"),
                "--workspace",
                str(tmp_path / "ws"),
                "--quiet",
                "--set",
                "dtype=bfloat16",
            ]
        )
        == 0
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [parent["name"] for parent in manifest["parents"]] == ["base", "mean", "c"]
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out"), "--workspace", str(tmp_path / "ws")]) == 0
    assert "derived again" in capsys.readouterr().out
    circle = last.replace("ties", "linear").replace("base_model: base", "name: x")
    file.write_text(f"{circle}---\n{first.replace('model: b', 'model: x')}")
    assert main(["merge", str(file), "--out", str(tmp_path / "circle"), "--workspace", str(tmp_path / "ws")]) == 2
    assert "in a cycle: x uses mean uses x" in capsys.readouterr().err
    file.write_text(first.replace("name: mean\n", ""))
    assert main(["merge", str(file), "--plan", "--json", "--workspace", str(tmp_path / "ws")]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tensors"] == 39
    assert plan["read_bytes"] == 2 * plan["written_bytes"]


def test_a_slice_takes_what_its_config_says_of_layers(family: Path, tmp_path: Path) -> None:
    path = broken(family / "a", tmp_path / "typed", layer_types=["full", "sliding", "full", "wide"])
    config = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "typed", "layer_range": [1, 3]}]},
            {"sources": [{"model": "typed", "layer_range": [3, 4]}]},
            {"sources": [{"model": "typed", "layer_range": [1, 2]}]},
        ],
    }
    merged(config, path.parent, tmp_path / "out")
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (made["num_hidden_layers"], made["layer_types"]) == (4, ["sliding", "full", "wide", "sliding"])
    found = weights(tmp_path / "out")
    assert torch.equal(found["model.layers.3.mlp.up_proj.weight"], weights(path)["model.layers.1.mlp.up_proj.weight"])


def test_half_precision_is_computed_as_it_is_stored(family: Path, tmp_path: Path) -> None:
    """Models in bfloat16 merge to bfloat16; with fp32 among them in fp32."""
    merged({"merge_method": "linear", "models": of("half", "half-b", weight=1)}, family, tmp_path / "half")
    assert weights(tmp_path / "half")[Q].dtype == torch.bfloat16
    merged({"merge_method": "linear", "models": of("half", "b", weight=1)}, family, tmp_path / "both")
    assert weights(tmp_path / "both")[Q].dtype == torch.float32


def test_a_merge_runs(family: Path, tmp_path: Path) -> None:
    """In transformers, tied heads that were untied included: what it computes is the mean of the weights."""
    merged(CASES["heads in one of two"], family, tmp_path / "out")
    made = load_model(tmp_path / "out")
    tensors = [weights(family / name) for name in ("a", "tied")]
    head = (tensors[0]["lm_head.weight"] + tensors[1]["model.embed_tokens.weight"]) / 2
    assert torch.allclose(made.lm_head.weight, head)
    assert not torch.equal(made.lm_head.weight, made.model.embed_tokens.weight)


def test_vectors_without_models_are_the_base(family: Path, tmp_path: Path) -> None:
    given = vectors("task_arithmetic")
    merged({**given, "models": weighted(("a", 0.0))}, family, tmp_path / "out")
    assert same(tmp_path / "out", family / "base")


def test_a_model_that_is_not_named_is_refused(family: Path, tmp_path: Path) -> None:
    from llmworks.merge.merge import merge

    config = MergeConfig.model_validate(CASES["linear"])
    found: dict[str, Any] = {name: load(str(family / name)) for name in ("a", "b", "c", "far")}
    context = Context(tmp_path, tmp_path, 0, Progress(quiet=True), ReportBuilder(), lambda _: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(UserError, match="the model 'far' is given"):
        merge(config, found, context)
    found.pop("far")
    found.pop("a")
    with pytest.raises(UserError, match="the model 'a' is not given; given: b, c"):
        merge(config, found, context)
