"""The labs keep their contract, and the tools that run them find what breaks it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from labs.tools import build
from labs.tools.contract import find_violations, list_terms
from labs.tools.execute import execute
from labs.tools.lab import LABS, LabError, list_labs, read_lab

from llmworks.core.errors import AssetError

ALL = list_labs()

MINI = """\
# ---
# jupyter:
#   kernelspec: {display_name: Python 3, language: python, name: python3}
#   lab: {learn: Add., minutes: 1, budget_seconds: 30, topics: [sum]}
# ---

# %% [markdown]
# # F90 Mini

# %% tags=["picture"] alt="A straight line through the origin, from zero to one."
import matplotlib.pyplot as plt

fig, ax = plt.subplots()
ax.plot([0, 1])
ax.set(xlabel="x (m)", ylabel="y (m)")
plt.show()


# %% tags=["exercise"]
def add(a, b): ...


# %% tags=["solution"]
def add(a, b):
    return a + b


# %% tags=["wrong"]
# says: product
def add(a, b):
    return a * b


# %% tags=["check"]
assert add(1, 2) is not None, "add returns nothing"
assert add(3, 2) != 6, "this is the product"
assert add(1, 2) == 3, "not the sum"
print("right")
"""


def write_lab(folder: Path, text: str, name: str = "F90_mini") -> Path:
    path = folder / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("lab", ALL, ids=[lab.path.stem for lab in ALL])
def test_every_lab_keeps_the_contract(lab: Any) -> None:
    assert find_violations(lab) == []
    assert all(need in {other.id for other in ALL} for need in lab.header.needs)


def test_labs_link_labs_that_exist() -> None:
    names = {f"{lab.path.stem}.ipynb" for lab in ALL}
    open_ends = {
        (lab.id, link)
        for lab in ALL
        for link in re.findall(r"\(([FSE]\d\d_\w+\.ipynb)\)", "\n".join(c.source for c in lab.cells))
        if link not in names
    }
    assert open_ends == set()


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        (' alt="', ' alternative="', "no alt text"),
        ('tags=["parity"]', 'tags=["picture"]', "shows nowhere that a library"),
        ('tags=["measured"]', "", "no measured surprise"),
        ('tags=["picture"]', "", "has no picture"),
        ('tags=["wrong"]', 'tags=["wrung"]', "unknown tag 'wrung'"),
        ("# says: length\n", "", "a wrong answer begins with"),
        ("import math\n", "import llmworks.core.errors\n", "is not public"),
        ("import math\n", "from llmworks.train import sft\n", "is not public"),
        ("**eigenvalues**", "eigenvalues", "topic 'eigenvalues'"),
        ("--set max_rank=16", "--set rank=16", "merge.extract has no field 'rank'"),
        ("llmworks merge extract --model", "llmworks merge extract --models", "has no input 'models'"),
        ("llmworks merge extract", "llmworks extract", "no such command"),
        ("--base base ", "", "merge.extract needs the input 'base'"),
        ("## Self-test", "## Questions", "has no section 'Self-test'"),
        ("<details><summary>What does", "<p>What does", "has 2 self-test questions"),
        ("Eckart and Young, 1936", "the error was 0.136", "a figure stands in the prose, 0.136"),
        ('"wheel"', '"whl"', ""),
        ("import importlib.util", "import importlib", "the second cell is the setup cell"),
        (', "project returns nothing"', "", "every assert of the check says what is wrong"),
        ("(F02_calculus.ipynb)", "(F02_calculus.html)", "links no next lab"),
        ("(1936)", "", ""),
        ("def norm(x):", "def norm(x:", "cell 4, line "),
    ],
)
def test_a_broken_contract_is_found(tmp_path: Path, old: str, new: str, found: str) -> None:
    text = (LABS / "F01_linear_algebra.py").read_text(encoding="utf-8")
    if not found:  # harmless: no violation
        assert find_violations(read_lab(write_lab(tmp_path, text, "F01_linear_algebra"))) == []
        return
    assert old in text
    path = write_lab(tmp_path, text.replace(old, new), "F01_linear_algebra")
    assert any(found in line for line in find_violations(read_lab(path))), find_violations(read_lab(path))


def test_a_wrong_header_or_name_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"F90_mini\.py: header, minutes: ") as error:
        read_lab(write_lab(tmp_path, MINI.replace("minutes: 1", "minutes: -1")))
    assert "\n" not in str(error.value)
    with pytest.raises(LabError, match="a lab is called F01_name"):
        read_lab(write_lab(tmp_path, MINI, "linear"))


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lab that keeps its promises, executed."""
    folder = tmp_path_factory.mktemp("lab")
    execute(read_lab(write_lab(folder, MINI)), folder / "out")
    return folder


