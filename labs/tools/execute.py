"""Run one lab in a kernel of its own: `python -m labs.tools.execute LAB.py OUT`.

Every cell runs in order. Pictures are inspected while they are open. Each exercise is tried: its check has to fail on
the stub and on the usual wrong answers, with a message, and to pass on the solution. Writes `OUT/NAME.ipynb`, executed,
and `OUT/record.json`: seconds, memory, exercises, and the files of llmworks that the lab used.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from labs.tools.lab import Exercise, Lab, LabError, get_roles, read_lab

MEMORY_MB = 2048
# Runs in the kernel before the first cell: inspects each figure when it is drawn for the page.
INSPECTOR = """
_FAULTS = []

def _install():
    import re
    from matplotlib._pylab_helpers import Gcf
    from matplotlib.backend_bases import FigureCanvasBase

    def inspect(figure):
        shared = figure.get_supxlabel(), figure.get_supylabel()
        for axes in figure.axes:
            if axes.get_label() == "<colorbar>" or not (axes.has_data() or axes.images):
                continue
            if not axes.axison:
                if not (axes.get_title() or axes.texts):
                    _FAULTS.append("a picture without axes has no title")
                continue
            for name, axis, common in zip("xy", (axes.xaxis, axes.yaxis), shared):
                side = "labelbottom" if name == "x" else "labelleft"
                if not (axis.get_visible() and axis.get_tick_params().get(side, True) and len(axis.get_ticklocs())):
                    continue
                label = axis.get_label_text() or common
                if not re.search(r"\\(.+\\)", label):
                    _FAULTS.append(f"the {name} axis says {label!r}: name it and its unit, as 'time (s)'")

    draw = FigureCanvasBase.print_figure

    def print_figure(self, *arguments, **named):
        if any(manager.canvas.figure is self.figure for manager in Gcf.get_all_fig_managers()):  # the lab's own
            inspect(self.figure)
        return draw(self, *arguments, **named)

    FigureCanvasBase.print_figure = print_figure

