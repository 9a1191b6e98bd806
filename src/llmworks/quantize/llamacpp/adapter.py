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

from llmworks.core.artifact import Adapter, Model, check_base
from llmworks.core.context import Context
from llmworks.core.errors import GoldenMismatch, ModelError
from llmworks.core.progress import Progress
from llmworks.generate.engines.llamacpp import LlamaCppEngine
from llmworks.model.gguf.layout import LAYOUTS, get_interleaved_heads, interleave_rows, to_gguf_name
from llmworks.model.golden import record_golden
from llmworks.model.io.load import load_model
from llmworks.model.lora.adapter_io import PREFIX, compute_scale, read_adapter, read_base_quantization
from llmworks.model.lora.merge_adapter import make_weight_lookup, merge_adapter_into
from llmworks.quantize.llamacpp.metadata import read_config
from llmworks.quantize.llamacpp.writer import write_gguf
from llmworks.quantize.report.page import add_metrics_table

if TYPE_CHECKING:
    from llmworks.quantize.llamacpp.config import GgufAdapterConfig

MAX_GAP, TOP_N = 0.05, 16  # maximum mean gap, in nats, of the log-probabilities of the 16 most probable tokens


def run(config: GgufAdapterConfig, adapter: Adapter, model: Model, ctx: Context) -> Adapter:
    """Run `adapter.adapter`."""
    if not check_base(adapter, model):
        ctx.progress.log(
            f"warning: {adapter.name} does not record the digest of its base model; assuming it was trained on"
            f" {model.name}"
        )
    if model.format != "hf":
        raise ModelError(
            f"{model.name}: give the Hugging Face directory that the adapter was trained on, not a {model.format} file"
        )
    target = ctx.out / "adapter.gguf"
    layers = write_adapter_gguf(adapter.path, model.path, target, config.type)
    gap, same = compare_logprobs(adapter.path, model, target, ctx.scratch)
    if gap > MAX_GAP:
        raise GoldenMismatch(
            f"quantize.adapter: log-probabilities of llama.cpp with {target.name} differ from the merged model by"
            f" {gap:.3f} nats on average (at most {MAX_GAP})"
        )
    for file in sorted(adapter.path.iterdir()):
        if file.is_file() and file.name != "manifest.json":
            shutil.copyfile(file, ctx.out / file.name)
    metrics = {
        "layers": layers,
        "bytes": target.stat().st_size,
        "logprob_gap": round(gap, 5),
        "greedy_agreement": round(same, 5),
    }
    ctx.report.title = f"{adapter.name} as GGUF"
    ctx.report.subtitle = (
        f"{layers} layers, {metrics['bytes'] / 1e6:,.1f} MB. On golden tokens llama.cpp's log-probabilities differ"
        f" from the merged model by {gap:.4f} nats on average, top-1 agreement {same:.0%}."
    )
    add_metrics_table(ctx.report, metrics)
    ctx.progress.log(ctx.report.subtitle)
    return Adapter(ctx.out, golden=adapter.golden, metrics=metrics, about={**adapter.about, "gguf": config.type})


def write_adapter_gguf(source: Path, base: Path, target: Path, kind: str) -> int:
    """Write the file; return the number of layers it adapts. ModelError for an adapter that llama.cpp cannot
    represent.
    """
    import gguf

    config, (adapter_config, tensors) = read_config(base), read_adapter(source)
    if adapter_config.get("use_dora"):
        raise ModelError(
            f"{source}: is a DoRA, whose magnitudes llama.cpp does not support; merge it into its model (merge.adapter)"
        )
    if read_base_quantization(source):
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
    writer.add_float32("adapter.lora.alpha", float(adapter_config["lora_alpha"]))
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
            compute_scale(adapter_config, name, len(a)) * len(a) / float(adapter_config["lora_alpha"])
        )  # llama.cpp has one alpha for all layers, divided by the rank
        head_count = get_interleaved_heads(place, heads, kv_heads) if layout.interleaved else None
        writer.add_tensor(f"{place}.lora_a", np.ascontiguousarray(a.astype(number)))
        writer.add_tensor(
            f"{place}.lora_b",
            np.ascontiguousarray((b if head_count is None else interleave_rows(b, head_count)).astype(number)),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return len(layers)


def compare_logprobs(adapter: Path, model: Model, file: Path, scratch: Path) -> tuple[float, float]:
    """Compare llama.cpp with the file and the merged model, after each half of a golden conversation. Return (mean
    gap of the log-probabilities of the most probable next tokens, top-1 agreement).
    """
    base = scratch / "base.gguf"
    if not base.exists():
        write_gguf(model.path, scratch / "base.part", "f32", Progress(quiet=True))
        (scratch / "base.part").rename(base)
    network: Any = load_model(model.path)
    merge_adapter_into(make_weight_lookup(network), adapter)
    golden = model.golden or record_golden(model.path)
    sequences = [
        list(one.ids[:end]) for one in golden.conversations for end in (max(1, len(one.ids) // 2), len(one.ids))
    ]
    engine = LlamaCppEngine(base, name=file.name, slots=1, adapter=file)
    try:
        found = [engine.next_tokens(ids, TOP_N) for ids in sequences]
    finally:
        engine.close()
        base.unlink()
    gaps, same = [], 0
    with torch.inference_mode():
        for ids, top_logprobs in zip(sequences, found, strict=True):
            expected = torch.log_softmax(network(input_ids=torch.tensor([ids])).logits[0, -1].float(), -1)
            gaps += [abs(float(expected[token]) - logprob) for token, logprob in top_logprobs.items()]
            same += int(expected.argmax()) == max(top_logprobs, key=lambda token: top_logprobs[token])
    return sum(gaps) / len(gaps), same / len(sequences)
