"""Bits where a model bears least to lose them: costs are what a change does, budgets are kept, the result is better
than the same bits everywhere.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from llmworks.core.artifact import Dataset
from llmworks.core.context import Context
from llmworks.core.errors import ModelError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.model.io.decoder_files import load_decoder
from llmworks.model.io.layer_reader import LayerReader
from llmworks.quantize.algorithms.config import MixedConfig
from llmworks.quantize.algorithms.knapsack import allocate
from llmworks.quantize.calibrate.sensitivity import estimate_costs
from tests.quantize.test_quantize import _ours, quantized, texts  # noqa: F401 (a fixture)


def context(folder: Path) -> Context:
    folder.mkdir(parents=True, exist_ok=True)
    return Context(
        folder, folder, 0, Progress(quiet=True), ReportBuilder(), lambda _: pytest.fail("no engine is needed")
    )


def test_costs_are_the_divergence_that_follows(pico: Path, tmp_path: Path) -> None:
    """Small changes of single matrices, tried: of the last one, which no other token sees, nearly to the digit; of
    others of the same order.
    """
    model = load_decoder(pico)
    ids = torch.randint(3, model.shape.vocab_size, (60, 64), generator=torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    changes = {
        name.removesuffix(".weight"): 0.02 * torch.randn(tensor.shape, generator=draw)
        for name, tensor in load_file(pico / "model.safetensors").items()
        if name.endswith("_proj.weight")
    }
    found = estimate_costs(
        LayerReader(pico),
        ids,
        context(tmp_path),
        lambda name, weight: [weight + changes[name], weight + changes[name] / 2, weight],
    )
    with torch.no_grad():
        before = F.log_softmax(model(input_ids=ids).logits, -1)
        for name, change in changes.items():
            weight = model.get_parameter(f"{_ours(name)}.weight")
            weight += change
            after = F.log_softmax(model(input_ids=ids).logits, -1)
            weight -= change
            measured = float((before.exp() * (before - after)).sum(-1).mean())
            assert found[name][1] == pytest.approx(found[name][0] / 4, rel=1e-3)
            assert found[name][2] == 0
            within = 0.12 if name == "model.layers.1.mlp.down_proj" else 1.2
            assert found[name][0] == pytest.approx(measured, rel=within), name


def test_a_killed_look_goes_on(pico: Path, tmp_path: Path) -> None:
    """Stopped while it goes back: blocks that were done are not looked at again, and the sums are the same."""
    ids = torch.randint(3, 300, (6, 32), generator=torch.Generator().manual_seed(0))
    seen: list[str] = []

    def tries(name: str, weight: torch.Tensor) -> list[torch.Tensor]:
        seen.append(name)
        if stop and name.startswith("model.layers.0"):
            raise KeyboardInterrupt
        return [weight * 1.01]

    stop = False
    whole = estimate_costs(LayerReader(pico), ids, context(tmp_path / "whole"), tries)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        estimate_costs(LayerReader(pico), ids, context(tmp_path / "killed"), tries)
    stop = False
    seen.clear()
    assert estimate_costs(LayerReader(pico), ids, context(tmp_path / "killed"), tries) == whole
    assert all(name.startswith("model.layers.0") for name in seen)


@pytest.mark.parametrize("seed", range(5))
def test_budgets_are_kept_and_used_well(seed: int) -> None:
    """Against all choices there are: never beyond the budget, and no worse than the best of a budget that is one step
    of one part smaller.
    """
    draw = torch.Generator().manual_seed(seed)
    sizes = [[2.0, 3.0, 4.0, 6.0] for _ in range(5)]
    table = [
        [
            float(scale * 4.0**-bits * noise)
            for bits, noise in zip((2, 3, 4, 6), torch.rand(4, generator=draw) * 0.5 + 0.75, strict=True)
        ]
        for scale in torch.rand(5, generator=draw) * 50 + 1
    ]
    for budget in (10.0, 14.5, 20.0, 30.0):
        chosen = allocate(table, sizes, budget)
        assert sum(size[at] for size, at in zip(sizes, chosen, strict=True)) <= budget
        best = min(
            sum(row[at] for row, at in zip(table, one, strict=True))
            for one in itertools.product(range(4), repeat=5)
            if sum(size[at] for size, at in zip(sizes, one, strict=True)) <= budget
        )
        spare = min(
            (
                sum(row[at] for row, at in zip(table, one, strict=True))
                for one in itertools.product(range(4), repeat=5)
                if sum(size[at] for size, at in zip(sizes, one, strict=True)) <= budget - 4
            ),
            default=float("inf"),
        )
        assert best <= sum(row[at] for row, at in zip(table, chosen, strict=True)) <= max(best, spare) + 1e-12
    with pytest.raises(ValueError, match="the smallest choices take 10, which exceeds the budget of 9"):
        allocate(table, sizes, 9.0)


def test_mixed_bits_lose_less_than_the_same_everywhere(pico: Path, texts: Dataset, tmp_path: Path) -> None:
    """At no more bits; the file is read by transformers as here."""
    same = quantized("gptq", pico, texts, tmp_path / "same", bits=3)
    made = quantized(
        "mixed",
        pico,
        texts,
        tmp_path / "mixed",
        bits=same.metrics["bits_per_weight"],
        group_size=32,
        sensitivity_samples=8,
    )
    assert made.metrics["bits_per_weight"] <= same.metrics["bits_per_weight"]
    assert made.metrics["kl"] < same.metrics["kl"]
    config = json.loads((made.path / "config.json").read_text())["quantization_config"]
    bits = {
        name: group["weights"]["num_bits"] for group in config["config_groups"].values() for name in group["targets"]
    }
    assert len(set(bits.values())) > 1
    assert len({bits[f"model.layers.0.self_attn.{x}_proj"] for x in "qkv"}) == 1
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)(input_ids=ids).logits
        assert torch.allclose(theirs, load_decoder(made.path)(input_ids=ids).logits, atol=1e-3)


def test_what_is_refused(pico: Path, texts: Dataset, tmp_path: Path) -> None:
    more: dict[str, Any] = {"sensitivity_samples": 2, "group_size": 32}
    with pytest.raises(
        ModelError,
        match=r"config.bits: 2.2 bits per weight is less than 2.5, the minimum of config.bit_choices with their scales",
    ):
        quantized("mixed", pico, texts, tmp_path, bits=2.2, **more)
    with pytest.raises(ValidationError, match="each must be from 2 to 8, without duplicates"):
        MixedConfig(bit_choices=[4, 4])


@pytest.mark.parametrize("form", ["exl2", "exl3"])
def test_what_needs_a_gpu_is_handed_over_or_refused(
    form: Any, pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the package, without a GPU; with both (a stand-in that writes what it was told) its directory is the
    result, and its last line the error.
    """
    from llmworks.core.artifact import Model
    from llmworks.core.errors import MissingDependency
    from llmworks.quantize.exl2 import Exl2Config, exl2

    package = {"exl2": "exllamav2", "exl3": "exllamav3"}[form]
    with pytest.raises(
        MissingDependency,
        match=(
            f"{form} files are written by {package}, which is not installed; .* quantize.mixed also"
            " allocates bits within a budget"
        ),
    ):
        exl2(Exl2Config(save_format=form), Model(pico), context(tmp_path / "a"))
    place = tmp_path / "packages" / package / "conversion"
    place.mkdir(parents=True)
    for folder in (place.parent, place):
        (folder / "__init__.py").write_text("")
    told = (
        "import argparse, json, pathlib\nparser = argparse.ArgumentParser()\nfor name in ('-i', '-o', '-cf', '-w',"
        " '-b', '-hb'):\n    parser.add_argument(name)\n"
    )
    write = (
        "def wrote(a):\n    out = pathlib.Path(a.cf or a.o)\n    out.mkdir()\n    (out /"
        " 'config.json').write_text(json.dumps(vars(a)))\n"
    )
    second = told + write + "wrote(parser.parse_args())\n"
    third = (
        told
        + write
        + "def prepare(a):\n    return a, None, a.b != '7.0', 'seven is too many'\ndef main(a, state):\n    wrote(a)\n"
    )
    (place / ("convert_exl2.py" if form == "exl2" else "convert_model.py")).write_text(
        second if form == "exl2" else third
    )
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    with pytest.raises(MissingDependency, match=f"{package} requires a CUDA GPU, but none is available"):
        exl2(Exl2Config(save_format=form), Model(pico), context(tmp_path / "b"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = exl2(Exl2Config(save_format=form, bits=3.5), Model(pico), context(tmp_path / "c"))
    seen = json.loads((made.path / "config.json").read_text())
    assert (seen["i"], seen["b"], seen["hb"]) == (str(pico), "3.5", "6")
    if form == "exl3":
        with pytest.raises(ModelError, match="exllamav3 failed: seven is too many"):
            exl2(Exl2Config(save_format=form, bits=7.0), Model(pico), context(tmp_path / "d"))
