"""Compare merging with mergekit 0.1.5: wall seconds, CPU seconds and memory of the same merges.

Three models of 1.49 billion parameters in bfloat16 (2.98 GB each), one thread, one run after the other, warm page
cache.

    python -m venv PEER; PEER/bin/pip install torch==2.13.0 mergekit==0.1.5
    python benchmarks/merge.py --peer PEER/bin/python                     (half an hour, 20 GB of disk)
    python benchmarks/merge.py --peer PEER/bin/python --only linear --layers 4

The models have the shape of Qwen2.5-1.5B, random weights and no tokenizer. Each merge is a separate process. Computing
the digests of the input files is not counted, since they are cached. `cat` copies a model's bytes. The weights of both
results are compared: the fraction that differs, and the largest difference relative to the tensor's largest weight.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SHAPE = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
}
WAYS: dict[str, dict[str, Any]] = {
    "linear": {
        "merge_method": "linear",
        "models": [
            {"model": name, "parameters": {"weight": weight}}
            for name, weight in (("base", 0.5), ("a", 0.3), ("b", 0.2))
        ],
    },
    "task_arithmetic": {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": name, "parameters": {"weight": 0.6}} for name in "ab"],
    },
    "slerp": {"merge_method": "slerp", "base_model": "base", "models": [{"model": "a"}], "parameters": {"t": 0.4}},
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": name, "parameters": {"weight": 0.6, "density": 0.5}} for name in "ab"],
    },
    "dare_ties": {
        "merge_method": "dare_ties",
        "base_model": "base",
        "models": [{"model": name, "parameters": {"weight": 0.6, "density": 0.5}} for name in "ab"],
    },
    "passthrough": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "base", "layer_range": [0, 14]}]},
            {"sources": [{"model": "a", "layer_range": [14, 28]}]},
        ],
    },
}
TOKENIZER = json.dumps(
    {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}
)
EXPERTS = {
    "base_model": "base",
    "gate_mode": "random",
    "experts_per_token": 2,
    "experts": [{"source_model": name} for name in ("base", "a", "b")],
}


def made(place: Path, layers: int) -> None:
    """Write the three models."""
    import torch
    from safetensors.torch import save_file

    width, inner, tokens = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    shapes = {"model.embed_tokens.weight": (tokens, width), "model.norm.weight": (width,)}
    for layer in range(layers):
        for part, shape in {
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (256, width),
            "self_attn.v_proj": (256, width),
            "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }.items():
            shapes[f"model.layers.{layer}.{part}.weight"] = shape
    for seed, name in enumerate(("base", "a", "b")):
        (place / name).mkdir()
        base, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
        tensors = {}
        for tensor, shape in shapes.items():
            value = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.03, generator=base)
            tensors[tensor] = (
                value.add_(torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.003, generator=own)) if seed else value
            )
        save_file(tensors, place / name / "model.safetensors", metadata={"format": "pt"})
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **SHAPE,
            "num_hidden_layers": layers,
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }
        (place / name / "config.json").write_text(json.dumps(config))


LAUNCH = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
with open("said", "w") as stream:
    code = subprocess.run(sys.argv[1:], stdout=stream, stderr=stream).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
wall, cpu = time.perf_counter() - began, used.ru_utime + used.ru_stime
print(json.dumps({"code": code, "wall": wall, "cpu": cpu, "memory": used.ru_maxrss / 1000}))
"""


def measured(command: list[str], place: Path) -> dict[str, float]:
    """Return wall seconds, CPU seconds and peak memory (MB) of a process.

    A small process starts it, since a child's peak memory includes that of the process it was forked from.
    """
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "LLMWORKS_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "LLMWORKS_CACHE": str(place / "cache"),
    }
    said = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCH, *command], cwd=place, env=env, capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, float] = json.loads(said)
    if found["code"]:
        raise SystemExit((place / "said").read_text()[-2000:])
    return found


def apart(one: Path, other: Path) -> tuple[float, float]:
    """Return (fraction of weights that differ, largest difference relative to the tensor's largest weight)."""
    from safetensors import safe_open

    differ = count = 0
    most = 0.0
    with (
        safe_open(next(one.glob("*.safetensors")), "pt") as first,
        safe_open(next(other.glob("*.safetensors")), "pt") as second,
    ):
        assert set(first.keys()) == set(second.keys())
        for name in first.keys():  # noqa: SIM118  (not a mapping)
            a, b = first.get_tensor(name).float(), second.get_tensor(name).float()
            gap = (a - b).abs_()
            differ, count, most = (
                differ + int((gap > 0).sum()),
                count + gap.numel(),
                max(most, float(gap.max() / b.abs().max())),
            )
    return differ / count, most


