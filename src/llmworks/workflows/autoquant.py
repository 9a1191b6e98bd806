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
from llmworks.evaluate.suites import SuiteTask
from llmworks.runtime.session import Session
from llmworks.tokenize.load import read_json


@dataclass(frozen=True)
class QuantizationVariant:
    """A quantization method: its stage and config; `before`: a quantize stage to run first."""

    stage: str
    config: Mapping[str, Any] = field(default_factory=dict)
    before: str = ""


GGUF = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_xs", "q3_k_m", "iq3_xs", "q2_k", "iq2_xs")
QUANTIZATION_METHODS: dict[str, QuantizationVariant] = {
    "absmax-8": QuantizationVariant("rtn", {"bits": 8, "group_size": 0}),
    "int8": QuantizationVariant("int8"),
    "smoothquant-8": QuantizationVariant("smoothquant", {"bits": 8, "group_size": 0}),
    "absmax-4": QuantizationVariant("rtn"),
    "zeropoint-4": QuantizationVariant("rtn", {"symmetric": False}),
    "hqq-4": QuantizationVariant("hqq"),
    "nf4": QuantizationVariant("nf4"),
    "fp4": QuantizationVariant("nf4", {"bnb_4bit_quant_type": "fp4"}),
    "gptq-4": QuantizationVariant("gptq"),
    "gptq-4-zero": QuantizationVariant("gptq", {"symmetric": False, "awq_scaling": True}),
    "awq-4": QuantizationVariant("awq"),
    "zeroquant-4": QuantizationVariant("zeroquant"),
    "rotated-gptq-4": QuantizationVariant("gptq", before="rotate"),
    "gptq-3": QuantizationVariant("gptq", {"bits": 3}),
    "mixed-4.25": QuantizationVariant("mixed", {"bits": 4.25}),
    "mixed-3.25": QuantizationVariant("mixed", {"bits": 3.25}),
    **{f"gguf-{kind}": QuantizationVariant("gguf", {"type": kind}) for kind in GGUF},
    **{
        f"gguf-{kind}-auto": QuantizationVariant("gguf", {"type": kind, "allocate_bits": True})
        for kind in ("q5_k_m", "q4_k_m", "q3_k_m", "q2_k")
    },
}
ENGINES = {"gguf": "llama.cpp", "int8": "transformers", "nf4": "transformers", "hqq": "vLLM"}
CALIBRATED = ("gptq", "awq", "smoothquant", "zeroquant", "mixed", "gguf")


def select_methods(names: Sequence[str]) -> dict[str, QuantizationVariant]:
    """Select methods by name or name prefix; all where none is given. UserError for an unknown name."""
    if not names:
        return dict(QUANTIZATION_METHODS)
    chosen: dict[str, QuantizationVariant] = {}
    for name in names:
        matches = {one: way for one, way in QUANTIZATION_METHODS.items() if one == name} or {
            one: way for one, way in QUANTIZATION_METHODS.items() if one.startswith(name)
        }
        if not matches:
            close_match = next((one for one in QUANTIZATION_METHODS if one == f"gguf-{name}"), "") or next(
                iter(difflib.get_close_matches(name, QUANTIZATION_METHODS, n=1)), ""
            )
            raise UserError(
                "no quantization method is named"
                f" {name!r}{f', did you mean {close_match!r}' if close_match else ''}; known:"
                f" {', '.join(QUANTIZATION_METHODS)}"
            )
        chosen |= matches
    return chosen


