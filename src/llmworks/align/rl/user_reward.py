"""Reward functions from the user's own file, run in the sandbox.

An exception or a timeout is recorded for the completion that caused it and does not block the others.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmworks.core.errors import UserError
from llmworks.sandbox import Limits, run_python

STARTUP_SECONDS = 10.0  # seconds for the interpreter and the imports of the file
MAX_BATCH = 1000  # completions per sandboxed program
HARNESS = """\
import importlib.util, json, os, select, signal, sys
tell = os.fdopen(os.dup(1), "w")
null = os.open(os.devnull, os.O_WRONLY)
os.dup2(null, 1)
given = json.load(open("cases.json"))
seconds, cases = given["seconds"], given["cases"]
spec = importlib.util.spec_from_file_location("reward", "reward.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
function = getattr(module, given["function"])
print(json.dumps({"ready": True}), file=tell, flush=True)
os.dup2(null, 2)
def late(*_): raise TimeoutError("took longer than %g s" % seconds)
def work(first, out):
    tell.close()
    signal.signal(signal.SIGALRM, late)
    for number, case in cases[first:]:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            found = {"value": float(function(case["prompt"], case["completion"], case["row"]))}
        except BaseException as error:
            found = {"error": (type(error).__name__ + ": " + str(error))[:200]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(out, (json.dumps({"number": number, **found}) + chr(10)).encode())
    os._exit(0)
at = 0
while at < len(cases):  # a child of its own, so that what does not hear its alarm can be ended
    source, out = os.pipe()
    child = os.fork()
    if not child:
        os.close(source)
        work(at, out)
    os.close(out)
    rest = b""
    why = ""
    while True:
        if not select.select([source], [], [], seconds + 1)[0]:
            why = "took longer than %g s" % seconds
            break
        piece = os.read(source, 65536)
        if not piece:
            break
        *lines, rest = (rest + piece).split(b"\\n")
        for line in lines:
            try:
                said = json.loads(line)
                fits = said["number"] == cases[at][0] and ("value" in said or "error" in said)
            except (ValueError, TypeError, LookupError):
                fits = False
            if fits:  # what the function itself wrote there is no answer
                print(json.dumps(said), file=tell, flush=True)
                at += 1
    os.kill(child, signal.SIGKILL)
    os.close(source)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if at < len(cases):
        ended = "signal %d" % -code if code < 0 else "exit code %d" % code
        said = {"number": cases[at][0], "error": why or "ended the program (%s)" % ended}
        print(json.dumps(said), file=tell, flush=True)
        at += 1
"""


class UserRewardFunction:
    """`FILE.py:FUNCTION`, called as function(prompt, completion, row); returns a number.

    `prompt`: a list of {role, content}; `completion`: a string; `row`: the fields of its row. The sandbox has the
    standard library and the packages of the base interpreter, no network and no files.

    Errors: UserError for a missing file or function.
    """

    def __init__(self, name: str, timeout: float) -> None:
        file, _, self.function = name.rpartition(":")
        self.name, self.timeout, path = name, timeout, Path(file)
        try:
            self.source = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"reward_funcs: {name!r}: {path} cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise UserError(f"reward_funcs: {name!r}: {path} is not UTF-8 text") from None
        try:
            tree = ast.parse(self.source)
        except (SyntaxError, ValueError) as error:
            raise UserError(f"reward_funcs: {name!r}: {path} is not valid Python ({error})") from None
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        if self.function not in functions:
            raise UserError(
                f"reward_funcs: {name!r}: {path} has no function {self.function!r}; it has"
                f" {', '.join(functions) or 'none'}"
            )

    def compute_rewards(self, cases: Sequence[Mapping[str, Any]]) -> list[float | str]:
        """Return a number for each case {prompt, completion, row}, or the reason why there is none."""
        found: dict[int, float | str] = {}
        while todo := [(number, case) for number, case in enumerate(cases) if number not in found][:MAX_BATCH]:
            limits = Limits(seconds=STARTUP_SECONDS + (self.timeout + 1.5) * len(todo), memory_mb=1024)
            given = json.dumps({"function": self.function, "seconds": self.timeout, "cases": todo})
            outcome = run_python(HARNESS, files={"reward.py": self.source, "cases.json": given}, limits=limits)
            lines = [line for text in outcome.stdout.splitlines() if (line := _parse_line(text)) is not None]
            found |= {line["number"]: _get_value(line) for line in lines if "number" in line}
            if not any("ready" in line for line in lines):
                last = next(
                    (line for line in reversed(outcome.stderr.splitlines()) if line.strip()),
                    f"ended by {outcome.stop_reason}",
                )
                raise UserError(f"reward_funcs: {self.name!r}: the file cannot be run: {last[:200]}")
            left = [number for number, _ in todo if number not in found]
            if left:  # the calling program was killed with it
                found[left[0]] = (
                    f"reached the limit of {outcome.stop_reason}"
                    if outcome.stop_reason != "exit"
                    else f"ended the program (exit code {outcome.exit_code})"
                )
        return [found[number] for number in range(len(cases))]


def _parse_line(text: str) -> dict[str, Any] | None:
    """Parse a line of the program's output as a JSON object; None for anything else."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None


def _get_value(line: Mapping[str, Any]) -> float | str:
    """Return the number, or the reason as encodable text."""
    value = line.get("value")
    return (
        float(value)
        if isinstance(value, (int, float))
        else str(line.get("error", "returned nothing")).encode("utf-8", "replace").decode()
    )
