"""Bulk encoding gives the ids of the tokenizer that it was made from, or says that it cannot."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from llmworks import assets
from llmworks.tokenize.bpe.bulk_encoder import PROBE_TEXTS, build_bulk_encoder
from llmworks.tokenize.bpe.trainers import LLAMA3_PATTERN

TEXTS = [
    row[1]
    for row in json.loads(
        gzip.decompress((Path(__file__).parents[1] / "fixtures" / "filter_cases.json.gz").read_bytes())
    )["rows"]
]
BYTES = pre_tokenizers.ByteLevel
KINDS: dict[str, Any] = {
    "gpt2": BYTES(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES(add_prefix_space=False)]),
    "gaps": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[^中e]+"), "isolated"), BYTES(add_prefix_space=False, use_regex=False)]
    ),
    "llama3": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"), BYTES(add_prefix_space=False, use_regex=False)]
    ),
}


def trained(pre: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>"]  # ids of merges do not begin at 256
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=special, initial_alphabet=BYTES.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS[:200], *PROBE_TEXTS], trainer)
    return tokenizer


def tricky(count: int = 3000) -> list[str]:
    """Random texts of what the words' patterns could divide otherwise: white space of all kinds, numbers and letters
    beyond ASCII, marks.
    """
    draw = random.Random(1)
    parts = [
        *"aB3 \n\t\r\x1c\x85\xa0\u3000'’\"“.,_-½²é́Ⅷ一あ١🙂\u200d\0",
        "  ",
        "'s",
        "'ll",
        "'RE",
        "\n\n",
        "word",
        " 12",
        "ſ",
        "\U0001e030",
    ]
    return ["".join(draw.choices(parts, k=draw.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_same(kind: str) -> None:
    tokenizer = trained(KINDS[kind])
    encoder = build_bulk_encoder(tokenizer)
    assert encoder is not None
    for text in (*TEXTS, *PROBE_TEXTS, "", " ", "\n", "a\0b", "x" * 5000, "a <|im_start|> b<|endoftext|>", *tricky()):
        assert encoder.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_bytes_without_a_token_are_left_out_alike() -> None:
    state = json.loads(trained(KINDS["smollm"]).to_str())
    state["model"]["merges"] = [m for m in state["model"]["merges"] if "¢" not in "".join(m)]
    for character in ("\u0104", "ñ", "¢"):  # the bytes 4, 0xF1 and 0xA2
        state["model"]["vocab"].pop(character)
    tokenizer = Tokenizer.from_str(json.dumps(state))
    encoder = build_bulk_encoder(tokenizer)
    assert encoder is not None
    for text in ("a\x04b the\x04re", "x\U00040000y", "plain", "the ¢ent, 5 ¢s.", *PROBE_TEXTS):
        assert encoder.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_others_are_left_to_their_own_library() -> None:
    lower = trained(KINDS["gpt2"])
    lower.normalizer = normalizers.Lowercase()
    assert build_bulk_encoder(lower) is None
    assert build_bulk_encoder(trained(BYTES(add_prefix_space=True))) is None
    assert build_bulk_encoder(Tokenizer(models.WordLevel({"a": 0}))) is None
    unknown = trained(KINDS["gpt2"])
    unknown.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), BYTES(add_prefix_space=False)])
    assert build_bulk_encoder(unknown) is None


@pytest.mark.parametrize("pattern", [r"(?=[A-Z])|[^A-Z]+", r"\p{L}*", "a|", r"(?<=a)", r"\h+"])
def test_patterns_that_can_find_nothing_are_left_to_the_library(pattern: str) -> None:
    pre = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES(add_prefix_space=False, use_regex=False)]
    )
    assert build_bulk_encoder(trained(pre)) is None


def test_settings_that_change_what_is_encoded() -> None:
    cuts, pads = trained(KINDS["gpt2"]), trained(KINDS["gpt2"])
    cuts.enable_truncation(5)
    pads.enable_padding(length=9)
    assert build_bulk_encoder(cuts) is None
    assert build_bulk_encoder(pads) is None


def test_what_is_no_text_is_refused_alike() -> None:
    tokenizer = trained(KINDS["smollm"])
    encoder = build_bulk_encoder(tokenizer)
    assert encoder is not None
    for text in ("a\ud800", "word \udc80 word"):
        with pytest.raises(TypeError):
            tokenizer.encode(text)
        with pytest.raises(TypeError):
            encoder.encode(text)


def test_merges_that_do_not_make_their_tokens_are_left_to_the_library() -> None:
    state = json.loads(trained(KINDS["gpt2"]).to_str())
    merges: list[list[str]] = [["q", "x"], ["z", "q"], ["zq", "x"]]  # "zqx" becomes z, qx
    vocab = {character: i for i, character in enumerate(BYTES.alphabet())} | {"qx": 256, "zq": 257, "zqx": 258}
    state["model"] |= {"vocab": vocab, "merges": merges}
    state["added_tokens"] = []
    odd = Tokenizer.from_str(json.dumps(state))
    assert odd.encode("zqx").tokens == ["z", "qx"]
    assert build_bulk_encoder(odd) is None
    state["model"] |= {"merges": [["z", "q"], ["zq", "x"]], "ignore_merges": True}
    assert build_bulk_encoder(Tokenizer.from_str(json.dumps(state))) is None  # "qx" is a word that no merge makes
    state["model"] |= {"ignore_merges": False, "dropout": 0.5}
    assert build_bulk_encoder(Tokenizer.from_str(json.dumps(state))) is None


@pytest.mark.parametrize("kind", KINDS)
def test_endless_white_space_and_new_digits(kind: str) -> None:
    tokenizer = trained(KINDS[kind])
    encoder = build_bulk_encoder(tokenizer)
    assert encoder is not None
    for text in ("a" + " " * 1_000_000 + "b", "\n" * 400_000, "  \U00011de1 ", "x  \U00016ff4"):
        assert encoder.encode(text) == tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.slow
def test_a_real_tokenizer_on_real_text() -> None:
    from tests.data.real_documents import real_documents

    from llmworks.runtime.session import load

    assert assets.get_asset("smollm2-135m-instruct").convert
    tokenizer = Tokenizer.from_file(str(load("asset:smollm2-135m-instruct").path / "tokenizer.json"))
    encoder = build_bulk_encoder(tokenizer)
    assert encoder is not None
    texts = [text for _, text in real_documents()]
    for text, expected in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
        assert encoder.encode(text) == expected.ids
