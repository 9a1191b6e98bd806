"""Make tests/fixtures/bfcl_cases.json: calls and the verdict of BFCL's own checker on them.

Needs the unpacked wheel of bfcl-eval==2026.3.23 (Apache-2.0):  python tests/oracles/bfcl_cases.py UNPACKED_WHEEL
Only its checker is imported; the table of hosted models that it also imports is left out.
"""

import copy
import json
import random
import sys
import types
from pathlib import Path

sys.path.insert(0, sys.argv[1])
stand_in = types.ModuleType("bfcl_eval.constants.model_config")
stand_in.MODEL_CONFIG_MAPPING = {"m": types.SimpleNamespace(underscore_to_dot=False)}
sys.modules["bfcl_eval.constants.model_config"] = stand_in

from bfcl_eval.constants.enums import Language  # noqa: E402
from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker  # noqa: E402

from llmworks.data.published.bfcl import convert_row  # noqa: E402

DATA = Path(sys.argv[1]) / "bfcl_eval" / "data"
FILE = "BFCL_v4_simple_python.json"


def mutate(arguments: dict, rng: random.Random) -> dict:
    """Change one thing about the arguments."""
    out = copy.deepcopy(arguments)
    if not out:
        return {"extra": 1}
    name = rng.choice(sorted(out))
    value = out[name]
    choices = ["drop", "extra", "none", "string", "list", "bool"]
    if isinstance(value, str):
        choices += ["upper", "space", "punctuation", "other", "quote", "int"] * 2
    if isinstance(value, (int, float)):
        choices += ["float", "plus", "int", "text"] * 2
    if isinstance(value, list):
        choices += ["reverse", "shorter", "item", "upper-items", "floats"] * 2
    if isinstance(value, dict):
        choices += ["key", "lost"] * 3
    match rng.choice(choices):
        case "drop":
            del out[name]
        case "extra":
            out["surplus"] = 1
        case "none":
            out[name] = None
        case "string" | "text":
            out[name] = str(value)
        case "list":
            out[name] = [value]
        case "bool":
            out[name] = True
        case "upper":
            out[name] = value.upper()
        case "space":
            out[name] = value.replace(" ", "  ")
        case "punctuation":
            out[name] = value.replace(" ", "-") + "."
        case "quote":
            out[name] = value + "'"
        case "other":
            out[name] = value + "x"
        case "int":
            out[name] = 7
        case "float":
            out[name] = float(value)
        case "plus":
            out[name] = value + 1
        case "reverse":
            out[name] = value[::-1]
        case "shorter":
            out[name] = value[:-1]
        case "item":
            out[name] = [*value, "x"]
        case "upper-items":
            out[name] = [v.upper() if isinstance(v, str) else v for v in value]
        case "floats":
            out[name] = [float(v) if isinstance(v, int) else v for v in value]
        case "key":
            out[name] = {**value, "surplus": 1}
        case "lost":
            out[name] = dict(list(value.items())[1:])
    return out


def main() -> None:
    """Write the fixture."""
    rng = random.Random(0)
    answers = {a["id"]: a for a in map(json.loads, (DATA / "possible_answer" / FILE).read_text().splitlines())}
    cases = []
    for question in map(json.loads, (DATA / FILE).read_text().splitlines()):
        answer = answers[question["id"]]
        _, _, call, _ = convert_row(question, answer)
        optional = {k: next((v for v in vs if v != ""), None) for k, vs in answer["ground_truth"][0][call.name].items()}
        tried = [
            call.arguments,
            {k: v for k, v in optional.items() if v is not None},
            mutate(call.arguments, rng),
            mutate(call.arguments, rng),
        ]
        for arguments in tried:
            try:
                verdict = ast_checker(
                    question["function"],
                    [{call.name: copy.deepcopy(arguments)}],
                    answer["ground_truth"],
                    Language.PYTHON,
                    "simple_python",
                    "m",
                )["valid"]
            except Exception:  # the checker itself fails on some malformed values: no verdict to agree with
                continue
            cases.append({"id": question["id"], "name": call.name, "arguments": arguments, "valid": verdict})
    out = Path(__file__).parents[1] / "fixtures" / "bfcl_cases.json"
    out.write_text("[\n" + ",\n".join(json.dumps(c) for c in cases) + "\n]\n")
    print(len(cases), "cases,", sum(c["valid"] for c in cases), "valid")


if __name__ == "__main__":
    main()
