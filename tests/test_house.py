"""The house stands as designed: imports go down the rows, stage files are torch-free, help is instant, table and docs
agree.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

from llmworks.commands.table import COMMANDS, Command
from llmworks.runtime.config.help import config_help
from llmworks.runtime.resolve import resolve_stage
from llmworks.runtime.stages import STAGES
from tests.budgets import BUDGETS, NEW_ROOM, TOTAL
from tests.plant_faults import read_faults
from tests.rows import ROWS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "llmworks"

ORDERED = (0, 8)  # rows in which the order of the list holds
FILES, SHARED, LINES, STATEMENTS = 12, 3, 400, 60  # of machinery in a folder, beside stages, of a file, of a function
FAMILIES = ("merge/methods", "commands")  # one method, one command a file
NOUNS_OF_RECIPES = ("workflows", "commands", "importers")  # who may name stages besides the table


PRIVATE = frozenset(
    ("told", "said", "asked", "asking", "heard", "chances", "looks", "thought", "spoken", "worth", "among", "went")
)
PARTICIPLE = re.compile(
    r"[a-z]+(ed|ing)|told|said|thought|found|made|given|taken|held|kept|drawn|written|shown|known|sent"
)
NO_PARTICIPLES = frozenset(("seed", "feed", "embed", "embedding"))


def room(module: str) -> str:
    """`llmworks.model.lora.lora` -> `model`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def place(name: str) -> tuple[int, int]:
    """(row, position) of a room."""
    for row, rooms in enumerate(ROWS):
        if name in rooms:
            return row, list(rooms).index(name)
    raise AssertionError(f"{name} has no row in the house")


def imports_of(file: Path) -> list[str]:
    """llmworks modules that a file imports, anywhere in it."""
    found: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "llmworks":
            found += [f"llmworks.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llmworks."):
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("llmworks.")]
    return found


def allowed(importer: str, imported: str) -> bool:
    """Whether a room may know another."""
    if importer == imported:
        return True
    (row, at), (other_row, other_at) = place(importer), place(imported)
    return other_row < row or (other_row == row and row in ORDERED and other_at < at)


def violations(source: Path) -> list[str]:
    """Every import that goes up or sideways."""
    found = []
    for file in sorted(source.rglob("*.py")):
        importer = file.relative_to(source).with_suffix("").parts[0]
        if importer == "__init__":
            continue
        found += [f"{file.name} imports {m}" for m in imports_of(file) if not allowed(importer, room(m))]
    return found


def test_imports_go_down_the_rows() -> None:
    assert violations(SOURCE) == []


def test_the_import_rule_finds_a_violation(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "bad.py").write_text(
        "from llmworks.train.loop.loop import train\nfrom llmworks.score import SCORES\n"
    )
    assert len(violations(tmp_path)) == 2


def test_stage_files_are_torch_free() -> None:
    names = list(STAGES)
    code = (
        f"import sys, warnings\nfrom llmworks.runtime.resolve import resolve_stage\nfor name in {names!r}:\n   "
        " resolve_stage(name)\n    assert 'torch' not in sys.modules and 'transformers' not in sys.modules, name"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_stage_is_documented() -> None:
    for name in STAGES:
        stage = resolve_stage(name)
        assert stage.help, name
        assert all(description for _, _, description in config_help(stage.config)), name
        assert stage.inputs, name


def test_help_is_instant_and_light() -> None:
    def cpu() -> float:
        import resource

        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = cpu()
    done = subprocess.run([sys.executable, "-m", "llmworks.cli", "--help"], capture_output=True, text=True, check=True)
    assert cpu() - before < 0.3
    for name, stage in STAGES.items():
        assert (f"  {name.replace('.', ' ')} " in done.stdout) is not stage.internal, name
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout, name
    code = (
        "import sys\nfrom llmworks.cli import main\nmain(['--help'])\nassert not {'torch', 'pydantic', 'rich'} &"
        " set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    "words", [["run", "--help"], ["train", "sft", "--help"], ["evaluate", "--help"], ["evaluate", "compare", "--help"]]
)
def test_command_help(words: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "llmworks.cli", *words], capture_output=True, text=True, check=True)
    assert "usage: llmworks" in done.stdout


def test_docs_are_those_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    pages = generate.pages()
    for name, stage in STAGES.items():
        page = "" if stage.internal else pages[ROOT / "docs" / "stages" / f"{name.partition('.')[0]}.md"]
        assert stage.internal or page.count(f"\n## {name}\n") == 1
    assert {*(ROOT / "docs" / "stages").iterdir()} == {path for path in pages if path.parent.name == "stages"}
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale; run make docs"


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    named = {".".join(("llmworks", *f.relative_to(SOURCE).with_suffix("").parts)): f for f in SOURCE.rglob("*.py")}
    return {name.removesuffix(".__init__"): file for name, file in named.items()}