_install()
del _install
"""
ENDING = """
def _end():
    import hashlib, json, pathlib, resource, sys, threading
    import llmworks
    package = pathlib.Path(llmworks.__file__).parent
    files = {pathlib.Path(m.__file__) for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
    used = sorted(f for f in files if package in f.parents)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    digests = {f.relative_to(package).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in used}
    torch = sys.modules.get("torch")
    print(json.dumps({"peak_mb": round(peak), "llmworks": digests, "threads": torch.get_num_threads() if torch else 1}))

_end()
"""


class Kernel:
    """A kernel that runs a lab's cells; silent code leaves no trace in the notebook."""

    def __init__(self, lab: Lab, client: NotebookClient) -> None:
        self.lab = lab
        self.client = client

    def run(self, cell: Any, index: int) -> None:
        """Run a cell of the notebook; LabError in one line when it fails."""
        try:
            self.client.execute_cell(cell, index)
        except CellExecutionError as error:
            said = " ".join(error.evalue.split())[:300]
            raise LabError(f"{self.lab.id}: cell {index + 1} ({_first_line(cell)}): {error.ename}: {said}") from None
        except CellTimeoutError:
            raise LabError(f"{self.lab.id}: cell {index + 1} ({_first_line(cell)}): out of time") from None
        except DeadKernelError:
            raise LabError(f"{self.lab.id}: cell {index + 1} ({_first_line(cell)}): the kernel died") from None

    def run_silent(self, code: str) -> tuple[str, str, str]:
        """Run code outside the notebook; return what it printed, and name and message of its exception."""
        cell = nbformat.v4.new_code_cell(code)
        name = message = ""
        first = self.lab.notebook.cells[0]
        try:
            self.client.execute_cell(cell, 0, store_history=False)
        except CellExecutionError as error:
            name, message = error.ename, error.evalue
        finally:  # nbclient puts what it executes into the notebook
            self.lab.notebook.cells[0] = first
        printed = "".join(output.get("text", "") for output in cell.outputs if output.output_type == "stream")
        return printed, name, message


def _first_line(cell: Any) -> str:
    return str(cell.source).partition("\n")[0][:60]


def _try_exercise(kernel: Kernel, exercise: Exercise, number: int) -> list[str]:
    """Check that the check refuses the stub (already run) and each wrong answer; return its messages."""
    messages = []
    for label, answer in (
        ("the stub", None),
        *((_first_line(cell), cell.source) for cell in exercise.wrong),
    ):
        if answer is not None:
            _, name, message = kernel.run_silent(answer)
            if name:
                raise LabError(f"{kernel.lab.id}: exercise {number}, {label}: does not run: {name}: {message}")
        _, name, message = kernel.run_silent(exercise.check.source)
        if name != "AssertionError" or not message:
            fails = f"fails with {name}: {message}" if name else "passes"
            raise LabError(
                f"{kernel.lab.id}: exercise {number}: on {label} the check {fails}, not with an assert's message"
            )
        expected = label.removeprefix("# says: ")
        if answer is not None and expected not in message:
            raise LabError(f"{kernel.lab.id}: exercise {number}: on {expected!r} the check says {message!r}")
        messages.append(message)
    return messages


def execute(lab: Lab, out: Path) -> dict[str, Any]:
    """Run a lab and write its executed notebook and its record.

    Errors: LabError, in one line, for a cell that fails, a picture without labels, an exercise whose check is wrong,
    and a lab that needs more than twice its time or 2 GB.
    """
    exercises = {id(e.check): (e, n) for n, e in enumerate(lab.list_exercises(), 1)}
    started = time.monotonic()
    tried = {}
    with tempfile.TemporaryDirectory(prefix="lab-") as folder:
        client = NotebookClient(
            lab.notebook,
            timeout=2 * lab.header.budget_seconds,
            kernel_name="python3",
            resources={"metadata": {"path": folder}},
        )
        with client.setup_kernel():
            kernel = Kernel(lab, client)
            kernel.run_silent(INSPECTOR)
            for index, cell in enumerate(lab.cells):
                roles = get_roles(cell)
                if cell.cell_type != "code" or "wrong" in roles:
                    continue
                if "solution" in roles:  # the stub has run: what does the check say to it, and to wrong answers?
                    exercise, number = next((e, n) for e, n in exercises.values() if e.solution is cell)
                    tried[number] = _try_exercise(kernel, exercise, number)
                kernel.run(cell, index)
                faults, name, message = kernel.run_silent("print('\\n'.join(_FAULTS)); _FAULTS.clear()")
                if faults.strip() or name:
                    raise LabError(f"{lab.id}: cell {index + 1}: {(faults.strip() or message).splitlines()[0]}")
                loud = [o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stderr"]
                if loud:
                    raise LabError(f"{lab.id}: cell {index + 1} prints to stderr: {' '.join(loud[0].split())[:200]}")
                for output in cell.outputs:
                    if found := re.search(r"\{[a-z_]+[^{}]*\}", output.get("data", {}).get("text/markdown", "")):
                        raise LabError(f"{lab.id}: cell {index + 1}: {found[0]} is not formatted: an f is missing")
                if "picture" in roles and not any("image/png" in o.get("data", {}) for o in cell.outputs):
                    raise LabError(f"{lab.id}: cell {index + 1}: is tagged 'picture' and draws none")
            printed, _, message = kernel.run_silent(ENDING)
    seconds = time.monotonic() - started
    if not printed:
        raise LabError(f"{lab.id}: no record of the run: {message}")
    record = {
        "lab": lab.path.stem,
        "seconds": round(seconds, 1),
        **json.loads(printed),
        "exercises": tried,
    }
    if seconds > 2 * lab.header.budget_seconds:
        raise LabError(f"{lab.id}: took {seconds:.0f} s, its budget is {lab.header.budget_seconds} s")
    if record["peak_mb"] > MEMORY_MB:
        raise LabError(f"{lab.id}: used {record['peak_mb']} MB of memory, at most {MEMORY_MB} are allowed")
    if record["threads"] != 1:
        raise LabError(f"{lab.id}: torch used {record['threads']} threads; a lab runs with one")
    out.mkdir(parents=True, exist_ok=True)
    nbformat.write(lab.notebook, out / f"{lab.path.stem}.ipynb")
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def main(arguments: list[str]) -> int:
    """Run the lab named first into the folder named second; one line on stderr and exit code 1 when it fails."""
    warnings.simplefilter("ignore")
    try:
        execute(read_lab(Path(arguments[0])), Path(arguments[1]))
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
