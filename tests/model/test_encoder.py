"""Encoders see both ways, encoder-decoders write what was hidden; both learn real text, and objectives hide what they
say.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, DynamicCache, EncoderDecoderCache

from llmworks.model.loss.linear_cross_entropy import IGNORE_INDEX
from llmworks.model.loss.masking import corrupt_spans, mask_tokens
from llmworks.model.nn.encoder import EncoderConfig, EncoderDecoderLM, EncoderForMaskedLM, Seq2SeqConfig
from llmworks.model.shape import Shape
from llmworks.tokenize.bpe.reference import BPE

USUAL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}
IDS = torch.randint(3, 61, (2, 20), generator=torch.Generator().manual_seed(1))


def encoder(**more: Any) -> EncoderForMaskedLM:
    torch.manual_seed(0)
    made = EncoderForMaskedLM(EncoderConfig(shape=Shape.model_validate({**USUAL, **more}).model_dump()))
    made.train(False)
    return made


def both(**more: Any) -> EncoderDecoderLM:
    torch.manual_seed(0)
    made = EncoderDecoderLM(
        Seq2SeqConfig(
            shape=Shape.model_validate({**USUAL, **more}).model_dump(),
            decoder_start_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(10) if parameter.dim() > 1 else None  # so that answers differ
    made.train(False)
    return made


@pytest.mark.parametrize(
    "more",
    [
        {},
        {
            "position_embedding_type": "learned",
            "norm": "layer",
            "norm_position": "post",
            "gated_mlp": False,
            "hidden_act": "gelu",
            "bias": "all",
        },
        {"position_embedding_type": "alibi"},
        {"sliding_window": 4},
    ],
)
def test_an_encoder_sees_both_ways(more: dict[str, Any], tmp_path: Path) -> None:
    made = encoder(**more)
    with torch.no_grad():
        before = made(input_ids=IDS).logits
        changed = IDS.clone()
        changed[:, 12] = (changed[:, 12] + 1 - 3) % 58 + 3
        after = made(input_ids=changed).logits
        moved = (after - before).abs().amax((0, 2)) > 1e-6
        assert moved[11]
        assert moved[13]
        assert bool(moved[2]) != ("sliding_window" in more)  # two layers of a window of four reach six tokens
        mask = torch.ones_like(IDS)
        mask[1, 15:] = 0
        padded = made(input_ids=IDS, attention_mask=mask).logits
        assert (padded[1, :15] - made(input_ids=IDS[1:, :15]).logits[0]).abs().max() < 1e-5
    made.save_pretrained(tmp_path)
    assert torch.equal(
        AutoModelForMaskedLM.from_pretrained(tmp_path).eval()(input_ids=IDS).logits, made(input_ids=IDS).logits
    )


def test_an_encoder_decoder_writes(tmp_path: Path) -> None:
    made = both()
    mask = torch.ones_like(IDS)
    mask[1, 13:] = 0
    with torch.no_grad():
        written = torch.zeros(2, 1, dtype=torch.long)
        for _ in range(8):  # greedily, without a cache
            logits = made(input_ids=IDS, attention_mask=mask, decoder_input_ids=written).logits
            written = torch.cat((written, logits[:, -1].argmax(-1, keepdim=True)), 1)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        states = made.encoder(IDS, mask)
        parts = [
            made(
                encoder_outputs=states,
                attention_mask=mask,
                decoder_input_ids=written[:, i : i + 1],
                past_key_values=cache,
            ).logits
            for i in range(8)
        ]
        assert (torch.cat(parts, 1) - logits).abs().max() < 1e-4
        alone = made(input_ids=IDS[1:, :13], decoder_input_ids=written[1:]).logits
        assert (
            made(input_ids=IDS, attention_mask=mask, decoder_input_ids=written).logits[1] - alone[0]
        ).abs().max() < 1e-4
    settings: Any = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "attention_mask": mask,
        "eos_token_id": None,
    }
    assert torch.equal(made.generate(IDS, **settings), written)
    made.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again.generate(IDS, **settings), written)
    assert again.decoder.embedding.weight is again.encoder.stack.embedding.weight


def test_hidden_tokens() -> None:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 100, (50, 400), generator=draw)
    ids[:, 0] = 3
    hidden, labels = mask_tokens(ids, 4, 100, mlm_probability=0.2, excluded_ids=[3], generator=draw)
    chosen = labels != IGNORE_INDEX
    assert (labels[chosen] == ids[chosen]).all()
    assert (hidden[~chosen] == ids[~chosen]).all()
    assert not chosen[:, 0].any()
    assert float(chosen[:, 1:].float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float((hidden[chosen] == 4).float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float((hidden[chosen] == ids[chosen]).float().mean()) == pytest.approx(0.1, abs=0.02)


def test_hidden_spans() -> None:
    draw = torch.Generator().manual_seed(0)
    sentinels = list(range(900, 1000))
    total = hidden = spans = 0
    for length in [2, 3, 4, 5, 10, 33, *[200] * 50]:
        ids = list(range(10, 10 + length))
        source, target = corrupt_spans(ids, sentinels, 1, generator=draw)
        assert source[-1] == target[-1] == 1
        covered: dict[int, list[int]] = {}
        for token in target[:-1]:
            if token in sentinels:
                covered[token] = []
            else:
                covered[list(covered)[-1]].append(token)
        assert [t for token in source[:-1] for t in covered.get(token, [token])] == ids  # put together again
        assert list(covered) == sentinels[: len(covered)]
        assert all(covered.values())
        if length == 200:
            total, hidden, spans = total + length, hidden + sum(map(len, covered.values())), spans + len(covered)
    assert hidden / total == pytest.approx(0.15, abs=0.01)
    assert hidden / spans == pytest.approx(3.0, abs=0.01)
    assert corrupt_spans(list(range(50)), [900], 1, generator=draw)[0].count(900) == 1


@pytest.fixture(scope="module")
def text() -> tuple[list[int], int]:
    """(ids of the documentation, the first id that is free)."""
    pages = "\n".join(
        (Path(__file__).parents[2] / "docs" / name).read_text()
        for name in ("conversations.md", "corpus.md", "artifacts.md")
    )
    tokenizer = BPE()
    tokenizer.train([pages], 300)
    return tokenizer.encode(pages), 300


def trained(model: Any, batch: Any, steps: int) -> float:
    """Nats that it knows more, in the last tenth of the steps, than who knows only how frequent the labels are."""
    seen: Counter[int] = Counter()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        given = batch()
        seen.update(given["labels"][given["labels"] != IGNORE_INDEX].tolist())
        loss = model(**given).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    entropy = -sum(n / seen.total() * math.log(n / seen.total()) for n in seen.values())
    return entropy - sum(losses[-steps // 10 :]) / len(losses[-steps // 10 :])


def test_masked_tokens_of_real_text_are_learned(text: tuple[list[int], int]) -> None:
    ids, free = text
    made = encoder(
        vocab_size=free + 1, hidden_size=64, num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=64
    )
    draw = torch.Generator().manual_seed(0)

    def batch() -> dict[str, torch.Tensor]:
        starts = torch.randint(0, len(ids) - 48, (16,), generator=draw).tolist()
        hidden, labels = mask_tokens(
            torch.tensor([ids[s : s + 48] for s in starts]), free, free, mlm_probability=0.2, generator=draw
        )
        return {"input_ids": hidden, "labels": labels}

    assert trained(made, batch, 400) > 0.35


@pytest.mark.slow
def test_hidden_spans_of_real_text_are_learned(text: tuple[list[int], int]) -> None:
    ids, free = text
    end, start, pad, sentinels = free, free + 1, free + 2, list(range(free + 3, free + 11))
    made = both(vocab_size=free + 11, hidden_size=64, max_position_embeddings=64)
    made.init_weights()
    made.config.decoder_start_token_id = start
    draw = torch.Generator().manual_seed(0)

    def batch() -> dict[str, torch.Tensor]:
        starts = torch.randint(0, len(ids) - 48, (16,), generator=draw).tolist()
        pairs = [corrupt_spans(ids[s : s + 48], sentinels, end, generator=draw) for s in starts]
        source, target = (
            [row + [fill] * (max(map(len, rows)) - len(row)) for row in rows]
            for rows, fill in zip(map(list, zip(*pairs, strict=True)), (pad, IGNORE_INDEX), strict=True)
        )
        inputs = torch.tensor(source)
        return {"input_ids": inputs, "attention_mask": (inputs != pad).long(), "labels": torch.tensor(target)}

    assert trained(made, batch, 250) > 0.6


@pytest.mark.slow
def test_a_decoder_learns_to_look_at_what_it_translates() -> None:
    """Capitals put back into real text: what stands in the source decides what is written."""
    pages = "\n".join(
        (Path(__file__).parents[2] / "docs" / name).read_text()
        for name in ("conversations.md", "corpus.md", "artifacts.md")
    )
    data, low = ([byte + 4 for byte in text.encode()] for text in (pages, pages.lower()))
    torch.manual_seed(0)
    shape = Shape.model_validate(
        {
            **USUAL,
            "vocab_size": 260,
            "hidden_size": 64,
            "position_embedding_type": "sinusoidal",
            "scale_embedding": True,
        }
    )
    made = EncoderDecoderLM(Seq2SeqConfig(shape=shape.model_dump(), decoder_start_token_id=0, pad_token_id=2))
    draw = torch.Generator().manual_seed(0)

    def batch() -> dict[str, torch.Tensor]:
        starts = torch.randint(0, len(data) - 24, (32,), generator=draw).tolist()
        return {
            "input_ids": torch.tensor([low[s : s + 24] for s in starts]),
            "labels": torch.tensor([data[s : s + 24] for s in starts]),
        }

    assert trained(made, batch, 1000) > 2.2
    made.train(False)
    given = batch()
    with torch.no_grad():
        right, wrong = (float(made(**{**given, "input_ids": given["input_ids"].roll(by, 0)}).loss) for by in (0, 1))
    assert wrong > right + 1.0
    written = made.generate(
        given["input_ids"], max_new_tokens=24, min_new_tokens=24, do_sample=False, eos_token_id=None
    )[:, 1:]
    assert float((written == given["labels"]).float().mean()) > 0.8
