"""GGUF files of every architecture that is written: llama.cpp computes what transformers computes, splits texts as it
does, and the file is read back.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from llmworks.core.errors import ModelError
from llmworks.core.progress import Progress
from llmworks.generate.engines.llamacpp import LlamaCppEngine
from llmworks.model.from_gguf import write_hf_directory
from llmworks.model.gguf.layout import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from llmworks.model.gguf.tokenizer import build_tokenizer, make_pre_tokenizer
from llmworks.quantize.llamacpp.vocabulary import compute_scores
from llmworks.quantize.llamacpp.writer import write_gguf
from tests.conftest import make_tokenizer
from tests.model.test_from_gguf import TEXTS

QUIET = Progress(quiet=True)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"head_dim": 24, "sliding_window": 256}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "phi3": ("Phi3", {"sliding_window": None, "original_max_position_embeddings": 512}),
    "gemma3": ("Gemma3", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 7}),
    "llama, its positions scaled": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    "qwen2, yarn": ("Qwen2", {"rope_parameters": YARN}),
}


def made(kind: str, out: Path, tokenizer: Any = None) -> Path:
    import transformers

    name, more = KINDS[kind]
    tokenizer = tokenizer or make_tokenizer()
    torch.manual_seed(0)
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 5,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "initializer_range": 0.2,
        "tie_word_embeddings": name == "Gemma3",
    }
    config = getattr(transformers, f"{name}{'TextConfig' if name == 'Gemma3' else 'Config'}")(**{**shared, **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same(kind: str, tmp_path: Path) -> None:
    """All weights and keys are where it looks for them; more tokens than the tokenizer has, and a window that is
    shorter than the text.
    """
    path = made(kind, tmp_path / "model")
    write_gguf(path, tmp_path / "model.gguf", "f32", QUIET)
    ids = [1, *random.Random(0).choices(range(3, 300), k=90)]
    with torch.no_grad():
        expected = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(input_ids=torch.tensor([ids]))
            .logits[0]
            .numpy()
        )
    engine = LlamaCppEngine(tmp_path / "model.gguf", threads=1)
    try:
        found = engine.logits(ids)
    finally:
        engine.close()
    assert np.abs(found - expected).max() < 2e-2 * np.abs(expected).max()
    assert np.abs(found - expected).mean() < 2e-3


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "phi3", "gemma3"])
def test_files_come_back(kind: str, tmp_path: Path) -> None:
    path = made(kind, tmp_path / "model")
    write_gguf(path, tmp_path / "model.gguf", "f32", QUIET)
    write_hf_directory(tmp_path / "model.gguf", tmp_path / "back")
    ids = torch.tensor([[1, *random.Random(0).choices(range(3, 300), k=40)]])
    with torch.no_grad():
        one, other = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=ids).logits
            for folder in (path, tmp_path / "back")
        )
    assert torch.allclose(one, other, atol=2e-4)


def make_pieces(prefix: bool) -> Any:
    """A tokenizer like SentencePiece's: pieces by frequency, bytes for what has none."""
    text = " ".join(
        ["the quick brown fox jumps over what is the weather in Oslo", "def f(x): return x**2", "naive cafes and 12345"]
        * 3
    ).replace(" ", "\u2581")
    count = Counter(text[at : at + size] for size in range(1, 7) for at in range(len(text) - size))
    pieces = [piece for piece, times in count.most_common() if times > 2 or len(piece) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "<mark>"]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces), USER_DEFINED]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))] + [0.0]
    meta = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": prefix,
        "tokenizer.ggml.bos_token_id": 1,
    }
    make: Any = PreTrainedTokenizerFast
    return make(
        tokenizer_object=build_tokenizer(meta),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_are_joined_as_in_llama_cpp(prefix: bool, tmp_path: Path) -> None:
    """SentencePiece's: ids of transformers, of llama.cpp, and of the tokenizer that is read from the file."""
    from cyllama.llama import llama_cpp as cy

    tokenizer = make_pieces(prefix)
    path = made("mistral", tmp_path / "model", tokenizer)
    write_gguf(path, tmp_path / "model.gguf", "f32", QUIET)
    model = cy.LlamaModel(str(tmp_path / "model.gguf"), cy.LlamaModelParams())
    write_hf_directory(tmp_path / "model.gguf", tmp_path / "back")
    back: Any = PreTrainedTokenizerFast.from_pretrained(tmp_path / "back")
    vocabulary = model.get_vocab()
    for text in [*TEXTS, "the <mark> fox", "weather weather", "  what"]:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 1
        assert back(text)["input_ids"] == ids, text
        assert list(vocabulary.tokenize(text, True, True)) == ids, text
        if "<mark>" not in text and "<|" not in text:
            assert back.decode(ids, skip_special_tokens=True) == text


def test_ids_without_a_token_have_a_name_that_no_token_has(tmp_path: Path) -> None:
    """Of 260 rows 256 have tokens; one of these is called as llama.cpp's converter calls the 258th row."""
    from gguf import GGUFReader, GGUFWriter
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    from llmworks.quantize.llamacpp.vocabulary import add_vocabulary

    backend = Tokenizer(
        BPE({token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["[PAD258]"])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[PAD258]").save_pretrained(tmp_path)
    writer = GGUFWriter(tmp_path / "v.gguf", "llama")
    add_vocabulary(writer, tmp_path, {"vocab_size": 260})
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokens = GGUFReader(tmp_path / "v.gguf").fields["tokenizer.ggml.tokens"].contents()
    assert len(set(tokens)) == len(tokens) == 260


def test_merges_that_llama_cpp_would_not_follow_are_refused(tmp_path: Path) -> None:
    vocabulary = {token: at for at, token in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    types = [NORMAL] * 6
    good = {"vocab": vocabulary, "merges": [["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]]}
    assert compute_scores(good, types, tmp_path)[3:] == [0.0, -1.0, -2.0]
    with pytest.raises(
        ModelError,
        match=r"'a' and 'bc' have no merge although 'abc' is a token, so llama.cpp would tokenize differently",
    ):
        compute_scores({**good, "merges": good["merges"][:3]}, types, tmp_path)
    with pytest.raises(ModelError, match="merges that produce 'abc' are not consecutive"):
        compute_scores({**good, "merges": [["a", "b"], ["ab", "c"], ["b", "c"], ["a", "bc"]]}, types, tmp_path)


@pytest.mark.parametrize("name", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_texts_are_split_as_in_llama_cpp(name: str, tmp_path: Path) -> None:
    from cyllama.llama import llama_cpp as cy
    from tokenizers import normalizers

    tokenizer = make_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["ignore_merges"] = name == "llama-bpe"
    inner = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    inner.pre_tokenizer = make_pre_tokenizer(name)
    if name == "qwen2":
        inner.normalizer = normalizers.NFC()
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>", clean_up_tokenization_spaces=False
    )
    path = made("qwen2", tmp_path / "model", tokenizer)
    write_gguf(path, tmp_path / "model.gguf", "f32", QUIET)
    model = cy.LlamaModel(str(tmp_path / "model.gguf"), cy.LlamaModelParams())
    write_hf_directory(tmp_path / "model.gguf", tmp_path / "back")
    back: Any = PreTrainedTokenizerFast.from_pretrained(tmp_path / "back")
    vocabulary = model.get_vocab()
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert list(vocabulary.tokenize(text, False, True)) == ids, text
        assert back(text)["input_ids"] == ids, text


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"query_pre_attn_scalar": 16}, "this model differs"),
        ({"model_type": "mamba"}, "cannot be written as GGUF, only LlamaForCausalLM, MistralForCausalLM"),
        ({"vocab_size": 20}, "its embedding only 20 rows"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    path = made("gemma3", tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ModelError, match=match):
        write_gguf(path, tmp_path / "x.gguf", "f16", QUIET)
