"""Merging refuses what is not the same function: another base, changed weights, a changed template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llmworks.core.artifact import Adapter, Model, hash_files
from llmworks.core.errors import ArtifactError, GoldenMismatch
from llmworks.core.workspace import Workspace
from llmworks.runtime.read_recipe import load_recipe
from llmworks.runtime.runner import RecipeRun
from llmworks.runtime.session import Session, load
from tests.conftest import make_pico, write_chats, write_recipe


@pytest.fixture(scope="module")
def tuned(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Adapter, Model]:
    """A trained adapter and its model."""
    folder = tmp_path_factory.mktemp("tuned")
    recipe = write_recipe(folder, pico, write_chats(folder), num_train_epochs=1, chat_template="tools")
    text = recipe.read_text()
    recipe.write_text(text[: text.index("  merged:")])
    job = RecipeRun(load_recipe(recipe), Workspace(folder / "w"), quiet=True)
    job.run()
    adapter, model = job.artifacts["tuned"], job.artifacts["base"]
    assert isinstance(adapter, Adapter)
    assert isinstance(model, Model)
    return adapter, model


def merge(adapter: Adapter, model: Model, workspace: Workspace) -> Model:
    return Session(workspace, quiet=True).make("merge.adapter", kind=Model, adapter=adapter, model=model)


def test_merged_model_carries_the_adapters_template_and_golden_tokens(
    tuned: tuple[Adapter, Model], tmp_path: Path
) -> None:
    adapter, model = tuned
    merged = merge(adapter, model, Workspace(tmp_path / "w"))
    assert merged.golden == adapter.golden
    assert merged.golden is not None
    assert any(c.tools for c in merged.golden.conversations)  # the tool-aware template is part of what replays
    assert (merged.path / "tokenizer.json").read_bytes() == (adapter.path / "tokenizer.json").read_bytes()
    assert merged.metrics["golden_gap_mean"] < 1e-3


def changed(adapter: Adapter, to: Path, change: Callable[[Path], None]) -> Adapter:
    """A copy of the adapter whose files and their digests, but not whose golden tokens, were changed."""
    shutil.copytree(adapter.path, to)
    change(to)
    assert adapter.manifest is not None
    return Adapter(to, manifest=adapter.manifest.model_copy(update={"files": hash_files(to)}), name="changed")


def scale_up(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * 20}))


def other_weights(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: v + 0.1 for k, v in tensors.items()}, folder / "adapter_model.safetensors")


def other_template(folder: Path) -> None:
    for file in folder.glob("*"):
        if file.name in ("chat_template.jinja", "tokenizer_config.json") and "<|im_end|>" in file.read_text():
            file.write_text(file.read_text().replace("+ '<|im_end|>' +", "+"))


@pytest.mark.parametrize("change", [scale_up, other_weights, other_template])
def test_silent_damage_publishes_nothing(
    tuned: tuple[Adapter, Model], tmp_path: Path, change: Callable[[Path], None]
) -> None:
    adapter, model = tuned
    workspace = Workspace(tmp_path / "w")
    with pytest.raises(GoldenMismatch, match=r"merge\.adapter: golden .*nothing was published"):
        merge(changed(adapter, tmp_path / "changed", change), model, workspace)
    assert not workspace.artifacts()


def test_adapter_of_another_model_is_refused(tuned: tuple[Adapter, Model], tmp_path: Path) -> None:
    adapter, _ = tuned
    other = load(str(make_pico(tmp_path / "other", seed=5)))
    assert isinstance(other, Model)
    with pytest.raises(ArtifactError, match="was trained on the model"):
        merge(adapter, other, Workspace(tmp_path / "w"))
