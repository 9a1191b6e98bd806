"""Cards of quantized models, read as the Hub reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from llmworks.core.artifact import Dataset, Model
from llmworks.quantize.report.card import gguf_name, hub_name, write_card
from tests.quantize.test_quantize import quantized, texts  # noqa: F401


@pytest.mark.parametrize(
    ("form", "bits", "inputs", "name"),
    [
        ("gptq", 4, 16, "Qwen2.5-0.5B-Instruct-GPTQ-Int4"),
        ("gptq", 8, 16, "Qwen2.5-0.5B-Instruct-GPTQ-Int8"),
        ("awq", 4, 16, "Qwen2.5-0.5B-Instruct-AWQ"),
        ("bitsandbytes-4bit", 4, 16, "Qwen2.5-0.5B-Instruct-bnb-4bit"),
        ("compressed-tensors", 4, 16, "Qwen2.5-0.5B-Instruct-quantized.w4a16"),
        ("compressed-tensors", 8, 8, "Qwen2.5-0.5B-Instruct-quantized.w8a8"),
        ("gguf", 0, 16, "Qwen2.5-0.5B-Instruct-GGUF"),
        ("hqq", 4, 16, "Qwen2.5-0.5B-Instruct-HQQ-4bit"),
    ],
)
def test_names_are_those_that_people_look_for(form: str, bits: float, inputs: int, name: str) -> None:
    """As these are called on the Hub."""
    assert hub_name("Qwen/Qwen2.5-0.5B-Instruct", form, bits, inputs=inputs) == name
    assert gguf_name("Qwen/Qwen2.5-0.5B-Instruct", "q4_k_m") == "Qwen2.5-0.5B-Instruct-Q4_K_M.gguf"


def test_a_card_says_what_was_done(pico: Path, texts: Dataset, tmp_path: Path) -> None:
    """Figures are those of the run; no date, no path of this machine."""
    made = quantized("gptq", pico, texts, tmp_path)
    card = ModelCard.load(made.path / "README.md")
    assert card.data.tags == ["quantized", "gptq", "4-bit", "compressed-tensors"]
    assert card.data.library_name == "transformers"
    assert card.text.lstrip().startswith(f"# {pico.name}-quantized.w4a16")
    assert f"| KL divergence from the original, nats per token | {made.metrics['kl']:.4g} |" in card.text
    assert f"on {made.metrics['eval_tokens']} held-out tokens of texts" in card.text
    assert str(tmp_path) not in card.content
    two = quantized("gguf", pico, texts, tmp_path / "two", type="q8_0")
    card = ModelCard.load(two.path / "README.md")
    assert card.data.library_name == "gguf"
    assert card.data.tags == ["quantized", "q8_0", "gguf"]
    assert "llama-server -m model.gguf" in card.text
    assert f"as {pico.name}-Q8_0.gguf on the Hub" in card.text


def test_what_the_original_says_of_itself_is_carried(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en]\ntags: [x]\n---\n# Base\n")
    metrics = {"bytes": 1e6, "bits_per_weight": 4.25}
    for ref, expected in (("hf:ORG/Base", "ORG/Base"), ("", None)):
        write_card(
            tmp_path,
            Model(base, name="ORG/Base", ref=ref),
            "rounded.",
            form="awq",
            method="awq",
            bits=4,
            name="Base-AWQ",
            metrics=metrics,
            data=None,
        )
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.base_model == expected
        assert card.data.to_dict().get("base_model_relation") == ("quantized" if expected else None)
        assert card.data.license == "apache-2.0"
        assert card.data.language == ["en"]
        assert card.data.tags == ["quantized", "awq", "4-bit"]
        assert "The divergence from the original was not measured." in card.text
    (base / "README.md").unlink()
    write_card(
        tmp_path,
        Model(base, ref="asset:smollm2-135m-instruct"),
        "rounded.",
        form="awq",
        method="awq",
        bits=4,
        name="Base-AWQ",
        metrics=metrics,
        data=None,
    )
    assert ModelCard.load(tmp_path / "README.md").data.license == "apache-2.0"
    (base / "README.md").write_bytes(b"---\n\xff: [\n---\n")
    write_card(
        tmp_path, Model(base), "rounded.", form="awq", method="awq", bits=4, name="Base-AWQ", metrics=metrics, data=None
    )
    assert ModelCard.load(tmp_path / "README.md").data.license is None
