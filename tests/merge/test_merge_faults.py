"""What would be another model without a word, and files that are not what they should be."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmworks.cli import main
from llmworks.core.errors import LlmworksError, ModelError, UserError
from llmworks.core.progress import Progress
from llmworks.lineage.claims.license import classify_license
from llmworks.lineage.claims.parents import list_claims
from llmworks.merge.ancestry import Ancestry, infer_ancestry
from llmworks.merge.plan.config import MergeConfig
from llmworks.merge.plan.layout import read_layout
from llmworks.merge.plan.plan import plan_merge
from llmworks.model.io.layer_reader import LayerReader
from llmworks.model.io.load import load_model
from llmworks.model.io.safetensors_io import ShardReader
from llmworks.model.io.weights import StoredTensors
from llmworks.runtime.session import Session, load
from llmworks.tokenize.load import load_tokenizer
from llmworks.tune.search.cma import evolve
from llmworks.tune.search.genome import MergeParameter, list_parameters
from llmworks.workflows.family import build_workspace_family, reproduce
from llmworks.workflows.lazymerge import build_merge_config, export
from tests.merge.test_merge import broken, weights
from tests.merge.test_methods_conformance import merged
from tests.oracles.merge_models import save
from tests.oracles.merges import models, of

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("faults")
    models(place)
    return place


def layers(*spans: tuple[str, int, int]) -> dict[str, Any]:
    return {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": name, "layer_range": [low, high]}]} for name, low, high in spans],
    }


def test_a_head_that_the_last_model_shares_with_its_embedding(family: Path, tmp_path: Path) -> None:
    """Layers of an untied model, then of a tied one: the result has a head, the last model's."""
    merged(layers(("base", 0, 2), ("tied", 2, 4)), family, tmp_path / "out")
    found = weights(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], weights(family / "tied")["model.embed_tokens.weight"])
    assert torch.equal(load_model(tmp_path / "out").lm_head.weight, found["lm_head.weight"])
    merged(layers(("tied", 0, 2), ("tied", 1, 4)), family, tmp_path / "both")
    assert "lm_head.weight" not in weights(tmp_path / "both")
    assert json.loads((tmp_path / "both" / "config.json").read_text())["tie_word_embeddings"] is True