def test_a_lab_is_executed_and_recorded(executed: Path) -> None:
    record = json.loads((executed / "out" / "record.json").read_text())
    assert record["exercises"] == {"1": ["add returns nothing", "this is the product"]}
    assert "core/errors.py" in record["llmworks"]
    assert 10 < record["peak_mb"] < 2048
    notebook = nbformat.read(executed / "out" / "F90_mini.ipynb", as_version=4)
    assert notebook.cells[0].source.startswith("# F90")
    assert [cell.outputs[-1].text for cell in notebook.cells if "check" in cell.metadata.get("tags", [])] == ["right\n"]


def test_the_learner_gets_no_solution(executed: Path) -> None:
    from labs.tools.notebooks import write_learner, write_page

    lab = read_lab(executed / "F90_mini.py")
    write_learner(lab, executed / "learner.ipynb")
    write_page(lab, executed / "out" / "F90_mini.ipynb", executed / "page.ipynb")
    learner, page = (nbformat.read(executed / f"{name}.ipynb", as_version=4) for name in ("learner", "page"))
    assert "a + b" not in str(learner)
    assert "a * b" not in str(learner)
    assert "def add(a, b): ..." in str(learner)
    (picture,) = [cell for cell in page.cells if "picture" in cell.metadata.get("tags", [])]
    assert picture.metadata.mystnb.image.alt.startswith("A straight line")
    assert "hide-cell" in next(cell.metadata.tags for cell in page.cells if "a + b" in cell.source)
    assert "a * b" not in str(page)
    write_page(lab, None, executed / "empty.ipynb")  # a lab that is not built
    assert "make labs" in nbformat.read(executed / "empty.ipynb", as_version=4).cells[0].source


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ('"x (m)"', '"x"', "the x axis says 'x': name it and its unit"),
        ("ax.plot([0, 1])", "ax.plott([0, 1])", "AttributeError"),
        ("ax.plot([0, 1])", "plt.close()", "is tagged 'picture' and draws none"),
        (
            'is not None, "add returns nothing"',
            'is None, "add returns nothing"',
            "the check says 'add returns nothing'",
        ),
        (
            'assert add(1, 2) is not None, "add returns nothing"',
            "add(1, 2) + 0",
            "on the stub the check fails with TypeError",
        ),
        ("!= 6", "!= 7", "the check says 'not the sum'"),
        ("return a + b", "return b", "cell 6 (assert add(1, 2)"),
        ("ax.plot([0, 1])", "import time; time.sleep(5)", "out of time"),
        ("ax.plot([0, 1])", "import os; os._exit(1)", "the kernel died"),
        ("ax.plot([0, 1])", "ax.plot([0, 1]); import sys; print('oh', file=sys.stderr)", "prints to stderr: oh"),
    ],
)
def test_a_lab_that_fails_says_where(tmp_path: Path, old: str, new: str, found: str) -> None:
    assert old in MINI
    text = MINI.replace(old, new)
    text = text.replace("budget_seconds: 30", "budget_seconds: 2") if "sleep" in new else text
    with pytest.raises(LabError) as error:
        execute(read_lab(write_lab(tmp_path, text)), tmp_path / "out")
    assert found in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_labs_run_without_network_and_are_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("bwrap"):
        pytest.fail("labs run in bubblewrap; install it with: apt-get install bubblewrap")
    monkeypatch.setattr(build, "BUILD", tmp_path / "build")
    monkeypatch.setattr(build, "PAGES", tmp_path / "pages")
    monkeypatch.setattr(build, "find_violations", lambda lab: [])
    ask = (
        "import socket\ntry:\n    socket.create_connection(('192.0.2.1', 80), 3)\n"
        "except OSError as e:\n    print('no network:', e)\n"
    )
    path = write_lab(tmp_path, MINI.replace("fig, ax", f"{ask}fig, ax", 1))
    _, ran = build.build_lab(read_lab(path))
    assert ran
    assert "no network: [Errno 101]" in (tmp_path / "pages" / "F90_mini.ipynb").read_text()
    assert build.build_lab(read_lab(path))[1] is False
    assert {p.name for p in (tmp_path / "pages").rglob("*.ipynb")} == {"F90_mini.ipynb"}
    path.write_text(path.read_text() + "\n# %%\nprint(1)\n")
    assert build.read_record(read_lab(path)) is None  # another text, another run


