"""Compare forward and backward of the decoder with transformers' Llama of the same shape, in one run: seconds per step,
and memory.

    python benchmarks/model.py [--layers 30] [--length 512] [--batch 2]      (about three minutes on two cores)
    python benchmarks/model.py --attention                                   (attention alone, half a minute)

Each run is a separate process. All use fp32, eager PyTorch, the same threads, the same token ids, and loss on every
token. transformers' Llama runs with two attention implementations: `eager`, and `sdpa` (PyTorch's fused kernel, which
llmworks uses, too).
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

VOCABULARY, WIDTH, HEADS, GROUPS, HIDDEN = 49_152, 576, 9, 3, 1536  # SmolLM2-135M


def model(kind: str, layers: int, length: int) -> Any:
    """Return the model to measure."""
    if kind == "llmworks":
        from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
        from llmworks.model.shape import Shape

        shape = Shape(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=GROUPS,
            intermediate_size=HIDDEN,
            max_position_embeddings=length,
        )
        return DecoderForCausalLM(DecoderConfig(shape=shape.model_dump()))
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        intermediate_size=HIDDEN,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        attn_implementation=kind,
    )
    return LlamaForCausalLM(config)


def measure(kind: str, layers: int, length: int, batch: int, steps: int) -> dict[str, float]:
    """Return seconds per step (minimum and median) and the growth of peak memory, in this process."""
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


def attention() -> None:
    """Measure attention alone with SmolLM2's heads, forward and backward.

    Blockwise attention, PyTorch's kernel, and PyTorch's kernel with the mask that packed sequences need.
    """
    import torch
    from torch.nn import functional as F

    from llmworks.model.nn.attention import build_attention_mask, repeat_kv
    from llmworks.model.nn.cpu_attention import blockwise_attention

    def theirs_of(q: Any, k: Any, v: Any, look: Any) -> Any:
        return F.scaled_dot_product_attention(
            q, repeat_kv(k, 3), repeat_kv(v, 3), attn_mask=look.mask, is_causal=look.causal, scale=0.125
        )

    def fastest(run: Any) -> float:
        seconds = []
        for _ in range(9):
            began = time.perf_counter()
            run().sum().backward()
            seconds.append(time.perf_counter() - began)
        return min(seconds[1:]) * 1e3

    print(
        "| rows x tokens | blockwise, ms | PyTorch, ms | ratio | 4 sequences per row: blockwise, ms | PyTorch with"
        " mask, ms | ratio |\n|---|---|---|---|---|---|---|"
    )
    for batch, length in ((4, 256), (2, 512), (16, 512), (1, 1024), (1, 2048)):
        q, k, v = (torch.randn(batch, length, n, 64).transpose(1, 2).requires_grad_() for n in (HEADS, GROUPS, GROUPS))
        at = torch.arange(length)[None]
        texts = (at // (length // 4)).expand(batch, -1)
        found = []
        for look in (build_attention_mask(at, at), build_attention_mask(at, at, segments=(texts, texts))):
            found.append(fastest(functools.partial(blockwise_attention, q, k, v, 0.125, look.mask, look.query_blocks)))
            found.append(fastest(functools.partial(theirs_of, q, k, v, look)))
        ours, theirs, packed, masked = found
        print(
            f"| {batch} x {length} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f} | {packed:.1f} | {masked:.1f} |"
            f" {masked / packed:.2f} |"
        )


def main() -> None:
    """Measure all three alternately and print a table."""
    parser = argparse.ArgumentParser()
    for name, value in (("layers", 30), ("length", 512), ("batch", 2), ("steps", 4), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--one", default="")
    parser.add_argument("--attention", action="store_true")
    args = parser.parse_args()
    if args.attention:
        attention()
        return
    if args.one:
        print(json.dumps(measure(args.one, args.layers, args.length, args.batch, args.steps)))
        return
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for kind in ("llmworks", "sdpa", "eager"):
            words = [
                word
                for name in ("layers", "length", "batch", "steps")
                for word in (f"--{name}", str(getattr(args, name)))
            ]
            done = subprocess.run(
                [sys.executable, __file__, "--one", kind, *words], check=True, capture_output=True, text=True
            )
            found.setdefault(kind, []).append(json.loads(done.stdout.splitlines()[-1]))
    ours = min(r["least"] for r in found["llmworks"])
    print(
        f"{args.layers} layers, {args.batch} x {args.length} tokens\n\n| model | step, s | ratio | memory of a"
        " step, MB |\n|---|---|---|---|"
    )
    for kind, rows in found.items():
        least = min(r["least"] for r in rows)
        print(
            f"| {kind if kind == 'llmworks' else f'transformers, {kind}'} | {least:.2f} | {least / ours:.2f} |"
            f" {max(r['megabytes'] for r in rows):,.0f} |"
        )


if __name__ == "__main__":
    main()