@dataclass
class QuantizationJob:
    """One run: the model, calibration data, tasks, and sample counts."""

    model: Model
    data: Dataset
    session: Session
    items: Sequence[SuiteTask] = ()
    num_calibration_samples: int = 128
    eval_samples: int = 16
    max_seq_length: int = 512
    say: Callable[[str], None] = print
    measure_sensitivity: bool = (
        True  # whether bits are allocated, which needs quantize.imatrix's slow sensitivity analysis
    )

    def quantize(self, method: QuantizationVariant) -> Model:
        """Quantize the model with a method."""
        make = self.session.make
        base = make(f"quantize.{method.before}", kind=Model, model=self.model) if method.before else self.model
        config = {
            "eval_samples": self.eval_samples,
            "max_seq_length": self.max_seq_length,
            **({"num_calibration_samples": self.num_calibration_samples} if method.stage in CALIBRATED else {}),
            **method.config,
        }
        inputs: dict[str, Any] = {"model": base, "data": self.data}
        if method.stage == "gguf" and method.config["type"] != "q8_0":
            imatrix_config = {
                "num_calibration_samples": self.num_calibration_samples,
                "max_seq_length": self.max_seq_length,
                **({} if self.measure_sensitivity else {"sensitivity_samples": 0}),
            }
            inputs["imatrix"] = make("quantize.imatrix", config=imatrix_config, model=base, data=self.data)
        return make(f"quantize.{method.stage}", kind=Model, config=config, **inputs)

    def measure(
        self, name: str, model: Model, engine: str, figures: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[Report]]:
        """Benchmark and evaluate a variant; return (its figures, their reports)."""
        benchmark = self.session.make("tune.benchmark", kind=Report, model=model)
        reports, skills = [benchmark], dict[str, dict[str, float]]()
        for item in self.items:
            try:
                config = {"task": item.task, "limit": item.limit}
                evaluation = self.session.make("evaluate", kind=Report, config=config, model=model)
            except LlmworksError as error:
                self.say(f"  evaluation failed: {name} on {item.task}: {error}")
                continue
            skills |= extract_skills(item.task, evaluation.read())
            reports.append(evaluation)
        size = (
            sum(file.stat().st_size for pattern in ("*.safetensors", "*.gguf") for file in model.path.glob(pattern))
            if model.path.is_dir()
            else model.path.stat().st_size
        )
        divergence_metrics = {
            key: float(figures[key])
            for key in ("kl", "top1_agreement", "perplexity")
            if math.isfinite(figures.get(key, math.nan))
        }
        return {
            "name": name,
            "engine": engine,
            "digest": model.digest,
            "bytes": size,
            "bits": float(figures.get("bits_per_weight", 0.0)),
            **divergence_metrics,
            **{
                key: float(benchmark.metrics[key])
                for key in ("peak_memory", "prefill_speed", "decode_speed")
                if key in benchmark.metrics
            },
            "skills": skills,
            "completions": benchmark.read()["completions"],
        }, reports


def frontier(
    job: QuantizationJob, methods: Mapping[str, QuantizationVariant], budget: float | None = None
) -> tuple[Report, Model | None]:
    """Quantize with all methods; return (the report, the recommended model). Failed methods are listed with the error.

    Errors: ModelError for a model that is already quantized; DataError when every method failed, or none is within the
    budget.
    """
    if job.model.format != "hf" or read_json(job.model.path / "config.json").get("quantization_config"):
        raise ModelError(f"{job.model.name}: is already quantized; give the original model")
    job.measure_sensitivity = any(way.config.get("allocate_bits") for way in methods.values())
    job.say(
        f"{len(methods)} methods; each is quantized, measured and evaluated, taking minutes; existing results are"
        " reused"
    )
    variants: list[dict[str, Any]] = []
    models: dict[str, Model] = {}
    reports: list[Report] = []
    before: float | None = None
    for name, way in methods.items():
        try:
            model = job.quantize(way)
            figures = dict(model.metrics)
            variant, variant_reports = job.measure(name, model, ENGINES.get(way.stage, "transformers, vLLM"), figures)
        except LlmworksError as error:
            why = str(error).replace(str(job.model.path), job.model.name)[:300]
            job.say(f"· {name}: {why}")
            variants.append({"name": name, "error": why})
            continue
        before = before or figures.get("original_perplexity")
        variants.append(variant)
        models[model.digest] = model
        reports += variant_reports
        job.say(
            f"✓ {name}  {variant['bytes'] / 1e6:,.1f} MB  {variant.get('kl', float('nan')):.4f} nats per token "
            f" {variant['decode_speed'] if 'decode_speed' in variant else float('nan'):,.1f} tokens/s"
            + "".join(f"  {task} {skill['score']:.3f}" for task, skill in variant["skills"].items())
        )
    original, variant_reports = job.measure(
        "as it was",
        job.model,
        "transformers",
        {
            "bits_per_weight": 8 * _compute_bytes_per_weight(job.model),
            **({"perplexity": before, "top1_agreement": 1.0, "kl": 0.0} if before else {}),
        },
    )
    config = {"model": job.model.name, "original": original, "variants": variants, "budget": budget}
    inputs: dict[str, Any] = {
        "reports": [*variant_reports, *reports],
        **({"models": list(models.values())} if models else {}),
    }
    page = job.session.make("tune.tradeoff", kind=Report, config=config, **inputs)
    return page, models.get(page.read()["recommended"]["digest"])


def extract_skills(task: str, evaluation_data: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Extract scores by name from an evaluation report: the task's metric, and for generation tasks also
    all other metrics.
    """
    names = [
        name
        for name in evaluation_data["intervals"]
        if name == evaluation_data["metric"] or evaluation_data["kind"] == "generate"
    ]
    return {
        task if name == evaluation_data["metric"] else f"{task}: {name}": {
            "score": evaluation_data["intervals"][name]["value"],
            **{key: evaluation_data["intervals"][name][key] for key in ("low", "high")},
        }
        for name in names
    }


def _compute_bytes_per_weight(model: Model) -> float:
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
