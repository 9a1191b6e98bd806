"""Stop ids and weight files of GGUF conversion: all stop ids are kept or refused, stray files are never read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmworks.cli import main
from llmworks.generate.engines.llamacpp import get_stop_ids
from llmworks.model.from_gguf import write_hf_directory
from llmworks.model.io.load import load_model
from llmworks.model.io.weights import weight_files
from tests.conftest import make_pico


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pico(tmp_path_factory.mktemp("base") / "pico")


def with_stops(base: Path, out: Path, stops: Any) -> Path:
    shutil.copytree(base, out)
    file = out / "generation_config.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**known, "eos_token_id": stops}))
    return out


def convert(model: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    words = ["quantize", "gguf", str(model), "--set", "type=f16", "--out", str(out), "--quiet"]
    code = main([*words, "--workspace", str(out.parent / "ws")])
    return code, capsys.readouterr().err


def read_stops(folder: Path) -> dict[str, int]:
    reader = gguf.GGUFReader(next(folder.glob("*.gguf")))
    names = {"eos": "eos_token_id", "eot": "eot_token_id", "eom": "eom_token_id"}
    fields = {name: reader.fields.get(f"tokenizer.ggml.{key}") for name, key in names.items()}
    return {name: int(field.parts[-1][0]) for name, field in fields.items() if field is not None}


def test_three_stop_ids_are_kept_and_read_back(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of Llama 3.1 Instruct: end of sequence, of turn and of message."""
    model = with_stops(base, tmp_path / "m", [0, 2, 5])
    assert convert(model, tmp_path / "out", capsys)[0] == 0
    stops = read_stops(tmp_path / "out")
    assert sorted(stops.values()) == [0, 2, 5]
    assert stops["eos"] == 2  # the tokenizer's own
    meta = {f"tokenizer.ggml.{name}_token_id": id for name, id in stops.items()}
    assert get_stop_ids(meta) == [0, 2, 5]
    write_hf_directory(next((tmp_path / "out").glob("*.gguf")), tmp_path / "back")
    back = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert sorted(back["eos_token_id"]) == [0, 2, 5]


def test_the_token_of_messages_is_known_by_its_name(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = with_stops(base, tmp_path / "m", [0, 2, 9])
    text = (model / "tokenizer.json").read_text("utf-8")
    state = json.loads(text)
    (token,) = [piece for piece, id in state["model"]["vocab"].items() if id == 9]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    state["added_tokens"].append({"id": 9, "content": "<|eom_id|>", "special": True, **flags})
    state["model"]["vocab"]["<|eom_id|>"] = state["model"]["vocab"].pop(token)
    merges = [merge if isinstance(merge, list) else merge.split() for merge in state["model"]["merges"]]
    state["model"]["merges"] = [merge for merge in merges if "".join(merge) != token]
    (model / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), "utf-8")
    code, err = convert(model, tmp_path / "out", capsys)
    assert code == 0, err
    assert read_stops(tmp_path / "out") == {"eos": 2, "eot": 0, "eom": 9}


@pytest.mark.parametrize(
    ("stops", "message"),
    [
        ([2, 5000], "the stop id 5000 is beyond the vocabulary of"),
        ([2, -1], "-1 is beyond"),
        ([0, 1, 2, 5, 6], "GGUF stores two"),
    ],
)
def test_other_stop_ids_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stops: list[int], message: str
) -> None:
    code, err = convert(with_stops(base, tmp_path / "m", stops), tmp_path / "out", capsys)
    assert code == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def stray(base: Path, out: Path, what: str) -> Path:
    shutil.copytree(base, out)
    other = {name: tensor + 1 for name, tensor in load_file(base / "model.safetensors").items()}
    if what == "consolidated":
        save_file({f"tok.{name}": tensor for name, tensor in other.items()}, out / "consolidated.safetensors")
    elif what == "an adapter":
        save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, out / "adapter_model.safetensors")
    elif what == "a backup":
        save_file(other, out / "model-old.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("what", ["consolidated", "an adapter", "a backup"])
def test_stray_files_are_not_read(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    model = stray(base, tmp_path / "m", what)
    assert weight_files(model) == [model / "model.safetensors"]
    code, err = convert(model, tmp_path / "out", capsys)
    assert code == 0, err
    assert main(["verify", "--golden", str(base), str(tmp_path / "out")]) == 0
    ids = torch.arange(3, 20)[None]
    assert torch.equal(load_model(model)(input_ids=ids).logits, load_model(base)(input_ids=ids).logits)


def test_an_index_beside_other_weights_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would read the single file, other programs those of the index."""
    model = tmp_path / "m"
    shutil.copytree(base, model)
    tensors = load_file(base / "model.safetensors")
    save_file(
        {name: t + 1 for name, t in tensors.items()}, model / "model-00001-of-00001.safetensors", {"format": "pt"}
    )
    weight_map = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    code, err = convert(model, tmp_path / "out", capsys)
    assert code == 2
    assert "does not name it" in err
    (model / "model.safetensors").unlink()
    assert convert(model, tmp_path / "out", capsys)[0] == 0
