"""GGUF files of every type: formats of tensors and their bytes are those of llama.cpp's quantizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmworks.core.artifact import Dataset
from llmworks.core.errors import DataError, ModelError
from llmworks.core.progress import Progress
from llmworks.model.from_gguf import open_reader
from llmworks.quantize.llamacpp.types import (
    FILE_TYPES,
    REQUIRE_IMATRIX,
    MixParameters,
    assign_formats,
    get_base_format,
    get_block_size,
)
from llmworks.quantize.llamacpp.writer import encode, write_gguf
from tests.conftest import make_tokenizer
from tests.quantize.test_quantize import quantized, texts  # noqa: F401 (a fixture)

QUIET = Progress(quiet=True)
BLIND = [
    kind
    for kind in FILE_TYPES
    if get_base_format(kind) not in REQUIRE_IMATRIX and kind not in ("f32", "q2_k_s", "iq2_s", "iq2_m", "iq3_xs")
]


def make_wide(out: Path, *, kv_heads: int, tied: bool, width: int = 256, layers: int = 17) -> Path:
    """A Llama whose rows K formats divide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of which one shares keys among eight heads and has a head of its own, and one has neither; one with rows
    that 256 does not divide.
    """
    folder = tmp_path_factory.mktemp("wide")
    made = {
        "shared": make_wide(folder / "shared", kv_heads=1, tied=False),
        "tied": make_wide(folder / "tied", kv_heads=4, tied=True),
        "narrow": make_wide(folder / "narrow", kv_heads=4, tied=True, width=96 * 2, layers=9),
        "odd": make_wide(folder / "odd", kv_heads=4, tied=False, width=8 * 10, layers=1),
    }
    for path in made.values():
        write_gguf(path, path / "f32.gguf", "f32", QUIET)
    return made


def theirs(source: Path, target: Path, kind: str) -> None:
    import gguf
    from cyllama.llama import llama_cpp as cy

    params = cy.LlamaModelQuantizeParams()
    params.ftype, params.nthread = int(getattr(gguf.LlamaFileType, f"MOSTLY_{kind.upper()}")), 1
    cy.model_quantize(str(source), str(target), params)


@pytest.mark.parametrize("model", ["shared", "tied", "narrow"])
@pytest.mark.parametrize(
    "kind",
    [
        (
            pytest.param(kind, marks=pytest.mark.slow)
            if kind.startswith("iq3") or kind in ("iq4_nl", "q5_1", "q5_k_s", "q3_k_l", "q3_k_s", "q4_k_s")
            else kind
        )
        for kind in BLIND
    ],
)
def test_files_are_those_of_llama_cpp(kind: str, model: str, wide: dict[str, Path], tmp_path: Path) -> None:
    """Every tensor's format and bytes; the file's order and size, too."""
    theirs(wide[model] / "f32.gguf", tmp_path / "theirs.gguf", kind)
    write_gguf(wide[model], tmp_path / "ours.gguf", kind, QUIET)
    ours, other = (open_reader(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    expected = {tensor.name: tensor for tensor in other.tensors}
    assert {tensor.name for tensor in ours.tensors} == set(expected)
    for tensor in ours.tensors:
        assert tensor.tensor_type.name == expected[tensor.name].tensor_type.name, tensor.name
        assert tensor.data.tobytes() == expected[tensor.name].data.tobytes(), tensor.name
    assert ours.fields["general.file_type"].contents() == other.fields["general.file_type"].contents()


def test_what_is_important_is_kept_better() -> None:
    """The error, weighed by the importance, is less where a format is told of it; formats that need it are refused
    without.
    """
    draw = np.random.default_rng(0)
    weight, important = (
        draw.normal(size=(64, 256)).astype(np.float32),
        (draw.random(256).astype(np.float32) ** 8 * 100 + 0.01),
    )
    from libgguf import GGMLQuantizationType, dequantize_rows

    def error(kind: str, given: Any) -> float:
        back = dequantize_rows(encode(weight, kind, given), GGMLQuantizationType[kind])
        return float((((back - weight) ** 2) * important).sum())

    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "IQ4_NL", "IQ4_XS", "IQ3_S"):
        assert error(kind, important) < 0.95 * error(kind, None), kind
    assert error("Q8_0", important) == error("Q8_0", None)


def test_importance_is_needed_by_some_and_changes_the_mix(wide: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"iq2_xs requires an importance matrix: blk.0.ffn_gate.weight would be IQ2_XS; give `data`"
    ):
        write_gguf(wide["shared"], tmp_path / "x.gguf", "iq2_xs", QUIET)
    assert not (tmp_path / "x.gguf").exists()
    shapes = {f"blk.{layer}.ffn_down.weight": (256, 256) for layer in range(16)}
    with_it, without = (
        assign_formats(shapes, "q4_0", MixParameters(16, 4, True, importance)) for importance in (True, False)
    )
    assert [*with_it.values()] == ["Q4_1"] * 2 + ["Q4_0"] * 14
    assert set(without.values()) == {"Q4_0"}


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("iq2_xxs", "q2_k_s") else pytest.param(kind, marks=pytest.mark.slow)
        for kind in FILE_TYPES
        if kind not in BLIND
    ],
)
def test_types_that_see_are_written_and_read(kind: str, wide: dict[str, Path], tmp_path: Path) -> None:
    """llama.cpp computes with each of them."""
    from llmworks.generate.engines.llamacpp import LlamaCppEngine

    draw = np.random.default_rng(0)
    with_seeing = {
        name: draw.random(256).astype(np.float32) + 0.1
        for name in assign_formats(
            {tensor.name: tuple(reversed(tensor.shape)) for tensor in open_reader(wide["shared"] / "f32.gguf").tensors},
            "f16",
            MixParameters(17, 8, False),
        )
        if "blk" in name
    }
    written = write_gguf(wide["shared"], tmp_path / "made.gguf", kind, QUIET, with_seeing)
    assert all(256 % get_block_size(found) == 0 for found in written.types.values())
    assert not written.fallback_tensors
    engine = LlamaCppEngine(tmp_path / "made.gguf", threads=1)
    try:
        assert np.isfinite(engine.logits([1, 5, 9, 200, 17])).all()
    finally:
        engine.close()


def test_rows_that_nothing_divides_stay_in_16_bits(wide: dict[str, Path], tmp_path: Path) -> None:
    written = write_gguf(wide["odd"], tmp_path / "x.gguf", "q4_k_m", QUIET)
    assert {found for name, found in written.types.items() if "norm" not in name} == {"F16"}
    assert "blk.0.ffn_up.weight" in written.fallback_tensors


def test_formats_by_a_pattern_go_before(wide: dict[str, Path], tmp_path: Path) -> None:
    written = write_gguf(
        wide["tied"], tmp_path / "x.gguf", "q4_k_m", QUIET, overrides={r"blk\.3\.": "q8_0", "attn_v": "f16"}
    )
    assert written.types["blk.3.ffn_up.weight"] == "Q8_0"
    assert written.types["blk.3.attn_norm.weight"] == "F32"
    assert written.types["blk.4.attn_v.weight"] == "F16"
    assert written.types["blk.4.ffn_up.weight"] == "Q4_K"


def test_formats_by_what_tensors_bear_are_no_larger_and_lose_less(pico: Path, texts: Dataset, tmp_path: Path) -> None:
    """At the size of the type's own mix; the damage is that of llama.cpp beside the model; a kind is no longer than its
    neighbour.
    """
    plain, made = (
        quantized(
            "gguf",
            pico,
            texts,
            tmp_path / str(allocate),
            type="q4_0",
            allocate_bits=allocate,
            texts_=12,
            sensitivity_samples=8,
            tensor_types={"token_embd": "f16"},
        )
        for allocate in (False, True)
    )
    assert made.metrics["bytes"] <= plain.metrics["bytes"] + 64
    assert made.metrics["kl"] < plain.metrics["kl"]
    assert made.metrics["expected_kl"] == pytest.approx(made.metrics["kl"], rel=1.5)
    kinds = {tensor.tensor_type.name for tensor in open_reader(made.path / "model.gguf").tensors}
    assert len(kinds) > 3
    with pytest.raises(DataError, match=r"config.allocate_bits requires `data`"):
        quantized("gguf", pico, None, tmp_path / "none", allocate_bits=True)


def test_importance_lowers_the_divergence(pico: Path, texts: Dataset, tmp_path: Path) -> None:
    """At the same type, and the numbers are those of hooks on the model."""
    from llmworks.model.io.decoder_files import load_decoder
    from llmworks.model.io.layer_reader import LayerReader
    from llmworks.quantize.calibrate.calibration_data import load_samples
    from llmworks.quantize.calibrate.imatrix import compute_importance
    from llmworks.tokenize.load import load_tokenizer
    from tests.quantize.test_mixed import context

    with_it, without = (
        quantized("gguf", pico, texts, tmp_path / str(seen), type="q4_0", use_imatrix=seen, texts_=24)
        for seen in (True, False)
    )
    assert with_it.metrics["kl"] < without.metrics["kl"]
    ids, held = load_samples(load_tokenizer(pico), texts, 12, 3, 48, 0)
    found, walk = compute_importance(LayerReader(pico), ids, held, context(tmp_path / "look"))
    model = load_decoder(pico)
    sums: dict[str, Any] = {}
    layer = model.decoder.blocks[1].feed_forward.down
    layer.register_forward_hook(lambda _, given, __: sums.__setitem__("down", given[0].flatten(0, 1).square().mean(0)))
    model.head.register_forward_hook(
        lambda _, given, __: sums.__setitem__("head", given[0].flatten(0, 1).square().mean(0))
    )
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        model(input_ids=ids)
        assert np.allclose(found["blk.1.ffn_down.weight"], sums["down"], rtol=1e-3)
        assert np.allclose(found["output.weight"], sums["head"], rtol=1e-3)
        assert logits.shape[:2] == ids.shape
        assert torch.allclose(walk.compute_logits(walk.quantized_states), model(input_ids=held).logits, atol=1e-3)


def test_what_was_found_once_serves_many_files(pico: Path, texts: Dataset, tmp_path: Path) -> None:
    """Files by `quantize.imatrix`'s result are those that look for themselves; its matrix is read by another reader;
    another model's is refused.
    """
    from llmworks.core.artifact import Report
    from llmworks.quantize.calibrate.imatrix import read_importance, write_importance
    from llmworks.quantize.gguf import gguf
    from llmworks.quantize.imatrix import imatrix
    from llmworks.quantize.llamacpp.config import GgufConfig, ImatrixConfig
    from llmworks.runtime.session import load
    from tests.quantize.test_mixed import context

    alone = quantized("gguf", pico, texts, tmp_path / "alone", type="q4_0", allocate_bits=True, sensitivity_samples=4)
    model: Any = load(str(pico))
    other: Any = load(str(make_wide(tmp_path / "other", kv_heads=4, tied=True, layers=1)))
    look = context(tmp_path / "sense")
    imatrix(ImatrixConfig(num_calibration_samples=12, sensitivity_samples=4, max_seq_length=48), model, look, texts)
    look.report.write(tmp_path / "sense")
    found = Report(tmp_path / "sense")
    by = context(tmp_path / "by")
    with_it = gguf(
        GgufConfig(type="q4_0", allocate_bits=True, eval_samples=0, max_seq_length=48), model, by, None, found
    )
    assert with_it.metrics["bytes"] == alone.metrics["bytes"]
    assert with_it.metrics["expected_kl"] == pytest.approx(
        alone.metrics["expected_kl"], rel=0.5
    )  # other texts: some are not kept apart
    given = {"blk.0.ffn_up.weight": np.arange(1, 65, dtype=np.float32)}
    write_importance(tmp_path / "i.gguf", given, "texts", 3, 48)
    assert np.allclose(read_importance(tmp_path / "i.gguf")["blk.0.ffn_up.weight"], given["blk.0.ffn_up.weight"])
    with pytest.raises(DataError, match="was computed for another model"):
        gguf(GgufConfig(type="q4_0"), other, context(tmp_path / "no"), None, found)
    with pytest.raises(DataError, match=r"is not a result of quantize.imatrix \(no importance.gguf\)"):
        gguf(GgufConfig(type="q4_0"), model, context(tmp_path / "no2"), None, Report(tmp_path / "by"))