def graph(source: dict[str, Path]) -> nx.DiGraph:
    """Imports from file to file, anywhere in them; a name that is a module itself counts as that."""
    found = nx.DiGraph()
    for name, file in source.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                to = [f"{node.module}.{alias.name}" for alias in node.names]
                found.add_edges_from((name, one if one in source else node.module) for one in to)
            elif isinstance(node, ast.Import):
                found.add_edges_from((name, alias.name) for alias in node.names)
    found.remove_nodes_from([node for node in found if node not in source])
    found.remove_edges_from([(a, b) for a, b in found.edges if a == b or a == "llmworks" or b == "llmworks"])
    return found


def test_no_files_import_one_another_in_a_circle(tmp_path: Path) -> None:
    assert [sorted(c) for c in nx.strongly_connected_components(graph(modules())) if len(c) > 1] == []
    (tmp_path / "a.py").write_text("def f():\n    from llmworks.b import g\n")
    (tmp_path / "b.py").write_text("import llmworks.a\n")
    planted = graph({"llmworks.a": tmp_path / "a.py", "llmworks.b": tmp_path / "b.py"})
    assert any(len(c) > 1 for c in nx.strongly_connected_components(planted))


def stage_file(name: str) -> str:
    """`data.dedup` -> `data/dedup.py`; of a stage that is a group's own name `merge/merge.py`."""
    group, _, stage = name.partition(".")
    return f"{group}/{(stage or group).replace('-', '_')}.py"


def test_a_stage_is_in_the_file_of_its_name() -> None:
    for name, stage in STAGES.items():
        module, _, function = stage.target.partition(":")
        file = stage_file(name)
        assert module == "llmworks." + file.removesuffix(".py").replace("/", "."), f"{name} belongs into {file}"
        assert function == file.rpartition("/")[2].removesuffix(".py"), f"{name}: its function is called {function}"
        assert (SOURCE / file).exists()


def test_a_command_is_in_the_file_of_its_name() -> None:
    shared = {"__init__", "parsers", "output", "session", "launch", "table", "stage"}
    files = {file.stem for file in (SOURCE / "commands").glob("*.py")} - shared
    assert files == {Command.get_module_name(name) for name in COMMANDS}
    for name in COMMANDS:
        names = {
            node.name
            for node in ast.parse((SOURCE / "commands" / f"{Command.get_module_name(name)}.py").read_text()).body
            if isinstance(node, ast.FunctionDef)
        }
        assert "build_parser" in names, name


def crowded(source: Path) -> list[str]:
    """Folders with more files than a newcomer can look through."""
    own = {stage_file(name) for name in STAGES}
    typed = {Command.get_module_name(name) for name in COMMANDS}  # `lineage/diff.py` is what `llmworks diff` computes
    found = []
    for folder in (source, *(d for d in source.rglob("*") if d.is_dir())):
        where = folder.relative_to(source).as_posix()
        files = [f for f in folder.glob("*.py") if f.name != "__init__.py"]
        machinery = [f for f in files if f"{where}/{f.name}" not in own and f.stem not in typed]
        bound = SHARED if any(f"{where}/{f.name}" in own for f in files) else FILES
        if where == ".":
            machinery, bound = [f for f in files if f.name not in ("cli.py", "__main__.py")], 0
        if where not in FAMILIES and len(machinery) > bound:
            found.append(f"{where}: {len(machinery)} files that are no stages, at most {bound}; make a folder by noun")
    return found


def test_rooms_are_not_crowded(tmp_path: Path) -> None:
    assert crowded(SOURCE) == []
    (tmp_path / "model").mkdir()
    for name in ("new", "a", "b", "c", "d"):
        (tmp_path / "model" / f"{name}.py").touch()
    (tmp_path / "loose.py").touch()
    assert len(crowded(tmp_path)) == 2


def large(file: Path) -> list[str]:
    """What is too long in a file."""
    text = file.read_text(encoding="utf-8")
    found = [f"{file}: {text.count(chr(10))} lines, split it by noun"] if text.count("\n") > LINES else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            size = (node.end_lineno or 0) - node.lineno + 1
            found += (
                [f"{file}:{node.lineno}: {node.name} has {size} lines, name its steps"] if size > STATEMENTS else []
            )
    return found + [f"{file}:{at}: wide" for at, line in enumerate(text.split("\n"), 1) if len(line) > 120]


def test_files_and_functions_are_small(tmp_path: Path) -> None:
    assert [line for file in SOURCE.rglob("*.py") for line in large(file)] == []
    planted = tmp_path / "planted.py"
    planted.write_text("def f():\n" + "    x = 1\n" * 400 + "y = '" + "z" * 120 + "'\n")
    assert len(large(planted)) == 3


def named_stages(file: Path, room: str) -> list[str]:
    """Names of other rooms' stages that stand in a file as texts of their own."""
    names = {name for name in STAGES if name.partition(".")[2] and name.partition(".")[0] != room}
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return [f"{file}:{n.lineno}: {n.value}" for n in nodes if isinstance(n, ast.Constant) and n.value in names]


def test_stages_are_named_in_the_table_and_where_several_run(tmp_path: Path) -> None:
    """Elsewhere a room says only the names of its own stages, for cards and messages."""
    found = []
    for file in SOURCE.rglob("*.py"):
        first = file.relative_to(SOURCE).parts[0]
        if first not in NOUNS_OF_RECIPES and file != SOURCE / "runtime" / "stages.py":
            found += named_stages(file, first)
    assert found == []
    (tmp_path / "a.py").write_text("def f(name):\n    return name == 'train.sft'\n")
    assert len(named_stages(tmp_path / "a.py", "runtime")) == 1


