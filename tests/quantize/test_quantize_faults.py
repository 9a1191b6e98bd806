"""Files and settings that are not as they should be: one line of a known error, and nothing that loads as something
else.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmworks.cli import main
from llmworks.core.artifact import Dataset, Model
from llmworks.core.errors import DataError, GoldenMismatch, ModelError
from llmworks.model.io.decoder_files import load_decoder, save_decoder
from llmworks.model.io.layer_reader import LayerReader
from llmworks.model.io.load import load_model
from llmworks.quantize.algorithms.calibrated import AwqMethod, SmoothQuantMethod
from llmworks.quantize.calibrate.layerwise import LayerwiseCalibration
from llmworks.quantize.report.card import write_card
from tests.conftest import make_pico
from tests.quantize.test_quantize import quantized, texts  # noqa: F401

LAYER = "model.layers.0.mlp.up_proj"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def forms(pico: Path, texts: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("forms")
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "zeropoint": ("zeropoint", {}),
        "gptq": ("absmax", {"save_format": "gptq", "dtype": "float16"}),
        "awq": ("zeropoint", {"save_format": "awq", "dtype": "float16"}),
        "hqq": ("hqq", {"dtype": "float16"}),
        "nf4": ("nf4", {}),
        "int8": ("int8", {}),
        "w8a8": ("smoothquant", {}),
    }
    return {name: quantized(stage, pico, texts, folder / name, **given).path for name, (stage, given) in ways.items()}


def changed(
    source: Path,
    out: Path,
    tensors: Callable[[Tensors], Any] | None = None,
    config: Callable[[dict[str, Any]], Any] | None = None,
) -> Path:
    shutil.copytree(source, out)
    if tensors is not None:
        found = load_file(out / "model.safetensors")
        tensors(found)
        save_file({name: one.contiguous() for name, one in found.items()}, out / "model.safetensors")
    if config is not None:
        whole = json.loads((out / "config.json").read_text())
        config(whole)
        (out / "config.json").write_text(json.dumps(whole))
    return out


def put(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({f"{LAYER}.{name}": value(tensors[f"{LAYER}.{name}"])})


def gone(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(f"{LAYER}.{name}")


TENSORS: dict[str, tuple[str, Callable[[Tensors], Any]]] = {
    "zero points missing": ("zeropoint", gone("weight_zero_point")),
    "scales missing": ("zeropoint", gone("weight_scale")),
    "floats for words": ("zeropoint", put("weight_packed", torch.Tensor.float)),
    "too narrow": ("zeropoint", put("weight_packed", lambda t: t[:, :-1])),
    "scales of whole numbers": ("zeropoint", put("weight_scale", lambda t: t.to(torch.int8))),
    "no numbers": ("zeropoint", put("weight_scale", lambda t: t * float("nan"))),
    "gptq floats": ("gptq", put("qweight", torch.Tensor.float)),
    "gptq groups": ("gptq", put("g_idx", lambda t: t - 1)),
    "gptq words": ("gptq", put("qzeros", lambda t: t[:, :-1])),
    "awq words": ("awq", put("qweight", lambda t: t[:-1])),
    "hqq twice": ("hqq", put("W_q", lambda t: torch.cat([t, t]))),
    "hqq no numbers": ("hqq", put("scale", lambda t: t * float("nan"))),
    "nf4 nested": ("nf4", gone("weight.nested_absmax")),
    "nf4 short": ("nf4", put("weight.nested_absmax", lambda t: t[:0])),
    "int8 no numbers": ("int8", put("SCB", lambda t: t * float("nan"))),
    "int8 of another kind": ("int8", put("weight", torch.Tensor.int)),
    "int8 in a GPU's order": ("int8", put("weight_format", lambda t: t + 2)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_broken_tensors_are_not_read(name: str, forms: dict[str, Path], tmp_path: Path) -> None:
    """As the engine and as training read them."""
    form, change = TENSORS[name]
    path = changed(forms[form], tmp_path / "m", change)
    for low_bit in (False, True):
        with pytest.raises(ModelError) as error:
            load_model(path, low_bit=low_bit)
        assert "\n" not in str(error.value)


def quantization(**given: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["quantization_config"].update(given)


def weights_of_group(**given: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(given)


CONFIGS: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "a word": ("zeropoint", lambda config: config.update(quantization_config="int4")),
    "a list": ("zeropoint", lambda config: config.update(quantization_config=[4])),
    "no groups": ("zeropoint", quantization(config_groups=None)),
    "groups in a list": ("zeropoint", quantization(config_groups=[1])),
    "no targets": (
        "zeropoint",
        lambda config: config["quantization_config"]["config_groups"]["group_0"].pop("targets"),
    ),
    "no bits": (
        "zeropoint",
        lambda config: config["quantization_config"]["config_groups"]["group_0"]["weights"].pop("num_bits"),
    ),
    "0 bits": ("zeropoint", weights_of_group(num_bits=0)),
    "8 bits for 4": ("zeropoint", weights_of_group(num_bits=8)),
    "2 bits for 4": ("zeropoint", weights_of_group(num_bits=2)),
    "gptq bits": ("gptq", quantization(bits=None)),
    "awq bits": ("awq", quantization(bits="x")),
    "hqq": ("hqq", lambda config: config["quantization_config"].update(quant_config="x")),
    "threshold": ("int8", quantization(llm_int8_threshold="x")),
    "skipped": ("int8", quantization(llm_int8_skip_modules=5)),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_nonsense_config_is_one_line(name: str, forms: dict[str, Path], tmp_path: Path) -> None:
    form, change = CONFIGS[name]
    path = changed(forms[form], tmp_path / "m", config=change)
    with pytest.raises(ModelError) as error:
        load_decoder(path)
    assert "\n" not in str(error.value)


def test_columns_by_their_inputs_need_their_groups(forms: dict[str, Path], tmp_path: Path) -> None:
    """An order that is claimed and not given is no order as it stands."""
    config = quantization(desc_act=True)
    load_decoder(changed(forms["gptq"], tmp_path / "given", config=config))
    with pytest.raises(ModelError, match=r"desc_act.*g_idx"):
        load_decoder(changed(forms["gptq"], tmp_path / "none", gone("g_idx"), config))


def test_patterns_name_layers(forms: dict[str, Path], pico: Path, texts: Dataset, tmp_path: Path) -> None:
    """Targets and layers that are left, as compressed-tensors matches them; a layer of plain weights never reads
    rounded inputs.
    """
    ids = torch.arange(3, 40)[None]
    mixed = quantized("absmax", pico, texts, tmp_path / "mixed", ignore=["down_proj"], bits=8, group_size=0).path
    two = changed(
        mixed,
        tmp_path / "two",
        config=lambda config: config["quantization_config"]["config_groups"].update(
            group_1={
                **config["quantization_config"]["config_groups"]["group_0"],
                "targets": ["re:.*mlp\\.(up|gate)_proj$"],
                "weights": {**config["quantization_config"]["config_groups"]["group_0"]["weights"], "num_bits": 4},
            }
        ),
    )
    with pytest.raises(ModelError, match="its tensors do not match"):
        load_decoder(two)  # 8-bit words of a layer that the pattern says has 4
    left = quantized("smoothquant", pico, texts, tmp_path / "left", ignore=["down_proj"]).path
    again = changed(left, tmp_path / "again", config=quantization(ignore=["lm_head", "re:.*down_proj$"]))
    none = changed(left, tmp_path / "none", config=quantization(ignore=["lm_head"]))
    with torch.no_grad():
        first, *others = (load_decoder(path)(input_ids=ids).logits for path in (left, again, none))
        assert all(torch.equal(first, other) for other in others)
        int8 = quantized("int8", pico, texts, tmp_path / "int8", ignore=["mlp"]).path
        whole = changed(
            int8, tmp_path / "prefix", config=quantization(llm_int8_skip_modules=["lm_head", "model.layers.0.mlp"])
        )
        assert torch.equal(load_decoder(whole)(input_ids=ids).logits, load_decoder(int8)(input_ids=ids).logits)


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
@pytest.mark.parametrize(
    "shape",
    [
        {"num_key_value_heads": 2},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"gated_mlp": False, "hidden_act": "gelu", "num_key_value_heads": 2},
    ],
    ids=["two", "one", "four", "no gate"],
)
def test_scaling_what_layers_read_changes_nothing(
    method: str, shape: dict[str, Any], pico: Path, tmp_path: Path
) -> None:
    """Heads that share a head of values have one scale; where a bend stands between, nothing is scaled."""
    from llmworks.model.lowbit.activations import InputQuantization
    from llmworks.model.lowbit.integer import Grid
    from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM

    torch.manual_seed(1)
    model = DecoderForCausalLM(
        DecoderConfig(
            shape={
                "vocab_size": 300,
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 96,
                "max_position_embeddings": 128,
                **shape,
            }
        )
    )
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.2)
            weight.data[:, ::7] *= 4
    save_decoder(model, tmp_path / "m")
    source, ids = (
        LayerReader(tmp_path / "m"),
        torch.randint(0, 300, (8, 48), generator=torch.Generator().manual_seed(2)),
    )
    grid = Grid(8, 0, inputs=InputQuantization()) if method == "smoothquant" else Grid(3, 32)
    with torch.inference_mode():
        walk = LayerwiseCalibration(source, ids, ids[:1], tmp_path / "walk")
        passing = next(walk.iter_blocks())
        before = walk.run_block(source.load_block(0), walk.open_states(0)[:4].clone())
        (
            SmoothQuantMethod(8, smoothing_strengths=(0.5,))
            if method == "smoothquant"
            else AwqMethod(8, apply_clip=False)
        ).prepare(passing, lambda name: grid)
        moved = [
            name
            for name, weight in passing.block.state_dict().items()
            if not torch.equal(weight, source.load_block(0).state_dict()[name])
        ]
        assert any("attention.value" in name for name in moved)
        assert any("feed_forward.up" in name for name in moved)
        after = walk.run_block(passing.block, walk.open_states(0)[:4].clone())
    assert float((after - before).norm() / before.norm()) < 1e-5


def test_a_result_of_no_numbers_is_not_published(pico: Path, tmp_path: Path) -> None:
    huge = changed(
        pico, tmp_path / "huge", lambda tensors: tensors.update({f"{LAYER}.weight": tensors[f"{LAYER}.weight"] * 1e8})
    )
    with pytest.raises((GoldenMismatch, ModelError)):
        quantized("gguf", huge, None, tmp_path / "gguf", type="q8_0")


def test_what_would_be_another_model_is_refused(pico: Path, texts: Dataset, tmp_path: Path) -> None:
    two = changed(
        pico,
        tmp_path / "two",
        lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 1.5}),
    )
    for stage in ("absmax", "gguf"):
        with pytest.raises(ModelError, match="an embedding and a different head"):
            quantized(stage, two, None, tmp_path / stage, golden=pico, **({"type": "q8_0"} if stage == "gguf" else {}))
    bent = changed(pico, tmp_path / "bent", config=lambda config: config.update(hidden_act="gelu"))
    with pytest.raises(ModelError, match=r"its activation function is 'gelu', but llama.cpp computes silu"):
        quantized("gguf", bent, None, tmp_path / "bent-gguf", type="q3_k_m")
    short = changed(pico, tmp_path / "short", config=lambda config: config.pop("rms_norm_eps"))
    with pytest.raises(ModelError, match="'rms_norm_eps' is missing"):
        quantized("gguf", short, None, tmp_path / "short-gguf", golden=pico, type="q8_0")
    bare = changed(pico, tmp_path / "bare", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ModelError, match="embedding, norm or head"):
        quantized("absmax", bare, None, tmp_path / "bare-out", golden=pico)
    with pytest.raises(ModelError, match="all 14 matrices of blocks are ignored; nothing is left to quantize"):
        quantized("absmax", pico, None, tmp_path / "skipped", ignore=["proj"])


def test_without_texts_apart_nothing_is_measured(pico: Path, texts: Dataset, tmp_path: Path) -> None:
    made = quantized("absmax", pico, texts, tmp_path, eval_samples=0)
    assert "kl" not in made.metrics


def test_texts_are_no_longer_than_the_model_reads(pico: Path, texts: Dataset, tmp_path: Path) -> None:
    for stage in ("absmax", "gguf"):
        with pytest.raises(
            DataError, match=r"config.max_seq_length: sequences of 600 tokens exceed the model's context length of 512"
        ):
            quantized(stage, pico, texts, tmp_path / stage, max_seq_length=600)


def test_what_float16_cannot_hold_is_kept_in_float32(pico: Path, tmp_path: Path) -> None:
    head = "model.layers.0."
    names = {
        f"{head}input_layernorm.weight": 70000.1,
        **{f"{head}self_attn.{part}_proj.weight": 1 / 70000.1 for part in "qkv"},
    }
    large = changed(
        pico,
        tmp_path / "large",
        lambda tensors: tensors.update({name: tensors[name] * factor for name, factor in names.items()}),
    )
    made = quantized("absmax", large, None, tmp_path)
    assert made.about["dtype"] == "float32"
    assert torch.equal(
        load_decoder(made.path).decoder.blocks[0].attention_norm.weight,
        load_decoder(large).decoder.blocks[0].attention_norm.weight,
    )


def test_headers_that_are_no_headers(tmp_path: Path) -> None:
    path = make_pico(tmp_path / "m")
    file = path / "model.safetensors"
    body = file.read_bytes()
    for header in (
        b"[1, 2]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["x", "y"]}}',
    ):
        header = header.ljust(-(-len(header) // 8) * 8)
        file.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ModelError):
            load_decoder(path)
    name = b'"model.norm.weight":{"dtype":"F32"'
    file.write_bytes(
        body.replace(name, name.replace(b"F32", b"X99")) if name in body else body.replace(b'"F32"', b'"X99"')
    )
    with pytest.raises(ModelError):
        load_decoder(path)


def test_a_strange_card_costs_nothing(tmp_path: Path) -> None:
    """Whatever the original's card says; the language no stays a language."""
    from huggingface_hub import ModelCard

    base = tmp_path / "base"
    base.mkdir()
    for front in ("date: 2024-02-31\nlicense: mit", "a: " + "[" * 3000, "- 1"):
        (base / "README.md").write_text(f"---\n{front}\n---\n")
        write_card(
            tmp_path,
            Model(base, name="a|b\nc"),
            "rounded.",
            form="awq",
            method="awq",
            bits=4,
            name="x-AWQ",
            metrics={"bytes": 1, "bits_per_weight": 4},
            data=None,
        )
        assert "a\\|b c, rounded." in (tmp_path / "README.md").read_text()
    (base / "README.md").write_text("---\nlanguage: no\n---\n")
    write_card(
        tmp_path,
        Model(base),
        "rounded.",
        form="awq",
        method="awq",
        bits=4,
        name="x-AWQ",
        metrics={"bytes": 1, "bits_per_weight": 4},
        data=None,
    )
    assert ModelCard.load(tmp_path / "README.md").data.language == "no"


@pytest.mark.parametrize(
    "given", [["--budget", "nan"], ["--budget", "-5"], ["--budget", "inf"], ["--limit", "0", "--suite", "quick"]]
)
def test_a_frontier_says_at_once_what_is_wrong(
    given: list[str], pico: Path, texts: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(
        [
            "tune",
            "frontier",
            str(pico),
            "--data",
            str(texts.path),
            "--methods",
            "absmax-4",
            "--workspace",
            str(tmp_path / "ws"),
            *given,
        ]
    )
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert len(said) == 1
    assert "must be" in said[0]
    assert not list((tmp_path / "ws").rglob("model-*"))


def test_autogguf_makes_gguf_files(
    pico: Path, texts: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "autogguf",
                str(pico),
                "--data",
                str(texts.path),
                "--methods",
                "absmax-8",
                "--workspace",
                str(tmp_path / "ws"),
            ]
        )
        == 2
    )
    assert "autogguf supports GGUF files only, not absmax-8" in capsys.readouterr().err
