"""mergekit's weights from mergekit's configurations: bit for bit.

What mergekit made stands in tests/fixtures/merges.json.gz, by tests/oracles/merges.py.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmworks.core.artifact import Artifact, Model
from llmworks.core.context import Context
from llmworks.core.progress import Progress
from llmworks.core.report import ReportBuilder
from llmworks.merge.merge import merge
from llmworks.merge.plan.config import MergeConfig
from llmworks.runtime.session import load
from tests.oracles.merges import CASES, TOKENS, models

SAID: dict[str, Any] = json.loads(
    gzip.decompress((Path(__file__).parents[1] / "fixtures" / "merges.json.gz").read_bytes())
)
MIDDLE = "model.layers.1.mlp.up_proj.weight"
TIED = (
    "ties, bfloat16",
    "breadcrumbs, rescaled",
)  # changes of one size stand at a threshold, of which a sort that is not stable keeps some


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("family")
    models(place)
    return place


def merged(given: dict[str, Any], family: Path, out: Path, *, seed: int = 0, threads: int = 1) -> Model:
    """The stage, called as `execute` calls it."""
    config = MergeConfig.model_validate(given)
    found: dict[str, Artifact] = {name: load(str(family / name)) for name in config.model_names()}
    for folder in (out, out.parent / f"{out.name}-scratch"):
        folder.mkdir(parents=True)
    torch.set_num_threads(threads)
    made: Any = merge(
        config,
        found,
        Context(out, out.parent / f"{out.name}-scratch", seed, Progress(quiet=True), ReportBuilder(), lambda _: None),
    )  # type: ignore[arg-type, return-value]
    assert isinstance(made, Model)
    return made


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("name", TIED)
def test_only_what_is_tied_differs(name: str, family: Path, tmp_path: Path) -> None:
    """Fewer weights of a tensor than changes that are tied in it."""
    made = merged(CASES[name], family, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")[MIDDLE].float().flatten()
    theirs = torch.from_numpy(np.frombuffer(base64.b64decode(SAID["cases"][name][MIDDLE][3]), np.float32).copy())
    assert 0 < int((found != theirs).sum()) < 0.02 * len(theirs)
    assert made.metrics["threshold_ties"] > 0


@pytest.mark.parametrize("name", [name for name in CASES if name not in TIED])
def test_weights_are_those_of_mergekit(name: str, family: Path, tmp_path: Path) -> None:
    merged(CASES[name], family, tmp_path / "out")
    tensors, said = load_file(tmp_path / "out" / "model.safetensors"), dict(SAID["cases"][name])
    assert {key: json.loads((tmp_path / "out" / "config.json").read_text())[key] for key in said["config"]} == said.pop(
        "config"
    )
    assert set(tensors) == set(said)
    wrong = [
        tensor
        for tensor, (dtype, shape, known, *_) in said.items()
        if [str(tensors[tensor].dtype).removeprefix("torch."), list(tensors[tensor].shape), digest(tensors[tensor])]
        != [dtype, shape, known]
    ]
    assert not wrong


@pytest.mark.parametrize("name", TOKENS)
def test_rows_of_tokens_are_those_of_mergekit(name: str, family: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    merged(TOKENS[name], family, tmp_path / "out")
    tensors, ids = (
        load_file(tmp_path / "out" / "model.safetensors"),
        AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab(),
    )
    for tensor, said in SAID["tokens"][name].items():
        assert list(tensors[tensor].shape) == said[""]
        assert {token: digest(tensors[tensor][at].float()) for token, at in ids.items()} == {
            token: known for token, known in said.items() if token
        }
