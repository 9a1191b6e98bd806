"""Embedders: means over tokens as worked out by hand, batches that change nothing, and the real ones tell related from
unrelated.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmworks import assets
from llmworks.core.errors import ModelError
from llmworks.embed import load_embedder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    from tests.conftest import make_tokenizer

    tokenizer = make_tokenizer()
    (tmp_path / "static").mkdir()
    tokenizer.backend_tokenizer.save(str(tmp_path / "static/tokenizer.json"))
    save_file(
        {"embedding.weight": np.random.default_rng(0).normal(size=(len(tokenizer), 16)).astype(np.float16)},
        tmp_path / "static/model.safetensors",
    )
    return tmp_path / "static"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefghij"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    ).save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    BertModel(config).eval().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_static_vectors_are_means(table: Path) -> None:
    embedder = load_embedder(table)
    texts = ["the quick brown fox", "", "what", "user assistant system " * 30]
    vectors = embedder.encode(texts)
    assert vectors.shape == (4, embedder.dimensions) == (4, 16)
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(table / "tokenizer.json")).encode(texts[0], add_special_tokens=False).ids
    mean = embedder.table[ids].mean(axis=0)  # type: ignore[attr-defined]
    np.testing.assert_allclose(vectors[0], mean / np.linalg.norm(mean), rtol=1e-5)
    assert not vectors[1].any()
    np.testing.assert_allclose(np.linalg.norm(vectors[[0, 2, 3]], axis=1), 1, rtol=1e-5)


def test_encoder_pools_what_is_no_padding(bert: Path) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    texts = ["a b c", "j", "a " * 200, "d e f g h i j a b c d", "b c"]
    vectors = load_embedder(bert).encode(texts)
    tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert).eval()
    for text, vector in zip(texts, vectors, strict=True):
        with torch.inference_mode():
            hidden = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=64)).last_hidden_state[0]
        mean = hidden.mean(0).numpy()
        np.testing.assert_allclose(vector, mean / np.linalg.norm(mean), atol=2e-6)


def test_what_is_no_embedder(tmp_path: Path, table: Path) -> None:
    with pytest.raises(ModelError, match="holds no embedder"):
        load_embedder(tmp_path)
    (table / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ModelError, match="cannot be read"):
        load_embedder(table)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wordllama", "all-minilm-l6-v2"])
def test_the_real_ones(name: str) -> None:
    texts = [
        "How do I reset my password?",
        "I forgot my login credentials, how can I change them?",
        "The recipe needs two eggs and flour.",
    ]
    a, b, c = load_embedder(assets.fetch(name)).encode(texts)
    assert a @ b > 0.5
    assert a @ c < 0.15
