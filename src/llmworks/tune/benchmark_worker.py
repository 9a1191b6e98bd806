"""Worker process that runs a model for benchmarking: a JSON request on standard input, results on standard output.

See the stage `tune.benchmark`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from llmworks.core.machine import get_thread_count, track_peak_memory


def main() -> None:
    """Read the request, run the benchmark and print the results."""
    settings = json.loads(sys.stdin.read())
    with track_peak_memory() as memory:  # the system's peak memory of a process includes its parent's up to the fork
        engine = open_engine(Path(settings["path"]), settings["format"])
        try:
            result = measure(engine, settings)
        finally:
            engine.close()
    print(json.dumps({**result, "peak_memory": memory.peak}))


def open_engine(path: Path, format_name: str) -> Any:
    """Open the engine for a model's files."""
    if format_name == "gguf":
        from llmworks.generate.engines.llamacpp import LlamaCppEngine

        return LlamaCppEngine(path, slots=1)
    import torch

    from llmworks.generate.engines.torch import TorchEngine

    torch.set_num_threads(get_thread_count())
    return TorchEngine.open(path)


def measure(engine: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Measure prefill and decode speed, and generate completions."""
    from llmworks.core.types import Message, Request, Sampling

    def build_request(prompt: str, tokens: int) -> Request:
        return (
            Request((Message("user", prompt),), sampling=Sampling(max_tokens=tokens))
            if engine.tokenizer.chat_template
            else Request(ids=tuple(engine.tokenizer(prompt)["input_ids"]), sampling=Sampling(max_tokens=tokens))
        )

    ids = engine.tokenizer(" ".join(["the weather is what it was before"] * settings["prompt_tokens"]))["input_ids"][
        : settings["prompt_tokens"]
    ]
    best = 0.0
    for turn in range(settings["repetitions"] + 1):
        began = time.perf_counter()
        engine.generate(
            [Request(ids=(*ids[turn:], *ids[:turn]), sampling=Sampling(max_tokens=1))]
        )  # a rotated prompt, so that no prefix cache applies
        best = max(best, len(ids) / (time.perf_counter() - began)) if turn else 0.0
    tokens = seconds = 0.0
    answers = []
    for prompt in settings["prompts"]:
        began = time.perf_counter()
        engine.generate([build_request(prompt, 1)])
        first = time.perf_counter() - began
        began = time.perf_counter()
        made = engine.generate([build_request(prompt, settings["max_tokens"])])[0]
        seconds += max(1e-9, time.perf_counter() - began - first)
        tokens += max(0, len(made.ids) - 1)
        answers.append(made.text)
    return {
        "prefill_speed": round(best, 2),
        "decode_speed": round(tokens / seconds, 2) if tokens else None,
        "completions": answers,
    }  # None where every completion ends at its first token


if __name__ == "__main__":
    main()
