"""A layer as the package hqq quantizes, keeps and reads it. Writes tests/fixtures/hqq_layout.json.gz.

python -m venv ENV; ENV/bin/pip install torch==2.13.0 hqq==0.2.8.post1; ENV/bin/python tests/oracles/hqq_layout.py
"""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

TARGET = Path(__file__).parents[1] / "fixtures" / "hqq_layout.json.gz"


def encoded(tensor: torch.Tensor) -> dict[str, Any]:
    """A tensor as JSON has it."""
    array = tensor.detach().contiguous().numpy()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": base64.b64encode(array.tobytes()).decode()}


def main() -> None:
    """Quantize, keep, read."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(128, 48, bias=False)
    layer.weight.data = torch.randn(48, 128) * 0.05
    layer.weight.data[::7, 5] *= 8
    found: dict[str, Any] = {"weight": encoded(layer.weight), "ways": {}}
    for bits in (2, 3, 4, 8):
        given = torch.nn.Linear(128, 48, bias=False)
        given.weight.data = layer.weight.data.clone()
        made = HQQLinear(
            given, BaseQuantizeConfig(nbits=bits, group_size=32, axis=1), compute_dtype=torch.float16, device="cpu"
        )
        made.encoded_state_dict = True
        state = {name: tensor for name, tensor in made.state_dict().items() if tensor is not None}
        again = HQQLinear(None, None, compute_dtype=torch.float16, device="cpu", initialize=False)
        again.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
        found["ways"][str(bits)] = {
            "tensors": {name: encoded(tensor) for name, tensor in state.items()},
            "weight": encoded(again.dequantize()),
        }
    with gzip.GzipFile(TARGET, "wb", mtime=0) as out:
        out.write(json.dumps(found).encode())


if __name__ == "__main__":
    main()
