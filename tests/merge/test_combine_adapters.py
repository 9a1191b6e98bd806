"""Adapters merged and extracted: against peft's own merging, and against the models that they are of."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llmworks.core.artifact import Adapter, Artifact
from llmworks.core.context import Context
from llmworks.core.errors import LlmworksError, ModelError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.merge.adapter import MergeAdapterConfig
from llmworks.merge.adapter import adapter as fold
from llmworks.merge.lora.config import CombineAdaptersConfig, ExtractConfig
from llmworks.merge.lora.extract_lora import extract_adapter
from llmworks.merge.lora.low_rank import low_rank_factors
from llmworks.merge.lora.merge_lora import combine_adapters
from llmworks.model.io.load import load_model
from llmworks.model.lora.merge_adapter import make_weight_lookup, merge_adapter_into
from llmworks.runtime.session import load
from tests.conftest import make_pico

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, two adapters of rank 4, one of rank 2 with another alpha and fewer layers."""
    place = tmp_path_factory.mktemp("adapters")
    make_pico(place / "pico")
    for seed, name in enumerate(("a", "b", "narrow")):
        torch.manual_seed(seed)
        given: dict[str, Any] = (
            {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
            if name == "narrow"
            else {"r": 4, "lora_alpha": 8 if name == "a" else 3, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        )
        tuned = get_peft_model(
            AutoModelForCausalLM.from_pretrained(place / "pico", dtype=torch.float32),
            LoraConfig(task_type="CAUSAL_LM", **given),
        )
        for key, weight in tuned.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weight, std=0.05)
        tuned.save_pretrained(place / name)
    return place


def context(out: Path) -> Context:
    for folder in (out, out.parent / f"{out.name}-scratch"):
        folder.mkdir(parents=True)
    return Context(out, out.parent / f"{out.name}-scratch", 0, Progress(quiet=True), ReportBuilder(), lambda _: None)  # type: ignore[arg-type, return-value]


def together(names: list[str], family: Path, out: Path, **given: Any) -> Adapter:
    found: dict[str, Artifact] = {name: load(str(family / name)) for name in names}
    model: Any = load(str(family / "pico"))
    return combine_adapters(CombineAdaptersConfig.model_validate(given), found, model, context(out))  # type: ignore[arg-type]


def folded(family: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight."""
    model = AutoModelForCausalLM.from_pretrained(family / "pico", dtype=torch.float32)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    merge_adapter_into(make_weight_lookup(model), adapter)
    return {name: one - before[name] for name, one in model.state_dict().items() if not torch.equal(one, before[name])}


@pytest.mark.parametrize(
    ("method", "first"), [("linear", 0.7), ("linear", -0.4), ("cat", 0.7), ("cat", -0.4), ("svd", 0.7)]
)
def test_the_same_as_peft(method: str, first: float, family: Path, tmp_path: Path) -> None:
    """`add_weighted_adapter` of peft; of two adapters with different alphas, and ranks where those may differ; one
    weight below zero.
    """
    names = ["a", "b"] if method == "linear" else ["a", "narrow"]
    both = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(family / "pico", dtype=torch.float32),
        family / names[0],
        adapter_name=names[0],
    )
    both.load_adapter(family / names[1], adapter_name=names[1])
    both.add_weighted_adapter(
        names, [first, 1.3], "both", combination_type=method, **({"svd_rank": 3} if method == "svd" else {})
    )
    both.set_adapter("both")
    made = together(
        names,
        family,
        tmp_path / "out",
        combination_type=method,
        weights={names[0]: first, names[1]: 1.3},
        svd_rank=3 if method == "svd" else 0,
    )
    model = load_model(family / "pico")
    ours = AutoModelForCausalLM.from_pretrained(family / "pico", dtype=torch.float32)
    merge_adapter_into(make_weight_lookup(ours), made.path)
    with torch.no_grad():
        theirs, mine, plain = both(input_ids=IDS).logits, ours(input_ids=IDS).logits, model(input_ids=IDS).logits
    assert torch.allclose(mine, theirs, atol=2e-4)
    assert not torch.allclose(mine, plain, atol=1e-2)


def test_peft_reads_it(family: Path, tmp_path: Path) -> None:
    """Layers of different ranks, by rank_pattern and alpha_pattern."""
    made = together(["a", "narrow"], family, tmp_path / "out", combination_type="cat")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(family / "pico", dtype=torch.float32), made.path
    )
    ours = AutoModelForCausalLM.from_pretrained(family / "pico", dtype=torch.float32)
    merge_adapter_into(make_weight_lookup(ours), made.path)
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=IDS).logits, ours(input_ids=IDS).logits, atol=2e-4)
    sums = {name: folded(family, family / name) for name in ("a", "narrow")}
    for name, change in folded(family, made.path).items():
        assert torch.allclose(change, sum(one.get(name, torch.zeros(())) for one in sums.values()), atol=1e-5)
    assert made.golden is not None


def test_methods_on_products_are_those_of_models(family: Path, tmp_path: Path) -> None:
    """TIES of two adapters, of full rank, is what `merge` makes of the two folded models' changes."""
    made = together(
        ["a", "b"], family, tmp_path / "out", combination_type="ties", density=0.5, normalize=True, svd_rank=500
    )
    changes = [folded(family, family / name) for name in ("a", "b")]
    name = next(one for one in changes[0] if "down_proj" in one)
    kept = []
    for change in (one[name].flatten() for one in changes):
        order = change.abs().argsort(descending=True)[: len(change) // 2]
        kept.append(torch.zeros_like(change).index_copy(0, order, change[order]))
    stacked = torch.stack(kept)
    sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agree = stacked.sign() == sign
    wanted = (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)
    assert torch.allclose(folded(family, made.path)[name].flatten(), wanted, atol=2e-5)
    assert made.metrics["relative_error"] < 1e-3
    few = together(["a", "b"], family, tmp_path / "few", combination_type="ties", density=0.5, svd_rank=3)
    assert few.metrics["relative_error"] > 0.05


def test_factors_are_the_nearest() -> None:
    """By torch's own singular value decomposition, wide and tall; as few ranks as keep a share."""
    torch.manual_seed(0)
    for shape in ((24, 60), (60, 24)):
        change = torch.randn(shape) @ torch.diag(0.7 ** torch.arange(shape[1]).float())
        u, s, v = torch.linalg.svd(change)
        a, b, missed = low_rank_factors(change, 5)
        assert torch.allclose(b @ a, (u[:, :5] * s[:5]) @ v[:5], atol=1e-4)
        assert missed == pytest.approx(float(s[5:].square().sum() / s.square().sum()) ** 0.5, rel=1e-3)
        few, _, miss = low_rank_factors(change, 24, min_energy=0.9)
        sums = s.square().cumsum(0) / s.square().sum()
        assert len(few) == int((sums < 0.9).sum()) + 1
        assert miss**2 <= 0.1
    a, b, missed = low_rank_factors(torch.zeros(3, 4), 2)
    assert (float((b @ a).abs().max()), missed) == (0.0, 0.0)


def test_what_was_folded_is_extracted(family: Path, tmp_path: Path) -> None:
    """An adapter folded into its model comes back out: nothing is missed at its rank, half of it at half."""
    model = load_model(family / "pico")
    tuned = AutoModelForCausalLM.from_pretrained(family / "pico", dtype=torch.float32)
    merge_adapter_into(make_weight_lookup(tuned), family / "a")
    make_pico(tmp_path / "tuned")
    tuned.save_pretrained(tmp_path / "tuned")
    base, other = (load(str(path)) for path in (family / "pico", tmp_path / "tuned"))
    made = extract_adapter(ExtractConfig(max_rank=4), other, base, context(tmp_path / "out"))  # type: ignore[arg-type]
    assert made.metrics["relative_error"] < 1e-4
    assert made.metrics["skipped_tensors"] == 0
    again = copy.deepcopy(model)
    merge_adapter_into(make_weight_lookup(again), made.path)
    with torch.no_grad():
        assert torch.allclose(again(input_ids=IDS).logits, tuned(input_ids=IDS).logits, atol=1e-4)
    half = extract_adapter(ExtractConfig(max_rank=2), other, base, context(tmp_path / "half"))  # type: ignore[arg-type]
    assert 0.1 < half.metrics["relative_error"] < 0.9
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    third = extract_adapter(
        ExtractConfig(max_rank=4, exclude_modules=["v_proj"]),
        load(str(tmp_path / "tuned")),
        base,
        context(tmp_path / "third"),
    )  # type: ignore[arg-type]
    assert third.metrics["skipped_tensors"] >= 2
    assert third.metrics["relative_error"] > 0.1  # of all that differs, what is skipped among it
    assert not any("v_proj" in name for name in load_file(third.path / "adapter_model.safetensors"))


def test_bad_input_is_one_line(family: Path, tmp_path: Path) -> None:
    for number, (names, given, said) in enumerate(
        (
            (["a"], {}, "only one adapter given"),
            (["a", "b"], {"weights": {"c": 1}}, "unknown adapter 'c'"),
            (["a", "narrow"], {"combination_type": "linear"}, "factors of different ranks cannot be averaged"),
            (["a", "b"], {"normalize": True, "weights": {"a": 1, "b": -1}}, "sum to zero"),
        )
    ):
        with pytest.raises(LlmworksError, match=said):
            together(names, family, tmp_path / str(number), **given)
    base: Any = load(str(family / "pico"))
    with pytest.raises(LlmworksError, match="do not differ in any matrix"):
        extract_adapter(ExtractConfig(), base, base, context(tmp_path / "same"))
    save_file(
        {name: one * float("nan") for name, one in load_file(family / "a" / "adapter_model.safetensors").items()},
        tmp_path / "nan.safetensors",
    )
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (family / "a").iterdir():
        if file.is_file():
            (broken / file.name).write_bytes(file.read_bytes())
    (tmp_path / "nan.safetensors").replace(broken / "adapter_model.safetensors")
    found: Any = {"broken": load(str(broken)), "b": load(str(family / "b"))}
    with pytest.raises(LlmworksError, match="holds values that are NaN or infinite"):
        combine_adapters(CombineAdaptersConfig(), found, base, context(tmp_path / "nan"))


Q = "base_model.model.model.layers.0.self_attn.q_proj"
ODD: dict[str, tuple[Any, str]] = {
    "an embedding's": (
        lambda t, c: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 400)}),
        "lora_embedding_A is not part of a plain LoRA",
    ),
    "a whole tensor": (
        lambda t, c: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(400, 64)}),
        "embed_tokens.weight is not part of a plain LoRA",
    ),
    "magnitudes": (
        lambda t, c: t.update({f"{Q}.lora_magnitude_vector": torch.ones(64)}),
        "has a lora_magnitude_vector, but",
    ),
    "no A": (lambda t, c: t.pop(f"{Q}.lora_A.weight"), "q_proj has no A matrix"),
    "no B": (lambda t, c: t.pop(f"{Q}.lora_B.weight"), "q_proj has an A but no B matrix"),
    "rank 0": (
        lambda t, c: t.update({f"{Q}.lora_A.weight": torch.zeros(0, 64), f"{Q}.lora_B.weight": torch.zeros(64, 0)}),
        "are not two matrices of the same rank",
    ),
    "one side": (
        lambda t, c: t.update({f"{Q}.lora_A.weight": torch.zeros(256)}),
        "are not two matrices of the same rank",
    ),
    "no side": (
        lambda t, c: t.update({f"{Q}.lora_A.weight": torch.zeros(())}),
        "are not two matrices of the same rank",
    ),
    "four sides": (
        lambda t, c: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 64, 1, 1)}),
        "are not two matrices of the same rank",
    ),
    "another width": (
        lambda t, c: t.update({f"{Q}.lora_A.weight": torch.zeros(4, 32)}),
        "its shapes differ|belongs to another model",
    ),
    "infinite": (lambda t, c: t[f"{Q}.lora_B.weight"].fill_(float("inf")), "holds values that are NaN or infinite"),
    "alphas in a list": (lambda t, c: c.update(alpha_pattern=["q"]), "alpha_pattern must map"),
    "a broken pattern": (lambda t, c: c.update(alpha_pattern={"(": 3}), "alpha_pattern must map"),
    "an alpha of letters": (lambda t, c: c.update(alpha_pattern={"q_proj": "x"}), "alpha_pattern must map"),
    "alpha that is none": (
        lambda t, c: c.update(lora_alpha=float("nan")),
        "needs a rank `r` greater than zero and a number `lora_alpha`",
    ),
    "nothing": (lambda t, c: t.clear(), "has no LoRA matrices"),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_adapters(what: str, family: Path, tmp_path: Path) -> None:
    """Neither merged nor folded, and what is wrong is said: nothing in an adapter is passed over."""
    change, said = ODD[what]
    odd = tmp_path / "odd"
    odd.mkdir()
    tensors, config = (
        load_file(family / "a" / "adapter_model.safetensors"),
        json.loads((family / "a" / "adapter_config.json").read_text()),
    )
    change(tensors, config)
    save_file(tensors, odd / "adapter_model.safetensors")
    (odd / "adapter_config.json").write_text(json.dumps(config))
    given, base = {"odd": load(str(odd)), "b": load(str(family / "b"))}, load(str(family / "pico"))
    with pytest.raises(ModelError, match=said):
        combine_adapters(CombineAdaptersConfig(), given, base, context(tmp_path / "merged"))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=said):
        fold(MergeAdapterConfig(), given["odd"], base, context(tmp_path / "folded"))  # type: ignore[arg-type]


