"""Checkpoints as gptqmodel writes and reads them: the tensors of one layer of a random Llama, and the weights that it
takes them for.

Writes tests/fixtures/gptq_layouts.json.gz.

python -m venv ENV; ENV/bin/pip install torch==2.13.0 ENV/bin/pip install --no-build-isolation gptqmodel==7.6.0
CUDA_VISIBLE_DEVICES= GPTQMODEL_CPU_WORKERS=2 ENV/bin/python tests/oracles/gptq_layouts.py
"""

from __future__ import annotations

import base64
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.quantization.config import FORMAT, AWQConfig, GPTQConfig
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TARGET = Path(__file__).parents[1] / "fixtures" / "gptq_layouts.json.gz"
LAYER, KEPT = "model.layers.0.self_attn.k_proj", 16  # rows of the weights that are kept
WAYS = {
    "gptq": (True, False, "gptq"),
    "gptq, zero points": (False, False, "gptq"),
    "gptq, by activation": (False, True, "gptq"),
    "gptq_v2, zero points": (False, False, "gptq_v2"),
    "awq": (False, False, ""),
}


def encoded(tensor: torch.Tensor) -> dict[str, Any]:
    """A tensor as JSON has it."""
    array = tensor.detach().contiguous().numpy()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "data": base64.b64encode(array.tobytes()).decode()}


def main() -> None:
    """Quantize, read, write."""
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        shape = LlamaConfig(
            vocab_size=64,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = LlamaForCausalLM(shape)
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.data.normal_(0, 0.06)
        model.half().save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0")),
            unk_token="w0",
            pad_token="w0",
        ).save_pretrained(folder)
        texts = [{"input_ids": row.tolist(), "attention_mask": [1] * 64} for row in torch.randint(4, 64, (32, 64))]
        for way, (symmetric, ordered, form) in WAYS.items():
            common: dict[str, Any] = {
                "bits": 4,
                "group_size": 32,
                "sym": symmetric,
                "device": "cpu",
                "offload_to_disk": False,
            }
            more: dict[str, Any] = {"act_group_aware": False} if ordered else {}
            config = (
                GPTQConfig(**common, desc_act=ordered, format=FORMAT(form), **more)
                if form
                else AWQConfig(**common, format=FORMAT.GEMM)
            )
            made = GPTQModel.load(folder, config, dtype=torch.float16)
            made.quantize(
                texts, batch_size=1, calibration_sort=None, backend=BACKEND.GPTQ_TORCH if form else BACKEND.AWQ_TORCH
            )
            out = f"{folder}/{way.replace(' ', '')}"
            made.save(out)
            layer = GPTQModel.load(
                out, device="cpu", backend=BACKEND.GPTQ_TORCH if form else BACKEND.AWQ_TORCH, dtype=torch.float16
            ).model.get_submodule(LAYER)
            layer.scales = layer.scales.float()
            weights = (
                layer.dequantize_weight() if form else dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, 32)
            )
            from safetensors.torch import load_file

            stored = load_file(f"{out}/model.safetensors")
            said = json.loads(Path(out, "config.json").read_text())["quantization_config"]
            found[way] = {
                "config": {
                    key: said[key]
                    for key in (
                        "quant_method",
                        "bits",
                        "group_size",
                        "sym",
                        "desc_act",
                        "checkpoint_format",
                        "zero_point",
                        "version",
                    )
                    if key in said
                },
                "tensors": {
                    name.removeprefix(f"{LAYER}."): encoded(tensor)
                    for name, tensor in stored.items()
                    if name.startswith(LAYER)
                },
                "weight": encoded(weights.float().T[:KEPT]),
            }
    TARGET.write_bytes(gzip.compress(json.dumps(found).encode(), mtime=0))


if __name__ == "__main__":
    main()
