"""Window, RNN, LSTM and GRU: their equations written out, texts in a row that do not see one another, a state in place
of a cache, and learning.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmworks.cli import main
from llmworks.core.errors import ModelError
from llmworks.core.types import Message, Request, Sampling
from llmworks.generate.engines.torch import TorchEngine
from llmworks.model.nn.recurrent import RecurrentForCausalLM, RecurrentModelConfig

KINDS = ("mlp", "rnn", "lstm", "gru")
IDS = torch.randint(0, 61, (3, 14), generator=torch.Generator().manual_seed(1))


def made(kind: str, **more: Any) -> RecurrentForCausalLM:
    torch.manual_seed(0)
    shape = {
        "rnn_type": kind,
        "vocab_size": 61,
        "embedding_dim": 16,
        "hidden_size": 24,
        **({"window_size": 4} if kind == "mlp" else {"num_hidden_layers": 2}),
        **more,
    }
    model = RecurrentForCausalLM(RecurrentModelConfig(shape=shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(std=0.3)  # so that a bias that is ignored is seen
    model.train(False)
    return model


def by_hand(model: RecurrentForCausalLM, ids: Tensor) -> Tensor:
    """Logits [length, vocabulary] of one text, by the papers' equations."""
    weights = dict(model.named_parameters())
    kind, inner = model.shape.rnn_type, model.shape.inner_size
    xs = [model.embedding.weight[i] for i in ids]
    if kind == "mlp":
        zeros = [torch.zeros(model.shape.embedding_dim)] * (model.shape.window_size - 1)
        row = zeros + xs
        states = [
            torch.tanh(
                weights["body.layer.weight"] @ torch.cat(row[i : i + model.shape.window_size])
                + weights["body.layer.bias"]
            )
            for i in range(len(xs))
        ]
    else:
        for layer in range(model.shape.num_hidden_layers):
            w, u, b, d = (
                weights[f"body.cells.{name}_l{layer}"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            h, c, states = torch.zeros(inner), torch.zeros(inner), []
            for x in xs:
                if kind == "rnn":
                    h = torch.tanh(w @ x + b + u @ h + d)
                elif kind == "lstm":
                    i, f, n, o = (w @ x + b + u @ h + d).split(inner)
                    c = f.sigmoid() * c + i.sigmoid() * n.tanh()
                    h = o.sigmoid() * c.tanh()
                else:
                    (r, z, n), (ur, uz, un) = (w @ x + b).split(inner), (u @ h + d).split(inner)
                    z = (z + uz).sigmoid()
                    h = (1 - z) * torch.tanh(n + (r + ur).sigmoid() * un) + z * h
                states.append(h)
            xs = states
    assert model.to_width is not None
    return torch.stack([model.embedding.weight @ (model.to_width.weight @ state) for state in states])


@pytest.mark.parametrize("kind", KINDS)
def test_the_equations(kind: str) -> None:
    model = made(kind)
    with torch.no_grad():
        assert (model(IDS).logits[0] - by_hand(model, IDS[0])).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_texts_in_a_row_do_not_see_one_another(kind: str) -> None:
    model = made(kind)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, *range(7)]]).expand(3, -1)
    with torch.no_grad():
        packed = model(IDS, position_ids=positions).logits
        for low, high in ((0, 4), (4, 6), (6, 7), (7, 14)):
            assert (packed[:, low:high] - model(IDS[:, low:high]).logits).abs().max() < 1e-6
        labels = IDS.clone()
        labels[:, [0, 4, 6, 7]] = -100
        apart = [
            model(IDS[:, low:high], labels=IDS[:, low:high]).loss * (high - low - 1)
            for low, high in ((0, 4), (4, 6), (7, 14))
        ]
        assert float(model(IDS, position_ids=positions, labels=labels).loss) == pytest.approx(
            float(sum(apart)) / 10, rel=1e-5
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_is_the_cache(kind: str) -> None:
    model = made(kind)
    with torch.no_grad():
        whole = model(IDS).logits
        cache, parts = None, []
        for low, high in ((0, 5), (5, 6), (6, 7), (7, 14)):
            out = model(IDS[:, low:high], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-6
        assert cache is not None
        assert cache.get_seq_length() == 14
        # padded on the left, then two steps without padding
        mask = torch.ones_like(IDS)
        mask[1, :5] = 0
        mask[2, :9] = 0
        out = model(IDS[:, :12], attention_mask=mask[:, :12], use_cache=True)
        out = model(IDS[:, 12:], attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
        for row, start in ((0, 0), (1, 5), (2, 9)):
            assert (out.logits[row] - model(IDS[row : row + 1, start:]).logits[0, -2:]).abs().max() < 1e-6
        out = model(IDS[:, :5], use_cache=True)  # a row that is only padding keeps what it knows
        hidden = mask[:, :9].clone()
        hidden[:, 5:] = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])
        hidden[:, :5] = 1
        out = model(IDS[:, 5:9], attention_mask=hidden, past_key_values=out.past_key_values, use_cache=True)
        out = model(IDS[:, 9:10], past_key_values=out.past_key_values, use_cache=True)
        for row, kept in ((0, [*range(10)]), (1, [*range(5), 9]), (2, [*range(7), 9])):
            assert (out.logits[row, -1] - model(IDS[row : row + 1, kept]).logits[0, -1]).abs().max() < 1e-6
    settings: Any = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(IDS, **settings), model.generate(IDS, use_cache=False, **settings))
    assert torch.equal(
        model.generate(IDS, num_beams=3, **settings), model.generate(IDS, num_beams=3, use_cache=False, **settings)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_learns_more_than_frequencies(kind: str) -> None:
    text = (Path(__file__).parents[2] / "LICENSE").read_bytes().decode()[:8000]
    letters = sorted(set(text))
    ids = torch.tensor([letters.index(c) for c in text])
    train, test = ids[:6400].view(-1, 64), ids[6400:]
    counts = Counter(train.flatten().tolist())
    entropy = -sum(math.log((counts[int(i)] + 1) / (train.numel() + len(letters))) for i in test) / len(test)
    torch.manual_seed(0)
    shape = {
        "rnn_type": kind,
        "vocab_size": len(letters),
        "embedding_dim": 32,
        "hidden_size": 64,
        "tie_word_embeddings": False,
        "dropout": 0.1,
    }
    model = RecurrentForCausalLM(RecurrentModelConfig(shape=shape)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(150):
        rows = train[torch.randint(0, len(train), (16,), generator=torch.Generator().manual_seed(step))]
        model(rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.train(False)
    with torch.no_grad():
        loss = float(model(test[None], labels=test[None]).loss)
    assert loss < entropy - 0.5, (loss, entropy)


def test_dropout_is_heard() -> None:
    for kind in KINDS:
        model = made(kind, dropout=0.5).train()
        assert not torch.equal(model(IDS).logits, model(IDS).logits)
        model.train(False)
        assert torch.equal(model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_rows(kind: str) -> None:
    model = made(kind)
    positions = torch.tensor([[0, 1, 2, *range(11)]]).expand(3, -1)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):  # packed rows in narrow products
            narrow = model(IDS, position_ids=positions).logits
        assert (narrow.float() - model(IDS, position_ids=positions).logits).abs().max() < 0.05
        assert (
            model(IDS, attention_mask=torch.zeros_like(IDS), use_cache=True).past_key_values.state is None
        )  # nothing but padding
    with pytest.raises(ModelError, match="is negative"):
        model(IDS - 61)


def test_ids_beyond_the_vocabulary() -> None:
    with pytest.raises(ModelError, match="token id 61 is out of range for a vocabulary of 61"):
        made("gru")(torch.full_like(IDS, 61))


@pytest.mark.parametrize("kind", KINDS)
def test_the_stage(kind: str, pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    out = tmp_path / kind
    assert (
        main(
            [
                "model",
                "recurrent",
                str(pico),
                "--set",
                f"rnn_type={kind}",
                "--set",
                "embedding_dim=32",
                "--out",
                str(out),
                "--quiet",
            ]
        )
        == 0
    )
    assert main(["verify", str(out)]) == 0
    assert main(["verify", "--golden", str(out)]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.head.weight is loaded.embedding.weight
    engine = TorchEngine.open(out)
    asked = [Request((Message("user", "hi " * n),), sampling=Sampling(max_tokens=9)) for n in (1, 12, 30)]
    together = engine.generate(asked)  # padded, with a common beginning
    assert [a.ids for a in together] == [engine.generate([request])[0].ids for request in asked]
    assert json.loads((out / "manifest.json").read_text())["about"]["architecture"] == kind


def test_mistakes(
    pico: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    for words, says in (
        (["rnn_type=lstm", "heads=4"], "unknown key 'heads'"),
        (["rnn_type=gru", "window_size=4"], "window_size needs rnn_type mlp"),
        (["rnn_type=mlp", "num_hidden_layers=2"], "rnn_type mlp has one layer"),
        (["vocab_size=10"], "the tokenizer has"),
        (["rnn_type=lstms"], "'lstm'"),
    ):
        assert (
            main(
                [
                    "model",
                    "recurrent",
                    str(pico),
                    *(w for word in words for w in ("--set", word)),
                    "--out",
                    str(tmp_path / "o"),
                    "--quiet",
                ]
            )
            == 2
        )
        told = capsys.readouterr().err.strip()
        assert says in told
        assert len(told.splitlines()) == 1
