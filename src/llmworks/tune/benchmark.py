"""Stage `tune.benchmark`: measure a model's inference on this machine: peak memory, prefill and decode speed, samples.

Runs in a separate process.
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
    """Benchmark settings."""

    prompts: list[str] = Field(
        list(PROMPTS), min_length=1, description="prompts for sample completions (greedy decoding)"
    )
    max_tokens: int = Field(48, gt=0, description="maximum new tokens of a completion")
    prompt_tokens: int = Field(256, gt=1, description="prompt tokens of the prefill benchmark")
    repetitions: int = Field(3, gt=0, description="repetitions of the prefill benchmark; the fastest counts")


def benchmark(config: BenchmarkConfig, model: Model, ctx: Context) -> Report:
    """Measure peak memory in bytes, speeds in tokens per second, and completions. Speeds depend on this machine's load.

    Errors: ModelError when the model cannot be run.
    """
    if model.format == "http":
        raise ModelError(f"{model.name}: is a remote model and cannot be benchmarked here")
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
            f" ({(done.stderr.strip().splitlines() or ['exit code ' + str(done.returncode)])[-1][:200]})"
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    metrics = {
        name: found[name] for name in ("peak_memory", "prefill_speed", "decode_speed") if found[name] is not None
    }
    ctx.report.title = f"Benchmark of {model.name}"
    writes = (
        f"decode {found['decode_speed']:,.1f} tokens/s"
        if found["decode_speed"] is not None
        else "decode not measured (each completion ended at its first token)"
    )
    ctx.report.subtitle = (
        f"Peak memory {found['peak_memory'] / 1e6:,.0f} MB; prefill {found['prefill_speed']:,.0f} tokens/s, {writes}."
    )
    ctx.report.data = {"metrics": metrics, "completions": dict(zip(config.prompts, found["completions"], strict=True))}
    ctx.report.add_samples(
        "Sample completions",
        [{"prompt": prompt, "answer": answer} for prompt, answer in ctx.report.data["completions"].items()],
    )
    return Report(ctx.out, metrics=metrics, about={"model": model.digest})
