"""How probable given tokens are to a model: log-probabilities of a batch's answers, with gradients.

The head runs on the places that are asked for, some at a time. Knows no method.
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
    """Examples as a model reads them: `free`, as `train.tuned.Tuned` has it, where texts of one row can be apart."""
    return branched(examples, device, prompts=prompts) if free else padded(examples, device, prompts=prompts)


def states(model: Any, batch: Branches) -> Tensor:
    """The last states of all tokens [rows * length, width]."""
    if batch.positions is not None:
        found = model.decoder(
            model.get_input_embeddings()(batch.ids), batch.positions, segments=batch.segments, branches=batch.branches
        )
    else:
        found = model.get_decoder()(input_ids=batch.ids, use_cache=False).last_hidden_state
    return found.reshape(-1, found.shape[-1])  # type: ignore[no-any-return]


def logprobs(model: Any, batch: Branches, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities [n] in nats of the tokens that are weighed, entropies [n] there without a gradient,
    log-probabilities of the prompts' own tokens, if they are asked for).

    Logits are divided by `temperature` first, as they were when the tokens were drawn.
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
    """Take dropout out of a network: chances of two models are compared, and what is left out by chance would be a
    difference.
    """
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
