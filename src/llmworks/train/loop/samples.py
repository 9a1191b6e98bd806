"""Sample continuations of prompts during training, always with the same seed so that only the model differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def sample_continuations(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_tokens: int, seed: int, temperature: float = 0.8
) -> list[str]:
    """Sample a continuation of at most `max_tokens` tokens of each prompt; "" for each when `max_tokens` is 0."""
    import torch

    if not max_tokens:
        return [""] * len(prompts)
    training = model.training
    model.train(False)
    continuations = []
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        for prompt in prompts:
            ids = tokenizer(prompt, add_special_tokens=True)["input_ids"] or [tokenizer.eos_token_id]
            while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:  # some tokenizers append EOS
                ids = ids[:-1]
            input_ids = torch.tensor([ids], device=model.device)
            room = min(max_tokens, model.config.max_position_embeddings - len(ids))
            if room < 1:
                continuations.append("")
                continue
            output_ids = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=room,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
            continuations.append(tokenizer.decode(output_ids[0, len(ids) :], skip_special_tokens=True))
    model.train(training)
    return continuations