def test_kinds_of_layers_are_those_of_their_models(family: Path, tmp_path: Path) -> None:
    broken(family / "a", family / "sliding", layer_types=["sliding"] * 4)
    broken(family / "b", family / "full", layer_types=["full"] * 4)
    merged(layers(("sliding", 0, 2), ("full", 1, 4)), family, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"] == ["sliding"] * 2 + ["full"] * 3
    with pytest.raises(ModelError, match=r"c: its config.json has no layer_types for layer 1"):
        merged(layers(("sliding", 0, 2), ("c", 1, 4)), family, tmp_path / "none")


def test_ids_of_roles_follow_the_tokenizer(family: Path, tmp_path: Path) -> None:
    """Another model's tokenizer, whose end token has the id that the donor's begin token has."""
    shutil.copytree(family / "other", family / "swapped")
    text = (family / "swapped" / "tokenizer.json").read_text()
    (family / "swapped" / "tokenizer.json").write_text(
        text.replace('"id": 0, "content": "<s>"', '"id": 1, "content": "<s>"')
        .replace('"id": 1, "content": "</s>"', '"id": 0, "content": "</s>"')
        .replace('"<s>": 0, "</s>": 1', '"<s>": 1, "</s>": 0')
    )
    merged(
        {
            "merge_method": "linear",
            "base_model": "few",
            "models": of("few", "swapped", weight=1),
            "tokenizer_source": "swapped",
        },
        family,
        tmp_path / "out",
    )
    config, tokenizer = json.loads((tmp_path / "out" / "config.json").read_text()), load_tokenizer(tmp_path / "out")
    assert (
        (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 0)
    )


def test_files_that_an_index_does_not_name(family: Path, tmp_path: Path) -> None:
    """Mistral's repositories hold the same weights twice, under other names."""
    shutil.copytree(family / "a", tmp_path / "twice")
    tensors = load_file(family / "a" / "model.safetensors")
    save_file(
        {name.replace("model.", ""): one for name, one in tensors.items()},
        tmp_path / "twice" / "consolidated.safetensors",
    )
    assert (
        set(ShardReader(tmp_path / "twice").locations)
        == set(StoredTensors(tmp_path / "twice"))
        == set(LayerReader(tmp_path / "twice").files)
        == set(tensors)
    )
    shutil.copyfile(tmp_path / "twice" / "model.safetensors", tmp_path / "twice" / "other.safetensors")
    (tmp_path / "twice" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")})
    )
    assert set(ShardReader(tmp_path / "twice").locations) == set(tensors)
    (tmp_path / "twice" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "gone.safetensors"}})
    )
    with pytest.raises(ModelError, match=r"lists gone.safetensors, which is missing"):
        ShardReader(tmp_path / "twice")


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", lambda v: v.update(vocab_size="abc"), "vocab_size is 'abc'"),
        ("config.json", lambda v: v.update(architectures=5), "architectures is 5"),
        ("config.json", lambda v: v.update(architectures="Llama"), "architectures is 'Llama'"),
        ("tokenizer.json", lambda v: v.clear(), "is not a valid tokenizer"),
        ("tokenizer.json", lambda v: v["added_tokens"][0].pop("id"), "is not a valid tokenizer"),
        (
            "generation_config.json",
            lambda v: v.update(eos_token_id="x"),
            "few2/generation_config.json: eos_token_id is 'x'",
        ),
    ],
)
def test_broken_files_are_told_before_weights_are_written(
    file: str, change: Callable[[dict[str, Any]], Any], said: str, family: Path, tmp_path: Path
) -> None:
    for name in ("few", "few2"):
        shutil.copytree(family / "few", tmp_path / name)
    values = json.loads((tmp_path / "few2" / file).read_text()) if (tmp_path / "few2" / file).exists() else {}
    change(values)
    (tmp_path / "few2" / file).write_text(json.dumps(values))
    with pytest.raises(LlmworksError) as error:
        merged({"merge_method": "linear", "models": of("few", "few2", weight=1)}, tmp_path, tmp_path / "out")
    assert said in str(error.value)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert not list((tmp_path / "out-scratch").rglob("*.safetensors"))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "data_offsets": [0, 64]},
        {"shape": [16], "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": "x", "data_offsets": [0, 64]},
        {"dtype": "F32", "shape": [-4, -4], "data_offsets": [0, 64]},
    ],
)
def test_headers_that_are_none(entry: dict[str, Any], tmp_path: Path) -> None:
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError):
        ShardReader(tmp_path)


def test_a_template_that_cannot_be_rendered(family: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be rendered"):
        merged(
            {
                "merge_method": "linear",
                "models": of("few", weight=1),
                "chat_template": "{% for x in messages %}{{ oops broken",
            },
            family,
            tmp_path / "out",
        )


@pytest.mark.parametrize(
    "more",
    [
        {"merge_method": "ties", "base_model": "base", "models": of("a", weight=1, density=2)},
        {"merge_method": "breadcrumbs", "base_model": "base", "models": of("a", weight=1, gamma=-0.5)},
        {"merge_method": "karcher", "models": of("a", "b"), "parameters": {"max_iter": -3}},
    ],
)
def test_numbers_out_of_range(more: dict[str, Any], family: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it must be"):
        merged(more, family, tmp_path / "out")


@pytest.mark.parametrize(
    "text",
    [
        "dtype: 2024-13-45",
        "x: !!int abc",
        f"a: {'9' * 5000}",
        f"a: {'[' * 3000}",
        "name: [1]\nmerge_method: linear\nmodels: [{model: a}]",
        "merge_method: linear\nmodels: [{model: '+'}]",
        f"merge_method: linear\nmodels: [{{model: a, parameters: {{weight: {'9' * 400}}}}}]",
    ],
)
def test_yaml_that_is_none_is_one_line(
    text: str, family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(family)
    (tmp_path / "m.yml").write_text(text)
    assert (
        main(["merge", str(tmp_path / "m.yml"), "--out", str(tmp_path / "out"), "--workspace", str(tmp_path / "ws")])
        == 2
    )
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def kin(child: Path, *among: Path) -> Ancestry:
    return infer_ancestry(read_layout("child", child), {path.name: read_layout(path.name, path) for path in among})


def test_only_what_is_equal_is_the_same(family: Path, tmp_path: Path) -> None:
    """Norms, the embedding, or a matrix that is missing make another model, though all that was read of matrices is
    equal.
    """
    base = family / "base"
    assert kin(base, base, family / "a").relation == "same"
    changes: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
        "norm": lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * 3}),
        "embedding": lambda t: t.update(
            {"model.embed_tokens.weight": torch.randn_like(t["model.embed_tokens.weight"])}
        ),
        "one": lambda t: t[Q].view(-1)[7:8].add_(1e-3),
    }
    for name, change in changes.items():
        found = kin(broken(base, tmp_path / name, change), base, family / "a")
        assert (found.relation, set(found.parents)) == ("tuned", {"base"}), name


