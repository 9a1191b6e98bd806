"""Load soft prompts: trained embeddings of virtual tokens before every prompt (prompt tuning: Lester et al. 2021,
arXiv:2104.08691), or keys and values for every layer (prefix tuning: Li & Liang 2021, arXiv:2101.00190).

Trained by peft, read from its files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmworks.core.errors import ModelError
from llmworks.tokenize.load import read_json

KINDS = ("PROMPT_TUNING", "PREFIX_TUNING")


def is_soft_prompt(adapter: Path) -> bool:
    """Return whether a peft directory holds a soft prompt."""
    file = adapter / "adapter_config.json"
    return file.exists() and read_json(file).get("peft_type") in KINDS


class SoftPromptModel(nn.Module):
    """Transformers causal model with a soft prompt, for callers that use a KV cache: an empty cache is filled with it.

    Position ids and 2-d masks cover the text only, without the virtual tokens.
    """

    def __init__(self, model: Any, keys: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.base, self.key_values, self.config = model, keys, model.config
        self.num_virtual_tokens = int(keys[0][0].shape[2])

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        found: torch.dtype = self.base.dtype
        return found

    def get_input_embeddings(self) -> nn.Module:
        """Return the model's input embedding."""
        table: nn.Module = self.base.get_input_embeddings()
        return table

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: Any = 0,
    ) -> Any:
        """Run the model. A 4-d mask covers the cache, including the virtual tokens once they are in it."""
        from transformers import DynamicCache

        cache = DynamicCache() if past_key_values is None else past_key_values
        begins = cache.get_seq_length() == 0
        if begins:
            for layer, (key, value) in enumerate(self.key_values):
                cache.update(key.expand(len(input_ids), -1, -1, -1), value.expand(len(input_ids), -1, -1, -1), layer)
        if attention_mask is not None and (attention_mask.dim() == 2 or begins):
            attention_mask = F.pad(
                attention_mask, (self.num_virtual_tokens, 0), value=1 if attention_mask.dim() == 2 else 0
            )
        positions = None if position_ids is None else position_ids + self.num_virtual_tokens
        return self.base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
        )


def attach_soft_prompt(model: Any, adapter: Path) -> SoftPromptModel:
    """Wrap a transformers model with the soft prompt of a peft directory.

    ModelError for one that is broken, or belongs to another model.
    """
    from safetensors.torch import load_file

    config = read_json(adapter / "adapter_config.json")
    try:
        table = load_file(adapter / "adapter_model.safetensors")["prompt_embeddings"].float()
    except Exception as error:  # safetensors raises its own kind for a truncated file
        raise ModelError(
            f"{adapter}: the soft prompt cannot be read ({type(error).__name__}: {error}); copy it again"
        ) from None
    own = model.config
    if config["peft_type"] == "PREFIX_TUNING":
        if config.get("prefix_projection"):
            raise ModelError(f"{adapter}: uses prefix_projection, which is not supported")
        heads, width = (
            getattr(own, "num_key_value_heads", None) or own.num_attention_heads,
            getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads,
        )
        if table.shape[1] != own.num_hidden_layers * 2 * heads * width:
            raise ModelError(
                f"{adapter}: belongs to another model: its prefix has {table.shape[1]} dimensions per token, this model"
                f" has {own.num_hidden_layers * 2 * heads * width}"
            )
        parts = table.view(1, len(table), own.num_hidden_layers * 2, heads, width).permute(2, 0, 3, 1, 4)
        return SoftPromptModel(
            model, [(parts[2 * i].contiguous(), parts[2 * i + 1].contiguous()) for i in range(own.num_hidden_layers)]
        )
    if table.shape[1] != own.hidden_size:
        raise ModelError(
            f"{adapter}: belongs to another model: its prompt has {table.shape[1]} dimensions per token, this model has"
            f" {own.hidden_size}"
        )
    with torch.no_grad():
        cache = model(inputs_embeds=table[None].to(model.dtype), use_cache=True).past_key_values
    return SoftPromptModel(model, [(layer.keys, layer.values) for layer in cache.layers])
