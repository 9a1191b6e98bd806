"""The reference BPE learns the library's merges and gives its ids, and gives back any bytes."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from llmworks.tokenize.bpe.bulk_encoder import GPT2
from llmworks.tokenize.bpe.reference import BPE, merge_pair
from llmworks.tokenize.bpe.trainers import LLAMA3_PATTERN

BYTES = pre_tokenizers.ByteLevel
WORKED = "aaabdaaabac"  # Gage 1994: aa, then ab or its like, then what they make


def library(texts: list[str], size: int, pattern: str, least: int = 1, control: int = 0) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES(add_prefix_space=False, use_regex=False)]
    )
    special = [f"<|{i}|>" for i in range(control)]
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=least,
            special_tokens=special,
            initial_alphabet=BYTES.alphabet(),
            show_progress=False,
        ),
    )
    return made


def same(texts: list[str], others: list[str], size: int, pattern: str = GPT2, least: int = 1, control: int = 0) -> BPE:
    theirs = library(texts, size, pattern, least, control)
    ours = BPE(pattern=pattern, first_id=control)
    ours.train(texts, size, min_frequency=least)
    state = json.loads(theirs.to_str())
    vocab = state["model"]["vocab"]
    assert [(vocab[a], vocab[b]) for a, b in state["model"]["merges"]] == list(ours.merges)
    again = BPE(list(ours.merges), pattern=pattern, first_id=control)
    for text in (*texts, *others):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ids == again.encode(text)
        assert ours.decode(ids) == text
    return ours


def test_a_worked_example() -> None:
    """aaabdaaabac: aa, then aaa, then aaab, each standing twice or more; of equals the pair of smaller ids comes
    first.
    """
    ours = BPE(pattern=r"[\s\S]+")
    ours.train([WORKED], 259)
    assert [ours.id_to_bytes[id] for id in ours.merges.values()] == [b"aa", b"ab", b"aaab"]
    assert [ours.id_to_bytes[id] for id in ours.encode(WORKED)] == [b"aaab", b"d", b"aaab", b"a", b"c"]
    assert merge_pair([1, 1, 1, 2, 1, 1], (1, 1), 9) == [9, 1, 2, 9]


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3_PATTERN])
def test_it_is_the_library(pattern: str) -> None:
    texts = [
        Path(__file__).read_text(),
        (Path(__file__).parents[2] / "docs" / "conversations.md").read_text(),
        "aaaa aaa aa a aaaaaaaa " * 20,
        "Grüße aus Köln, 日本語のテキスト, мир, ١٢٣ " * 9,
    ]
    same(texts, ["unseen words, neue Wörter, 新しい言葉", "  \n\n\t x", ""], 900, pattern)
    same(texts, [], 700, pattern, least=3, control=5)


def test_training_ends_when_pairs_are_rare() -> None:
    ours = BPE()
    ours.train(["ab ab cd"], 1000, min_frequency=2)
    assert len(ours.merges) == 1
    with pytest.raises(KeyError):
        ours.decode([9999])


def test_any_bytes_come_back() -> None:
    draw = random.Random(0)
    ours = BPE()
    ours.train([Path(__file__).read_text()], 600)
    for length in [0, 1, 2, 3, *draw.choices(range(200), k=400)]:
        data = draw.randbytes(length) if length % 2 else "".join(draw.choices("ab \n€é😀\u0301中", k=length)).encode()
        assert ours.decode_bytes(ours.encode(data)) == data


@pytest.mark.slow
@pytest.mark.parametrize("language", ["ru-RU", "zh-CN", "ar-MA", "de-DE"])
def test_it_is_the_library_on_real_text_of_several_scripts(language: str) -> None:
    from llmworks import assets

    folder = assets.fetch("debian-handbook-languages") / language
    pages = [re.sub(r"<[^>]+>", " ", file.read_text()) for file in sorted(folder.glob("*.html"))]
    text = "".join(pages)[:400_000]
    assert len({c for c in text if c.isalpha() and not c.isascii()}) > 25 or language == "de-DE"
    same([text], ["".join(pages)[500_000:520_000]], 2000, LLAMA3_PATTERN)
