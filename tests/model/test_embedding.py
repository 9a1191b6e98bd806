"""Word vectors: GloVe's counts and gradients against the paper, scores against gensim's, and the stage by every
method.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmworks import assets
from llmworks.cli import main
from llmworks.core.artifact import load
from llmworks.core.errors import DataError
from llmworks.embed import load_embedder
from llmworks.embed.glove import count_cooccurrences, train_glove
from llmworks.embed.word_similarity import Analogies, WordPairs, read_word_test, score_analogies, score_similarity
from llmworks.model.embedding import mean_random_cosine


def test_cooccurrences_by_hand() -> None:
    texts = [np.array([0, 1, 2, 0]), np.array([-1, 2, 1])]
    found = {(int(a), int(b)): x for a, b, x in zip(*count_cooccurrences(texts, 3, 2), strict=True)}
    # distance 1: 01 12 20 | 21; distance 2: 02 10
    assert found == {(0, 1): 1.5, (1, 0): 1.5, (1, 2): 2.0, (2, 1): 2.0, (0, 2): 1.5, (2, 0): 1.5}
    assert all(len(x) == 0 for x in count_cooccurrences([np.array([0])], 3, 2))


def test_one_step_of_glove_is_adagrad_on_its_loss() -> None:
    """The gradient of the paper's equation 8, pair by pair by autograd, and AdaGrad with squares that begin at one, as
    the authors' code has it.
    """
    pairs = (np.array([0, 1, 0, 2, 2]), np.array([1, 0, 2, 0, 2]), np.array([3.0, 3.0, 150.0, 150.0, 0.5]))
    draw = torch.Generator().manual_seed(0)
    w, c = (((torch.rand(3, 5, generator=draw) - 0.5) / 4).requires_grad_() for _ in range(2))
    losses = []
    for i, j, x in zip(*pairs, strict=True):
        f = (x / 100) ** 0.75 if x < 100 else 1.0
        losses.append(f * ((w[i, :4] * c[j, :4]).sum() + w[i, 4] + c[j, 4] - math.log(x)) ** 2 / 2)
    steps = [torch.autograd.grad(loss, (w, c), retain_graph=True) for loss in losses]
    summed, squared = (
        [sum((how(s[side]) for s in steps), torch.zeros(3, 5)) for side in (0, 1)]
        for how in (lambda g: g, torch.square)
    )
    expected = sum(
        (t.detach() - 0.05 * g / (1 + s).sqrt() for t, g, s in zip((w, c), summed, squared, strict=True)),
        torch.zeros(3, 5),
    )
    heard: list[float] = []
    made = train_glove(pairs, 3, 4, epochs=1, seed=0, on_epoch=lambda epoch, mean: heard.append(mean))
    assert torch.allclose(made, expected[:, :4], atol=1e-6)
    assert heard == [pytest.approx(float(sum(losses).detach()) / 5, rel=1e-5)]  # type: ignore[union-attr]


def test_glove_finds_what_was_put_in() -> None:
    """Counts made of vectors are explained by vectors that explain them."""
    truth = np.random.default_rng(0).normal(size=(30, 4))
    counts = np.exp(truth @ truth.T / 2 + 3)
    at = np.indices((30, 30)).reshape(2, -1)
    heard: list[float] = []
    train_glove(
        (at[0], at[1], counts.ravel()),
        30,
        8,
        epochs=150,
        learning_rate=0.1,
        batch_size=100,
        on_epoch=lambda epoch, mean: heard.append(mean),
    )
    assert heard[-1] < heard[0] / 50, (heard[0], heard[-1])


@pytest.fixture(scope="module")
def vectors() -> Any:
    """Vectors that gensim scores too: words of the tests with random vectors that mean a little."""
    from gensim.models import KeyedVectors

    words = sorted(
        {w for name in ("wordsim353", "simlex999") for a, b, _ in read_asset(name).rows for w in (a, b)}
        | {w for rows in read_asset("word-analogies").sections.values() for row in rows[:200] for w in row}
    )
    draw = np.random.default_rng(0)
    made = KeyedVectors(12)
    made.add_vectors(
        words,
        np.stack(
            [
                np.frombuffer((w * 12)[:12].encode()[:12].ljust(12), np.uint8) - 105.0 + draw.normal(size=12)
                for w in words
            ]
        ).astype(np.float32),
    )
    return made


def read_asset(name: str) -> Any:
    return read_word_test(assets.fetch(name))


def test_the_scores_of_gensim(vectors: Any) -> None:
    for name in ("wordsim353", "simlex999"):
        file = next(p for p in assets.fetch(name).iterdir() if not p.name.startswith("."))
        theirs = vectors.evaluate_word_pairs(str(file))[1].statistic
        found = score_similarity(read_asset(name), lambda word: vectors[word])
        assert found.score == pytest.approx(theirs, abs=1e-6)
        assert found.answered == found.questions == {"wordsim353": 353, "simlex999": 999}[name]
        assert found.low < found.score < found.high
    test = read_asset("word-analogies")
    assert sum(map(len, test.sections.values())) == 19_544
    some = Analogies({name: rows[:200] for name, rows in test.sections.items()})
    found_all = score_analogies(some, vectors.key_to_index, vectors.vectors)
    file = next(p for p in assets.fetch("word-analogies").iterdir() if not p.name.startswith("."))
    for section in vectors.evaluate_word_analogies(str(file), restrict_vocab=10**6)[1]:
        if section["section"] in some.sections:
            right = {tuple(w.lower() for w in row) for row in section["correct"]}
            expected = sum(row in right for row in some.sections[section["section"]])
            assert round(found_all[section["section"]].score * found_all[section["section"]].answered) == expected
    assert found_all["all"].score > 0


def test_vectors_that_are_all_alike_are_told() -> None:
    draw = np.random.default_rng(0)
    apart = draw.normal(size=(200, 30))
    assert abs(mean_random_cosine(apart)) < 0.05
    unit = apart / np.linalg.norm(apart, axis=1, keepdims=True)
    assert mean_random_cosine(apart) == pytest.approx(float(((unit @ unit.T).sum() - 200) / (200 * 199)))
    assert mean_random_cosine(apart + 10) > 0.95


def test_words_without_vectors_are_not_answered() -> None:
    test = WordPairs([("a", "b", 1.0), ("a", "c", 2.0), ("b", "c", 3.0), ("a", "z", 9.0)])
    table = {"a": np.array([1.0, 0]), "b": np.array([1.0, 0.1]), "c": np.array([0, 1.0])}
    found = score_similarity(test, table.get)
    assert (found.answered, found.questions) == (3, 4)
    assert math.isnan(found.score)
    assert score_analogies(Analogies({"x": [("a", "b", "c", "z")]}), {"a": 0}, np.ones((1, 2)))["all"].answered == 0


TEXT = (
    "the king sits in his castle\nthe queen sits in her castle\nthe man walks in his garden\nthe woman walks in her"
    " garden\na dog barks\na cat meows\n"
)


@pytest.mark.parametrize("method", ["skip-gram", "cbow", "fasttext", "glove"])
def test_the_stage(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    (tmp_path / "t.txt").write_text(TEXT * 200)
    assert main(["data", "read", str(tmp_path / "t.txt"), "--out", str(tmp_path / "read"), "--quiet"]) == 0
    (tmp_path / "pairs.tsv").write_text(
        "king\tqueen\t9\nking\tdog\t1\ncat\tdog\t8\ncat\tgarden\t1\nwalks\tsits\t7\nKingly\tking\t6\n"
    )
    (tmp_path / "why.txt").write_text(": people\nman king woman queen\nking his queen her\n")
    words = ["--set", "vector_size=16", "--set", "sample=0", "--set", f"method={method}", "--set", "window=3"]
    command = [
        "model",
        "embedding",
        str(tmp_path / "read"),
        "--tests",
        f"alike={tmp_path / 'pairs.tsv'}",
        "--tests",
        f"why={tmp_path / 'why.txt'}",
        *words,
        "--quiet",
    ]
    made = []
    for name in ("one", "two"):
        assert (
            main(
                [
                    *command,
                    "--out",
                    str(tmp_path / name),
                    *([] if name == "one" else ["--workspace", str(tmp_path / "other")]),
                ]
            )
            == 0
        )
        made.append((tmp_path / name / "model.safetensors").read_bytes())
    assert made[0] == made[1]
    out = tmp_path / "one"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["metrics"]["alike_answered"] == (
        6 if method == "fasttext" else 5
    )  # parts tell of words that were never seen
    assert manifest["metrics"]["why_answered"] == 2
    embedder = load_embedder(out)
    king, queen, dog, nothing = embedder.encode(["The KING", "the queen", "a dog, barks!", "zzz"])
    assert king @ queen > king @ dog
    assert not nothing.any()
    from gensim.models import KeyedVectors
    from gensim.models.fasttext import load_facebook_vectors

    theirs = (
        load_facebook_vectors(str(out / "fasttext.bin"))
        if method == "fasttext"
        else KeyedVectors.load_word2vec_format(str(out / "vectors.bin"), binary=True)
    )
    ours = embedder.encode(["king"])[0]
    assert ours @ theirs["king"] / np.linalg.norm(theirs["king"]) == pytest.approx(1, abs=1e-5)
    assert load(out).metrics["words"] == 17
    capsys.readouterr()
    assert main(["model", "show", str(out), "--out", str(tmp_path / "o"), "--quiet"]) == 2
    assert "holds word vectors" in capsys.readouterr().err


def test_words_of_every_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted as a word, the saved tokenizer finds again: combining marks, ligatures, dotted capitals,
    digits.
    """
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    text = "हिन्दी भाषा สวัสดี cafe\u0301 İstanbul x² don't naïve 42 straße ΣΊΣΥΦΟΣ"
    (tmp_path / "t.txt").write_text((text + "\n") * 40)
    assert main(["data", "read", str(tmp_path / "t.txt"), "--out", str(tmp_path / "read"), "--quiet"]) == 0
    assert (
        main(
            [
                "model",
                "embedding",
                str(tmp_path / "read"),
                "--set",
                "vector_size=8",
                "--out",
                str(tmp_path / "v"),
                "--quiet",
            ]
        )
        == 0
    )
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tmp_path / "v" / "tokenizer.json"))
    found = tokenizer.encode(text).tokens
    assert {"हिन्दी", "भाषा", "สวัสดี", "cafe\u0301", "x", "²", "don't", "naïve", "42", "straße"} <= set(found)
    assert "<unk>" not in found


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLMWORKS_WORKSPACE", str(tmp_path / "ws"))
    (tmp_path / "t.txt").write_text("too few words here")
    assert main(["data", "read", str(tmp_path / "t.txt"), "--out", str(tmp_path / "read"), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["model", "embedding", str(tmp_path / "read"), "--out", str(tmp_path / "o"), "--quiet"]) == 2
    assert "only 0 words occur 5 times or more" in capsys.readouterr().err
    (tmp_path / "t.txt").write_text("king queen man " * 100)
    assert main(["data", "read", str(tmp_path / "t.txt"), "--out", str(tmp_path / "more"), "--quiet"]) == 0
    (tmp_path / "p.tsv").write_text("king\tqueen\t1\nking\tman\t1\nman\tqueen\t1\nman\tman\t1\n")
    capsys.readouterr()
    for words, says in (
        (["--set", "char_ngrams=[6,3]"], "char_ngrams is [6, 3]"),
        (["--set", "char_ngrams=[-1,3]"], "char_ngrams is [-1, 3]"),
        (["--tests", f"words={tmp_path / 'p.tsv'}"], "cannot be named 'words'"),
        (["--set", "min_count=1000"], "only 0 words"),
        (["--set", "vector_size=8", "--set", "method=glove", "--set", "learning_rate=1e30"], "only 3 words"),
    ):
        assert (
            main(["model", "embedding", str(tmp_path / "more"), *words, "--out", str(tmp_path / "o"), "--quiet"]) == 2
        )
        told = capsys.readouterr().err.strip()
        assert says in told
        assert len(told.splitlines()) == 1
    for text, says in (
        (b"a b\n", "line 1 is neither"),
        (b"", "holds no word similarity"),
        (b"a\tb\t1\na b c d\n", "line 2 is neither"),
        (b"a\tb\tnan\n", "line 1 is neither"),
        (b"\xff\xfe", "not UTF-8"),
    ):
        (tmp_path / "x.txt").write_bytes(text)
        with pytest.raises(DataError, match=says):
            read_word_test(tmp_path / "x.txt")
