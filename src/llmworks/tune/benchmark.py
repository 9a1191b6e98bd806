"""Stage `tune.benchmark`: what it takes to run a model here: its memory, how fast it reads and writes, and what it says.

Measured in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from pydantic import Field

from llmworks.core.artifact import Config, Model, Report
from llmworks.core.context import Context
from llmworks.core.errors import ModelError

PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a Python function that adds two numbers.",
    "Name three cities in Italy as a JSON list.",
)


class BenchmarkConfig(Config):
    """What it is asked."""

    prompts: list[str] = Field(list(PROMPTS), min_length=1, description="what it is asked; it answers greedily")
    max_tokens: int = Field(48, gt=0, description="longest answer")
    prompt_tokens: int = Field(256, gt=1, description="tokens of the text by which reading is measured")
    repetitions: int = Field(3, gt=0, description="times that reading is measured; the fastest counts")


def benchmark(config: BenchmarkConfig, model: Model, ctx: Context) -> Report:
    """Memory in bytes, speeds in tokens a second, answers. Speeds are of this machine and of whatever else it does.

    Errors: ModelError when the model cannot be run.
    """
    if model.format == "http":
        raise ModelError(f"{model.name}: runs elsewhere, so that nothing can be measured of it here")
    asked = {
        "path": str(model.gguf_path if model.format == "gguf" else model.path),
        "format": model.format,
        **config.model_dump(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "llmworks.tune.benchmark_worker"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ModelError(
            f"{model.name}: cannot be run"
            f" ({(done.stderr.strip().splitlines() or ['it ended with ' + str(done.returncode)])[-1][:200]})"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    metrics = {
        name: found[name] for name in ("peak_memory", "prefill_speed", "decode_speed") if found[name] is not None
    }
    ctx.report.title = f"Running {model.name}"
    writes = (
        f"writes {found['decode_speed']:,.1f}"
        if found["decode_speed"] is not None
        else "ends each answer at its first token"
    )
    ctx.report.lead = f"{found['peak_memory'] / 1e6:,.0f} MB at most; of tokens it reads {found['prefill_speed']:,.0f} a second and {writes}."
    ctx.report.data = {"metrics": metrics, "completions": dict(zip(config.prompts, found["completions"], strict=True))}
    ctx.report.samples(
        "What it says",
        [{"prompt": prompt, "answer": answer} for prompt, answer in ctx.report.data["completions"].items()],
    )
    return Report(ctx.out, metrics=metrics, about={"model": model.digest})
