"""Log-probabilities of a batch's completions under a model, with gradients.

The LM head runs on the requested positions only, in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmworks.align.preference.batch import CompletionBatch, collate_padded, collate_shared_prompts
from llmworks.align.preference.examples import PromptCompletions
from llmworks.model.loss.linear_logprobs import linear_logprobs, logprobs_from_logits
from llmworks.train.loop.losses import needs_full_logits


def collate(
    examples: Sequence[PromptCompletions],
    *,
    supports_segments: bool,
    device: torch.device | str = "cpu",
    include_prompts: bool = False,
) -> CompletionBatch:
    """Collate examples for a model. `supports_segments`: it supports separate sequences in one row."""
    return (
        collate_shared_prompts(examples, device, include_prompts=include_prompts)
        if supports_segments
        else collate_padded(examples, device, include_prompts=include_prompts)
    )


def hidden_states(model: Any, batch: CompletionBatch) -> Tensor:
    """Return the last hidden states of all tokens [rows * length, hidden size]."""
    if batch.positions is not None:
        found = model.decoder(
            model.get_input_embeddings()(batch.ids), batch.positions, segments=batch.segments, branches=batch.branches
        )
    else:
        found = model.get_decoder()(input_ids=batch.ids, use_cache=False).last_hidden_state
    return found.reshape(-1, found.shape[-1])  # type: ignore[no-any-return]


def compute_logprobs(model: Any, batch: CompletionBatch, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (log-probabilities of the label tokens [n], entropies [n] without gradient, log-probabilities of prompt
    tokens).

    In nats; prompt tokens only if requested. Logits are divided by `temperature` first, as in sampling.
    """
    at, target_ids = batch.positions_before, batch.target_ids
    if batch.prompt_targets is not None:
        at, target_ids = torch.cat([at, batch.prompt_targets[0]]), torch.cat([target_ids, batch.prompt_targets[1]])
    if needs_full_logits(model):
        logits = model(input_ids=batch.ids, use_cache=False).logits
        found, entropy = logprobs_from_logits(logits.reshape(-1, logits.shape[-1])[at], target_ids, temperature)
    else:
        found, entropy = linear_logprobs(
            hidden_states(model, batch)[at], model.get_output_embeddings(), target_ids, temperature
        )
    n = len(batch.positions_before)
    return found[:n], entropy[:n], found[n:]


def disable_dropout(network: nn.Module) -> None:
    """Disable dropout in a network, since it would change the log-probabilities that are compared."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
