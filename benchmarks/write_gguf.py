"""Writing GGUF files beside a plain copy of as many bytes, and beside llama.cpp's own quantizer (cyllama) on one
thread.

    python benchmarks/write_gguf.py           (three minutes on one core)

SmolLM2-135M-Instruct, fp32 in safetensors. Seconds are of the best of three, each in a process of its own; memory is
the most that a process took beyond what it had when its libraries were loaded. llama.cpp quantizes the F32 file that
was written before.
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
    """Bytes, of this process alone."""
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
    """One file by `write_gguf`."""
    from llmworks.core.progress import Progress
    from llmworks.quantize.llamacpp.writer import write_gguf
    from llmworks.runtime.session import load

    path = load(source).path
    import gguf  # noqa: F401
    import libgguf  # noqa: F401
    import torch

    torch.set_num_threads(1)
    before = 0
    for _ in range(2):  # the first time libraries are loaded
        before, began = before or peak(), time.perf_counter()
        write_gguf(path, Path(target), kind, Progress(quiet=True), None, {})
        seconds = time.perf_counter() - began
    return {"seconds": seconds, "memory": peak() - before}


def theirs(source: str, kind: str, target: str) -> dict[str, float]:
    """llama.cpp's quantizer on a file in F32."""
    import cyllama.llama.llama_cpp as cy

    params: Any = cy.LlamaModelQuantizeParams()
    params.nthread = 1
    params.ftype = {"q8_0": 7, "q4_0": 2, "q4_k_m": 15, "iq4_xs": 30}[kind]
    before, began = peak(), time.perf_counter()
    cy.model_quantize(source, target, params)
    return {"seconds": time.perf_counter() - began, "memory": peak() - before}


def copied(source: str, kind: str, target: str) -> dict[str, float]:
    """As many bytes, written and flushed."""
    began = time.perf_counter()
    shutil.copyfile(source, target)
    return {"seconds": time.perf_counter() - began, "memory": 0}


def best(way: str, source: str, kind: str, target: str) -> dict[str, float]:
    """Of three."""
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
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=4, metavar=("WAY", "SOURCE", "KIND", "TARGET"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        way, source, kind, target = args.one
        print(json.dumps({"ours": ours, "theirs": theirs, "copied": copied}[way](source, kind, target)))
        return
    print(
        "| type | MB | seconds | MB/s | memory MB | a copy takes | llama.cpp takes | same bytes"
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
    """Of tensors whose bytes are the same."""
    from gguf import GGUFReader

    mine, their = ({tensor.name: bytes(tensor.data) for tensor in GGUFReader(file).tensors} for file in (one, other))
    return sum(mine[name] == their.get(name) for name in mine) / len(mine)


if __name__ == "__main__":
    main()
