"""Compare quantization with llm-compressor, gptqmodel and hqq: loss of quality, time and memory at 4 bits in groups of
64.

    python -m venv ONE; ONE/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1 hqq==0.2.8.post1
    python -m venv TWO; TWO/bin/pip install torch==2.13.0; TWO/bin/pip install --no-build-isolation gptqmodel==7.6.0
    python benchmarks/quantize.py --peers ONE/bin/python --peers TWO/bin/python       (two hours on one core)
    python benchmarks/quantize.py --texts 16 --only gptq                  (llmworks only, a few minutes)
    python benchmarks/quantize.py --depths                                (memory by number of blocks, five minutes)

All use the same model (SmolLM2-135M-Instruct, fp32) and the same calibration samples: joined beginnings of Wikipedia
articles, 512 tokens per sample. The quality is measured on the same held-out samples: the KL divergence from the
original model in nats per token, the fraction of tokens with the same top-1 token, and the perplexity. The results of
the other tools are loaded from their files and measured by the same code. Seconds are from the loaded model to the
saved one; those of llmworks include loading the model, checking golden tokens and writing the report. Memory is the
peak of a process.
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

from quantize_peers import WAYS as PEERS

MODEL, LENGTH, HELD = "asset:smollm2-135m-instruct", 512, 32
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "zeropoint": ("rtn", {"symmetric": False}),
    "absmax": ("rtn", {}),
    "gptq": ("gptq", {}),
    "gptq, zero points": ("gptq", {"symmetric": False}),
    "awq": ("awq", {}),
    "hqq": ("hqq", {}),
}


def ours(name: str, tokens: Path, out: Path) -> dict[str, float]:
    """Run the stage on the same tokens."""
    import numpy as np
    import torch

    from llmworks.core.artifact import Model
    from llmworks.core.context import Context
    from llmworks.core.progress import Progress
    from llmworks.core.report import ReportBuilder
    from llmworks.quantize import run as rounding
    from llmworks.runtime.resolve import resolve_stage as stage
    from llmworks.runtime.session import load
    from llmworks.tokenize.load import load_tokenizer

    method, config = OURS[name]
    found = np.load(tokens)
    texts, held = (torch.from_numpy(found[which].astype("int64")) for which in ("texts", "held"))
    looks = method in ("gptq", "awq")
    rounding.load_samples = lambda *_: (texts if looks else texts[:0], held[:0])  # type: ignore[assignment]
    model: Any = load(MODEL)
    step = stage(f"quantize.{method}")
    out.mkdir()
    load_tokenizer(model.path)  # imports transformers
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(out, Path(scratch), 0, Progress(quiet=True), ReportBuilder(), lambda _: None)  # type: ignore[arg-type, return-value]
        began = time.perf_counter()
        made: Any = step.function(
            step.config.model_validate(
                {"eval_samples": 0, **({"num_calibration_samples": len(texts)} if looks else {}), **config}
            ),
            model,
            context,
            data=model,
        )
        seconds = time.perf_counter() - began
    assert isinstance(made, Model)
    return {"seconds": seconds, "bits": made.metrics["bits_per_weight"]}


def damage(path: Path, tokens: Path) -> dict[str, float]:
    """Return KL divergence, top-1 agreement and perplexity of a quantized model, compared with the original."""
    import numpy as np
    import torch
    from torch.nn import functional as F

    from llmworks.model.io.decoder_files import load_decoder
    from llmworks.runtime.session import load

    held = torch.from_numpy(np.load(tokens)["held"].astype("int64"))
    before, after = load_decoder(load(MODEL).path), load_decoder(path)
    kl = same = old_loss = new_loss = 0.0
    with torch.inference_mode():
        for ids in held:
            old, new = (F.log_softmax(model(input_ids=ids[None]).logits[0], -1) for model in (before, after))
            kl += float((old.exp() * (old - new)).sum(-1).mean())
            same += float((old.argmax(-1) == new.argmax(-1)).float().mean())
            old_loss += float(F.nll_loss(old[:-1], ids[1:]))
            new_loss += float(F.nll_loss(new[:-1], ids[1:]))
    count = len(held)
    return {
        "kl": kl / count,
        "same": same / count,
        "before": float(np.exp(old_loss / count)),
        "perplexity": float(np.exp(new_loss / count)),
    }


def depths(place: Path) -> None:
    """Measure the memory of GPTQ and AWQ, without libraries, for models of 4 and of 16 blocks."""
    import torch

    from llmworks.model.io.decoder_files import save_decoder
    from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
    from llmworks.quantize.run import copy_other_files
    from llmworks.runtime.session import load

    print("| model | fp32 MB | MB per block | gptq MB | awq MB |\n|---|---|---|---|---|")
    for layers in (4, 16):
        torch.manual_seed(0)
        model = DecoderForCausalLM(
            DecoderConfig(
                shape={
                    "vocab_size": 49152,
                    "hidden_size": 1024,
                    "num_hidden_layers": layers,
                    "num_attention_heads": 16,
                    "num_key_value_heads": 4,
                    "intermediate_size": 2816,
                    "max_position_embeddings": 256,
                }
            )
        )
        path = place / str(layers)
        save_decoder(model, path)
        copy_other_files(load(MODEL).path, path)
        whole, block = (
            sum(weight.numel() for weight in some.parameters()) * 4e-6 for some in (model, model.decoder.blocks[0])
        )
        del model
        found = [run([sys.executable, __file__, "--deep", str(path), method]) for method in ("gptq", "awq")]
        print(
            f"| {layers} blocks of width 1024 | {whole:.0f} | {block:.0f} | "
            + " | ".join(f"{one['memory'] / 1e6:.0f}" for one in found)
            + " |",
            flush=True,
        )


def deep(path: Path, method: str) -> dict[str, float]:
    """Return the peak memory of a stage with 16 samples of 128 tokens."""
    import numpy as np
    import torch

    from llmworks.core.artifact import Model
    from llmworks.core.context import Context
    from llmworks.core.machine import track_peak_memory
    from llmworks.core.progress import Progress
    from llmworks.core.report import ReportBuilder
    from llmworks.quantize import run as rounding
    from llmworks.runtime.resolve import resolve_stage as stage

    texts = torch.from_numpy(np.random.default_rng(0).integers(100, 49000, (16, 128)))
    rounding.load_samples = lambda *_: (texts, texts[:0])  # type: ignore[assignment]
    step = stage(f"quantize.{method}")
    with tempfile.TemporaryDirectory() as out, tempfile.TemporaryDirectory() as scratch:
        context = Context(Path(out), Path(scratch), 0, Progress(quiet=True), ReportBuilder(), lambda _: None)  # type: ignore[arg-type, return-value]
        before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        with track_peak_memory() as memory:
            step.function(
                step.config.model_validate({"eval_samples": 0, "num_calibration_samples": 16, "max_seq_length": 128}),
                Model(path),
                context,
                data=Model(path),
            )
    return {"memory": memory.peak - before}


def prepared(texts: int, file: Path) -> None:
    """Write calibration samples and held-out samples."""
    import numpy as np

    from llmworks import Dataset, Session, load
    from llmworks.quantize.calibrate.calibration_data import load_samples
    from llmworks.tokenize.load import load_tokenizer

    session = Session(file.parent / "ws", quiet=True)
    fields = {"text_field": "0", "keep_fields": []}
    read = session.make("data.read", kind=Dataset, data="asset:wikipedia-sample", config=fields)
    ids, held = load_samples(load_tokenizer(load(MODEL).path), read, texts, HELD, LENGTH, 0)
    np.savez(file, texts=ids.numpy(), held=held.numpy())


def has(python: str, module: str) -> bool:
    """Return whether a Python can import a module."""
    return (
        subprocess.run(
            [python, "-c", f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"]
        ).returncode
        == 0
    )


def run(command: list[str]) -> dict[str, Any]:
    """Run a separate process; return the JSON of its last line."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            "GPTQMODEL_CPU_WORKERS": "2",
        },
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Parse the arguments, run the benchmark, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=128, help="number of calibration samples")
    parser.add_argument("--only", action="append", default=[], help="methods whose names start with this")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--peers", action="append", default=[], help="Python of an environment with llmcompressor, hqq or gptqmodel"
    )
    parser.add_argument("--depths", action="store_true", help="memory by number of blocks")
    parser.add_argument("--deep", nargs=2, metavar=("PATH", "METHOD"), help=argparse.SUPPRESS)
    parser.add_argument("--one", nargs=3, metavar=("NAME", "TOKENS", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--damage", nargs=2, metavar=("PATH", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, tokens, out = args.one
        found = ours(name, Path(tokens), Path(out))
        print(json.dumps({**found, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    if args.deep:
        print(json.dumps(deep(Path(args.deep[0]), args.deep[1])))
        return
    if args.depths:
        with tempfile.TemporaryDirectory() as folder:
            depths(Path(folder))
        return
    if args.damage:
        print(json.dumps(damage(Path(args.damage[0]), Path(args.damage[1]))))
        return
    from llmworks.runtime.session import load

    peers = {
        f"{name} (peer)" if name in OURS else name: (python, name)
        for name, module in PEERS.items()
        for python in args.peers
        if has(python, module)
    }
    names = [*OURS, *peers]
    chosen = [name for name in names if not args.only or any(name.startswith(some) for some in args.only)]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        prepared(args.texts, place / "tokens.npz")
        print(
            "| method | KL, nats per token | top-1 agreement | perplexity | bits per weight | seconds | peak MB"
            " |\n|---|---|---|---|---|---|---|"
        )
        for number, name in enumerate(chosen):
            out = place / f"made-{number}"
            if name in OURS:
                made = run([sys.executable, __file__, "--one", name, str(place / "tokens.npz"), str(out)])
            else:
                made = run(
                    [
                        peers[name][0],
                        str(Path(__file__).with_name("quantize_peers.py")),
                        peers[name][1],
                        str(load(MODEL).path),
                        str(place / "tokens.npz"),
                        str(out),
                        str(args.threads),
                    ]
                )
            lost = run([sys.executable, __file__, "--damage", str(out), str(place / "tokens.npz")])
            if not number:
                print(f"| original | 0 | 100% | {lost['before']:.3f} | 32 | | |", flush=True)
            bits = f"{made['bits']:.2f}" if "bits" in made else ""
            print(
                f"| {name} | {lost['kl']:.4f} | {lost['same']:.1%} | {lost['perplexity']:.3f} | {bits} |"
                f" {made['seconds']:.0f} | {made['megabytes']:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
