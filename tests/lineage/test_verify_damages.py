"""Planted damages of models of three architectures: which command finds each.

    python -m tests.lineage.test_verify_damages        print the table of docs/promises.md

Each damage of files is planted twice: in a published model, and in a copy of its files without `manifest.json`, as a
download, an export or another program leaves it. The copy has no digest that could be compared, only golden tokens.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmworks import LlmworksError, Session
from llmworks.cli import main
from tests.conftest import make_pico

Tensors = dict[str, torch.Tensor]
Json = dict[str, Any]
PAGE = Path(__file__).parents[2] / "docs" / "promises.md"
WEIGHTS = "model.safetensors"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 2048, "tie_word_embeddings": False}
GPT2 = {
    "norm": "layer",
    "bias": "all",
    "position_embedding_type": "learned",
    "gated_mlp": False,
    "hidden_act": "gelu_pytorch_tanh",
}
SHAPES: dict[str, tuple[str, Json]] = {
    "Llama": ("model.new", SIZES),
    "GPT-2": ("model.new", SIZES | GPT2),
    "LSTM": ("model.recurrent", SIZES | {"embedding_dim": 32, "rnn_type": "lstm"}),
}
TASK = {
    "name": "letters",
    "kind": "choice",
    "question": "{{question}}",
    "choices": "{{choices}}",
    "answer": "{{answer}}",
    "metrics": ["acc"],
}


def of_tensors(change: Callable[[Tensors], Tensors | None]) -> Callable[[Path], None]:
    """Plant a change of the weights; a change that returns None works in place."""

    def plant(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        made = change(tensors) or tensors
        save_file({k: v.contiguous() for k, v in made.items()}, model / WEIGHTS, metadata={"format": "pt"})

    return plant


def of_json(file: str, change: Callable[[Json], None]) -> Callable[[Path], None]:
    def plant(model: Path) -> None:
        content = json.loads((model / file).read_text("utf-8"))
        before = json.dumps(content)
        change(content)
        assert json.dumps(content) != before
        (model / file).write_text(json.dumps(content), encoding="utf-8")

    return plant


def get_head(tensors: Tensors) -> torch.Tensor:
    return next(t for name, t in tensors.items() if name.endswith("head.weight"))


def get_matrix(tensors: Tensors) -> torch.Tensor:
    """A matrix inside of a layer."""
    words = ("o_proj.weight", "attn.c_proj.weight", "weight_ih_l1")
    return next(t for name, t in tensors.items() if name.endswith(words))


def flip_lowest_bit(model: Path) -> None:
    data = bytearray((model / WEIGHTS).read_bytes())
    data[-4] ^= 1
    (model / WEIGHTS).write_bytes(data)


def flip_exponent_bit(tensors: Tensors) -> None:
    get_matrix(tensors).view(torch.int32)[3, 3] ^= 1 << 30


def write_nan(tensors: Tensors) -> None:
    get_head(tensors)[1777, 0] = float("nan")


def write_infinity(tensors: Tensors) -> None:
    min(tensors.values(), key=torch.Tensor.numel).view(-1)[0] = float("inf")


def zero_matrix(tensors: Tensors) -> None:
    get_matrix(tensors).zero_()


def transpose_matrix(tensors: Tensors) -> None:
    matrix = get_matrix(tensors)
    matrix.copy_(matrix.T.contiguous().view(matrix.shape))


def swap_layers(tensors: Tensors) -> Tensors:
    pairs = {".0.": ".1.", ".1.": ".0.", "_l0": "_l1", "_l1": "_l0"}
    return {
        next((name.replace(a, b) for a, b in pairs.items() if a in name), name): tensor
        for name, tensor in tensors.items()
    }


def scale_rare_rows(tensors: Tensors) -> None:
    get_head(tensors)[400:] *= 30


def reverse_rows(tensors: Tensors) -> None:
    """The output layer has the rows of the used ids in another order."""
    head = get_head(tensors)
    head[3:384] = head[3:384].flip(0)


def round_weights(tensors: Tensors) -> None:
    for tensor in tensors.values():
        step = tensor.abs().max() / 3
        tensor.copy_((tensor / step).round() * step)


def add_noise(tensors: Tensors) -> None:
    torch.manual_seed(0)
    for tensor in tensors.values():
        tensor += torch.randn_like(tensor) * tensor.std()


def take_initial_weights(model: Path) -> None:
    shutil.copyfile(model.parents[1] / "initial.safetensors", model / WEIGHTS)


def link_initial_weights(model: Path) -> None:
    (model / WEIGHTS).unlink()
    (model / WEIGHTS).symlink_to(model.parents[1] / "initial.safetensors")


def truncate(model: Path) -> None:
    data = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(data[: len(data) * 2 // 3])


def remove_tensor(tensors: Tensors) -> Tensors:
    matrix = get_matrix(tensors)
    return {name: tensor for name, tensor in tensors.items() if tensor is not matrix}


def add_index(model: Path) -> None:
    """An index of other shards, left behind by a program, beside the file of weights."""
    save_file({k: 2 * v for k, v in load_file(model / WEIGHTS).items()}, model / "model-1-of-1.safetensors")
    names = dict.fromkeys(load_file(model / WEIGHTS), "model-1-of-1.safetensors")
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def drop_layer(config: Json) -> None:
    for fields in (config, config.get("shape", {})):
        for name in ("num_hidden_layers", "n_layer"):
            if name in fields:
                fields[name] = 1


def change_computation(config: Json) -> None:
    if "rope_parameters" in config:
        config["rope_parameters"]["rope_theta"] = 3.0
    elif "activation_function" in config:
        config["activation_function"] = "relu"
    else:
        config["shape"]["rnn_type"] = "gru"


def change_end(config: Json) -> None:
    config["eos_token_id"] = 7


def swap_tokens(tokenizer: Json) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["e"], vocabulary["a"] = vocabulary["a"], vocabulary["e"]


def lose_merge(tokenizer: Json) -> None:
    del tokenizer["model"]["merges"][0]


def lower_case(tokenizer: Json) -> None:
    tokenizer["normalizer"] = {"type": "Lowercase"}


def lose_end_of_turn(model: Path) -> None:
    file = model / "chat_template.jinja"
    text = file.read_text()
    assert "'<|im_end|>' + " in text
    file.write_text(text.replace("'<|im_end|>' + ", ""))


def edit_figure(manifest: Json) -> None:
    manifest["metrics"]["loss"] = 0.1


def edit_seed(manifest: Json) -> None:
    manifest["seed"] += 1


def edit_golden(manifest: Json) -> None:
    for conversation in manifest["golden"]["conversations"]:
        conversation["top_logits"] = [[x + 2 for x in row] for row in conversation["top_logits"]]


def replace_parent(model: Path) -> None:
    """The model that the training began with has other weights, under the same digest."""
    of_tensors(zero_matrix)((model.parents[1] / "planted" / "initial").resolve())


@dataclass(frozen=True)
class Damage:
    """One damage. `golden`: golden tokens find it, too, in a copy without digests (None: it has no such copy)."""

    plant: Callable[[Path], None]
    golden: bool | None = True


DAMAGES = {
    "the lowest bit of one weight": Damage(flip_lowest_bit, golden=False),
    "the highest exponent bit of one weight": Damage(of_tensors(flip_exponent_bit)),
    "NaN in an embedding row that no text uses": Damage(of_tensors(write_nan)),
    "an infinite value": Damage(of_tensors(write_infinity)),
    "one matrix is zero": Damage(of_tensors(zero_matrix)),
    "one matrix is transposed": Damage(of_tensors(transpose_matrix)),
    "two layers are swapped": Damage(of_tensors(swap_layers)),
    "embedding rows that no text uses are 30 times as large": Damage(of_tensors(scale_rare_rows)),
    "rows of the output layer in another order": Damage(of_tensors(reverse_rows)),
    "all weights rounded to 7 values": Damage(of_tensors(round_weights)),
    "noise on all weights": Damage(of_tensors(add_noise)),
    "the weights before training": Damage(take_initial_weights),
    "the file is a link to other weights": Damage(link_initial_weights),
    "the file of weights is cut": Damage(truncate),
    "a tensor is missing": Damage(of_tensors(remove_tensor)),
    "an index of other shards beside the weights": Damage(add_index),
    "config.json: one layer less": Damage(of_json("config.json", drop_layer)),
    "config.json: RoPE base, activation or cell": Damage(of_json("config.json", change_computation)),
    "generation_config.json: another end token": Damage(of_json("generation_config.json", change_end)),
    "tokenizer.json: two ids swapped": Damage(of_json("tokenizer.json", swap_tokens)),
    "tokenizer.json: a merge lost": Damage(of_json("tokenizer.json", lose_merge)),
    "tokenizer.json: a normalizer more": Damage(of_json("tokenizer.json", lower_case)),
    "chat template: the end of turn lost": Damage(lose_end_of_turn),
    "manifest.json: another figure": Damage(of_json("manifest.json", edit_figure), golden=None),
    "manifest.json: another seed": Damage(of_json("manifest.json", edit_seed), golden=None),
    "manifest.json: other golden tokens": Damage(of_json("manifest.json", edit_golden), golden=None),
    "the parent has other weights": Damage(replace_parent, golden=None),
}


def render_table() -> str:
    """The table of docs/promises.md."""
    lines = ["| damage | `verify` | next step, gate | `verify --golden` of a copy |", "|---|---|---|---|"]
    for what, damage in DAMAGES.items():
        copy = {True: "found", False: "not found: below rounding", None: ""}[damage.golden]
        step = "refused" if damage.plant is not replace_parent else "refused by the recipe"
        lines.append(f"| {what} | found | {step} | {copy} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def test_the_page_has_the_table() -> None:
    assert render_table() in PAGE.read_text("utf-8")


@dataclass(frozen=True)
class Trained:
    """A trained model in a workspace, with a recipe that evaluates it and holds a gate."""

    recipe: Path
    workspace: Path

    @property
    def model(self) -> Path:
        return (self.workspace / "planted" / "trained").resolve()

    @contextlib.contextmanager
    def plant(self, damage: Damage) -> Iterator[None]:
        """Damage the model in its place, and restore it afterwards."""
        saved = self.workspace.parent / "saved"
        shutil.copytree(self.workspace / "store", saved, symlinks=True)
        try:
            damage.plant(self.model)
            yield
        finally:
            shutil.rmtree(self.workspace / "store")
            saved.rename(self.workspace / "store")


RECIPE = """
name: planted
steps:
  pico: {use: "path:FOLDER/pico"}
  text: {use: "path:FOLDER/text.txt"}
  questions: {use: "path:FOLDER/rows.jsonl"}
  read: {stage: data.read, inputs: {data: text}}
  packed: {stage: data.pack, inputs: {model: pico, data: read}, config: {max_length: 64}}
  initial: {stage: STAGE, inputs: {tokenizer: pico}, config: CONFIG}
  trained: {stage: train.pretrain, inputs: {model: initial, data: packed}, config: TRAINING}
  score: {stage: evaluate, inputs: {model: trained, data: questions}, config: {task: FOLDER/task.yaml}}
  good: {gate: score, metric: score, at_least: 0}