def private_names(file: Path) -> list[str]:
    """Names that are no words of the field: functions that are no verbs or nouns, and any name of `PRIVATE` words."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        name, words = "", set[str]()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            name = node.name.strip("_") if not node.name.endswith("__") else ""
            stage = stage_file(f"{file.parent.name}.{name}").endswith(f"/{file.name}")
            decorated = {getattr(d, "id", getattr(d, "attr", "")) for d in node.decorator_list}
            if PARTICIPLE.fullmatch(name) and name not in NO_PARTICIPLES and not stage and "property" not in decorated:
                found.append(f"{file}:{node.lineno}: {node.name} is a bare participle; a function is a verb")
        elif isinstance(node, ast.ClassDef):
            name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", node.name)
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            name = node.attr
        words = set(name.lower().split("_")) & PRIVATE
        found += [f"{file}:{getattr(node, 'lineno', 0)}: {name}: {word} is no word of the field" for word in words]
    return found


def test_names_are_words_of_the_field(tmp_path: Path) -> None:
    found = [name for file in SOURCE.rglob("*.py") for name in private_names(file)]
    assert found == []
    (tmp_path / "planted.py").write_text(
        "def weighed(): ...\ndef f(chances): ...\nclass WayTold: ...\nclass A:\n    looks: int = 0\n"
    )
    assert len(private_names(tmp_path / "planted.py")) == 4


def public_classes(source: Path) -> dict[str, list[str]]:
    """Files of each public class name."""
    found: dict[str, list[str]] = {}
    for file in source.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(str(file.relative_to(source)))
    return found


def test_no_two_public_classes_have_one_name(tmp_path: Path) -> None:
    assert {name: files for name, files in public_classes(SOURCE).items() if len(files) > 1} == {}
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text("class Row: ...\n")
    assert len(public_classes(tmp_path)["Row"]) == 2


def test_only_the_session_executes() -> None:
    callers = [
        file.relative_to(SOURCE).as_posix()
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "execute"
    ]
    assert set(callers) == {"runtime/session.py"}


def test_the_session_reserves_no_input() -> None:
    """Inputs are given to `make` by name, beside its own words."""
    for name in STAGES:
        assert not {"kind", "config", "out", "stage", "self"} & set(resolve_stage(name).inputs), name


def test_tests_are_found_by_the_name_of_their_file() -> None:
    """`tests/ROOM/test_NAME.py`: NAME is a file or folder of the room, or the room; more may follow behind a `_`."""
    lost = []
    for test in (ROOT / "tests").glob("*/test_*.py"):
        room = test.parent.name
        known = {room, *(path.stem for path in (SOURCE / room).rglob("*") if path.stem != "__init__")}
        known |= {name.partition(".")[2].replace("-", "_") for name in STAGES if name.startswith(f"{room}.")}
        stem = test.stem.removeprefix("test_")
        if not any(stem == name or stem.startswith(f"{name}_") for name in known):
            lost.append(str(test.relative_to(ROOT)))
    assert lost == []


def test_planted_faults_quote_the_code() -> None:
    """`make faults` runs rarely: a fault whose line or test was renamed is found here."""
    for fault in read_faults(ROOT / "tests" / "faults.md"):
        lines = (SOURCE / fault.file).read_text(encoding="utf-8").splitlines()
        assert sum(line.strip() == fault.line for line in lines) == 1, fault
        file, _, test = fault.test.partition("::")
        assert f"def {test.partition('[')[0]}(" in (ROOT / file).read_text(encoding="utf-8"), fault


def test_the_suite_stays_short() -> None:
    """Every folder of tests has a budget; all of them, and the rooms without tests, are within the total."""
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert set(BUDGETS) == {"", *folders}
    to_come = {name for row in ROWS for name in row} - folders - {"commands", "cli", "__main__"}
    assert sum(BUDGETS.values()) + NEW_ROOM * len(to_come) <= TOTAL


@pytest.mark.parametrize(
    ("file", "holds"),
    [
        ("quantize/algorithms/gptq.py", "def _update_columns("),  # where GPTQ updates its columns
        ("commands/merge.py", "workflows.merge_file"),  # what `llmworks merge` runs
        ("tokenize/chat/templates.py", "def render_masked("),  # where a chat row becomes a loss mask
        ("align/losses/policy.py", "cispo"),  # where a loss is added to GRPO
        ("generate/engines/torch.py", "class TorchEngine"),  # beside which an engine is added
    ],
)
def test_a_newcomer_finds(file: str, holds: str) -> None:
    assert holds in (SOURCE / file).read_text(encoding="utf-8")


def test_project_names_no_place_or_host() -> None:
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in files:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".txt") or path.name == "Makefile":
            text = path.read_text(encoding="utf-8")
            for word in ("/ro" + "ot/", "files.python" + "hosted", "pypi" + ".org"):
                assert word not in text, f"{name} names {word}"
