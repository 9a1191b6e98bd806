"""Quantize a model with another package; print seconds and megabytes.

`quantize.py` runs this with the Python of the package's environment. Arguments: METHOD MODEL TOKENS OUT THREADS.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

WAYS = {  # module that each method needs
    "llm-compressor RTN": "llmcompressor",
    "llm-compressor GPTQ": "llmcompressor",
    "llm-compressor AWQ": "llmcompressor",
    "gptqmodel GPTQ": "gptqmodel",
    "hqq": "hqq",
}


def llm_compressor(way: str, path: str, ids: Any, out: str) -> float:
    """Quantize to 4 bits, groups of 64; AWQ with zero points."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.pipelines.cache import IntermediatesCache
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    weights = QuantizationArgs(num_bits=4, type="int", symmetric="AWQ" not in way, strategy="group", group_size=64)
    given: dict[str, Any] = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    recipe: list[Any] = [GPTQModifier(**given) if "GPTQ" in way else QuantizationModifier(**given)]
    if "AWQ" in way:
        from llmcompressor.modifiers.transform.awq import AWQModifier

        IntermediatesCache.pin_memory = lambda *_: None  # which needs a GPU
        recipe.insert(0, AWQModifier())
    more = (
        {}
        if "RTN" in way
        else {
            "dataset": Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}),
            "num_calibration_samples": len(ids),
            "max_seq_length": ids.shape[1],
            "shuffle_calibration_samples": False,
        }
    )
    began = time.perf_counter()
    oneshot(model=model, tokenizer=AutoTokenizer.from_pretrained(path), recipe=recipe, **more)
    model.save_pretrained(out, save_compressed=True)
    return time.perf_counter() - began


def gptqmodel(way: str, path: str, ids: Any, out: str) -> float:
    """Quantize to 4 bits, groups of 64, symmetric, otherwise with defaults; twice, since the first run compiles."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.config import GPTQConfig

    for some in (ids[:2], ids):
        model = GPTQModel.load(
            path, GPTQConfig(bits=4, group_size=64, sym=True, device="cpu", offload_to_disk=False), dtype=torch.float32
        )
        began = time.perf_counter()
        model.quantize(
            [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in some],
            batch_size=1,
            calibration_sort=None,
            calibration_concat_size=None,
            backend=BACKEND.GPTQ_TORCH,
        )
    model.save(out)
    return time.perf_counter() - began


def hqq(way: str, path: str, ids: Any, out: str) -> float:
    """Quantize to 4 bits, groups of 64 along rows, otherwise with defaults; save dequantized weights."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    began, seconds = time.perf_counter(), 0.0
    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and name != "lm_head":
            began = time.perf_counter()
            made = HQQLinear(
                layer,
                BaseQuantizeConfig(nbits=4, group_size=64, axis=1),
                compute_dtype=torch.float32,
                device="cpu",
                del_orig=False,
            )
            seconds += time.perf_counter() - began
            layer.weight.data = made.dequantize()
    model.save_pretrained(out)
    return seconds


def main() -> None:
    """Quantize, save, print."""
    way, path, tokens, out, threads = sys.argv[1:6]
    torch.set_num_threads(int(threads))
    ids = np.load(Path(tokens))["texts"]
    seconds = {"llmcompressor": llm_compressor, "gptqmodel": gptqmodel, "hqq": hqq}[WAYS[way]](way, path, ids, out)
    print(json.dumps({"seconds": seconds, "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


if __name__ == "__main__":
    main()
