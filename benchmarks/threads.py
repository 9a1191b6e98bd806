"""Measure what a busy neighbour costs: decoding, training and evaluation beside one process of another program.

    python benchmarks/threads.py            idle and busy, as llmworks waits, and with other ways to wait

Every figure is the median of `--rounds` runs; the ways take turns, so that all of them see the same machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SPIN = "while True:\n    pass"
WORK = ["decoding", "llama.cpp", "training", "evaluation"]
WAYS: dict[str, dict[str, str]] = {
    "llmworks": {},
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},
    "passive": {"GOMP_SPINCOUNT": "0"},
    "one thread": {"LLMWORKS_THREADS": "1"},
}


def measure_decoding(model: Any, rows: list[dict[str, Any]]) -> Callable[[], float]:
    """Tokens per second of one greedy completion after another, torch engine."""
    from llmworks.core.types import Request, Sampling, messages_from_json
    from llmworks.generate.engines.torch import TorchEngine

    engine = TorchEngine.open(model.path)
    requests = [Request(messages_from_json(row["messages"])[:-1], sampling=Sampling(max_tokens=32)) for row in rows]

    def run() -> float:
        began = time.perf_counter()
        tokens = sum(len(engine.generate([request])[0].ids) for request in requests[:3])
        return tokens / (time.perf_counter() - began)

    return run


def measure_llamacpp(rows: list[dict[str, Any]]) -> Callable[[], float]:
    """Tokens per second of four completions at once, llama.cpp engine."""
    from llmworks.core.types import Request, Sampling, messages_from_json
    from llmworks.generate.engines.llamacpp import LlamaCppEngine
    from llmworks.runtime.references import get_asset_files

    engine = LlamaCppEngine(get_asset_files("smollm2-135m-instruct", "q4_1").gguf_path)  # type: ignore[attr-defined]
    requests = [Request(messages_from_json(row["messages"])[:-1], sampling=Sampling(max_tokens=32)) for row in rows[:8]]

    def run() -> float:
        began = time.perf_counter()
        return sum(len(one.ids) for one in engine.generate(requests)) / (time.perf_counter() - began)

    return run


def measure_training(model: Any, rows: list[dict[str, Any]]) -> Callable[[], float]:
    """Tokens per second of LoRA training steps of two rows."""
    import torch

    from llmworks.tokenize.load import load_tokenizer
    from llmworks.train.finetune.examples import Example, collate_padding_free, make_example
    from llmworks.train.finetune.lora_config import LoraConfig
    from llmworks.train.finetune.trainable import open_trainable_model
    from llmworks.train.loop.packed_steps import packed_loss

    tuned = open_trainable_model(model.path)
    tuned.add_adapter(LoraConfig())
    tokenizer = load_tokenizer(model.path)
    made = [make_example(tokenizer, {**row, "id": str(i)}, 512) for i, row in enumerate(rows[:8])]
    batches = [collate_padding_free([e for e in made[i : i + 2] if isinstance(e, Example)]) for i in range(0, 6, 2)]
    optimizer = torch.optim.AdamW([p for p in tuned.network.parameters() if p.requires_grad], lr=1e-4)

    def run() -> float:
        began = time.perf_counter()
        for batch in batches:
            packed_loss(tuned.network, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return sum(batch.tokens for batch in batches) / (time.perf_counter() - began)

    return run


def measure_evaluation(model: Any, rows: list[dict[str, Any]]) -> Callable[[], float]:
    """Tokens per second of log-likelihoods, torch engine."""
    from llmworks.generate.engines.torch import TorchEngine

    engine = TorchEngine.open(model.path)
    texts = [engine.tokenizer(str(row["messages"]))["input_ids"][:200] for row in rows[:8]]

    def run() -> float:
        began = time.perf_counter()
        engine.score(texts)
        return sum(map(len, texts)) / (time.perf_counter() - began)

    return run


def measure_here(chosen: list[str]) -> dict[str, float]:
    """The chosen speeds in this process, each the median of three after a warm-up."""
    import llmworks
    from llmworks.core.machine import get_thread_count, set_threads
    from llmworks.data.published.bfcl import rows as bfcl_rows
    from llmworks.data.store.jsonl import RejectedRows
    from llmworks.runtime.references import get_asset_files

    set_threads(get_thread_count())
    model = llmworks.load("asset:smollm2-135m-instruct")
    rows = bfcl_rows(get_asset_files("bfcl-simple", "bfcl").path, RejectedRows())
    found = {}
    prepare: dict[str, Callable[[], Callable[[], float]]] = {
        "decoding": lambda: measure_decoding(model, rows),
        "llama.cpp": lambda: measure_llamacpp(rows),
        "training": lambda: measure_training(model, rows),
        "evaluation": lambda: measure_evaluation(model, rows),
    }
    for name in chosen:
        run = prepare[name]()
        run()
        found[name] = statistics.median(run() for _ in range(3))
    return found


def main() -> None:
    """Print the table: speed alone, speed beside a busy process, and its share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), help="NAME, or KEY=VALUE of an environment")
    parser.add_argument("--work", nargs="*", default=WORK, choices=WORK)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure_here(args.work)))
        return
    speeds: dict[tuple[str, bool, str], list[float]] = {}
    for _ in range(args.rounds):
        for busy in (False, True):
            for way in args.ways:
                extra = WAYS.get(way) or dict([way.split("=")] if "=" in way else [])
                neighbour = subprocess.Popen([sys.executable, "-c", SPIN]) if busy else None
                try:
                    done = subprocess.run(
                        [sys.executable, __file__, "--here", "--work", *args.work],
                        capture_output=True,
                        env={**os.environ, **extra},
                        check=True,
                    )
                finally:
                    if neighbour is not None:
                        neighbour.kill()
                        neighbour.wait()
                for name, speed in json.loads(done.stdout.splitlines()[-1]).items():
                    speeds.setdefault((name, busy, way), []).append(speed)
    from llmworks.core.machine import describe_machine

    print(f"{describe_machine()['processor']}, {os.cpu_count()} cores\n")
    print(f"{'work':<12} {'waiting':<24} {'alone':>8} {'beside':>8}  share of libgomp's default alone")
    for name in dict.fromkeys(name for name, _, _ in speeds):
        for way in args.ways:
            alone, beside = (statistics.median(speeds[name, busy, way]) for busy in (False, True))
            base = statistics.median(speeds.get((name, False, "libgomp's default"), [alone]))
            print(
                f"{name:<12} {way:<24} {alone:8.1f} {beside:8.1f}  {alone / base:.0%} alone, {beside / base:.0%} beside"
            )


if __name__ == "__main__":
    main()
