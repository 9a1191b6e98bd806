"""Stage `train.prune`: prune layers of a model, as the start of a smaller student (train.distill).

Removes the layers with the least block influence: one minus the cosine similarity between a layer's input and output,
averaged over tokens of `data` (Men et al. 2024, ShortGPT, arXiv:2403.03853, equation 1).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Config, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError, ModelError, UserError
from llmworks.data.conversations.training_rows import read_training_rows

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from llmworks.model.nn.decoder import DecoderForCausalLM
    from llmworks.train.finetune.examples import Example


class PruneConfig(Config):
    """Which layers to keep."""

    num_hidden_layers: int = Field(
        0, ge=0, description="number of layers to keep: those with the most block influence on `data`"
    )
    drop_layers: list[int] = Field([], description="or the layers to remove, by index from 0")
    num_calibration_samples: int = Field(
        64, gt=0, description="calibration samples: rows of `data` to compute block influence on"
    )
    max_length: int = Field(512, gt=1, description="maximum sequence length of a calibration sample in tokens")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if bool(self.num_hidden_layers) == bool(self.drop_layers):
            raise ValueError("set either num_hidden_layers, the number to keep, or drop_layers, those to remove")
        if len(set(self.drop_layers)) < len(self.drop_layers) or any(number < 0 for number in self.drop_layers):
            raise ValueError("drop_layers: layer indices from 0, each at most once")
        return self


def prune(config: PruneConfig, model: Model, ctx: Context, data: Dataset | None = None) -> Model:
    """Prune layers of a model.

    Errors: ModelError for an unsupported architecture, or one that alternates two kinds of layers; UserError for layers
    that the model does not have.
    """
    from llmworks.model.golden import record_golden
    from llmworks.model.io.decoder_files import load_decoder, save_decoder
    from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
    from llmworks.tokenize.load import load_tokenizer, read_json

    if model.format != "hf":
        raise ModelError(
            f"{model.name}: pruning needs a Hugging Face directory, but this is {model.format}; convert it with"
            " the stage model.from_gguf"
        )
    whole = load_decoder(model.path)
    count = whole.shape.num_hidden_layers
    if whole.shape.sliding_window and whole.shape.global_attn_every_n_layers:
        raise ModelError(
            f"{model.name}: its layers alternate sliding-window and full attention; removing layers would change"
            " the pattern"
        )
    if (
        config.num_hidden_layers >= count
        or len(config.drop_layers) >= count
        or max(config.drop_layers, default=0) >= count
    ):
        raise UserError(
            f"{model.name} has {count} layers, from 0 to {count - 1}; keep fewer than that, but at least one"
        )
    tokenizer = load_tokenizer(model.path)
    found = _compute_influence(data, config, model, whole, tokenizer)
    drop = sorted(
        config.drop_layers or sorted(range(count), key=lambda number: found[number])[: count - config.num_hidden_layers]
    )
    stay = [number for number in range(count) if number not in drop]
    small = DecoderForCausalLM(
        DecoderConfig(shape=whole.shape.model_copy(update={"num_hidden_layers": len(stay)}).model_dump())
    )
    small.load_state_dict(renumber_layers(whole.state_dict(), stay))
    small.train(False)
    ids = {
        name: value
        for name, value in read_json(model.path / "config.json").items()
        if name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    save_decoder(small, ctx.out, token_ids=ids)
    tokenizer.save_pretrained(ctx.out)
    if (model.path / "generation_config.json").exists():
        shutil.copyfile(model.path / "generation_config.json", ctx.out / "generation_config.json")
    after = _describe(whole, small, ctx, model, stay, count, drop, found)
    return Model(
        ctx.out,
        golden=record_golden(ctx.out),
        metrics={"blocks": len(stay), "parameters": after},
        about={"format": "hf", "dtype": "float32", "architecture": str(model.about.get("architecture", ""))},
    )


def _compute_influence(
    data: Dataset | None,
    config: PruneConfig,
    model: Model,
    whole: DecoderForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
) -> list[float]:
    """Return the block influence of each layer; empty if the layers are named. UserError if nothing selects them."""
    if data is None:
        if config.num_hidden_layers:
            raise UserError(
                "block influence is computed on `data`; provide it, or name the layers in config.drop_layers"
            )
        return []
    from llmworks.train.finetune.examples import make_example

    examples = [
        example
        for row in read_training_rows(data)[: config.num_calibration_samples]
        if not isinstance(example := make_example(tokenizer, row, config.max_length, truncate=True), str)
    ]
    if not examples:
        raise DataError(
            f"{data.name}: none of its first {config.num_calibration_samples} rows can be read by {model.name}"
        )
    return compute_block_influence(whole, examples)


def _describe(
    whole: DecoderForCausalLM,
    small: DecoderForCausalLM,
    ctx: Context,
    model: Model,
    kept_layers: list[int],
    count: int,
    drop: list[int],
    found: list[float],
) -> int:
    """Write the report."""
    before, after = (sum(p.numel() for p in m.parameters()) for m in (whole, small))
    ctx.report.title = f"{model.name} with {len(kept_layers)} of {count} layers"
    ctx.report.subtitle = (
        f"{after:,} of {before:,} parameters. Removed layers: {', '.join(map(str, drop))}. Recover the quality by"
        " training, e.g. train.distill."
    )
    ctx.report.data = {"drop": drop, "influence": [round(value, 5) for value in found]}
    if found:
        ctx.report.add_table(
            "Block influence",
            ("layer", "influence", "kept"),
            [(number, round(value, 4), number in kept_layers) for number, value in enumerate(found)],
            note=(
                "One minus the cosine similarity of a token's hidden state before and after the layer,"
                " averaged over tokens."
            ),
        )
    return after


def renumber_layers(state: Mapping[str, Any], kept_layers: Sequence[int]) -> dict[str, Any]:
    """Return the weights with the kept layers renumbered and the others removed."""
    head = "decoder.blocks."
    state_dict = {}
    for name, tensor in state.items():
        number, _, rest = name.removeprefix(head).partition(".")
        if not name.startswith(head):
            state_dict[name] = tensor
        elif int(number) in kept_layers:
            state_dict[f"{head}{kept_layers.index(int(number))}.{rest}"] = tensor
    return state_dict


def compute_block_influence(network: Any, examples: list[Example]) -> list[float]:
    """Compute block influence: one minus the mean cosine similarity of hidden states before and after each layer."""
    import torch
    from torch.nn import functional as F

    sums, tokens = [0.0] * len(network.decoder.blocks), 0

    def make_hook(number: int) -> Any:
        def hook(block: Any, given: Any, made: Any) -> None:
            x, y = given[0], made[0] if isinstance(made, tuple) else made
            sums[number] += float((1 - F.cosine_similarity(x.float(), y.float(), dim=-1)).sum())

        return hook

    hooks = [block.register_forward_hook(make_hook(number)) for number, block in enumerate(network.decoder.blocks)]
    try:
        with torch.inference_mode():
            for example in examples:
                network(input_ids=torch.tensor([example.ids]), logits_to_keep=1)
                tokens += len(example.ids)
    finally:
        for hook in hooks:
            hook.remove()
    return [total / tokens for total in sums]
