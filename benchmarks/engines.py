"""Compare generation speed: the torch engine, transformers' generate and the llama.cpp engine.

    make bench            prints one table; copy it with the machine's name into benchmarks/README.md

All run in the same process, one after the other, on the same prompts and weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from llmworks.core.machine import describe_machine, get_thread_count
from llmworks.core.types import Request, Sampling, messages_from_json
from llmworks.data.published.bfcl import rows as bfcl_rows
from llmworks.data.store.jsonl import RejectedRows
from llmworks.generate.engines.llamacpp import LlamaCppEngine
from llmworks.generate.engines.torch import TorchEngine
from llmworks.runtime.references import get_asset_files
from llmworks.runtime.session import load

ROWS, NEW = 16, 48


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return (seconds, result) of a call."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def decode(rows: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Completion tokens per second for a batch of prompts."""
    model = load("asset:smollm2-135m-instruct")
    engine = TorchEngine.open(model.path)
    requests = [Request(messages_from_json(r["messages"])[:-1], sampling=Sampling(max_tokens=NEW)) for r in rows[:ROWS]]
    prompts = [engine.prompt_ids(r) for r in requests]
    width = max(map(len, prompts))
    ids = torch.tensor([[2] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    engine.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, do_sample=False)  # warm up
    peer, out = timed(
        lambda: engine.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    )
    peer_tokens = sum(int((row[width:] != 2).sum()) for row in out)
    ours, done = timed(lambda: engine.generate(requests))
    our_tokens = sum(c.completion_tokens for c in done)
    engine.close()
    cpp = LlamaCppEngine(get_asset_files("smollm2-135m-instruct", "q4_1").gguf_path)  # type: ignore[attr-defined]
    cpp.generate(requests[:1])
    native, answers = timed(lambda: cpp.generate(requests))
    native_tokens = sum(c.completion_tokens for c in answers)
    cpp.close()
    return [
        ("answer 16 prompts: transformers generate, fp32", peer_tokens / peer),
        ("answer 16 prompts: llmworks torch engine, fp32", our_tokens / ours),
        ("answer 16 prompts: llama.cpp engine, Q4_1", native_tokens / native),
    ]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(get_thread_count())
    rows = bfcl_rows(get_asset_files("bfcl-simple", "bfcl").path, RejectedRows())
    results = decode(rows)
    print(f"{describe_machine()['processor']}, {get_thread_count()} threads, torch {torch.__version__}\n")
    base: dict[str, float] = {}
    for name, speed in results:
        group = name.split(":")[0]
        base.setdefault(group, speed)
        print(f"{name:<52} {speed:8.1f} tokens/s   {speed / base[group]:.2f}x")


if __name__ == "__main__":
    main()
