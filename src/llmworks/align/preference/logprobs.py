"""Log-probabilities of a batch's completions under a model, with gradients.

The LM head runs on the requested positions only, in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmworks.align.preference.batch import Branches, branched, padded
from llmworks.align.preference.examples import Answered
from llmworks.model.loss.linear_logprobs import linear_logprobs, of_logits
from llmworks.train.loop.losses import whole_logits


def batch_of(
    examples: Sequence[Answered], *, free: bool, device: torch.device | str = "cpu", prompts: bool = False
) -> Branches:
    """Collate examples for a model. `free`: the model supports separate sequences in one row (`Tuned.free`)."""
    return branched(examples, device, prompts=prompts) if free else padded(examples, device, prompts=prompts)


def states(model: Any, batch: Branches) -> Tensor:
    """Return the last hidden states of all tokens [rows * length, hidden size]."""
    if batch.positions is not None:
        found = model.decoder(
            model.get_input_embeddings()(batch.ids), batch.positions, segments=batch.segments, branches=batch.branches
        )
    else:
        found = model.get_decoder()(input_ids=batch.ids, use_cache=False).last_hidden_state
    return found.reshape(-1, found.shape[-1])  # type: ignore[no-any-return]


def logprobs(model: Any, batch: Branches, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (log-probabilities of the label tokens [n], entropies [n] without gradient, log-probabilities of prompt
    tokens).

    In nats; prompt tokens only if requested. Logits are divided by `temperature` first, as in sampling.
    """
    at, wanted = batch.at, batch.wanted
    if batch.spoken is not None:
        at, wanted = torch.cat([at, batch.spoken[0]]), torch.cat([wanted, batch.spoken[1]])
    if whole_logits(model):
        logits = model(input_ids=batch.ids, use_cache=False).logits
        found, entropy = of_logits(logits.reshape(-1, logits.shape[-1])[at], wanted, temperature)
    else:
        found, entropy = linear_logprobs(states(model, batch)[at], model.get_output_embeddings(), wanted, temperature)
    n = len(batch.at)
    return found[:n], entropy[:n], found[n:]


def still(network: nn.Module) -> None:
    """Disable dropout in a network, since it would change the log-probabilities that are compared."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
