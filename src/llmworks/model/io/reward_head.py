"""Reward models: a decoder with a linear head that scores the last token of a sequence, or of each step of it.

Written and read as transformers' classification models: `whole` sequences (outcome reward model,
`...ForSequenceClassification`), or `steps` (process reward model, `...ForTokenClassification`).
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
from llmworks.model.io.families import parse_shape
from llmworks.model.io.weights import check_weights, weight_files
from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
from llmworks.tokenize.load import read_json

RewardKind = Literal["whole", "steps"]
CLASS_SUFFIXES: Mapping[RewardKind, str] = {"whole": "ForSequenceClassification", "steps": "ForTokenClassification"}


def create_reward_head(width: int, kind: RewardKind) -> nn.Linear:
    """Create an untrained head with small weights, so that initial rewards are near zero. Seed torch before."""
    head = nn.Linear(width, 1, bias=kind == "steps")
    nn.init.normal_(head.weight, std=(width + 1) ** -0.5 / 10)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return head


def get_reward_kind(path: Path) -> RewardKind | None:
    """Return a directory's kind of reward model; None for a causal model, or no model."""
    file = path / "config.json"
    names = read_json(file).get("architectures") or [] if file.exists() else []
    return next(
        (kind for kind, ending in CLASS_SUFFIXES.items() if any(str(name).endswith(ending) for name in names)), None
    )


def save_reward_model(
    network: DecoderForCausalLM, head: nn.Linear, source: Path, out: Path, kind: RewardKind, *, pad: int
) -> None:
    """Write a decoder with a reward head in the architecture of its source, fp32.

    ModelError for an architecture that transformers does not have.
    """
    from safetensors.torch import save_file

    config = read_json(source / "config.json")
    standard, _ = parse_shape(config)
    if not standard:
        raise ModelError(
            f"{source}: a model of a custom architecture cannot be saved with a reward head; use a standard"
            " architecture"
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
        raise ModelError(f"{source}: config.json has no ...ForCausalLM in `architectures`")
    reward_config = {
        **config,
        "architectures": [base + CLASS_SUFFIXES[kind]],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
        "pad_token_id": pad,
        "dtype": "float32",
        "classifier_dropout": 0.0,
    }
    (out / "config.json").write_text(json.dumps(reward_config, indent=2) + "\n", encoding="utf-8")


class RewardModel:
    """A reward model loaded from a directory: decoder and head. Errors: ModelError for one without a reward head."""

    def __init__(self, path: Path) -> None:
        from safetensors.torch import load_file

        kind = get_reward_kind(path)
        if kind is None:
            raise ModelError(
                f"{path}: is not a reward model (config.json has no"
                f" {' or '.join('...' + ending for ending in CLASS_SUFFIXES.values())} architecture); train one with"
                " align.reward"
            )
        check_weights(path)
        self.kind: RewardKind = kind
        standard, shape = parse_shape(read_json(path / "config.json"))
        tensors = {name: tensor.float() for file in weight_files(path) for name, tensor in load_file(file).items()}
        heads = {
            name.removeprefix("score."): tensors.pop(name) for name in sorted(tensors) if name.startswith("score.")
        }
        if "weight" not in heads or heads["weight"].shape != (1, shape.hidden_size):
            raise ModelError(
                f"{path}: its head has {len(heads['weight']) if 'weight' in heads else 'no'} outputs; a reward model"
                " has one (num_labels 1)"
            )
        tensors = from_standard(tensors, standard) if standard else tensors
        tensors["head.weight"] = tensors["decoder.embedding.weight"]
        self.network = DecoderForCausalLM(
            DecoderConfig(shape=shape.model_copy(update={"tie_word_embeddings": True}).model_dump())
        )
        wanted = set(self.network.state_dict())
        if set(tensors) != wanted:
            raise ModelError(
                f"{path}: {sorted(set(tensors) ^ wanted)[0]} is missing or unexpected; the weights and config.json do"
                " not match"
            )
        self.network.load_state_dict(tensors)
        self.network.train(False)
        self.head = nn.Linear(shape.hidden_size, 1, bias="bias" in heads)
        self.head.load_state_dict(heads)
        self.context = shape.max_position_embeddings

    def compute_rewards(self, ids: Tensor, positions: Tensor, segments: Tensor, indices: Tensor) -> Tensor:
        """Return the rewards at positions `indices` [n] of packed sequences in one row [1, length]."""
        with torch.no_grad():
            states: Any = self.network.decoder(self.network.get_input_embeddings()(ids), positions, segments=segments)
            scored: Tensor = self.head(states[0, indices])[:, 0]
        return scored
