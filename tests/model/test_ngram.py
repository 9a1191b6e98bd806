"""N-gram models: KenLM's numbers, a sum that a hand can do, chances that add up to one, and the interface of every
other model.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llmworks.core.errors import ModelError
from llmworks.model.io.load import load_model
from llmworks.model.ngram.kneser_ney import FALLBACK_DISCOUNTS, count_ngrams, estimate_all_discounts, estimate_discounts
from llmworks.model.ngram.ngram import NgramForCausalLM

FIXTURE = json.loads(gzip.decompress((Path(__file__).parents[1] / "fixtures" / "kenlm_ngrams.json.gz").read_bytes()))


def counted(texts: list[list[int]], vocabulary: int, order: int) -> Any:
    return count_ngrams(list(itertools.chain(*texts)), np.cumsum([0, *map(len, texts[:-1])]), vocabulary, order)


def scores(model: NgramForCausalLM, ids: list[int]) -> list[float]:
    """Log-probability of every token, the first one given only that a text begins."""
    row = torch.tensor([ids])
    state = model.get_initial_state(1, row.device)
    found = model.compute_contexts(row, torch.zeros_like(row, dtype=torch.bool), state)
    before = [torch.cat((s[0], c[0, :-1])) for s, c in zip(state, found, strict=True)]
    one = model.compute_token_probabilities(before, row[0]).log()
    assert (
        model.compute_probabilities(before).gather(1, row.T)[:, 0].log() - one
    ).abs().max() < 1e-12  # all next tokens at once, or one
    assert (model.compute_probabilities(before).sum(1) - 1).abs().max() < 1e-12
    return one.tolist()


@pytest.mark.parametrize("order", ["2", "3", "5"])
def test_kenlm_says_the_same(order: str) -> None:
    words = {"<unk>": 0, "</s>": 1}
    for word in sorted({word for sentence in FIXTURE["train"] for word in sentence}):
        words[word] = len(words)
    orders = counted([[*(words[w] for w in s), 1] for s in FIXTURE["train"]], len(words), int(order))
    found, fallen = estimate_all_discounts(orders)
    assert fallen == [1]
    wanted = FIXTURE["orders"][order]
    assert np.allclose(found, wanted["discounts"], rtol=1e-5)
    model = NgramForCausalLM.from_counts(orders, found)
    for sentence, theirs in zip(FIXTURE["test"], wanted["log10"], strict=True):
        ours = scores(model, [*(words.get(w, 0) for w in sentence), 1])
        assert np.allclose(np.array(ours) / math.log(10), theirs, atol=2e-6)


def test_a_sum_by_hand() -> None:
    """Texts a b, a c, b a (ids 0 1 2), bigrams, discount 0.5. Bigrams once each: ^a twice, ^b, ab, ac, ba."""
    model = NgramForCausalLM.from_counts(counted([[0, 1], [0, 2], [1, 0]], 3, 2), [(0.5, 0.5, 0.5)] * 2)
    # single tokens count what they follow: a: ^ b, b: ^ a, c: a; of 5, three of which lose 0.5, shared evenly among 3
    a, b, c = (1.5 + 0.5) / 5, (1.5 + 0.5) / 5, (0.5 + 0.5) / 5
    assert a + b + c == pytest.approx(1)
    # after a (b once, c once): each less 0.5, of 2; half of all goes to the single tokens
    assert scores(model, [0, 1]) == pytest.approx([math.log(1.5 / 3 + 1 / 3 * a), math.log(0.5 / 2 + 0.5 * b)])
    assert scores(model, [1, 1])[1] == pytest.approx(math.log(0.5 * b))  # only a followed b, once
    assert scores(model, [2, 2])[1] == pytest.approx(math.log(c))  # nothing followed c


def test_texts_shorter_than_the_order() -> None:
    """An order that no text reaches counts nothing and changes nothing."""
    texts = [[0, 1], [1], [2, 0]]
    long, short = (
        NgramForCausalLM.from_counts(o := counted(texts, 3, order), [(0.5, 0.5, 0.5)] * len(o)) for order in (5, 3)
    )
    assert scores(long, [0, 1, 2, 0]) == pytest.approx(scores(short, [0, 1, 2, 0]))
    assert len(long(torch.tensor([[0, 1, 2]]), use_cache=True).logits[0]) == 3


def test_tables_that_do_not_belong_together(model: NgramForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change in (
        {"discounts": config["discounts"][:-1]},
        {"discounts": ["x"] * 4},
        {"sizes": []},
        {"vocab_size": 300},
        {"discounts": [[5, 5, 5]] * 4},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ModelError, match="do not match"):
            load_model(tmp_path)


def test_discounts() -> None:
    counts = np.repeat([1, 2, 3, 4], [100, 40, 20, 10])
    share = 100 / 180
    found, fallen = estimate_discounts(counts)
    assert found == pytest.approx((1 - 2 * share * 0.4, 2 - 3 * share * 0.5, 3 - 4 * share * 0.5))
    assert not fallen
    assert estimate_discounts(np.array([1, 2, 3])) == (FALLBACK_DISCOUNTS, True)
    assert estimate_discounts(np.repeat([1, 2, 3, 4], [50, 1, 50, 1])) == (
        FALLBACK_DISCOUNTS,
        True,
    )  # would take less than nothing


@pytest.fixture(scope="module")
def model() -> NgramForCausalLM:
    draw = np.random.default_rng(0)
    orders = counted([draw.integers(0, 12, size=n).tolist() for n in draw.integers(1, 30, size=60)], 12, 4)
    return NgramForCausalLM.from_counts(orders, estimate_all_discounts(orders)[0], eos_token_id=1, pad_token_id=0)


IDS = torch.randint(0, 12, (3, 14), generator=torch.Generator().manual_seed(1))


def test_the_interface(model: NgramForCausalLM, tmp_path: Path) -> None:
    whole = model(IDS).logits
    labels = IDS.clone()
    labels[:, 5] = -100
    expected = -whole[:, :-1].gather(2, IDS[:, 1:, None])[..., 0]
    assert float(model(IDS, labels=labels).loss) == pytest.approx(
        float(torch.cat((expected[:, :4], expected[:, 5:]), 1).mean()), rel=1e-5
    )
    cache, parts = None, []
    for low, high in ((0, 5), (5, 6), (6, 14)):
        out = model(IDS[:, low:high], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert torch.equal(torch.cat(parts, 1), whole)
    positions = torch.tensor([[0, 1, 2, 3, 0, *range(9)]]).expand(3, -1)
    packed = model(IDS, position_ids=positions).logits
    for low, high in ((0, 4), (4, 5), (5, 14)):
        assert torch.equal(packed[:, low:high], model(IDS[:, low:high]).logits)
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0
    assert torch.equal(model(IDS, attention_mask=mask).logits[1, 6:], model(IDS[1:2, 6:]).logits[0])
    settings: Any = {"max_new_tokens": 12, "do_sample": False, "attention_mask": mask}
    assert torch.equal(model.generate(IDS, **settings), model.generate(IDS, use_cache=False, **settings))
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, whole)
    with pytest.raises(ModelError, match="out of range for a vocabulary of 12"):
        model(IDS + 1)


def test_longer_ones_know_more() -> None:
    """On text with structure, each order is surer than the one below it, and one token alone is as sure as
    frequencies.
    """
    text = (Path(__file__).parents[2] / "LICENSE").read_bytes()
    train, test = [list(text[:9000])], list(text[9000:])
    found = []
    for order in (1, 2, 3, 5):
        orders = counted(train, 256, order)
        model = NgramForCausalLM.from_counts(orders, estimate_all_discounts(orders)[0])
        found.append(float(model(torch.tensor([test]), labels=torch.tensor([test])).loss))
    assert found == sorted(found, reverse=True)
    assert found[0] - found[-1] > 1