def test_kin_under_other_names_and_formats(family: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed"
    shutil.copytree(family / "a", renamed)
    save_file(
        {
            name.replace("model.layers", "transformer.h"): one
            for name, one in load_file(family / "a" / "model.safetensors").items()
        },
        renamed / "model.safetensors",
    )
    assert (kin(renamed, family / "a", family / "c").relation, kin(renamed, family / "a", family / "c").parents) == (
        "same",
        {"a": 1.0},
    )
    small = broken(
        family / "a",
        tmp_path / "f8",
        lambda t: t.update({name: one.to(torch.float8_e4m3fn) for name, one in t.items()}),
    )
    assert set(kin(small, family / "a", family / "far").parents) == {"a"}
    odd = broken(
        family / "a", tmp_path / "odd", lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(7, 3)})
    )
    assert set(kin(odd, family / "a").parents) == {"a"}
    whole = broken(
        family / "a",
        tmp_path / "whole",
        lambda t: t.update({name: one.to(torch.int32) for name, one in t.items() if one.ndim == 2}),
    )
    with pytest.raises(ModelError, match="has dtype I32, which cannot be compared"):
        kin(whole, family / "a")


def test_a_search_over_the_same_score_goes_on(tmp_path: Path) -> None:
    genes = [MergeParameter((name,), 0.0, 1.0, 0.5) for name in "xy"]
    assert len(evolve(genes, lambda _: (0.0, {}), tmp_path / "flat", attempts=30, population=4, seed=0)) >= 30
    assert len(evolve(genes, lambda _: (float("nan"), {}), tmp_path / "none", attempts=30, population=4, seed=0)) >= 30
    assert [gene.start for gene in list_parameters({"parameters": {"weight": "1e-1", "normalize": True}})] == [0.1]


