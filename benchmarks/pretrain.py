"""Compare pretraining with transformers in one run: tokens per second and memory of the full step, the fraction of the
machine's matrix product rate, and of data loading.

    python benchmarks/pretrain.py                     the recipe's decoder, and one twice as wide (15 minutes)
    python benchmarks/pretrain.py --width 192         one of them
    python benchmarks/pretrain.py --plan WORKSPACE    the estimates of `llmworks plan --measure`, and the recipe's run

llmworks runs its decoder in the loop of `train.pretrain`. transformers runs Llama of the same shape in a plain loop and
in Trainer. Each run is a separate process, and they alternate. All use fp32, eager PyTorch, fused AdamW, gradient
clipping, the same threads and the same packed rows of sequences that do not attend to each other.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VOCABULARY, LAYERS, HEADS, GROUPS, LENGTH = 4096, 6, 6, 3, 256  # recipes/pretrain.yaml, whose width is 192
WIDTH = int(os.environ.get("BENCHMARK_WIDTH", "192"))
HIDDEN = -(-WIDTH * 8 // 3 // 64) * 64
WARM = 5


def rows(folder: Path, count: int) -> Any:
    """Return a dataset of packed tokens: full rows of two sequences each, random tokens."""
    import numpy as np
    from safetensors.numpy import save_file

    from llmworks.core.artifact import Dataset

    rng = np.random.default_rng(0)
    edges = np.stack(
        [np.arange(count) * LENGTH, np.arange(count) * LENGTH + rng.integers(32, LENGTH - 32, count)], 1
    ).reshape(-1)
    tensors = {
        "tokens": rng.integers(0, VOCABULARY, count * LENGTH).astype(np.uint16),
        "rows": (np.arange(count + 1) * LENGTH).astype(np.int64),
        "pieces": np.append(edges, count * LENGTH).astype(np.int64),
        "origins": np.arange(2 * count, dtype=np.int64),
    }
    save_file(tensors, folder / "shard-00000.safetensors")
    return Dataset(folder, about={"schema": "tokens", "length": LENGTH})


def llama() -> Any:
    """Return transformers' Llama of the recipe's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        intermediate_size=HIDDEN,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def ours(data: Any, batch: int, steps: int, scratch: Path) -> dict[str, float]:
    """Train with the loop of `train.pretrain`."""
    import torch

    from llmworks.core.progress import Progress
    from llmworks.data.store.packed_tokens import PackedDataset
    from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
    from llmworks.model.shape import Shape
    from llmworks.train.loop.loop import LoopConfig, train
    from llmworks.train.loop.packed_steps import PackedSteps, packed_loss
    from llmworks.train.loop.schedule import OptimizerConfig

    shape = Shape(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        intermediate_size=HIDDEN,
        max_position_embeddings=LENGTH,
    )
    model = DecoderForCausalLM(DecoderConfig(shape=shape.model_dump()))
    progress = Progress(scratch / "metrics.jsonl", quiet=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    parts = PackedSteps(PackedDataset(data), steps, batch_size=batch, num_micro_batches=1, length=LENGTH, seed=0)
    train(
        model,
        parts,
        packed_loss,
        OptimizerConfig(weight_decay=0.1),
        LoopConfig(10**6),
        scratch=scratch,
        progress=progress,
    )
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    found = [row for row in progress.read_metrics() if "loss" in row][WARM:]
    seconds = [row["seconds"] for row in found]
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    rate = gemm(torch)
    return {
        "least": min(seconds),
        "median": statistics.median(seconds),
        "megabytes": grown / 1024,
        "loading": sum(r["data_seconds"] for r in found) / sum(seconds),
        "matrices": matrices,
        "gemm": rate,
    }


def gemm(torch: Any) -> float:
    """Return the FLOP/s of fp32 products of square matrices, the best of some sizes."""
    best = 0.0
    for size in (512, 1024, 2048):
        a, b, c = (torch.randn(size, size) for _ in range(3))
        for _ in range(6):
            began = time.perf_counter()
            torch.mm(a, b, out=c)
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def plain(data: Any, batch: int, steps: int, scratch: Path) -> dict[str, float]:
    """Train Llama in a plain loop."""
    import torch

    from llmworks.data.store.packed_tokens import PackedDataset
    from llmworks.train.loop.packed_steps import PackedSteps

    model = llama().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True, weight_decay=0.1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for parts in PackedSteps(PackedDataset(data), steps, batch_size=batch, num_micro_batches=1, length=LENGTH, seed=0):
        began = time.perf_counter()
        made = parts[0]()
        model(input_ids=made.ids, position_ids=made.positions, labels=made.label_ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return {
        "least": min(seconds[WARM:]),
        "median": statistics.median(seconds[WARM:]),
        "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def trainer(data: Any, batch: int, steps: int, scratch: Path) -> dict[str, float]:
    """Train Llama with transformers' Trainer."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from llmworks.data.store.packed_tokens import PackedDataset
    from llmworks.train.loop.packed_steps import PackedSteps

    packed = PackedDataset(data)

    class Rows(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.steps = PackedSteps(packed, 1, batch_size=1, num_micro_batches=1, length=LENGTH, seed=0)

        def __len__(self) -> int:
            return len(packed)

        def __getitem__(self, number: int) -> dict[str, Any]:
            made = self.steps.collate([number])
            return {"input_ids": made.ids[0], "position_ids": made.positions[0], "labels": made.label_ids[0]}

    stamps: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[no-untyped-call]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-3,
        weight_decay=0.1,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
    )
    Trainer(model=llama(), args=arguments, train_dataset=Rows(), callbacks=[Clock()]).train()  # type: ignore[no-untyped-call]
    seconds = [b - a for a, b in zip(stamps[WARM:], stamps[WARM + 1 :], strict=False)]
    return {
        "least": min(seconds),
        "median": statistics.median(seconds),
        "megabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


KINDS = {"llmworks": ours, "transformers, a plain loop": plain, "transformers, Trainer": trainer}


def compare_plan(workspace: Path) -> None:
    """Compare the estimate of each training of the recipe, whose data exist, with its manifest."""
    from llmworks.core.workspace import Workspace
    from llmworks.runtime.read_recipe import load_recipe
    from llmworks.runtime.runner import RecipeRun
    from llmworks.workflows.estimate import get_training

    recipe = load_recipe(Path(__file__).parents[1] / "recipes" / "pretrain.yaml")
    job = RecipeRun(recipe, Workspace(workspace))
    job.plan()
    print(
        "| training | estimated, s | measured, s | error | estimated, MB | measured, MB | error"
        " |\n|---|---|---|---|---|---|---|"
    )
    for name in recipe.steps:
        training = get_training(recipe, job.artifacts, name)
        if training is None or name not in job.artifacts:
            continue
        trial, m = training.try_steps(), job.artifacts[name].metrics
        seconds, memory = training.estimate_seconds(trial), trial.memory
        print(
            f"| {name} | {seconds:.0f} | {m['wall_seconds']:.0f} | {seconds / m['wall_seconds'] - 1:+.0%} |"
            f" {memory / 1e6:,.0f} | {m['peak_memory_bytes'] / 1e6:,.0f} | {memory / m['peak_memory_bytes'] - 1:+.0%} |"
        )


def main() -> None:
    """Measure all widths."""
    parser = argparse.ArgumentParser()
    for name, value in (("batch", 8), ("steps", 60), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--width", type=int, nargs="+", default=[192, 384])
    parser.add_argument("--one", default="")
    parser.add_argument("--plan", type=Path)
    args = parser.parse_args()
    if args.plan:
        compare_plan(args.plan)
        return
    if args.one:
        with tempfile.TemporaryDirectory() as folder:
            data, scratch = Path(folder) / "data", Path(folder) / "scratch"
            data.mkdir()
            scratch.mkdir()
            print(json.dumps(KINDS[args.one](rows(data, args.batch * args.steps), args.batch, args.steps, scratch)))
        return
    for width in args.width:
        measure(width, args.batch, args.steps, args.rounds)


def measure(width: int, batch: int, steps: int, rounds: int) -> None:
    """Measure all three alternately at one width and print a table."""
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for kind in KINDS:
            done = subprocess.run(
                [sys.executable, __file__, "--one", kind, "--batch", str(batch), "--steps", str(steps)],
                check=True,
                capture_output=True,
                text=True,
                env={**os.environ, "BENCHMARK_WIDTH": str(width)},
            )
            found.setdefault(kind, []).append(json.loads(done.stdout.splitlines()[-1]))
    tokens = batch * LENGTH
    speed = {kind: tokens / statistics.median(r["median"] for r in of) for kind, of in found.items()}
    mine = found["llmworks"]
    print(
        f"{LAYERS} layers of width {width}, {batch} x {LENGTH} tokens, {steps} steps, {rounds} rounds\n\n| training |"
        " tokens/s (median step) | llmworks speedup | memory of training, MB |\n|---|---|---|---|"
    )
    for kind, of in found.items():
        print(
            f"| {kind} | {speed[kind]:,.0f} | {speed['llmworks'] / speed[kind]:.2f} |"
            f" {max(r['megabytes'] for r in of):,.0f} |"
        )
    rate = max(r["gemm"] for r in mine)
    print(
        f"\nfp32 matrix products: {rate / 1e9:.0f} GFLOP/s. llmworks:"
        f" {6 * mine[0]['matrices'] * speed['llmworks'] / 1e9:.0f} GFLOP/s of 6 x {mine[0]['matrices']:,.0f} parameters"
        f" x tokens/s, {6 * mine[0]['matrices'] * speed['llmworks'] / rate:.0%} of it."
    )
    print(f"Data loading: {max(r['loading'] for r in mine):.2%} of a step.\n", flush=True)


if __name__ == "__main__":
    main()