def main() -> None:
    """Make models, merge them with both tools, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="Python of an environment with mergekit")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--place", type=Path, help="directory of the models; they are made if missing")
    args = parser.parse_args()
    import yaml

    with tempfile.TemporaryDirectory() as folder:
        place = args.place or Path(folder)
        place.mkdir(exist_ok=True)
        if not (place / "b" / "config.json").exists():
            made(place, args.layers)
        subprocess.run(
            "cat base/model.safetensors a/model.safetensors b/model.safetensors > /dev/null",
            shell=True,
            cwd=place,
            check=True,
        )
        copied = measured(["sh", "-c", "cat base/model.safetensors > copy"], place)
        (place / "copy").unlink()
        print(f"cat: {copied['wall']:.1f} s, {copied['cpu']:.1f} CPU-s\n")
        print(
            "| method | mergekit s | CPU-s | peak MB | llmworks s | CPU-s | peak MB | speedup | CPU-s ratio |"
            " ratio to cat | differing weights | largest difference"
            " |\n|---|---|---|---|---|---|---|---|---|---|---|---|"
        )
        tool = [sys.executable, "-m", "llmworks.cli", "merge"]
        for name, way in {**WAYS, "experts": EXPERTS}.items():
            if args.only and name not in args.only:
                continue
            if name == "passthrough":
                way = {
                    **way,
                    "slices": [
                        {"sources": [{"model": source, "layer_range": span}]}
                        for source, span in (("base", [0, args.layers // 2]), ("a", [args.layers // 2, args.layers]))
                    ],
                }
            file = place / f"{name}.yml"
            file.write_text(yaml.safe_dump(way))
            for old in ("theirs", "ws", "ours"):
                shutil.rmtree(place / old, ignore_errors=True)
            (place / "ours").unlink(missing_ok=True)
            peer = (
                ["mergekit.scripts.moe", str(file), "theirs", "--i-understand-this-is-not-useful-without-training"]
                if name == "experts"
                else ["mergekit.scripts.run_yaml", str(file), "theirs", "--no-copy-tokenizer", "--no-write-model-card"]
            )
            given = (
                [place / "base" / part for part in ("tokenizer.json", "tokenizer_config.json")]
                if name == "experts"
                else []
            )
            for part, text in zip(
                given, (TOKENIZER, json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})), strict=False
            ):
                part.write_text(text)  # mergekit-moe always opens the tokenizer
            theirs = measured([args.peer, "-m", *peer], place)
            for part in given:
                part.unlink()
            if not (place / "cache" / "digests.json").exists():
                measured([*tool, str(file), "--out", "ours", "--workspace", "ws", "--quiet"], place)
                shutil.rmtree(place / "ws")
                (place / "ours").unlink()
            ours = measured([*tool, str(file), "--out", "ours", "--workspace", "ws", "--quiet"], place)
            differ, most = (
                apart(place / "ours", place / "theirs")
                if name not in ("dare_ties", "experts")
                else (float("nan"), float("nan"))
            )
            print(
                f"| {name} | {theirs['wall']:.1f} | {theirs['cpu']:.1f} | {theirs['memory']:.0f} | {ours['wall']:.1f} |"
                f" {ours['cpu']:.1f} | {ours['memory']:.0f} | {theirs['wall'] / ours['wall']:.1f} |"
                f" {theirs['cpu'] / ours['cpu']:.1f} | {ours['wall'] / copied['wall']:.1f} | {differ:.1e} |"
                f" {most:.1e} |",
                flush=True,
            )
        for label, command in (
            ("mergekit --help", [args.peer, "-m", "mergekit.scripts.run_yaml", "--help"]),
            ("llmworks merge --plan", [*tool, str(place / f"{next(iter(args.only or WAYS))}.yml"), "--plan"]),
        ):
            used = measured(command, place)
            print(f"\n{label}: {used['cpu']:.2f} CPU-s")


if __name__ == "__main__":
    main()
