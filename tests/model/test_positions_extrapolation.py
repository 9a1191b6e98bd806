"""Beyond the trained length: what the papers say of each kind of position, on a small model of bytes that is trained on
short rows.

RoPE breaks, stretched it does not, without any training (position interpolation: Chen et al. 2023, arXiv:2306.15595;
NTK-aware and YaRN: Peng et al. 2023, arXiv:2309.00071, section 3); ALiBi goes on as it was, learned positions do not
(Press et al. 2021, arXiv:2108.12409, figure 1).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
from llmworks.model.shape import Shape

TRAINED, LONG, STEPS, BATCH = 64, 256, 500, 32


def library() -> Tensor:
    """The source of Python's own library, as bytes."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()


def shape(**more: Any) -> Shape:
    return Shape.model_validate(
        {
            "vocab_size": 256,
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "max_position_embeddings": LONG,
            **more,
        }
    )


def trained(given: Shape, text: Tensor) -> DecoderForCausalLM:
    torch.manual_seed(0)
    model = DecoderForCausalLM(DecoderConfig(shape=given.model_dump()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    draw = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 25, (STEPS - step) / 150)
        starts = torch.randint(0, len(text) - TRAINED, (BATCH,), generator=draw)
        rows = torch.stack([text[s : s + TRAINED] for s in starts.tolist()])
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def losses(model: DecoderForCausalLM, text: Tensor) -> tuple[float, float]:
    """Nats a byte within the trained length, and of the last half of long rows."""
    rows = text[: 48 * LONG].view(48, LONG)
    with torch.no_grad():
        logits = model(input_ids=rows).logits[:, :-1]
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
    return float(nats[:, TRAINED // 2 : TRAINED - 1].mean()), float(nats[:, LONG // 2 :].mean())


def stretched(model: DecoderForCausalLM, scaling: str) -> DecoderForCausalLM:
    """The same weights, their rotary positions stretched to the long rows."""
    rope = {"rope_type": scaling, "factor": LONG / TRAINED, "original_max_position_embeddings": TRAINED}
    other = DecoderForCausalLM(DecoderConfig(shape=shape(rope_parameters=rope).model_dump()))
    other.load_state_dict(model.state_dict())
    return other.eval()


@pytest.mark.slow
def test_positions_beyond_what_was_trained() -> None:
    text = library()
    unseen, text = text[: 64 * LONG], text[64 * LONG :]
    rope = trained(shape(), text)
    found = {"none": losses(rope, unseen)} | {
        name: losses(stretched(rope, name), unseen) for name in ("linear", "ntk", "yarn")
    }
    found |= {name: losses(trained(shape(position_embedding_type=name), text), unseen) for name in ("alibi", "learned")}
    print(found)
    within, beyond = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
    assert beyond["none"] > within["none"] + 0.5  # it breaks
    for name in ("ntk", "yarn"):
        assert beyond[name] < beyond["none"] - 0.3
    assert beyond["yarn"] < beyond["linear"]  # untrained, interpolating short waves too costs most
    assert within["yarn"] < within["linear"]
    assert beyond["alibi"] < within["alibi"] + 0.1  # as it was
    assert beyond["alibi"] < beyond["learned"] - 0.3
