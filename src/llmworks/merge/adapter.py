"""Stage `merge.adapter`: merge (fold) a LoRA adapter into its base model; the result is an ordinary Hugging Face
directory.

The merged model must replay the adapter's golden tokens: merging preserves the function. Everything but the adapted
weights is copied unchanged; tokenizer and chat template come from the adapter, which was trained with them.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from llmworks.core.artifact import Adapter, Config, FileEntry, Model, check_base
from llmworks.core.context import Context
from llmworks.core.errors import ModelError

if TYPE_CHECKING:
    from llmworks.model.lora.merge_adapter import AdapterMergeResult

BOUNDS = {"F32": 1e-3, "F16": 0.02, "BF16": 0.15}  # mean differences of golden logits that rounding may cause
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class MergeAdapterConfig(Config):
    """Config of `merge.adapter`: the tolerance above which a merge is refused."""

    logits_atol: float = Field(
        0.0,
        ge=0,
        description=(
            "maximum mean change of golden logits before the merge is refused; 0: 0.001 for weights in fp32, 0.02 in"
            " fp16, 0.15 in bf16 (rounding changes them)"
        ),
    )


def adapter(config: MergeAdapterConfig, adapter: Adapter, model: Model, ctx: Context) -> Model:
    """Merge `adapter` into `model` in fp32, keeping the model's dtype.

    Errors: ArtifactError when the adapter belongs to another model; GoldenMismatch when the result computes something
    else.
    """
    from llmworks.model.golden import require_golden

    if not check_base(adapter, model):
        ctx.progress.log(
            f"warning: {adapter.name} does not record the digest of its base model; assuming it was trained on"
            f" {model.name}"
        )
    if model.format != "hf":
        raise ModelError(
            f"{model.path}: an adapter can only be merged into a Hugging Face directory, not into {model.format}"
        )
    for file in sorted(model.path.glob("*.json")):
        if file.name not in (*TOKENIZER_FILES, "manifest.json"):
            shutil.copyfile(file, ctx.out / file.name)
    for name in TOKENIZER_FILES:
        source = adapter.path / name if (adapter.path / "tokenizer.json").exists() else model.path / name
        if source.exists():
            shutil.copyfile(source, ctx.out / name)
    folded, entries = fold_files(model.path, adapter.path, ctx.out, adapter.name)
    ctx.digests.update(entries)
    metrics: dict[str, float] = {"layers": folded.layers}
    if folded.base_error:
        ctx.progress.log(
            "the adapter was trained on a 4-bit base model (QLoRA), so it is merged into those weights; they differ"
            f" by {folded.base_error:.1%} from {model.name}"
        )
        metrics["base_relative_error"] = round(folded.base_error, 6)
    golden = adapter.golden
    if golden is None:
        from llmworks.model.golden import record_golden

        golden = record_golden(ctx.out)
        return Model(ctx.out, golden=golden, metrics=metrics, about={"format": "hf"})
    gap = require_golden(
        golden,
        ctx.out,
        mean_within=config.logits_atol or BOUNDS.get(get_main_dtype(ctx.out), 1e-3),
        step="merge.adapter",
    )
    assert gap is not None
    return Model(
        ctx.out,
        golden=golden,
        metrics={**metrics, "golden_gap_mean": round(gap.mean, 7), "golden_gap_max": round(gap.maximum, 7)},
        about={"format": "hf"},
    )


def get_main_dtype(path: Path) -> str:
    """Return the dtype of most weights in a directory, as safetensors names it."""
    from llmworks.model.io.weights import read_header

    bytes_by_dtype: Counter[str] = Counter()
    for file in sorted(path.glob("*.safetensors")):
        for name, entry in read_header(file).items():
            if name != "__metadata__":
                bytes_by_dtype[entry["dtype"]] += entry["data_offsets"][1] - entry["data_offsets"][0]
    return bytes_by_dtype.most_common(1)[0][0] if bytes_by_dtype else ""


def fold_files(
    source: Path, adapter_path: Path, out: Path, adapter_name: str = ""
) -> tuple[AdapterMergeResult, dict[str, FileEntry]]:
    """Copy the safetensors of `source` to `out` with the adapter merged in, tensor by tensor. Return digests and sizes
    of the files by name.

    `adapter_name`: the adapter's name in messages.
    """
    import torch

    from llmworks.merge.execute.blocks import as_bytes
    from llmworks.model.io.safetensors_io import TORCH_DTYPES, ShardReader, ShardSpec, ShardWriter, TensorSpec
    from llmworks.model.lora.merge_adapter import AdapterMerger

    shards = ShardReader(source)
    places = shards.locations
    fold = AdapterMerger(
        adapter_path,
        lambda layer: places[f"{layer}.weight"].shape if f"{layer}.weight" in places else None,
        adapter_name,
    )
    adapted, entries = set(fold.layers), {}
    try:
        for file in sorted({place.file for place in places.values()}):
            names = sorted(
                (name for name, place in places.items() if place.file == file), key=lambda name: places[name].offset
            )
            shard = ShardSpec(
                file.name, tuple(TensorSpec(name, places[name].dtype, places[name].shape) for name in names)
            )
            with ShardWriter(out, shard) as writer:
                for name in names:
                    tensor = torch.empty(places[name].shape, dtype=getattr(torch, TORCH_DTYPES[places[name].dtype]))
                    shards.read(name, 0, as_bytes(tensor))
                    layer = name.removesuffix(".weight")
                    writer.write(as_bytes(fold.merge_layer(layer, tensor) if layer in adapted else tensor))
            assert writer.entry is not None
            entries[file.name] = writer.entry
    finally:
        shards.close()
    return fold.get_result(), entries
