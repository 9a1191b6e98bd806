"""Quantize a model with all requested methods in one resumable run: quantize, measure, benchmark and evaluate each,
then write one report.

See `tune/tradeoff.py`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llmworks.core.artifact import Dataset, Model, Report
from llmworks.core.errors import LlmworksError, ModelError, UserError
from llmworks.evaluate.suites import Item
from llmworks.runtime.session import Session
from llmworks.tokenize.load import read_json


@dataclass(frozen=True)
class Way:
    """A quantization method: its stage and config; `before`: a quantize stage to run first."""

    stage: str
    config: Mapping[str, Any] = field(default_factory=dict)
    before: str = ""


GGUF = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_xs", "q3_k_m", "iq3_xs", "q2_k", "iq2_xs")
WAYS: dict[str, Way] = {
    "absmax-8": Way("rtn", {"bits": 8, "group_size": 0}),
    "int8": Way("int8"),
    "smoothquant-8": Way("smoothquant", {"bits": 8, "group_size": 0}),
    "absmax-4": Way("rtn"),
    "zeropoint-4": Way("rtn", {"symmetric": False}),
    "hqq-4": Way("hqq"),
    "nf4": Way("nf4"),
    "fp4": Way("nf4", {"bnb_4bit_quant_type": "fp4"}),
    "gptq-4": Way("gptq"),
    "gptq-4-zero": Way("gptq", {"symmetric": False, "awq_scaling": True}),
    "awq-4": Way("awq"),
    "zeroquant-4": Way("zeroquant"),
    "rotated-gptq-4": Way("gptq", before="rotate"),
    "gptq-3": Way("gptq", {"bits": 3}),
    "mixed-4.25": Way("mixed", {"bits": 4.25}),
    "mixed-3.25": Way("mixed", {"bits": 3.25}),
    **{f"gguf-{kind}": Way("gguf", {"type": kind}) for kind in GGUF},
    **{
        f"gguf-{kind}-auto": Way("gguf", {"type": kind, "allocate_bits": True})
        for kind in ("q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
    },
}
LOADS = {"gguf": "llama.cpp", "int8": "transformers", "nf4": "transformers", "hqq": "vLLM"}
CALIBRATED = ("gptq", "awq", "smoothquant", "zeroquant", "mixed", "gguf")


def ways_of(names: Sequence[str]) -> dict[str, Way]:
    """Select methods by name or name prefix; all where none is given. UserError for an unknown name."""
    if not names:
        return dict(WAYS)
    chosen: dict[str, Way] = {}
    for name in names:
        found = {one: way for one, way in WAYS.items() if one == name} or {
            one: way for one, way in WAYS.items() if one.startswith(name)
        }
        if not found:
            near = next((one for one in WAYS if one == f"gguf-{name}"), "") or next(
                iter(difflib.get_close_matches(name, WAYS, n=1)), ""
            )
            raise UserError(
                f"no quantization method is named {name!r}{f', did you mean {near!r}' if near else ''}; known:"
                f" {', '.join(WAYS)}"
            )
        chosen |= found
    return chosen


@dataclass
class Frontier:
    """One run: the model, calibration data, tasks, and sample counts."""

    model: Model
    data: Dataset
    session: Session
    items: Sequence[Item] = ()
    texts: int = 128
    held: int = 16
    length: int = 512
    say: Callable[[str], None] = print
    costs: bool = True  # whether bits are allocated, which needs quantize.imatrix's slow sensitivity analysis

    def quantized(self, way: Way) -> Model:
        """Quantize the model with a method."""
        make = self.session.make
        base = make(f"quantize.{way.before}", kind=Model, model=self.model) if way.before else self.model
        config = {
            "eval_samples": self.held,
            "max_seq_length": self.length,
            **({"num_calibration_samples": self.texts} if way.stage in CALIBRATED else {}),
            **way.config,
        }
        inputs: dict[str, Any] = {"model": base, "data": self.data}
        if way.stage == "gguf" and way.config["type"] != "q8_0":
            sensed = {
                "num_calibration_samples": self.texts,
                "max_seq_length": self.length,
                **({} if self.costs else {"sensitivity_samples": 0}),
            }
            inputs["imatrix"] = make("quantize.imatrix", config=sensed, model=base, data=self.data)
        return make(f"quantize.{way.stage}", kind=Model, config=config, **inputs)

    def measured(
        self, name: str, model: Model, form: str, figures: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[Report]]:
        """Benchmark and evaluate a variant; return (its figures, their reports)."""
        ran = self.session.make("tune.benchmark", kind=Report, model=model)
        reports, skills = [ran], dict[str, dict[str, float]]()
        for item in self.items:
            try:
                config = {"task": item.task, "limit": item.limit}
                asked = self.session.make("evaluate", kind=Report, config=config, model=model)
            except LlmworksError as error:
                self.say(f"  evaluation failed: {name} on {item.task}: {error}")
                continue
            skills |= skills_of(item.task, asked.read())
            reports.append(asked)
        size = (
            sum(file.stat().st_size for pattern in ("*.safetensors", "*.gguf") for file in model.path.glob(pattern))
            if model.path.is_dir()
            else model.path.stat().st_size
        )
        told = {
            key: float(figures[key])
            for key in ("kl", "top1_agreement", "perplexity")
            if math.isfinite(figures.get(key, math.nan))
        }
        return {
            "name": name,
            "engine": form,
            "digest": model.digest,
            "bytes": size,
            "bits": float(figures.get("bits_per_weight", 0.0)),
            **told,
            **{
                key: float(ran.metrics[key])
                for key in ("peak_memory", "prefill_speed", "decode_speed")
                if key in ran.metrics
            },
            "skills": skills,
            "completions": ran.read()["completions"],
        }, reports


def frontier(job: Frontier, ways: Mapping[str, Way], budget: float | None = None) -> tuple[Report, Model | None]:
    """Quantize with all methods; return (the report, the recommended model). Failed methods are listed with the error.

    Errors: ModelError for a model that is already quantized; DataError when every method failed, or none is within the
    budget.
    """
    if job.model.format != "hf" or read_json(job.model.path / "config.json").get("quantization_config"):
        raise ModelError(f"{job.model.name}: is already quantized; give the original model")
    job.costs = any(way.config.get("allocate_bits") for way in ways.values())
    job.say(
        f"{len(ways)} methods; each is quantized, measured and evaluated, taking minutes; existing results are reused"
    )
    variants: list[dict[str, Any]] = []
    models: dict[str, Model] = {}
    reports: list[Report] = []
    before: float | None = None
    for name, way in ways.items():
        try:
            model = job.quantized(way)
            figures = dict(model.metrics)
            found, seen = job.measured(name, model, LOADS.get(way.stage, "transformers, vLLM"), figures)
        except LlmworksError as error:
            why = str(error).replace(str(job.model.path), job.model.name)[:300]
            job.say(f"· {name}: {why}")
            variants.append({"name": name, "error": why})
            continue
        before = before or figures.get("perplexity_before")
        variants.append(found)
        models[model.digest] = model
        reports += seen
        job.say(
            f"✓ {name}  {found['bytes'] / 1e6:,.1f} MB  {found.get('kl', float('nan')):.4f} nats per token "
            f" {found['decode_speed'] if 'decode_speed' in found else float('nan'):,.1f} tokens/s"
            + "".join(f"  {task} {skill['score']:.3f}" for task, skill in found["skills"].items())
        )
    original, seen = job.measured(
        "as it was",
        job.model,
        "transformers",
        {
            "bits_per_weight": 8 * _bytes_a_weight(job.model),
            **({"perplexity": before, "top1_agreement": 1.0, "kl": 0.0} if before else {}),
        },
    )
    config = {"model": job.model.name, "original": original, "variants": variants, "budget": budget}
    inputs: dict[str, Any] = {"reports": [*seen, *reports], **({"models": list(models.values())} if models else {})}
    page = job.session.make("tune.tradeoff", kind=Report, config=config, **inputs)
    return page, models.get(page.read()["recommended"]["digest"])


def skills_of(task: str, found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Extract scores by name from an evaluation report: the task's metric, and for generation tasks also
    all other metrics.
    """
    names = [name for name in found["intervals"] if name == found["metric"] or found["kind"] == "generate"]
    return {
        task if name == found["metric"] else f"{task}: {name}": {
            "score": found["intervals"][name]["value"],
            **{key: found["intervals"][name][key] for key in ("low", "high")},
        }
        for name in names
    }


def _bytes_a_weight(model: Model) -> float:
    """Compute the mean bytes per weight of the model's safetensors files."""
    from llmworks.model.io.weights import read_header

    entries = [
        entry
        for file in sorted(model.path.glob("*.safetensors"))
        for name, entry in read_header(file).items()
        if name != "__metadata__"
    ]
    weights = sum(math.prod(entry["shape"]) for entry in entries)
    return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries) / weights if weights else 0.0