def test_small_things(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a is given twice"):
        build_merge_config("linear", ["a", "a"])
    (tmp_path / "mergekit_config.yml").write_text('merge_method: linear\nmodels: [{model: "x\\ud800"}]\n')
    assert [claim.name for claim in list_claims(tmp_path)] == ["x?"]
    assert [classify_license(said) for said in ("mit-nd", "ncsa", "0bsd", "cdla-permissive-2.0")] == [
        "own",
        "free",
        "free",
        "free",
    ]
    assert save(tmp_path / "m", "a").exists()


def test_a_full_disk_is_known_before_anything_is_written(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="no space left"):
        merged({"merge_method": "linear", "models": of("a", weight=1)}, family, tmp_path / "out")
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_token_that_no_row_is_of(family: Path, tmp_path: Path) -> None:
    """A rule's id beyond a model's embedding is not the next tensor's bytes."""
    rows = len(weights(family / "more")["model.embed_tokens.weight"])
    given = {"merge_method": "linear", "base_model": "few", "models": of("few", "more", weight=1)}
    for number in (rows, rows + 40):
        rule = {
            "source": "base",
            "tokens": {"<x>": {"source": {"kind": "model_token", "model": "more", "token_id": number}, "force": True}},
        }
        with pytest.raises(UserError, match=f"more has {rows} rows, so no row for token {number}"):
            merged({**given, "tokenizer": rule}, family, tmp_path / str(number))
    shards = ShardReader(family / "more")
    with pytest.raises(ModelError, match="is out of range"):
        shards.read("model.norm.weight", 1, memoryview(bytearray(4 * 16)))
    shards.close()


def test_rows_of_zeros_are_told(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers on layers of models with other tokens: the embedding comes from one of them, which has none of the others'
    tokens.
    """
    said: list[str] = []
    monkeypatch.setattr(Progress, "log", lambda self, line: said.append(line))
    merged(
        {**layers(("few", 0, 2), ("more", 2, 4)), "base_model": "few", "tokenizer_source": "union"},
        family,
        tmp_path / "out",
    )
    made, tokens = weights(tmp_path / "out")["model.embed_tokens.weight"], load_tokenizer(tmp_path / "out").get_vocab()
    bare = [at for at in tokens.values() if not made[at].any()]
    assert bare
    assert any(line.startswith("warning: ") and "have a row of zeros" in line for line in said)
    said.clear()
    merged(
        {**layers(("few", 0, 2), ("few", 2, 4)), "base_model": "few", "tokenizer_source": "union"},
        family,
        tmp_path / "plain",
    )
    assert not any("have a row of zeros" in line for line in said)


def test_eight_bit_floats_are_copied_or_refused(family: Path, tmp_path: Path) -> None:
    small = broken(family / "a", family / "f8", lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}))
    merged({"merge_method": "passthrough", "models": of("f8")}, family, tmp_path / "copy")
    assert torch.equal(weights(tmp_path / "copy")[Q].view(torch.uint8), weights(small)[Q].view(torch.uint8))
    for number, more in enumerate(
        (
            {"models": of("f8", scale=0.5)},
            {"models": of("f8"), "dtype": "bfloat16"},
            {"models": of("f8"), "out_dtype": "float32"},
            {"merge_method": "linear", "models": of("f8", weight=1)},
        )
    ):
        with pytest.raises(ModelError, match="is in float8_e4m3fn, which"):
            merged({"merge_method": "passthrough", **more}, family, tmp_path / str(number))
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
        broken(
            family / "a",
            family / f"nan-{kind}",
            lambda t, kind=kind: t.update({Q: torch.full((16, 16), float("nan")).to(kind)}),
        )
        with pytest.raises(ModelError, match="holds NaN or infinite values"):
            merged({"merge_method": "passthrough", "models": of(f"nan-{kind}")}, family, tmp_path / f"n{kind}")


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "arcee_fusion", "dare_ties", "model_stock"])
def test_tensors_of_no_size(method: str, family: Path, tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        broken(
            family / name, tmp_path / f"{name}-empty", lambda t: t.update({"model.layers.0.none": torch.zeros(0, 4)})
        )
    others = ("a-empty",) if method == "arcee_fusion" else ("a-empty", "b-empty")
    merged(
        {
            "merge_method": method,
            "base_model": "base-empty",
            "models": [{"model": one, "parameters": {"weight": 1, "density": 0.5}} for one in others],
        },
        tmp_path,
        tmp_path / "out",
    )
    assert weights(tmp_path / "out")["model.layers.0.none"].shape == (0, 4)


def test_an_export_is_whole_or_not_there(tmp_path: Path, pico: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    (tmp_path / "child").mkdir()
    for file in pico.iterdir():
        if file.is_file():
            shutil.copyfile(file, tmp_path / "child" / file.name)
    (tmp_path / "child" / "README.md").write_text("---\nlicense: mit\n---\n# child\n")
    child: Any = load(str(tmp_path / "child"))
    real = shutil.copyfile

    def full(source: Any, target: Any) -> Any:
        if Path(source).name == "tokenizer.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match=r"No space left on device: .*upload"):
        export(child, None, "child", tmp_path / "upload")
    assert not (tmp_path / "upload").exists()
    assert not list(tmp_path.glob(".upload*"))
    monkeypatch.setattr(shutil, "copyfile", real)
    export(child, None, "child", tmp_path / "upload")
    assert (tmp_path / "upload" / "README.md").exists()


def test_digests_that_cannot_be_kept_are_computed_again(
    tmp_path: Path, pico: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").write_text("")  # where the cache's directory would be
    monkeypatch.setenv("LLMWORKS_CACHE", str(tmp_path / "taken"))
    found = load(str(pico))
    assert found.digest == load(str(pico)).digest


def test_a_parameter_that_no_method_has(family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is a mistake; one of another method is told, since mergekit's files often have some."""
    given = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "a", "parameters": {"weight": 1, "dencity": 0.5}}],
    }
    with pytest.raises(UserError, match="unknown parameter 'dencity', did you mean 'density'"):
        merged(given, family, tmp_path / "out")
    with pytest.raises(UserError, match="unknown parameter 'wieght', did you mean 'weight'"):
        merged({"merge_method": "linear", "models": of("a", wieght=1)}, family, tmp_path / "more")
    said: list[str] = []
    monkeypatch.setattr(Progress, "log", lambda self, line: said.append(line))
    merged(
        {"merge_method": "linear", "models": of("a", weight=1), "parameters": {"t": 0.4}}, family, tmp_path / "other"
    )
    assert any("linear has no parameter t" in line for line in said)
    said.clear()
    merged(
        {
            "merge_method": "linear",
            "models": of("a", weight=[{"filter": "self_atn", "value": 1}, {"filter": "mlp", "value": 1}, {"value": 1}]),
        },
        family,
        tmp_path / "filtered",
    )
    assert [line for line in said if "self_atn" in line]
    assert not [line for line in said if "filter mlp " in line]


