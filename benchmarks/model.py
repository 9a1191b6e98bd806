"""Forward and backward of the decoder beside transformers' Llama of the same shape, in one run: seconds of a step, and memory.

    python benchmarks/model.py [--layers 30] [--length 512] [--batch 2]      (about three minutes on two cores)

Each is a process of its own, fp32, eager PyTorch, the same threads, the same ids, loss on every token. transformers' Llama runs with both of its
kinds of attention: `eager` (written out) and `sdpa` (PyTorch's fused one, which ours uses too).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

VOCABULARY, WIDTH, HEADS, GROUPS, HIDDEN = 49_152, 576, 9, 3, 1536  # SmolLM2-135M


def model(kind: str, layers: int, length: int) -> Any:
    """The model to be measured."""
    if kind == "llmworks":
        from llmworks.model.decoder import DecoderConfig, DecoderForCausalLM
        from llmworks.model.shape import Shape

        shape = Shape(vocabulary=VOCABULARY, width=WIDTH, layers=layers, heads=HEADS, kv_heads=GROUPS, hidden=HIDDEN, context=length)
        return DecoderForCausalLM(DecoderConfig(shape=shape.model_dump()))
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=GROUPS, intermediate_size=HIDDEN,
        max_position_embeddings=length, tie_word_embeddings=True, attn_implementation=kind,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def measure(kind: str, layers: int, length: int, batch: int, steps: int) -> dict[str, float]:
    """Seconds of a step (the fastest and the middle one) and what memory grew by, in this process."""
    import torch

    torch.manual_seed(0)
    made = model(kind, layers, length).train()
    ids = torch.randint(0, VOCABULARY, (batch, length))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        made(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        made.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"least": min(seconds[1:]), "median": statistics.median(seconds[1:]), "megabytes": grown / 1024}


def main() -> None:
    """Measure all three, in turns, and print a table."""
    parser = argparse.ArgumentParser()
    for name, value in (("layers", 30), ("length", 512), ("batch", 2), ("steps", 4), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--one", default="")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.layers, args.length, args.batch, args.steps)))
        return
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for kind in ("llmworks", "sdpa", "eager"):
            words = [word for name in ("layers", "length", "batch", "steps") for word in (f"--{name}", str(getattr(args, name)))]
            done = subprocess.run([sys.executable, __file__, "--one", kind, *words], check=True, capture_output=True, text=True)
            found.setdefault(kind, []).append(json.loads(done.stdout.splitlines()[-1]))
    ours = min(r["least"] for r in found["llmworks"])
    print(f"{args.layers} layers, {args.batch} x {args.length} tokens\n\n| model | step, s | times ours | memory of a step, MB |\n|---|---|---|---|")
    for kind, rows in found.items():
        least = min(r["least"] for r in rows)
        print(f"| {kind if kind == 'llmworks' else f'transformers, {kind}'} | {least:.2f} | {least / ours:.2f} | {max(r['megabytes'] for r in rows):,.0f} |")


if __name__ == "__main__":
    main()
