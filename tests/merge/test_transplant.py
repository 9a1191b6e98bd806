"""Another tokenizer for a model: what both have stays as it was, new rows are the mean of their pieces, and the cost is
told.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llmworks.cli import main
from llmworks.core.artifact import Model
from llmworks.core.context import Context
from llmworks.core.errors import LlmworksError
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.merge.transplant import transplant
from llmworks.merge.vocabulary.config import TransplantConfig
from llmworks.merge.vocabulary.transplant import token_bytes
from llmworks.model.io.load import load_model
from llmworks.runtime.session import load
from llmworks.tokenize.load import load_tokenizer, read_json
from tests.conftest import make_pico
from tests.oracles.merge_models import save, tokenizer

EMBEDDING = "model.embed_tokens.weight"


def moved(model: Path, donor: Path, out: Path, data: Path | None = None, **given: Any) -> Model:
    for folder in (out, out.parent / f"{out.name}-scratch"):
        folder.mkdir(parents=True)
    found: Any = [load(str(path)) for path in (model, donor)]
    rows: Any = load(str(data)) if data else None
    return transplant(
        TransplantConfig.model_validate(given),
        *found,
        Context(out, out.parent / f"{out.name}-scratch", 0, Progress(quiet=True), ReportBuilder(), lambda _: None),
        rows,
    )  # type: ignore[arg-type, return-value]


def donor(path: Path, change: Any) -> Path:
    path.mkdir()
    source = make_pico(path.parent / f"{path.name}-source")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (source / name).exists():
            (path / name).write_bytes((source / name).read_bytes())
    definition = read_json(path / "tokenizer.json")
    change(definition)
    (path / "tokenizer.json").write_text(json.dumps(definition))
    return path


def test_its_own_tokenizer_changes_nothing(pico: Path, tmp_path: Path) -> None:
    made = moved(pico, pico, tmp_path / "out")
    before, after = load_file(pico / "model.safetensors"), load_file(made.path / "model.safetensors")
    count = len(load_tokenizer(pico))
    assert all(
        torch.equal(after[name], one if name not in (EMBEDDING, "lm_head.weight") else one[:count])
        for name, one in before.items()
    )
    assert (made.metrics["same"], made.metrics["by_pieces"], made.metrics["lost"]) == (count, 0, 0)


def test_the_same_tokens_under_other_ids(pico: Path, tmp_path: Path) -> None:
    """The model says the same of the same text."""

    def turn(definition: dict[str, Any]) -> None:
        vocab = definition["model"]["vocab"]
        plain = [token for token, at in vocab.items() if at not in {one["id"] for one in definition["added_tokens"]}]
        for token, at in zip(plain, sorted((vocab[token] for token in plain), reverse=True), strict=True):
            vocab[token] = at

    other = donor(tmp_path / "other", turn)
    made = moved(pico, other, tmp_path / "out")
    text = "What is the capital of France? 12345"
    old, new = load_tokenizer(pico), load_tokenizer(made.path)
    ids = [one(text, return_tensors="pt")["input_ids"] for one in (old, new)]
    assert ids[0].tolist() != ids[1].tolist()
    with torch.no_grad():
        said = [load_model(path)(input_ids=one).logits[0] for path, one in zip((pico, made.path), ids, strict=True)]
    place = {old.get_vocab()[token]: at for token, at in new.get_vocab().items()}
    order = [place[at] for at in range(len(old))]
    assert torch.allclose(said[1][:, order], said[0][:, : len(old)], atol=1e-5)


def test_new_tokens_are_the_mean_of_their_pieces(tmp_path: Path) -> None:
    """Of 258 shared tokens of bytes, and some that are joined otherwise; an end token by another name."""
    model = save(tmp_path / "model", "base", joined=("t h", "i n", "a n"), special=("<x>",))
    other = tmp_path / "other"
    other.mkdir()
    tokenizer(other, ("t h", "th e", "e r"), ("<end>",))
    (other / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<end>"})
    )
    data = tmp_path / "texts.jsonl"
    data.write_text(
        "".join(
            json.dumps({"text": text}) + "\n" for text in ("the thing in the inn", "another the er", "nothing there")
        )
    )
    made = moved(model, other, tmp_path / "out", data)
    before, after = (load_file(path / "model.safetensors") for path in (model, made.path))
    old, new = load_tokenizer(model).get_vocab(), load_tokenizer(made.path).get_vocab()
    for name in (EMBEDDING, "lm_head.weight"):
        assert torch.equal(after[name][new["th"]], before[name][old["th"]])
        assert torch.allclose(after[name][new["the"]], (before[name][old["th"]] + before[name][old["e"]]) / 2)
        assert torch.allclose(after[name][new["er"]], (before[name][old["e"]] + before[name][old["r"]]) / 2)
        assert torch.equal(after[name][new["<end>"]], before[name][old["</s>"]])
    assert made.metrics["by_role"] == 1
    assert read_json(made.path / "config.json")["eos_token_id"] == new["<end>"]
    assert read_json(made.path / "config.json")["vocab_size"] == len(new)
    assert made.golden is not None
    assert made.golden.stop_ids == [new["<end>"]]
    assert made.metrics["bits_per_byte"] > 0
    assert made.metrics["bits_per_byte_before"] > 0
    zero = moved(model, other, tmp_path / "zero", approximation_method="zero")
    assert not load_file(zero.path / "model.safetensors")[EMBEDDING][new["the"]].any()


def test_tokens_as_bytes(pico: Path) -> None:
    """Joined in the order of a text's tokens they are the text."""
    found, tokenizer_ = token_bytes(load_tokenizer(pico), read_json(pico / "tokenizer.json")), load_tokenizer(pico)
    text = "Zwölf Boxkämpfer — 谢谢 🙂 3.14"
    assert b"".join(found[at] for at in tokenizer_(text, add_special_tokens=False)["input_ids"]).decode() == text


