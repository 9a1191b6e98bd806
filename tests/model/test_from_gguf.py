"""GGUF in and out: equal to the transformers loader, to llama.cpp's tokenizer and logits, and byte-identical to its
quantizer.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llmworks.core.errors import ModelError
from llmworks.core.progress import Progress
from llmworks.generate.engines.llamacpp import LlamaCppEngine
from llmworks.model.from_gguf import open_reader, read_metadata, write_hf_directory
from llmworks.model.gguf.layout import deinterleave_rows, interleave_rows
from llmworks.model.gguf.tokenizer import build_transformers_tokenizer
from llmworks.model.golden import make_logits_function
from llmworks.model.io.load import load_model
from llmworks.quantize.llamacpp.writer import write_gguf
from llmworks.tokenize.load import load_tokenizer

TEXTS = [
    "Hello world",
    "  two  spaces\n\n\ttab",
    "12345 3.14",
    "don't we'll I'm",
    "naïve café — Zwölf 谢谢 🙂 ﷺ",
    "def f(x):\n    return x**2  # ok",
    '{"a": [1, 2], "b": null}',
    "<|im_start|>user\nhi<|im_end|>\n",
    "a" * 50,
    "\r\n \u00a0 end ",
]


def test_row_order_is_inverted() -> None:
    weight = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
    assert not np.array_equal(interleave_rows(weight, 2), weight)
    assert np.array_equal(deinterleave_rows(interleave_rows(weight, 2), 2), weight)


def test_round_trip_keeps_every_bit(pico: Path, pico_gguf: Path, tmp_path: Path) -> None:
    write_hf_directory(pico_gguf, tmp_path / "back")
    ours, original = load_model(tmp_path / "back"), load_model(pico)
    for (name, a), (_, b) in zip(ours.named_parameters(), original.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    a, b = load_tokenizer(tmp_path / "back"), load_tokenizer(pico)
    assert a.chat_template == b.chat_template
    for text in TEXTS:
        assert a(text)["input_ids"] == b(text)["input_ids"], text


def test_equal_to_the_transformers_loader(pico_gguf: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(pico_gguf.parent, gguf_file=pico_gguf.name, dtype=torch.float32)
    write_hf_directory(pico_gguf, tmp_path / "ours")
    ours = load_model(tmp_path / "ours")
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_llama_cpp_tokenizes_the_same(pico_gguf: Path) -> None:
    from cyllama.llama import llama_cpp as cy

    params = cy.LlamaModelParams()
    model = cy.LlamaModel(str(pico_gguf), params)  # owns the vocabulary's memory
    vocabulary = model.get_vocab()
    ours = build_transformers_tokenizer(read_metadata(open_reader(pico_gguf)))
    for text in TEXTS:
        assert ours(text)["input_ids"] == list(vocabulary.tokenize(text, False, True)), text


def test_llama_cpp_computes_the_same_logits(pico: Path, pico_gguf: Path) -> None:
    ids = [1, 5, 9, 200, 17, 3, 44, 2]
    ours = make_logits_function(load_model(pico))(ids)
    engine = LlamaCppEngine(pico_gguf, threads=1)
    theirs = engine.logits(ids)
    engine.close()
    assert np.abs(ours - theirs).max() < 1e-3


def test_q8_0_is_byte_identical_to_llama_cpp(pico_gguf: Path, pico: Path, tmp_path: Path) -> None:
    from cyllama.llama import llama_cpp as cy

    params = cy.LlamaModelQuantizeParams()
    params.ftype = 7  # LLAMA_FTYPE_MOSTLY_Q8_0
    params.nthread = 1
    cy.model_quantize(str(pico_gguf), str(tmp_path / "theirs.gguf"), params)
    write_gguf(pico, tmp_path / "ours.gguf", "q8_0", Progress(quiet=True))
    theirs = {t.name: t for t in open_reader(tmp_path / "theirs.gguf").tensors}
    ours = {t.name: t for t in open_reader(tmp_path / "ours.gguf").tensors}
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.tensor_type == theirs[name].tensor_type, name
        assert np.array_equal(tensor.data, theirs[name].data), name


@pytest.mark.parametrize("cut", [0, 10, 4000])
def test_truncated_file_is_one_line(pico_gguf: Path, tmp_path: Path, cut: int) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(pico_gguf.read_bytes()[:cut])
    with pytest.raises(ModelError, match=r"bad\.gguf"):
        write_hf_directory(bad, tmp_path / "out")


def test_other_architecture_is_named(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.add_tensor("t", np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match="'mamba' cannot be converted"):
        write_hf_directory(tmp_path / "x.gguf", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"])
def test_real_models_equal_the_transformers_loader(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmworks import assets

    monkeypatch.setenv("LLMWORKS_ACCEPT", name)
    folder = assets.fetch(name)
    file = next(folder.glob("*.gguf"))
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    write_hf_directory(file, tmp_path / "ours")
    ours = load_model(tmp_path / "ours")
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    a, b = load_tokenizer(tmp_path / "ours"), AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    for text in TEXTS:
        assert a(text)["input_ids"] == b(text)["input_ids"], text
