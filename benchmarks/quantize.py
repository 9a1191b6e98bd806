"""Quantization beside llm-compressor: what 4 bits in groups of 64 take from a model, and how long it takes to find them.

    python -m venv PEERS; PEERS/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    python benchmarks/quantize.py --peers PEERS/bin/python                (an hour on two cores)
    python benchmarks/quantize.py --texts 16 --only gptq                  (ours alone, a few minutes)

The same model (SmolLM2-135M-Instruct, fp32), the same tokens to calibrate by (beginnings of Wikipedia articles, joined, texts of 512 tokens), the same others to measure on: the divergence from the model as it was in nats a token, the
share of tokens of the same best guess, the perplexity within each text. The peers' results are read from what they saved, and measured by the same code. Seconds are of a process's main work, loading left out; memory is a process's most.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL, LENGTH, HELD = "asset:smollm2-135m-instruct", 512, 32
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "zeropoint": ("zeropoint", {}), "gptq": ("gptq", {}), "gptq, zero points": ("gptq", {"symmetric": False}), "gptq, not searched": ("gptq", {"search": False}), "awq": ("awq", {}),
}  # fmt: skip
PEERS = ("llm-compressor RTN", "llm-compressor GPTQ")
THEIRS = '''
import json, resource, sys, time
import numpy as np, torch
way, model_path, tokens, out = sys.argv[1:5]
torch.set_num_threads(int(sys.argv[5]))
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
ids = np.load(tokens)["texts"]
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=64)
given = dict(config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"])
if "GPTQ" in way:
    from llmcompressor.modifiers.gptq import GPTQModifier as Modifier
else:
    from llmcompressor.modifiers.quantization import QuantizationModifier as Modifier
more = {} if "RTN" in way else dict(dataset=Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}), num_calibration_samples=len(ids), max_seq_length=ids.shape[1], shuffle_calibration_samples=False)
began = time.perf_counter()
oneshot(model=model, tokenizer=AutoTokenizer.from_pretrained(model_path), recipe=[Modifier(**given)], **more)
seconds = time.perf_counter() - began
model.save_pretrained(out, save_compressed=True)
print(json.dumps({"seconds": seconds, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
'''


def ours(name: str, tokens: Path, out: Path) -> dict[str, float]:
    """The stage's own work, on the same tokens."""
    import numpy as np
    import torch

    from llmworks.artifact import Model
    from llmworks.context import Context
    from llmworks.progress import Progress
    from llmworks.quantize import rounding
    from llmworks.references import resolve
    from llmworks.report import ReportBuilder
    from llmworks.stages import resolve as stage

    method, config = OURS[name]
    found = np.load(tokens)
    texts, held = (torch.from_numpy(found[which].astype("int64")) for which in ("texts", "held"))
    looks = method != "zeropoint"
    rounding.calibration = lambda *_: (texts if looks else texts[:0], held[:0])  # type: ignore[assignment]
    model: Any = resolve(MODEL)
    step = stage(f"quantize.{method}")
    out.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(out, Path(scratch), 0, Progress(quiet=True), ReportBuilder(), lambda _: None)  # type: ignore[arg-type, return-value]
        began = time.perf_counter()
        made: Any = step.function(step.config.model_validate({"held": 0, **({"texts": len(texts)} if looks else {}), **config}), model, context, data=model)
        seconds = time.perf_counter() - began
    assert isinstance(made, Model)
    return {"seconds": seconds, "bits": made.metrics["bits_a_weight"]}


def damage(path: Path, tokens: Path) -> dict[str, float]:
    """Divergence, agreement and perplexity of a directory's model, beside the one that it was made of."""
    import numpy as np
    import torch
    from torch.nn import functional as F

    from llmworks.model.standard import load_decoder
    from llmworks.references import resolve

    held = torch.from_numpy(np.load(tokens)["held"].astype("int64"))
    before, after = load_decoder(resolve(MODEL).path), load_decoder(path)
    kl = same = old_loss = new_loss = 0.0
    with torch.inference_mode():
        for ids in held:
            old, new = (F.log_softmax(model(input_ids=ids[None]).logits[0], -1) for model in (before, after))
            kl += float((old.exp() * (old - new)).sum(-1).mean())
            same += float((old.argmax(-1) == new.argmax(-1)).float().mean())
            old_loss += float(F.nll_loss(old[:-1], ids[1:]))
            new_loss += float(F.nll_loss(new[:-1], ids[1:]))
    count = len(held)
    return {"kl": kl / count, "same": same / count, "before": float(np.exp(old_loss / count)), "perplexity": float(np.exp(new_loss / count))}


def prepared(texts: int, file: Path) -> None:
    """Tokens to calibrate by, and others."""
    from functools import partial

    import numpy as np

    from llmworks.execute import execute
    from llmworks.quantize.calibration import calibration
    from llmworks.references import open_engine, resolve
    from llmworks.stages import resolve as stage
    from llmworks.tokenize.load import load_tokenizer
    from llmworks.workspace import Workspace

    workspace = Workspace(file.parent / "ws")
    step = stage("data.read")
    read: Any = execute(step, step.config.model_validate({"text_field": "0", "keep_fields": []}), {"data": resolve("asset:wikipedia-sample")}, workspace, seed=0, open_engine=partial(open_engine, workspace=workspace), quiet=True).artifact
    ids, held = calibration(load_tokenizer(resolve(MODEL).path), read, texts, HELD, LENGTH, 0)
    np.savez(file, texts=ids.numpy(), held=held.numpy())


def run(command: list[str]) -> dict[str, Any]:
    """A process of its own: the last line of what it said."""
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--only", action="append", default=[], help="ways whose names begin so")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--peers", help="a Python that has llmcompressor")
    parser.add_argument("--one", nargs=3, metavar=("NAME", "TOKENS", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--damage", nargs=2, metavar=("PATH", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, tokens, out = args.one
        found = ours(name, Path(tokens), Path(out))
        print(json.dumps({**found, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    if args.damage:
        print(json.dumps(damage(Path(args.damage[0]), Path(args.damage[1]))))
        return
    from llmworks.references import resolve

    names = [*OURS, *(PEERS if args.peers else ())]
    chosen = [name for name in names if not args.only or any(name.startswith(some) for some in args.only)]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        prepared(args.texts, place / "tokens.npz")
        print("| way | nats a token | same best guess | perplexity | bits a weight | seconds | MB |\n|---|---|---|---|---|---|---|")
        for number, name in enumerate(chosen):
            out = place / f"made-{number}"
            if name in OURS:
                made = run([sys.executable, __file__, "--one", name, str(place / "tokens.npz"), str(out)])
            else:
                made = run([args.peers, "-c", THEIRS, name, str(resolve(MODEL).path), str(place / "tokens.npz"), str(out), str(args.threads)])
            lost = run([sys.executable, __file__, "--damage", str(out), str(place / "tokens.npz")])
            if not number:
                print(f"| as it was | 0 | 100 % | {lost['before']:.3f} | 32 | | |", flush=True)
            bits = f"{made['bits']:.2f}" if "bits" in made else ""
            print(f"| {name} | {lost['kl']:.4f} | {lost['same']:.1%} | {lost['perplexity']:.3f} | {bits} | {made['seconds']:.0f} | {made['megabytes']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