def test_a_model_that_the_file_does_not_name(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.yml").write_text("merge_method: linear\nmodels: [{model: one, parameters: {weight: 1}}]\n")
    assert (
        main(["merge", "m.yml", "--models", f"one={family / 'a'}", "--models", f"typo={family / 'b'}", "--out", "x"])
        == 2
    )
    assert "has no model 'typo'; it has one" in capsys.readouterr().err
    assert main(["merge", "m.yml", "--models", f"one={family / 'a'}", "--plan"]) == 0
    told = capsys.readouterr().out
    assert "linear of one" in told
    assert "one 0 to 3" in told
    assert main(["merge", "--methods"]) == 0
    assert "density (1.0, of each model)" in capsys.readouterr().out
    (tmp_path / "m.yml").write_text(
        "merge_method: slerp\nbase_model: one\nmodels: [{model: one}]\nparameters: {t: [{filter: mlp, valeu: 0.5},"
        " 0.3]}\n"
    )
    assert main(["merge", "m.yml", "--out", "x"]) == 2
    told = capsys.readouterr().err
    assert "parameters.t.0: unknown key 'valeu', did you mean 'value'" in told
    assert len(told) < 200


def test_what_is_read_is_counted_in_the_number_format_of_the_models(family: Path) -> None:
    layouts = {"a": read_layout("a", family / "a"), "b": read_layout("b", family / "b")}
    given = {"merge_method": "linear", "models": of("a", "b", weight=1)}
    plans = [plan_merge(MergeConfig.model_validate({**given, **more}), layouts) for more in ({}, {"dtype": "float16"})]
    assert plans[0].count_bytes() == (2 * plans[0].count_bytes()[1], plans[0].count_bytes()[1])
    assert plans[1].count_bytes() == (plans[0].count_bytes()[0], plans[0].count_bytes()[1] // 2)


def test_a_merge_of_an_asset_is_derived_again(family: Path, tmp_path: Path) -> None:
    """An asset is used as what it was converted to, which the workspace knows by another name; its licence is on the
    card both times.
    """
    session = Session(tmp_path / "ws", quiet=True)

    def made(given: dict[str, Any], models: dict[str, Any]) -> Any:
        return session.make("merge", config=given, models=models)

    base = copy.copy(made({"merge_method": "passthrough", "models": of("a")}, {"a": load(str(family / "a"))}))
    base.name = base.ref = "asset:smollm2-135m-instruct"
    child = made(
        {"merge_method": "ties", "base_model": base.name, "models": of("b", weight=1, density=0.5)},
        {base.name: base, "b": load(str(family / "b"))},
    )
    card = (child.path / "README.md").read_text()
    assert "asset:smollm2-135m-instruct: apache-2.0" in card
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in card
    assert "# smollm2-135m-instruct-ties" in card
    found = session.workspace.find_digest(child.digest)
    assert found is not None
    assert reproduce(session, build_workspace_family(session.workspace), found) == child.manifest.files
