"""The family tree: drawings that agree, parents that files claim, parents that weights tell, licences along the way."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from llmworks.cli import main
from llmworks.lineage.claims.license import classify_license, find_license_conflicts
from llmworks.lineage.claims.parents import ParentClaim, list_claims, read_license
from llmworks.lineage.drawing.formats import draw_mermaid, draw_png, draw_svg
from llmworks.lineage.drawing.layout import compute_layout
from llmworks.lineage.drawing.page import draw_page
from llmworks.lineage.family import Family, LineageNode
from tests.oracles.merge_models import save
from tests.oracles.merges import models


def node(name: str, *parents: str, kind: str = "model", stage: str = "merge", derivation: str = "exact") -> LineageNode:
    return LineageNode(name, kind, name, stage, derivation, tuple(("model", one) for one in parents))


def large() -> Family:
    """A family of thirty-odd models: a base, tuned children, merges of them, merges of merges, quantizations."""
    nodes = [
        node("base", stage="", derivation="declared"),
        *(node(f"tuned-{i}", "base", stage="train.sft", derivation="declared") for i in range(8)),
        *(node(f"data-{i}", kind="dataset", stage="data.read") for i in range(4)),
    ]
    nodes += (
        [node(f"merge-{i}", f"tuned-{i}", f"tuned-{(i + 3) % 8}", "base") for i in range(8)]
        + [node(f"second-{i}", f"merge-{i}", f"merge-{i + 1}") for i in range(6)]
        + [node(f"small-{i}", f"second-{i}", stage="quantize.gguf") for i in range(6)]
    )
    return Family({one.digest: one for one in nodes})


def star() -> Family:
    """A model, one that was made of it, and thirty of that; of the fourth of these, two more."""
    nodes = [
        node("root", stage=""),
        node("one", "root"),
        *(node(f"leaf-{i:02}", "one", "root", stage="quantize.gptq") for i in range(30)),
        *(node(f"last-{i}", "leaf-03") for i in range(2)),
    ]
    return Family({one.digest: one for one in nodes})


@pytest.mark.parametrize("family", [large(), star()], ids=["large", "star"])
def test_no_two_boxes_are_in_one_place(family: Family) -> None:
    at = compute_layout(family)
    boxes = list(at.boxes.values())
    assert len(boxes) == len(family.nodes) > 30
    for number, (x, y) in enumerate(boxes):
        assert x >= 0
        assert x + 176 <= at.width
        assert y + 52 <= at.height
        assert not any(abs(x - a) < 176 and abs(y - b) < 52 for a, b in boxes[number + 1 :])
    for edge in at.edges:
        assert at.boxes[edge.parent][1] < at.boxes[edge.child][1]
        assert edge.path[0] == ("M", (at.boxes[edge.parent][0] + 88, at.boxes[edge.parent][1] + 52))
    assert 1 < at.width / at.height < 4  # more or less as a screen is


def test_lines_to_lower_rows_run_between_columns() -> None:
    """The straight part of no line, and the end of none, is in another box; what has children stands in the last
    row.
    """
    at = compute_layout(star())
    rows = sorted({at.boxes[f"leaf-{i:02}"][1] for i in range(30)})
    assert len(rows) > 2
    assert at.boxes["leaf-03"][1] == rows[-1]
    for edge in at.edges:
        (x, y), points = at.boxes[edge.child], [numbers[-2:] for _, numbers in edge.path]
        assert points[-1] in ((x + 88, y), (x, y + 26))
        for a, b in points[1:]:
            assert not any(left < a < left + 176 and top < b < top + 52 for left, top in at.boxes.values())


def test_drawings_say_the_same(tmp_path: Path) -> None:
    family = large()
    svg = ElementTree.fromstring(draw_svg(family))
    space = "{http://www.w3.org/2000/svg}"
    assert {one.get("data-id") for one in svg.iter(f"{space}g")} == set(family.nodes)
    edges = {(one.get("data-from"), one.get("data-to")) for one in svg.iter(f"{space}path")}
    assert edges == {(parent, one.digest) for one in family.nodes.values() for _, parent in one.parents}
    mermaid = draw_mermaid(family)
    assert len(re.findall(r"-->|-\.->", mermaid)) == len(edges)
    draw_png(family, tmp_path / "tree.png")
    assert (tmp_path / "tree.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_page_holds_what_it_shows_and_no_more() -> None:
    """Names from outside are text, wherever they stand; nothing is fetched."""
    evil = LineageNode(
        "evil", "model", '</script><img src=x onerror="alert(1)">', "", "declared", (("says", "base"),), None, "hf:a/b"
    )
    family = Family({"base": node("base"), "evil": evil})
    page = draw_page(family, "<b>Tree</b>", {"load_in_4bit": "mit"}, ["a <line>"])
    assert "<img" not in page
    assert "<b>Tree" not in page
    assert "a &lt;line&gt;" in page
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["evil"]["name"] == evil.label
    assert data["base"]["children"] == [["says", "evil"]]
    assert not re.search(r"(?:src|href)=[\"']?(?:http|//)", page)


def card(path: Path, text: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "README.md").write_text(f"---\n{text}\n---\nA model.\n")
    return path


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"README.md": "---\nbase_model: org/base\nbase_model_relation: quantized\n---\n"},
            [ParentClaim("org/base", "quantized", "README.md")],
        ),
        (
            {"README.md": "---\nbase_model:\n- org/a\n- org/b\n---\n"},
            [ParentClaim("org/a", "merge", "README.md"), ParentClaim("org/b", "merge", "README.md")],
        ),
        (
            {
                "adapter_config.json": '{"base_model_name_or_path": "org/base"}',
                "README.md": "---\nbase_model: org/base\n---\n",
            },
            [ParentClaim("org/base", "adapter", "adapter_config.json")],
        ),
        (
            {
                "mergekit_config.yml": (
                    "merge_method: ties\nbase_model: org/base\nmodels:\n  - model: org/a\n    parameters: {weight: 1}\n"
                    "  - model: {model: {path: org/b}}\n"
                )
            },
            [
                ParentClaim("org/base", "merge, ties", "mergekit_config.yml"),
                ParentClaim("org/a", "merge, ties", "mergekit_config.yml"),
                ParentClaim("org/b", "merge, ties", "mergekit_config.yml"),
            ],
        ),
        (
            {"mergekit_moe_config.yml": "base_model: org/base\nexperts:\n- source_model: org/a\n"},
            [
                ParentClaim("org/base", "merge, experts", "mergekit_moe_config.yml"),
                ParentClaim("org/a", "merge, experts", "mergekit_moe_config.yml"),
            ],
        ),
        ({"README.md": "---\nbase_model: [\n---\n", "adapter_config.json": "[1]", "mergekit_config.yml": "- {"}, []),
        ({"README.md": "no head"}, []),
    ],
)
def test_what_files_claim(files: dict[str, str], said: list[ParentClaim], tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert list_claims(tmp_path) == said


def test_what_gguf_says_of_itself(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_base_model_count(1)
    writer.add_base_model_repo_url(0, "https://huggingface.co/org/base")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert list_claims(tmp_path / "m.gguf") == [ParentClaim("org/base", "quantized", "m.gguf")]
    assert read_license(tmp_path / "m.gguf") == "apache-2.0"
    assert read_license(card(tmp_path / "c", "license: other\nlicense_name: Llama3")) == "llama3"


def test_licences_that_may_not_go_together() -> None:
    assert [
        classify_license(said)
        for said in ("apache-2.0", "mit", "cc-by-nc-4.0", "gpl-3.0", "llama3", "gemma", "cc-by-sa-4.0", "cc-by-4.0")
    ] == ["free", "free", "non-commercial", "share-alike", "own", "own", "share-alike", "free"]
    family = Family(
        {
            one.digest: one
            for one in (
                node("nc"),
                node("free"),
                node("gemma"),
                node("llama"),
                node("child", "nc", "free"),
                node("fine", "free"),
                node("both", "gemma", "llama"),
                node("silent", "nc"),
            )
        }
    )
    said = {
        "nc": "cc-by-nc-4.0",
        "free": "apache-2.0",
        "gemma": "gemma",
        "llama": "llama3",
        "child": "apache-2.0",
        "fine": "mit",
    }
    found = find_license_conflicts(family, said)
    assert found == [
        "child: under apache-2.0, from nc (cc-by-nc-4.0), which have stricter terms",
        "both: from gemma (gemma) and llama (llama3): possibly incompatible terms",
        "silent: without a license of their own, from nc (cc-by-nc-4.0), which allows no commercial use",
    ]


def test_a_foreign_model_s_parents_by_files_and_by_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tree of a model that no manifest knows: its card's claim, and what its weights say when they are asked."""
    from tests.merge.test_methods_conformance import merged

    models(tmp_path / "family")
    merged(
        {
            "merge_method": "task_arithmetic",
            "base_model": "base",
            "models": [{"model": "a", "parameters": {"weight": 0.6}}, {"model": "b", "parameters": {"weight": 0.6}}],
        },
        tmp_path / "family",
        tmp_path / "found",
    )
    for name in ("mergekit_config.yml", "README.md"):
        (tmp_path / "found" / name).unlink()
    shutil.rmtree(tmp_path / "found" / "report", ignore_errors=True)
    card(tmp_path / "found", "base_model: some/where\nlicense: mit")
    card(tmp_path / "family" / "a", "license: cc-by-nc-4.0")
    save(tmp_path / "stranger", "far")
    monkeypatch.chdir(tmp_path / "family")
    words = [
        "tree",
        str(tmp_path / "found"),
        *(word for name in ("base", "a", "b", "c", str(tmp_path / "stranger")) for word in ("--candidates", name)),
        "--workspace",
        str(tmp_path / "ws"),
    ]
    files = {kind: tmp_path / f"tree.{kind}" for kind in ("html", "svg", "png", "mermaid")}
    assert main([*words, *(word for kind, file in files.items() for word in (f"--{kind}", str(file)))]) == 0
    told = capsys.readouterr()
    assert "found is a merge of" in told.err
    lines = told.out.splitlines()
    assert any("found" in line and "+ " in line for line in lines)
    assert any("licenses: found: under mit, from a (cc-by-nc-4.0)" in line for line in lines)
    assert all(file.stat().st_size > 500 for file in files.values())
    assert main([*words, "--json"]) == 0
    data: dict[str, Any] = json.loads(capsys.readouterr().out)
    names = {one["digest"]: one["name"] for one in data["nodes"]}
    child = next(one for one in data["nodes"] if one["name"] == "found")
    parents = {names[one["digest"]]: one["role"] for one in child["parents"]}
    assert set(parents) == {"base", "a", "b", "some/where"}
    assert parents["some/where"] == "README.md says: finetune"
    assert parents["a"].startswith("by its weights: merged 0.6")
    assert main(["tree", "--candidates", "base", "--workspace", str(tmp_path / "ws")]) == 2


def test_only_models(tmp_path: Path) -> None:
    """Data between two models is passed over."""
    family = Family(
        {
            one.digest: one
            for one in (
                node("a"),
                node("rows", "a", kind="dataset"),
                node("b", "rows"),
                node("report", "b", kind="report"),
            )
        }
    )
    small = family.filter_kinds("model")
    assert set(small.nodes) == {"a", "b"}
    assert small.nodes["b"].parents == (("model, indirectly", "a"),)
