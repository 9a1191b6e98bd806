"""Write the model card (README.md) of a quantized model, and its usual name on the Hub.

Does not know methods or tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmworks.core.artifact import Dataset, Model
from llmworks.model.card import get_base_model_fields, get_front_matter, to_hub_name, write_model_card

METRIC_LABELS = {
    "kl": "KL divergence from the original, nats per token",
    "top1_agreement": "top-1 agreement with the original",
    "original_perplexity": "perplexity of the original",
    "perplexity": "perplexity",
    "golden_gap_mean": "mean change of the golden tokens' logits",
}
USE = {
    "gguf": (
        "llama-server -m model.gguf              # as {file} on the Hub\nollama run hf.co/ORG/{name}\nllmworks chat"
        ' gguf:model.gguf "Hello"'
    ),
    "hqq": 'vllm serve ORG/{name}\nllmworks chat DIRECTORY "Hello"',
    "bitsandbytes": (
        'AutoModelForCausalLM.from_pretrained("ORG/{name}")      # transformers, with bitsandbytes\nllmworks chat'
        ' DIRECTORY "Hello"'
    ),
    "": (
        'vllm serve ORG/{name}\nAutoModelForCausalLM.from_pretrained("ORG/{name}")      # transformers, with'
        ' {package}\nllmworks chat DIRECTORY "Hello"'
    ),
}


def hub_name(base: str, form: str, bits: float, *, inputs: int = 16) -> str:
    """Return the name that people search for on the Hub, in the style of Qwen (GPTQ, AWQ), Unsloth (bitsandbytes),
    Mobius Labs (HQQ), Red Hat (compressed-tensors) and llama.cpp's users.

    `inputs`: activation bits.
    """
    base = to_hub_name(base)
    ends = {
        "gptq": f"-GPTQ-Int{bits:g}",
        "awq": "-AWQ",
        "bitsandbytes-4bit": "-bnb-4bit",
        "bitsandbytes-int8": "-bnb-8bit",
        "hqq": f"-HQQ-{bits:g}bit",
        "gguf": "-GGUF",
    }
    return base + ends.get(form, f"-quantized.w{bits:g}a{inputs}")


def gguf_name(base: str, kind: str) -> str:
    """Return the usual name of a GGUF file: Model-Q4_K_M.gguf."""
    return f"{to_hub_name(base)}-{kind.upper()}.gguf"


def write_card(
    out: Path,
    model: Model,
    summary: str,
    *,
    form: str,
    method: str,
    bits: float,
    name: str,
    metrics: Mapping[str, Any],
    data: Dataset | None,
    file: str = "",
) -> None:
    """Write README.md beside the weights. `summary`: one sentence on how they were made; `name`, `file`: on the Hub."""
    use = USE.get(form, USE["bitsandbytes" if form.startswith("bitsandbytes") else ""]).format(
        name=name, file=file, package="compressed-tensors" if form == "compressed-tensors" else "gptqmodel"
    )
    front: dict[str, Any] = {
        **get_front_matter(model),
        "library_name": "gguf" if form == "gguf" else "transformers",
        "pipeline_tag": "text-generation",
        **get_base_model_fields([model], "quantized"),
    }
    front["tags"] = list(dict.fromkeys(("quantized", method, *((f"{bits:g}-bit",) if bits else ()), form)))
    model_name = " ".join(model.name.split()).replace("|", "\\|")
    lines = [
        f"# {name}",
        "",
        f"{model_name}, {summary}",
        "",
        "| | |",
        "|---|---|",
        f"| weights | {metrics['bytes'] / 1e6:,.1f} MB |",
        f"| bits per weight, scales included | {metrics['bits_per_weight']:.2f} |",
    ]
    lines += [f"| {what} | {metrics[key]:.4g} |" for key, what in METRIC_LABELS.items() if key in metrics]
    lines = _add_divergence_note(data, metrics, lines)
    lines += [
        "The golden tokens of the original (ids, stop tokens, logits) were replayed on these files.",
        "",
        "## Use",
        "",
        f"Uploaded as ORG/{name}, or from its directory:",
        "",
        "```",
        use,
        "```",
        "",
    ]
    write_model_card(out, front, lines)


def _add_divergence_note(data: Dataset | None, metrics: Mapping[str, Any], lines: list[str]) -> list[str]:
    """Add what the divergence was measured on."""
    where = (
        f" on {metrics['eval_tokens']:,.0f} held-out tokens of {data.name}"
        if data is not None and "eval_tokens" in metrics
        else ""
    )
    lines += [
        "",
        (
            f"Divergence, agreement and perplexity are measured{where}; they say little about downstream tasks."
            if where
            else "The divergence from the original was not measured."
        ),
    ]
    return lines