def test_marks_of_other_vocabularies_are_no_text(pico: Path) -> None:
    """WordPiece's of what goes on in a word, and BPE's of its end."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE, WordPiece
    from transformers import PreTrainedTokenizerFast

    vocab = {"[UNK]": 0, "city": 1, "##ying": 2, "##": 3, "city</w>": 4}
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordPiece(vocab, unk_token="[UNK]")))
    assert token_bytes(words, {"model": {"continuing_subword_prefix": "##"}}) == {
        0: b"[UNK]",
        1: b"city",
        2: b"ying",
        3: b"##",
        4: b"city</w>",
    }
    pairs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(vocab, [], end_of_word_suffix="</w>")))
    assert token_bytes(pairs, {"model": {"end_of_word_suffix": "</w>"}})[4] == b"city"


def test_pieces_beyond_the_embedding_are_none(pico: Path, tmp_path: Path) -> None:
    """A token that the model's tokenizer has and its embedding has no row for: the new token's row is that of its other
    pieces, or of none.
    """
    old = donor(
        tmp_path / "old",
        lambda definition: definition["added_tokens"].append(
            {
                "id": 400,
                "content": "brown",
                "special": False,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
        ),
    )
    model = tmp_path / "model"
    shutil.copytree(pico, model)
    shutil.copyfile(old / "tokenizer.json", model / "tokenizer.json")
    new = donor(tmp_path / "new", lambda definition: definition["model"]["vocab"].update({"brownQ": 400}))
    rows = len(load_file(pico / "model.safetensors")[EMBEDDING])
    known = load_tokenizer(model)
    assert max(known("brownQ", add_special_tokens=False)["input_ids"]) >= rows
    made = load_file(moved(model, new, tmp_path / "out").path / "model.safetensors")[EMBEDDING]
    before = load_file(pico / "model.safetensors")[EMBEDDING]
    assert torch.equal(made[load_tokenizer(new).get_vocab()["brownQ"]], before[known.get_vocab()["Q"]])


def test_bad_input_is_one_line(pico: Path, pico_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LlmworksError, match="is a gguf file"):
        moved(pico_gguf, pico, tmp_path / "out")
    bare = save(tmp_path / "bare", "a")
    for words in ([str(pico), str(bare)], [str(bare), str(pico)]):
        assert (
            main(["merge", "transplant", *words, "--out", str(tmp_path / "x"), "--workspace", str(tmp_path / "ws")])
            == 2
        )
        told = capsys.readouterr().err
        assert "has no tokenizer" in told
        assert len(told.strip().splitlines()) == 1
