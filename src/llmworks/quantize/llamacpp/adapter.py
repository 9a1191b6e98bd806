"""Write a LoRA adapter as GGUF and check that llama.cpp computes the same with it. See `quantize/adapter.py`.

Names and metadata as in llama.cpp's convert_lora_to_gguf.py: for each layer `lora_a` [rank, in] and `lora_b` [out,
rank], a layer adding alpha / rank times their product. Rows of the queries' and keys' B are permuted like those of
their weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmworks.core.artifact import Adapter, Model, require_base
from llmworks.core.context import Context
from llmworks.core.errors import GoldenMismatch, ModelError
from llmworks.core.progress import Progress
from llmworks.generate.engines.llamacpp import LlamaCppEngine
from llmworks.model.gguf.layout import LAYOUTS, heads_of, interleave_rows, to_gguf_name
from llmworks.model.golden import record
from llmworks.model.io.load import load_model
from llmworks.model.lora.adapter_io import PREFIX, base_of, read_adapter, scale_of
from llmworks.model.lora.fold import fold_into, weights_of
from llmworks.quantize.llamacpp.metadata import read_config
from llmworks.quantize.llamacpp.writer import write_gguf
from llmworks.quantize.report.page import figures

if TYPE_CHECKING:
    from llmworks.quantize.llamacpp.config import AdapterConfig

WITHIN, BEST = 0.05, 16  # maximum mean gap, in nats, of the log-probabilities of the 16 most probable tokens


def run(config: AdapterConfig, adapter: Adapter, model: Model, ctx: Context) -> Adapter:
    """Run `adapter.adapter`."""
    if not require_base(adapter, model):
        ctx.progress.say(
            f"warning: {adapter.name} does not record the digest of its base model; assuming it was trained on"
            f" {model.name}"
        )
    if model.format != "hf":
        raise ModelError(
            f"{model.name}: give the Hugging Face directory that the adapter was trained on, not a {model.format} file"
        )
    target = ctx.out / "adapter.gguf"
    layers = write_adapter(adapter.path, model.path, target, config.type)
    apart, same = compared(adapter.path, model, target, ctx.scratch)
    if apart > WITHIN:
        raise GoldenMismatch(
            f"quantize.adapter: log-probabilities of llama.cpp with {target.name} differ from the merged model by"
            f" {apart:.3f} nats on average (at most {WITHIN})"
        )
    for file in sorted(adapter.path.iterdir()):
        if file.is_file() and file.name != "manifest.json":
            shutil.copyfile(file, ctx.out / file.name)
    metrics = {
        "layers": layers,
        "bytes": target.stat().st_size,
        "gap": round(apart, 5),
        "greedy_agreement": round(same, 5),
    }
    ctx.report.title = f"{adapter.name} as GGUF"
    ctx.report.lead = (
        f"{layers} layers, {metrics['bytes'] / 1e6:,.1f} MB. On golden tokens llama.cpp's log-probabilities differ"
        f" from the merged model by {apart:.4f} nats on average, top-1 agreement {same:.0%}."
    )
    figures(ctx.report, metrics)
    ctx.progress.say(ctx.report.lead)
    return Adapter(ctx.out, golden=adapter.golden, metrics=metrics, about={**adapter.about, "gguf": config.type})


def write_adapter(source: Path, base: Path, target: Path, kind: str) -> int:
    """Write the file; return the number of layers it adapts. ModelError for an adapter that llama.cpp cannot
    represent.
    """
    import gguf

    config, (given, tensors) = read_config(base), read_adapter(source)
    if given.get("use_dora"):
        raise ModelError(
            f"{source}: is a DoRA, whose magnitudes llama.cpp does not support; merge it into its model (merge.adapter)"
        )
    if base_of(source):
        raise ModelError(
            f"{source}: was trained on a 4-bit base model (QLoRA), whose quantization errors it corrects; merge it"
            " into its model (merge.adapter), which uses those 4-bit weights"
        )
    model_type = str(config["model_type"])
    heads, layout = int(config["num_attention_heads"]), LAYOUTS[model_type]
    kv_heads = int(config.get("num_key_value_heads") or heads)
    writer = gguf.GGUFWriter(target, layout.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(given["lora_alpha"]))
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if kind == "f32" else "MOSTLY_F16"))
    number = np.float32 if kind == "f32" else np.float16
    layers = sorted({name.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for name in tensors})
    for layer in layers:
        name = layer.removeprefix(PREFIX)
        place = to_gguf_name(f"{name}.weight", model_type)
        low, high = (tensors.get(f"{layer}.lora_{part}.weight") for part in "AB")
        if place is None or place == "token_embd.weight" or low is None or high is None:
            raise ModelError(
                f"{source}: llama.cpp does not support the adapter's change of {name}; merge it into its model"
                " (merge.adapter)"
            )
        a, b = low.float().numpy(), high.float().numpy()
        b = b * (
            scale_of(given, name, len(a)) * len(a) / float(given["lora_alpha"])
        )  # llama.cpp has one alpha for all layers, divided by the rank
        turned = heads_of(place, heads, kv_heads) if layout.interleaved else None
        writer.add_tensor(f"{place}.lora_a", np.ascontiguousarray(a.astype(number)))
        writer.add_tensor(
            f"{place}.lora_b",
            np.ascontiguousarray((b if turned is None else interleave_rows(b, turned)).astype(number)),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return len(layers)


def compared(adapter: Path, model: Model, file: Path, scratch: Path) -> tuple[float, float]:
    """Compare llama.cpp with the file and the merged model, after each half of a golden conversation. Return (mean
    gap of the log-probabilities of the most probable next tokens, top-1 agreement).
    """
    base = scratch / "base.gguf"
    if not base.exists():
        write_gguf(model.path, scratch / "base.part", "f32", Progress(quiet=True))
        (scratch / "base.part").rename(base)
    network: Any = load_model(model.path)
    fold_into(weights_of(network), adapter)
    golden = model.golden or record(model.path)
    texts = [list(one.ids[:end]) for one in golden.conversations for end in (max(1, len(one.ids) // 2), len(one.ids))]
    engine = LlamaCppEngine(base, name=file.name, slots=1, adapter=file)
    try:
        found = [engine.next_tokens(ids, BEST) for ids in texts]
    finally:
        engine.close()
        base.unlink()
    apart, same = [], 0
    with torch.inference_mode():
        for ids, said in zip(texts, found, strict=True):
            expected = torch.log_softmax(network(input_ids=torch.tensor([ids])).logits[0, -1].float(), -1)
            apart += [abs(float(expected[token]) - logprob) for token, logprob in said.items()]
            same += int(expected.argmax()) == max(said, key=lambda token: said[token])
    return sum(apart) / len(apart), same / len(texts)