"""
EPOCHS = {"Llama": 6, "GPT-2": 6, "LSTM": 24}
TRAINING = {
    "batch_size": 8,
    "optimizer": {"learning_rate": 0.01},
    "num_general_prompts": 0,
    "sample_max_tokens": 0,
}


@pytest.fixture(scope="module", params=SHAPES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A trained model of each architecture."""
    folder = tmp_path_factory.mktemp("planted")
    make_pico(folder / "pico")
    (folder / "text.txt").write_text((Path(__file__).parents[2] / "LICENSE").read_text())
    rows = [{"question": f"q{i}", "choices": ["a", "b"], "answer": i % 2} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(json.dumps(TASK))
    stage, config = SHAPES[request.param]
    text = RECIPE.replace("FOLDER", str(folder)).replace("STAGE", stage)
    (folder / "recipe.yaml").write_text(
        text.replace("CONFIG", json.dumps(config)).replace(
            "TRAINING", json.dumps(TRAINING | {"num_train_epochs": EPOCHS[request.param]})
        )
    )
    assert main(["run", str(folder / "recipe.yaml"), "--workspace", str(folder / "ws"), "--quiet"]) == 0
    initial = (folder / "ws" / "planted" / "initial").resolve() / WEIGHTS
    for where in (folder, folder / "ws"):  # two levels above copies, and above the model itself
        shutil.copyfile(initial, where / "initial.safetensors")
    return Trained(folder / "recipe.yaml", folder / "ws")


def test_undamaged_models_pass(trained: Trained, tmp_path: Path) -> None:
    """In place, as a copy, and as a copy without a manifest."""
    workspace = ["--workspace", str(trained.workspace)]
    assert main(["verify", "planted/trained", *workspace]) == 0
    assert main(["verify", "--golden", "planted/trained", *workspace]) == 0
    copy = shutil.copytree(trained.model, tmp_path / "copy", ignore=shutil.ignore_patterns("manifest.json"))
    assert main(["verify", "--golden", "planted/trained", str(copy), *workspace]) == 0
    assert main(["run", str(trained.recipe), *workspace, "--quiet"]) == 0


def get_cases() -> list[Any]:
    return [pytest.param(what, id=what, marks=[] if i % 9 == 3 else pytest.mark.slow) for i, what in enumerate(DAMAGES)]


@pytest.mark.parametrize("what", get_cases())
def test_damage_is_found(what: str, trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    workspace = ["--workspace", str(trained.workspace)]
    damage = DAMAGES[what]
    with trained.plant(damage):
        assert main(["verify", "planted/trained", *workspace]) == 1
        if damage.plant is not replace_parent:
            assert "DAMAGED" in capsys.readouterr().out
        session = Session(str(trained.workspace), quiet=True)
        model, data = session.load("planted/trained"), session.load("planted/read")
        if damage.plant is not replace_parent:  # a step reads its inputs, a recipe all that they were made from
            with pytest.raises(LlmworksError, match=r"changed|was added"):
                session.make("data.pack", model=model, data=data)
        assert main(["run", str(trained.recipe), *workspace, "--quiet"]) != 0  # steps are not up to date, no gate holds
        assert re.search(r"changed|was added", capsys.readouterr().err)
    if damage.golden is None:
        return
    copy = trained.workspace.parent / "copies" / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(trained.model, copy, ignore=shutil.ignore_patterns("manifest.json"))
    damage.plant(copy)
    code = main(["verify", "--golden", "planted/trained", str(copy), *workspace])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert code == (0 if not damage.golden else 1 if "✗" in out else 2), (what, out, err)


if __name__ == "__main__":
    print(render_table(), end="")
