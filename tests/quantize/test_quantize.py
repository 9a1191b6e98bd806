"""Quantizations as they are run: what layers are calibrated on, what is written and who reads it, what is measured,
what a stopped run goes on as, what is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from llmworks.core.artifact import Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError, GoldenMismatch, LlmworksError, ModelError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.core.types import Message, Request, Sampling
from llmworks.generate.engines.torch import TorchEngine
from llmworks.model.golden import record_golden
from llmworks.model.io.decoder_files import load_decoder
from llmworks.model.io.layer_reader import LayerReader
from llmworks.model.lowbit.activations import InputQuantization, quantize_tokens
from llmworks.model.lowbit.integer import Grid
from llmworks.quantize import awq, gguf, gptq, hqq, int8, mixed, nf4, rtn, smoothquant, zeroquant
from llmworks.quantize.algorithms.calibrated import AwqMethod, GptqMethod
from llmworks.quantize.algorithms.smoothquant import search_smoothing_scales
from llmworks.quantize.calibrate.calibration_data import load_samples
from llmworks.quantize.calibrate.layerwise import LayerwiseCalibration
from llmworks.tokenize.load import load_tokenizer
from tests.conftest import make_pico

STAGES: Mapping[str, tuple[Callable[..., Any], Any]] = {
    "absmax": (rtn.rtn, rtn.RtnConfig),
    "zeropoint": (rtn.rtn, partial(rtn.RtnConfig, symmetric=False)),
    "gptq": (gptq.gptq, gptq.GptqConfig),
    "awq": (awq.awq, awq.AwqConfig),
    "smoothquant": (smoothquant.smoothquant, smoothquant.SmoothquantConfig),
    "int8": (int8.int8, int8.Int8Config),
    "nf4": (nf4.nf4, nf4.Nf4Config),
    "hqq": (hqq.hqq, hqq.HqqConfig),
    "mixed": (mixed.mixed, mixed.MixedConfig),
    "gguf": (gguf.gguf, gguf.GgufConfig),
    "zeroquant": (zeroquant.zeroquant, zeroquant.ZeroquantConfig),
}
SMALL = {"bits": 4, "group_size": 32, "max_seq_length": 48, "eval_samples": 3}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    import random

    draw, words = random.Random(0), ["the", "fox", "what", "is", "weather", "in", "Oslo", "and", "name", "city"]
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    file.write_text(
        "".join(json.dumps({"id": str(i), "text": " ".join(draw.choices(words, k=40))}) + "\n" for i in range(60))
    )
    return Dataset(file, name="texts")


def quantized(
    stage: str, model: Path, texts: Dataset | None, folder: Path, golden: Path | None = None, **given: Any
) -> Model:
    """`golden`: the model whose golden tokens are replayed, if not this one."""
    function, config = STAGES[stage]
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (folder / "scratch").mkdir(exist_ok=True)
    context = Context(
        out, folder / "scratch", 0, Progress(quiet=True), ReportBuilder(), lambda _: pytest.fail("no engine is needed")
    )
    more = (
        {"num_calibration_samples": 12}
        if stage in ("gptq", "awq", "zeroquant", "mixed")
        else (
            {"group_size": 64}
            if stage == "nf4"
            else (
                {"num_calibration_samples": 12, "bits": 8, "group_size": 0}
                if stage == "smoothquant"
                else {"bits": 8, "group_size": 0}
                if stage == "int8"
                else {}
            )
        )
    )
    small = (
        {"max_seq_length": 48, "eval_samples": 3, "num_calibration_samples": given.pop("texts_", 12)}
        if stage == "gguf"
        else SMALL
    )
    made: Model = function(
        config(**{**small, **more, **given}),
        Model(model, golden=record_golden(golden or model)),
        context,
        **({} if texts is None else {"data": texts}),
    )
    context.report.write(folder / "report")
    return made


def _ours(name: str) -> str:
    """The name of a layer of Llama's in the decoder."""
    for theirs, here in (
        ("model.layers", "decoder.blocks"),
        ("self_attn", "attention"),
        ("mlp", "feed_forward"),
        ("q_proj", "query"),
        ("k_proj", "key"),
        ("v_proj", "value"),
        ("o_proj", "out"),
        ("_proj", ""),
    ):
        name = name.replace(theirs, here)
    return name


