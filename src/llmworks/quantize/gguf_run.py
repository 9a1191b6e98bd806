"""From a Hugging Face directory to a GGUF file: what is important, the file, its golden tokens in llama.cpp, the damage, the page. See `gguf.py`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from llmworks.artifact import Dataset, Model
from llmworks.context import Context
from llmworks.errors import DataError, ModelError
from llmworks.generate.engines.llamacpp import LlamaCppEngine
from llmworks.model.golden import record
from llmworks.model.load import check_weights
from llmworks.quantize.calibration import calibration
from llmworks.quantize.damage import Damage
from llmworks.quantize.gguf import BOUNDS
from llmworks.quantize.gguf_allocation import allocated
from llmworks.quantize.gguf_file import Written, types_in, write_gguf
from llmworks.quantize.gguf_keys import read_config
from llmworks.quantize.gguf_types import PLAIN, bits_of
from llmworks.quantize.importance import importance
from llmworks.quantize.source import Source
from llmworks.tokenize.golden import require
from llmworks.tokenize.load import load_tokenizer, read_json

if TYPE_CHECKING:
    from llmworks.quantize.gguf import GgufConfig
    from llmworks.quantize.walk import Walk


def run(config: GgufConfig, model: Model, ctx: Context, data: Dataset | None) -> Model:
    """See `gguf.gguf`."""
    if model.format != "hf":
        raise ModelError(f"{model.path}: is {model.format} already; quantize.gguf takes a Hugging Face directory")
    check_weights(model.path)
    read_config(model.path)
    if read_json(model.path / "config.json").get("quantization_config"):
        raise ModelError(f"{model.path}: is quantized already; give the model that it was made of")
    golden = model.golden or record(model.path)
    if config.allocate and data is None:
        raise DataError("config.allocate has to see what the model is for; give `data`: conversations or texts")
    seen: Mapping[str, Any] | None = None
    given, expected = dict(config.tensors), None
    walk: Walk | None = None
    if data is not None:
        source = Source(model.path)
        wanted = config.importance and config.type.upper() not in PLAIN
        ids, held = calibration(load_tokenizer(model.path), data, config.texts if wanted else config.sensed if config.allocate else 0, config.held, config.length, ctx.seed)
        found, walk = importance(source, ids if wanted else ids[:0], held, ctx)
        seen = found if wanted else None
        if config.allocate:
            kinds, expected = allocated(source, ids[: config.sensed], ctx, types_in(model.path, config.type, seen, config.tensors), found)
            given |= {f"^{re.escape(name)}$": kind for name, kind in kinds.items() if not any(re.search(pattern, name) for pattern in config.tensors)}
    target = ctx.out / "model.gguf"
    written = write_gguf(model.path, target, config.type, ctx.progress, seen, given)
    engine = LlamaCppEngine(target, name="model.gguf")
    try:
        bound = BOUNDS.get(config.type if config.type in BOUNDS else config.type.removeprefix("i")[:2], float("inf"))
        gap = require(golden, engine.tokenizer, engine.stops, engine.logits, mean_within=bound, step="quantize.gguf")
        damage = _damage(walk, engine) if walk is not None and len(walk.held) else {}
    finally:
        engine.close()
    assert gap is not None
    size, weights = target.stat().st_size, sum(math.prod(shape) for shape in written.shapes.values())
    metrics: dict[str, Any] = {
        **({} if expected is None else {"expected_kl": round(expected, 5)}), "bytes": size, "bits_a_weight": round(_bits(written), 4), "weights": weights, "fallen": len(written.fallen), **{name: round(value, 6) for name, value in damage.items()},
        "golden_gap_mean": round(gap.mean, 5), "golden_gap_largest": round(gap.largest, 5), "golden_same_greedy": round(gap.same_greedy, 5),
    }  # fmt: skip
    _describe(ctx, model, config.type, written, metrics)
    about = {"format": "gguf", "type": config.type, "importance": seen is not None, "allocated": config.allocate, **({"calibration": data.name} if data is not None else {})}
    return Model(ctx.out, golden=golden, metrics=metrics, about=about)


def _bits(written: Written) -> float:
    """Bits of a weight on average, scales included."""
    weights = {name: math.prod(shape) for name, shape in written.shapes.items()}
    return sum(bits_of(written.types[name]) * count for name, count in weights.items()) / sum(weights.values())


def _damage(walk: Walk, engine: LlamaCppEngine) -> dict[str, float]:
    """Of the file in llama.cpp beside the model as it was, on the texts apart."""
    found = Damage()
    with torch.inference_mode():
        for ids, state in zip(walk.held, walk.as_is, strict=True):
            new = torch.from_numpy(engine.logits(ids.tolist()))
            for some in torch.split(torch.arange(len(ids)), 64):
                found.add(walk.logits(state[some]), new[some], ids[some[0] + 1 : some[-1] + 2])
    return found.figures()


def _describe(ctx: Context, model: Model, kind: str, written: Written, metrics: Mapping[str, Any]) -> None:
    before = sum(file.stat().st_size for file in model.path.glob("*.safetensors"))
    report = ctx.report
    report.title = f"{model.name} as GGUF, {kind}"
    report.lead = f"{metrics['bytes'] / 1e6:,.1f} MB of {before / 1e6:,.1f}; {metrics['bits_a_weight']:.2f} bits a weight."
    if written.fallen:
        report.lead += f" {len(written.fallen)} of {len(written.types)} tensors have a neighbouring format, since {kind}'s blocks do not divide their rows."
    if "kl" in metrics:
        report.lead += (
            f" In llama.cpp, on {metrics['held_tokens']:,.0f} tokens apart, it is {metrics['kl']:.4f} nats a token away from the model as it was; its best guess is the same for {metrics['same_top']:.1%} of them;"
            f" perplexity {metrics['perplexity_before']:.3f} before, {metrics['perplexity']:.3f} after."
        )
    report.data = {"metrics": dict(metrics), "types": written.types, "fallen": list(written.fallen)}
    report.table("Figures", ("what", "value"), list(metrics.items()))
    kinds: dict[str, list[str]] = {}
    for name, found in written.types.items():
        kinds.setdefault(found, []).append(name)
    report.table("Number formats", ("format", "tensors", "weights", "as"), [(found, len(names), sum(math.prod(written.shapes[name]) for name in names), ", ".join(names[:3])) for found, names in sorted(kinds.items(), key=lambda one: -len(one[1]))])
    ctx.progress.say(report.lead)
