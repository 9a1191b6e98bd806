"""A reward function from the user's own file, run in the sandbox: what it raises, or how long it takes, is told of the answer, and nothing waits for it. Knows no training."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmworks.errors import UserError
from llmworks.sandbox import Limits, run_python

START = 10.0  # seconds for the interpreter and the imports of the file
HARNESS = '''\
import importlib.util, json, os, signal, sys
tell = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
cases = json.load(open("cases.json"))
def late(*_): raise TimeoutError("took longer than %g s" % cases["seconds"])
signal.signal(signal.SIGALRM, late)
spec = importlib.util.spec_from_file_location("reward", "reward.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
function = getattr(module, cases["function"])
print(json.dumps({"ready": True}), file=tell, flush=True)
for number, case in cases["cases"]:
    signal.setitimer(signal.ITIMER_REAL, cases["seconds"])
    try:
        found = {"value": float(function(case["prompt"], case["completion"], case["row"]))}
    except BaseException as error:
        found = {"error": (type(error).__name__ + ": " + str(error))[:200]}
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps({"number": number, **found}), file=tell, flush=True)
'''


class UserCode:
    """`FILE.py:FUNCTION`, called as function(prompt, completion, row): prompt a list of {role, content}, completion a text, row what its row holds. It gives a number.

    It has the standard library and what is installed for the base interpreter, no network and no files. Errors: UserError for a file or a function that is not there.
    """

    def __init__(self, name: str, seconds: float) -> None:
        file, _, self.function = name.rpartition(":")
        self.name, self.seconds, path = name, seconds, Path(file)
        try:
            self.text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"rewards: {name!r}: {path} cannot be read ({error.strerror})") from None
        except UnicodeDecodeError:
            raise UserError(f"rewards: {name!r}: {path} is no UTF-8 text") from None
        try:
            tree = ast.parse(self.text)
        except (SyntaxError, ValueError) as error:
            raise UserError(f"rewards: {name!r}: {path} is no Python ({error})") from None
        functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        if self.function not in functions:
            raise UserError(f"rewards: {name!r}: {path} has no function {self.function!r}; it has {', '.join(functions) or 'none'}")

    def values(self, cases: Sequence[Mapping[str, Any]]) -> list[float | str]:
        """A number of each case {prompt, completion, row}, or what went wrong with it."""
        found: dict[int, float | str] = {}
        while todo := [(number, case) for number, case in enumerate(cases) if number not in found]:
            limits = Limits(seconds=START + self.seconds * len(todo), memory_mb=1024)
            given = json.dumps({"function": self.function, "seconds": self.seconds, "cases": todo})
            outcome = run_python(HARNESS, files={"reward.py": self.text, "cases.json": given}, limits=limits)
            lines = [json.loads(line) for line in outcome.stdout.splitlines() if line.startswith("{")]
            told = [line for line in lines if "number" in line]
            found |= {line["number"]: line.get("value", line.get("error")) for line in told}
            if not any("ready" in line for line in lines):
                last = next((line for line in reversed(outcome.stderr.splitlines()) if line.strip()), f"ended by {outcome.ended}")
                raise UserError(f"rewards: {self.name!r}: the file cannot be run: {last[:200]}")
            left = [number for number, _ in todo if number not in found]
            if left:  # the first of them ended the program, or did not end
                found[left[0]] = f"reached the limit of {outcome.ended}" if outcome.ended != "exit" else f"ended the program (exit code {outcome.code})"
        return [found[number] for number in range(len(cases))]
