"""A decoder that scores texts: a linear layer turns the last state of a text, or of each of its steps, into one number.

Written and read as transformers' models for classification.

What it is trained for is not known here: `whole` texts (`...ForSequenceClassification`), or `steps`
(`...ForTokenClassification`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from llmworks.core.errors import ModelError
from llmworks.model.io.decoder_files import from_standard, to_standard
from llmworks.model.io.families import shape_of
from llmworks.model.io.weights import check_weights
from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
from llmworks.tokenize.load import read_json

Kind = Literal["whole", "steps"]
ENDINGS: Mapping[Kind, str] = {"whole": "ForSequenceClassification", "steps": "ForTokenClassification"}


def new_head(width: int, kind: Kind) -> nn.Linear:
    """An untrained head: small, so that all texts score alike. Seed torch before."""
    head = nn.Linear(width, 1, bias=kind == "steps")
    nn.init.normal_(head.weight, std=(width + 1) ** -0.5 / 10)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return head


def head_of(path: Path) -> Kind | None:
    """What a model directory scores; None for one that writes texts, or is none."""
    file = path / "config.json"
    names = read_json(file).get("architectures") or [] if file.exists() else []
    return next((kind for kind, ending in ENDINGS.items() if any(str(name).endswith(ending) for name in names)), None)


def save_scorer(network: DecoderForCausalLM, head: nn.Linear, source: Path, out: Path, kind: Kind, *, pad: int) -> None:
    """Write a decoder with a head in the architecture of its source, fp32.

    ModelError for one that transformers does not know.
    """
    from safetensors.torch import save_file

    config = read_json(source / "config.json")
    standard, _ = shape_of(config)
    if not standard:
        raise ModelError(
            f"{source}: a model of a shape of its own cannot be saved with a head; take one of a known architecture"
        )
    state = {
        name: tensor
        for name, tensor in network.state_dict().items()
        if name != "head.weight" and not name.startswith("score.")
    }
    tensors = {name: tensor.detach().float().contiguous() for name, tensor in to_standard(state, standard).items()}
    tensors |= {f"score.{name}": value.detach().float().contiguous() for name, value in head.named_parameters()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    base = next(
        (
            str(name).removesuffix("ForCausalLM")
            for name in config.get("architectures") or ()
            if str(name).endswith("ForCausalLM")
        ),
        "",
    )
    if not base:
        raise ModelError(f"{source}: config.json names no causal model in `architectures`")
    made = {
        **config,
        "architectures": [base + ENDINGS[kind]],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "pad_token_id": pad,
        "dtype": "float32",
        "classifier_dropout": 0.0,
    }
    (out / "config.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")


class Scorer:
    """A decoder with its head, from a directory. Errors: ModelError for one that has none."""

    def __init__(self, path: Path) -> None:
        from safetensors.torch import load_file

        kind = head_of(path)
        if kind is None:
            raise ModelError(
                f"{path}: is no reward model (config.json names no"
                f" {' or '.join('...' + ending for ending in ENDINGS.values())}); train one with align.reward"
            )
        check_weights(path)
        self.kind: Kind = kind
        standard, shape = shape_of(read_json(path / "config.json"))
        tensors = {
            name: tensor.float()
            for file in sorted(path.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        heads = {
            name.removeprefix("score."): tensors.pop(name) for name in sorted(tensors) if name.startswith("score.")
        }
        if "weight" not in heads or heads["weight"].shape != (1, shape.hidden_size):
            raise ModelError(
                f"{path}: its head scores {len(heads['weight']) if 'weight' in heads else 'nothing'}; one number is"
                " wanted (num_labels 1)"
            )
        tensors = from_standard(tensors, standard) if standard else tensors
        tensors["head.weight"] = tensors["decoder.embedding.weight"]
        self.network = DecoderForCausalLM(
            DecoderConfig(shape=shape.model_copy(update={"tie_word_embeddings": True}).model_dump())
        )
        wanted = set(self.network.state_dict())
        if set(tensors) != wanted:
            raise ModelError(
                f"{path}: {sorted(set(tensors) ^ wanted)[0]} is missing, or is too much; the weights and config.json do"
                " not belong together"
            )
        self.network.load_state_dict(tensors)
        self.network.train(False)
        self.head = nn.Linear(shape.hidden_size, 1, bias="bias" in heads)
        self.head.load_state_dict(heads)
        self.context = shape.max_position_embeddings

    def scores(self, ids: Tensor, positions: Tensor, segments: Tensor, at: Tensor) -> Tensor:
        """The number at places [n] of texts in one row [1, length] that do not see one another."""
        with torch.no_grad():
            states: Any = self.network.decoder(self.network.get_input_embeddings()(ids), positions, segments=segments)
            scored: Tensor = self.head(states[0, at])[:, 0]
        return scored