def test_what_a_number_format_cannot_hold(family: Path, tmp_path: Path) -> None:
    shutil.copytree(family / "pico", tmp_path / "half")
    save_file(
        {name: one.half() for name, one in load_file(family / "pico" / "model.safetensors").items()},
        tmp_path / "half" / "model.safetensors",
        metadata={"format": "pt"},
    )
    shutil.copytree(family / "a", tmp_path / "large")
    save_file(
        {name: one * 3e4 for name, one in load_file(family / "a" / "adapter_model.safetensors").items()},
        tmp_path / "large" / "adapter_model.safetensors",
    )
    with pytest.raises(
        ModelError, match=r"large: merged into .*, it gives values that are NaN, infinite, or too large for float16"
    ):
        fold(
            MergeAdapterConfig(),
            load(str(tmp_path / "large")),
            load(str(tmp_path / "half")),
            context(tmp_path / "out"),
        )  # type: ignore[arg-type]


def test_a_file_that_the_index_does_not_name_is_none_of_the_model(family: Path, tmp_path: Path) -> None:
    """A copy of old weights beside two shards: the shards are what is folded into."""
    stray, tensors = tmp_path / "stray", load_file(family / "pico" / "model.safetensors")
    shutil.copytree(family / "pico", stray, ignore=shutil.ignore_patterns("*.safetensors"))
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, some in parts.items():
        save_file({name: tensors[name] for name in some}, stray / file, metadata={"format": "pt"})
    (stray / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {name: file for file, some in parts.items() for name in some}})
    )
    save_file(tensors, stray / "weights_old.safetensors", metadata={"format": "pt"})
    for name, given in (("stray", stray), ("plain", family / "pico")):
        fold(MergeAdapterConfig(), load(str(family / "a")), load(str(given)), context(tmp_path / f"{name}-out"))  # type: ignore[arg-type]
    assert sorted(file.name for file in (tmp_path / "stray-out").glob("*.safetensors")) == sorted(parts)
    made = {name: one for file in parts for name, one in load_file(tmp_path / "stray-out" / file).items()}
    assert all(
        torch.equal(made[name], one) for name, one in load_file(tmp_path / "plain-out" / "model.safetensors").items()
    )


def test_extract_tells_of_heads_and_refuses_turned_matrices(family: Path, tmp_path: Path) -> None:
    base: Any = load(str(family / "pico"))
    untied = tmp_path / "untied"
    shutil.copytree(family / "pico", untied)
    tensors = load_file(untied / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] += 0.01 * torch.randn(
        tensors["model.layers.0.mlp.up_proj.weight"].shape
    )
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 1.5
    save_file(tensors, untied / "model.safetensors", metadata={"format": "pt"})
    made = extract_adapter(ExtractConfig(max_rank=500), load(str(untied)), base, context(tmp_path / "out"))  # type: ignore[arg-type]
    assert made.metrics["skipped_tensors"] == 1
    assert made.metrics["relative_error"] > 0.9  # the head differs most
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(ModelError, match="stored transposed"):
        extract_adapter(ExtractConfig(), load(str(family / "pico")), load(str(untied)), context(tmp_path / "turned"))  # type: ignore[arg-type]