def test_a_change_of_the_code_that_a_lab_uses_runs_it_again(executed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = read_lab(executed / "F90_mini.py")
    before = build.compute_key(lab, ["core/errors.py"])
    copy = executed / "package"
    (copy / "core").mkdir(parents=True)
    shutil.copy(build.PACKAGE / "core" / "errors.py", copy / "core")
    monkeypatch.setattr(build, "PACKAGE", copy)
    assert build.compute_key(lab, ["core/errors.py"]) == before
    (copy / "core" / "errors.py").write_text("# changed\n")
    assert build.compute_key(lab, ["core/errors.py"]) != before


def test_selection_of_changed_labs_and_of_labs_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    log = f"labs/{ALL[1].path.stem}.py\nlabs/tools/lab.py\n"
    count = 0
    monkeypatch.setattr(build, "_git", lambda *words: {"log": log, "diff": "", "rev-list": str(count)}[words[0]])
    assert build.select(ALL, [], 0, 0) == ALL
    assert build.select(ALL, [], 5, 0) == [ALL[1]]
    assert build.select(ALL, [ALL[0].id], 0, 0) == [ALL[0]]
    seen = set()
    for count in range(len(ALL)):  # noqa: B007  read by the lambda
        chosen = build.select(ALL, [], 0, 2)
        assert len(chosen) == min(2, len(ALL))
        seen |= {lab.id for lab in chosen}
    assert seen == {lab.id for lab in ALL}
    with pytest.raises(LabError, match="no lab 'F99'"):
        build.select(ALL, ["F99"], 0, 0)


def test_an_error_in_a_notebook_is_one_line() -> None:
    """IPython shows what `_render_traceback_` returns."""
    code = (
        "from IPython.core.interactiveshell import InteractiveShell as S\n"
        "s = S.instance()\ns.run_cell('import llmworks; llmworks.load(\"asset:austin\")')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert lines == ["AssetError: unknown asset 'austin', did you mean 'austen'?; `llmworks assets list` lists all"]


def test_an_asset_that_cannot_be_fetched_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import llmworks.assets as assets

    monkeypatch.setenv("LLMWORKS_CACHE", str(tmp_path))

    def fail(package: Any, folder: Path) -> Path:
        raise AssetError("gensim==4.4.0: cannot be downloaded (no network); check the network connection")

    monkeypatch.setattr(assets, "download_verified", fail)
    with pytest.raises(AssetError, match=r"^asset 'wordsim353': .*, then run `llmworks assets fetch wordsim353`$"):
        assets.fetch("wordsim353")


def test_terms_are_found_under_their_heading() -> None:
    terms = dict(list_terms(next(lab for lab in ALL if lab.id == "F01")))
    assert terms["eigenvalues"] == "Eigenvalues and eigenvectors"
