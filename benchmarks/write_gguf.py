"""Compare writing GGUF files with a plain copy of the same number of bytes, and with llama.cpp's quantizer (cyllama) on
one thread.

    python benchmarks/write_gguf.py           (three minutes on one core)

The model is SmolLM2-135M-Instruct, fp32 in safetensors. Seconds are the best of three runs, each in a separate process.
Memory is the largest peak of the three, without the memory in use after the libraries were loaded. llama.cpp quantizes
the F32 file written before.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL, KINDS = "asset:smollm2-135m-instruct", ("f32", "f16", "q8_0", "q4_0", "q4_k_m", "iq4_xs")


def peak() -> int:
    """Return the peak memory of this process in bytes."""
    return (
        int(
            next(
                line.split()[1]
                for line in Path("/proc/self/status").read_text().splitlines()
                if line.startswith("VmHWM")
            )
        )
        * 1024
    )


def ours(source: str, kind: str, target: str) -> dict[str, float]:
    """Write a file by `write_gguf`."""
    from llmworks.core.progress import Progress
    from llmworks.quantize.llamacpp.writer import write_gguf
    from llmworks.runtime.session import load

    path = load(source).path
    import gguf  # noqa: F401
    import libgguf  # noqa: F401
    import torch

    torch.set_num_threads(1)
    before = 0
    for _ in range(2):  # the first run loads libraries
        before, began = before or peak(), time.perf_counter()
        write_gguf(path, Path(target), kind, Progress(quiet=True), None, {})
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "memory": peak() - before}


def theirs(source: str, kind: str, target: str) -> dict[str, float]:
    """Quantize an F32 file by llama.cpp."""
    import cyllama.llama.llama_cpp as cy

    params: Any = cy.LlamaModelQuantizeParams()
    params.nthread = 1
    params.ftype = {"q8_0": 7, "q4_0": 2, "q4_k_m": 15, "iq4_xs": 30}[kind]
    before, began = peak(), time.perf_counter()
    cy.model_quantize(source, target, params)
    return {"seconds": time.perf_counter() - began, "memory": peak() - before}


def copied(source: str, kind: str, target: str) -> dict[str, float]:
    """Copy a file."""
    began = time.perf_counter()
    shutil.copyfile(source, target)
    return {"seconds": time.perf_counter() - began, "memory": 0}


def best(way: str, source: str, kind: str, target: str) -> dict[str, float]:
    """Return the shortest time and the largest memory of three runs."""
    found = []
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, __file__, "--one", way, source, kind, target], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {"seconds": min(one["seconds"] for one in found), "memory": max(one["memory"] for one in found)}


def main() -> None:
    """Parse the arguments, run the benchmark, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=4, metavar=("WAY", "SOURCE", "KIND", "TARGET"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        way, source, kind, target = args.one
        print(json.dumps({"ours": ours, "theirs": theirs, "copied": copied}[way](source, kind, target)))
        return
    print(
        "| type | MB | seconds | MB/s | memory MB | copy, seconds | llama.cpp, seconds | identical bytes"
        " |\n|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for kind in KINDS:
            made, copy, other = place / f"{kind}.gguf", place / "copy", place / "theirs.gguf"
            found = best("ours", MODEL, kind, str(made))
            plain = best("copied", str(made), kind, str(copy))
            peer = best("theirs", str(place / "f32.gguf"), kind, str(other)) if kind not in ("f32", "f16") else None
            size = made.stat().st_size / 1e6
            same = "" if peer is None else f"{share(made, other):.0%} of tensors"
            print(
                f"| {kind} | {size:.1f} | {found['seconds']:.2f} | {size / found['seconds']:.0f} |"
                f" {found['memory'] / 1e6:.0f} | {plain['seconds']:.2f} | "
                + (f"{peer['seconds']:.2f}" if peer else "")
                + f" | {same} |",
                flush=True,
            )


def share(one: Path, other: Path) -> float:
    """Return the fraction of tensors with identical bytes."""
    from gguf import GGUFReader

    mine, their = ({tensor.name: bytes(tensor.data) for tensor in GGUFReader(file).tensors} for file in (one, other))
    return sum(mine[name] == their.get(name) for name in mine) / len(mine)


if __name__ == "__main__":
    main()
