"""Compare low-bit integer layers with fp32: single matrix products, and a whole model in a separate process.

    python benchmarks/low_bit.py                  (three minutes on two cores)
    python benchmarks/low_bit.py --layers

Milliseconds are the best of five. The model is SmolLM2-135M-Instruct, quantized by round-to-nearest (`quantize.rtn`) to
4 bits with groups of 64 and to 8 bits with per-row scales. It is measured by `tune.benchmark`; the original is loaded
by transformers.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

MODEL = "asset:smollm2-135m-instruct"
SIZES, ROWS = ((576, 1536), (2048, 2048)), (1, 4, 16, 64, 256, 1024)


def best(function: Callable[[], Any], seconds: float = 0.1) -> float:
    """Return the milliseconds of a call, the best of five."""
    function()
    began = time.perf_counter()
    function()
    times = max(1, int(seconds / max(1e-6, time.perf_counter() - began)))
    found = []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(times):
            function()
        found.append((time.perf_counter() - began) / times)
    return 1e3 * min(found)


def layers() -> None:
    """Measure single matrix products."""
    import torch
    from torch.nn import functional as F

    from llmworks.model.lowbit.integer import Grid, quantize_matrix
    from llmworks.model.lowbit.linear import is_available, make_low_bit_layer

    if not is_available():
        raise SystemExit("this CPU has no AVX512-BF16 instructions: low-bit layers are not available")
    torch.set_num_threads(int(os.environ.get("LLMWORKS_THREADS") or os.cpu_count() or 1))
    print("| in x out, rows | fp32 ms | 4 bits ms | ratio | 8 bits ms | ratio |\n|---|---|---|---|---|---|")
    with torch.inference_mode():
        for columns, rows in SIZES:
            weight = torch.randn(rows, columns)
            four, eight = (make_low_bit_layer(quantize_matrix(weight, grid)) for grid in (Grid(4, 64), Grid(8)))
            assert four is not None
            assert eight is not None
            for count in ROWS:
                x = torch.randn(count, columns)
                plain, low, high = best(partial(F.linear, x, weight)), best(partial(four, x)), best(partial(eight, x))
                print(
                    f"| {columns} x {rows}, {count} | {plain:.3f} | {low:.3f} | {low / plain:.2f} | {high:.3f} |"
                    f" {high / plain:.2f} |",
                    flush=True,
                )


def models() -> None:
    """Measure the original model and the quantized ones."""
    from llmworks import Session

    with tempfile.TemporaryDirectory() as folder:
        session = Session(Path(folder) / "ws", quiet=True)
        print(
            "| model | files MB | peak memory MB | prefill tokens/s | ratio | decode tokens/s | ratio"
            " |\n|---|---|---|---|---|---|---|"
        )
        base: Any = None
        for name, config in (
            ("fp32", None),
            ("4 bits", {"bits": 4, "group_size": 64}),
            ("8 bits", {"bits": 8, "group_size": 0}),
        ):
            model = session.load(MODEL) if config is None else session.make("quantize.rtn", model=MODEL, config=config)
            ran = session.make("tune.benchmark", model=model).metrics
            base = base or ran
            size = sum(file.stat().st_size for file in model.path.glob("*.safetensors"))
            print(
                f"| {name} | {size / 1e6:.0f} | {ran['peak_memory'] / 1e6:.0f} | {ran['prefill_speed']:.0f} |"
                f" {ran['prefill_speed'] / base['prefill_speed']:.2f} | {ran['decode_speed']:.1f} |"
                f" {ran['decode_speed'] / base['decode_speed']:.2f} |",
                flush=True,
            )


def main() -> None:
    """Parse the arguments, run the benchmark, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", action="store_true", help="matrix products only")
    layers_only = parser.parse_args().layers
    layers()
    if not layers_only:
        print()
        models()


if __name__ == "__main__":
    main()