def test_walking_changes_nothing_and_reads_what_layers_read(pico: Path, tmp_path: Path) -> None:
    """States are the model's; moments are those of a hook on each layer; the texts apart are not moved."""
    model = load_decoder(pico)
    ids = torch.randint(0, model.shape.vocab_size, (10, 48), generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "head":
            module.register_forward_hook(lambda _, given, __, name=name: seen.__setitem__(name, given[0].flatten(0, 1)))  # type: ignore[misc]
    with torch.inference_mode():
        expected = model.decoder(model.decoder.embedding(ids), torch.arange(48)[None].expand(10, -1))
        walk = LayerwiseCalibration(LayerReader(pico), ids, ids[:3], tmp_path / "walk")
        for passing in walk.iter_blocks():
            for part in passing.parts:
                moments = passing.collect_statistics(part, with_abs_mean=True)
                for layer in part.layers:
                    x = seen[f"decoder.blocks.{passing.index}.{layer}"]
                    assert torch.allclose(moments.hessian.float(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
                    assert torch.allclose(moments.abs_mean.float(), x.abs().mean(0), rtol=1e-4)
                    assert torch.equal(moments.max_abs, x.abs().amax(0))
            passing.compute_outputs()
            passing.mark_done()
        assert torch.allclose(walk.stack.norm(walk.open_states(model.shape.num_hidden_layers)), expected, atol=1e-5)
        assert walk.measure_divergence()["kl"] == pytest.approx(0.0, abs=1e-6)


def test_layers_are_calibrated_on_what_quantized_layers_give(pico: Path, texts: Dataset, tmp_path: Path) -> None:
    """The weights of the last block, computed again by hand: hooks on a model whose earlier layers are those that were
    written.
    """
    made = quantized("gptq", pico, texts, tmp_path, mse_scales=False, act_order=False, dtype="float32")
    done, model = load_decoder(made.path), load_decoder(pico)
    ids, _ = load_samples(load_tokenizer(pico), texts, 12, 3, 48, 0)
    order = ["query", "key", "value", "out", "gate", "up", "down"]
    for block in range(2):
        for name in order:
            place = f"decoder.blocks.{block}.{'attention' if name in order[:4] else 'feed_forward'}.{name}"
            seen: list[torch.Tensor] = []
            hook = model.get_submodule(place).register_forward_hook(
                lambda _, given, __, seen=seen: seen.append(given[0].flatten(0, 1))
            )  # type: ignore[misc]
            with torch.no_grad():
                model(input_ids=ids)
            hook.remove()
            from llmworks.quantize.algorithms.gptq import quantize_gptq

            before = model.get_parameter(f"{place}.weight")
            expected = quantize_gptq(
                before.data,
                seen[0].T @ seen[0] / len(seen[0]),
                Grid(4, 32, stored=made.about["dtype"]),
                mse_scales=False,
            ).weight()
            now = done.get_parameter(f"{place}.weight").data
            assert float((expected - now).abs().gt(1e-5).float().mean()) < 0.01, place
            before.data.copy_(now)


@pytest.mark.parametrize("stage", ["absmax", "zeropoint", "gptq", "awq"])
@pytest.mark.parametrize(
    "more", [{}, {"bits": 8, "group_size": 0}, {"bits": 3}], ids=["4 bits", "8 bits a row", "3 bits"]
)
def test_what_is_written_is_read(stage: str, more: dict[str, Any], pico: Path, texts: Dataset, tmp_path: Path) -> None:
    """By compressed-tensors to the bit, by transformers, by our engine; figures are those of both models side by
    side.
    """
    made = quantized(stage, pico, texts, tmp_path, **more)
    ours, before = load_decoder(made.path), load_decoder(pico)
    tensors, config = load_file(made.path / "model.safetensors"), json.loads((made.path / "config.json").read_text())
    scheme = QuantizationConfig.model_validate(config["quantization_config"]).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    layers = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    assert len(layers) == 14
    for layer in layers:
        theirs = compressor.decompress(
            {
                name.removeprefix(f"{layer}."): tensor
                for name, tensor in tensors.items()
                if name.startswith(f"{layer}.")
            },
            scheme,
        )["weight"]
        assert torch.allclose(
            ours.get_parameter(f"{_ours(layer)}.weight"), theirs.float(), rtol=2e-3, atol=1e-6
        )  # theirs is rounded to the scales' format
    ids, held = load_samples(load_tokenizer(pico), texts, made_texts := 12 if stage in ("gptq", "awq") else 0, 3, 48, 0)
    assert len(ids) == made_texts
    with torch.no_grad():
        old, new = (F.log_softmax(model(input_ids=held).logits, -1) for model in (before, ours))
        assert made.metrics["kl"] == pytest.approx(float((old.exp() * (old - new)).sum(-1).mean()), rel=1e-3, abs=2e-5)
        assert made.metrics["top1_agreement"] == pytest.approx(
            float((old.argmax(-1) == new.argmax(-1)).float().mean()), abs=0.02
        )  # a tie may fall either way
        assert made.metrics["perplexity"] == pytest.approx(
            float(F.nll_loss(new[:, :-1].flatten(0, 1), held[:, 1:].flatten()).exp()), rel=1e-3
        )
        if config["quantization_config"]["config_groups"]["group_0"]["weights"][
            "symmetric"
        ]:  # transformers 5.23 expects zero points that are not packed, which nobody writes
            model = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
            assert torch.allclose(model(input_ids=held).logits, ours(input_ids=held).logits, atol=1e-3)
    engine = TorchEngine.open(made.path)
    assert next(iter(engine.generate([Request((Message("user", "the fox"),), sampling=Sampling(max_tokens=4))]))).ids
    assert (tmp_path / "report" / "report.html").stat().st_size > 1000


def test_inputs_in_8_bits_are_those_of_transformers(pico: Path, texts: Dataset, tmp_path: Path) -> None:
    """Weights are int8 in the file; inputs are rounded token by token, in both."""
    made = quantized("smoothquant", pico, texts, tmp_path)
    tensors = load_file(made.path / "model.safetensors")
    assert sum(tensor.dtype == torch.int8 for tensor in tensors.values()) == 14
    ours, before = load_decoder(made.path), load_decoder(pico)
    _, held = load_samples(load_tokenizer(pico), texts, 12, 3, 48, 0)
    with torch.no_grad():
        found = ours(input_ids=held).logits
        old, new = (F.log_softmax(logits, -1) for logits in (before(input_ids=held).logits, found))
        assert made.metrics["kl"] == pytest.approx(float((old.exp() * (old - new)).sum(-1).mean()), rel=1e-2)
        theirs = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)(input_ids=held).logits
        for module in ours.modules():
            module._forward_pre_hooks.clear()
        plain = ours(input_ids=held).logits
    assert float((found - theirs).abs().mean()) < 0.1 * float(
        (plain - theirs).abs().mean()
    )  # a tie in rounding may fall either way


def test_llm_int8_is_that_of_bitsandbytes(pico: Path, texts: Dataset, tmp_path: Path) -> None:
    """A layer, one token at a time, where taking a large number out is taking its column out; bitsandbytes computes in
    fp16.
    """
    made = quantized("int8", pico, texts, tmp_path, llm_int8_threshold=2.0)
    ours, before = (load_decoder(path).decoder.blocks[1].feed_forward.up for path in (made.path, pico))
    theirs = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float16).model.layers[1].mlp.up_proj
    assert type(theirs).__name__ == "Linear8bitLt"
    rows = torch.randn(100, 1, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, mine, other = before(rows), ours(rows), torch.stack([theirs(row.half()).float() for row in rows])
    assert float((rows.abs() > 2).any(-1).float().mean()) > 0.5
    assert float((mine - other).abs().mean()) < 0.2 * float((mine - plain).abs().mean())
    tensors = load_file(made.path / "model.safetensors")
    from bitsandbytes.functional import int8_vectorwise_quant

    weight = load_file(pico / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    codes, scales, _ = int8_vectorwise_quant(weight.half())
    assert (
        float((codes != tensors["model.layers.1.mlp.up_proj.weight"]).float().mean()) < 0.01
    )  # theirs are of fp16 weights
    assert torch.allclose(scales, tensors["model.layers.1.mlp.up_proj.SCB"], rtol=2e-3)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("levels", ["nf4", "fp4"])
def test_4_bits_are_those_of_bitsandbytes(
    levels: str, double: bool, pico: Path, texts: Dataset, tmp_path: Path
) -> None:
    """Codes and scales of its own function, its layers in transformers, and what is read here."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    made = quantized(
        "nf4", pico, texts, tmp_path, bnb_4bit_quant_type=levels, bnb_4bit_use_double_quant=double, dtype="float32"
    )
    ours = load_decoder(made.path)
    model = AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)
    found = {name: module for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert len(found) == 14
    for name, module in found.items():
        mine = ours.get_parameter(f"{_ours(name)}.weight")
        assert module.in_features % 64 or torch.allclose(
            dequantize_4bit(module.weight.data, module.weight.quant_state), mine, atol=1e-6
        )  # its function for CPUs takes rows that 64 divides for granted
    tensors, name = load_file(made.path / "model.safetensors"), "model.layers.0.self_attn.q_proj.weight"
    codes, state = quantize_4bit(
        load_file(pico / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"],
        quant_type=levels,
        compress_statistics=double,
    )
    zero = 8 if levels == "fp4" else 256  # there are two zeros
    halves = [
        torch.stack([some >> 4, some & 15]).masked_fill_(torch.stack([some >> 4, some & 15]) == zero, 0)
        for some in (codes, tensors[name])
    ]
    assert torch.equal(*halves)
    theirs = state.absmax if not double else state.state2.absmax
    assert torch.allclose(theirs, tensors[f"{name}.nested_absmax" if double else f"{name}.absmax"], rtol=1e-5)
    assert made.metrics["bits_per_weight"] == pytest.approx(4.126 if double else 4.5, abs=0.01)


def test_a_block_that_was_taught_answers_more_as_before(pico: Path, texts: Dataset, tmp_path: Path) -> None:
    """Weights in 4 bits, inputs in 8: what transformers computes of it, and less damage than without lessons."""
    plain, taught = (
        quantized("zeroquant", pico, texts, tmp_path / str(epochs), num_train_epochs=epochs, bits=3, learning_rate=0.01)
        for epochs in (0, 20)
    )
    assert taught.metrics["kl"] < 0.8 * plain.metrics["kl"]
    ours = load_decoder(taught.path)
    _, held = load_samples(load_tokenizer(pico), texts, 12, 3, 48, 0)
    with torch.no_grad():
        old, new = (
            F.log_softmax(logits, -1)
            for logits in (load_decoder(pico)(input_ids=held).logits, ours(input_ids=held).logits)
        )
        assert taught.metrics["kl"] == pytest.approx(float((old.exp() * (old - new)).sum(-1).mean()), rel=1e-2)
        theirs = AutoModelForCausalLM.from_pretrained(taught.path, dtype=torch.float32)(input_ids=held).logits
        for module in ours.modules():
            module._forward_pre_hooks.clear()
        without = ours(input_ids=held).logits
    mine = F.log_softmax(theirs, -1)
    assert float((new - mine).abs().mean()) < 0.2 * float((F.log_softmax(without, -1) - mine).abs().mean())


def test_large_inputs_are_taken_out_for_their_token_alone() -> None:
    reading = InputQuantization(8, "last", 6.0)
    x = torch.tensor([[0.5, -1.27, 100.0, 6.5], [0.01, 1.27, 2.0, -3.0]])
    made = quantize_tokens(x, reading)
    assert made[0].tolist() == pytest.approx([0.5, -1.27, 100.0, 6.5])
    assert made[0, 2:].tolist() == [100.0, 6.5]
    assert torch.equal(made[1], quantize_tokens(x[1:], reading)[0])
    assert float((made[1] - x[1]).abs().max()) <= 3.0 / 127 / 2 + 1e-6


@pytest.mark.parametrize("power", [0.5, 0.8])
def test_smoothing_is_the_papers_and_makes_inputs_easier(power: float) -> None:
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(16, 32, generator=draw), torch.randn(256, 32, generator=draw)
    x[:, 3] *= 60
    most = x.abs().amax(0)
    scale, found, without, least = search_smoothing_scales(
        [weight[:8], weight[8:]], x, most, Grid(8), InputQuantization(), [power]
    )
    expected = most**power / weight.abs().amax(0) ** (1 - power)
    assert found == power
    assert torch.allclose(scale / scale[0], expected / expected[0], rtol=1e-4)
    assert least < 0.3 * without


def test_methods_that_look_lose_less(pico: Path, texts: Dataset, tmp_path: Path) -> None:
    found = {
        stage: quantized(stage, pico, texts, tmp_path / stage, bits=3, **more).metrics["kl"]
        for stage, more in (("absmax", {}), ("zeropoint", {}), ("gptq", {"symmetric": False}), ("awq", {}))
    }
    assert found["gptq"] < 0.7 * found["zeropoint"] < 0.7 * found["absmax"]
    assert found["awq"] < found["zeropoint"]


@pytest.mark.parametrize("stage", ["gptq", "awq"])
def test_a_killed_run_goes_on_at_its_block(
    stage: str, pico: Path, texts: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of the second block: the first is not walked again, and the result is the same to the
    bit.
    """
    whole = quantized(stage, pico, texts, tmp_path / "whole")
    kind, times = {"gptq": GptqMethod, "awq": AwqMethod}[stage], []
    real = kind.quantize_part

    def failing(self: Any, passing: Any, part: Any, grids: Any) -> Any:
        times.append(passing.index)
        if len(times) == 6:
            raise KeyboardInterrupt
        return real(self, passing, part, grids)

    monkeypatch.setattr(kind, "quantize_part", failing)
    with pytest.raises(KeyboardInterrupt):
        quantized(stage, pico, texts, tmp_path / "killed")
    again = quantized(stage, pico, texts, tmp_path / "killed")
    assert times == [0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert (whole.path / "model.safetensors").read_bytes() == (again.path / "model.safetensors").read_bytes()
    assert whole.metrics["kl"] == again.metrics["kl"]


def test_layers_stay_as_they_are(pico: Path, texts: Dataset, tmp_path: Path) -> None:
    made = quantized("gptq", pico, texts, tmp_path, ignore=["v_proj", "layers.0.mlp"], dtype="float32")
    tensors, before = load_file(made.path / "model.safetensors"), load_file(pico / "model.safetensors")
    plain = {
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.mlp.down_proj",
    }
    assert all(torch.equal(tensors[f"{name}.weight"], before[f"{name}.weight"]) for name in plain)
    assert set(json.loads((made.path / "config.json").read_text())["quantization_config"]["ignore"]) == plain | {
        "lm_head"
    }
    with torch.no_grad():
        ids = torch.arange(3, 40)[None]
        assert torch.allclose(
            AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32)(input_ids=ids).logits,
            load_decoder(made.path)(input_ids=ids).logits,
            atol=1e-4,
        )


def test_weights_that_are_bfloat16_stay_it(pico: Path, tmp_path: Path) -> None:
    shutil.copytree(pico, tmp_path / "half")
    save_file(
        {name: tensor.bfloat16() for name, tensor in load_file(pico / "model.safetensors").items()},
        tmp_path / "half" / "model.safetensors",
    )
    assert quantized("absmax", tmp_path / "half", None, tmp_path / "a").about["dtype"] == "bfloat16"
    assert quantized("absmax", pico, None, tmp_path / "b").about["dtype"] == "float16"


def test_what_is_refused(pico: Path, texts: Dataset, tmp_path: Path) -> None:
    def refused(
        match: str, kind: type[LlmworksError], stage: str, model: Path, data: Dataset | None = texts, **given: Any
    ) -> None:
        with pytest.raises(kind, match=match):
            quantized(stage, model, data, tmp_path / "refused", **given)
        shutil.rmtree(tmp_path / "refused" / "scratch", ignore_errors=True)

    done = quantized("absmax", pico, None, tmp_path / "done").path
    refused("is already quantized \\(compressed-tensors\\); give the original model", ModelError, "gptq", done)
    refused(
        r"texts: has only \d+ sequences of 400 tokens, but 12 for calibration and 3 held-out ones are required; give"
        r" more data, or set num_calibration_samples, eval_samples or max_seq_length",
        DataError,
        "gptq",
        pico,
        max_seq_length=400,
    )
    refused(
        "rows of 64 weights are not divisible by group size 48; possible: 16, 32, 64",
        ModelError,
        "absmax",
        pico,
        group_size=48,
    )
    refused(
        "no layer name contains 'w_proj'; an example of a name is model.layers.0",
        ModelError,
        "absmax",
        pico,
        ignore=["w_proj"],
    )
    shutil.copytree(pico, tmp_path / "broken")
    tensors = load_file(pico / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, tmp_path / "broken" / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers.1.mlp.up_proj.weight holds 1 values that are NaN or infinite"):
        quantized("gptq", tmp_path / "broken", texts, tmp_path / "nan", golden=pico)
    assert not list((tmp_path / "nan" / "out").iterdir())


def test_a_result_that_computes_something_else_is_not_published(pico: Path, texts: Dataset, tmp_path: Path) -> None:
    """Golden tokens of another model do not replay."""
    other = make_pico(tmp_path / "other", seed=5)
    with pytest.raises(GoldenMismatch, match=r"golden logits differ by .* on average"):
        quantized("absmax", pico, None, tmp_path / "o", golden=other, bits=8)
