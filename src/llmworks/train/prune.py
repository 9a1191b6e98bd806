"""Stage `train.prune`: a model without some of its blocks, the beginning of a smaller one that learns from the whole
(train.distill).

Those are left out that change their input least: one less the cosine between what goes into a block and what comes out,
over tokens of `data` (block influence: Men et al. 2024, ShortGPT, arXiv:2403.03853, equation 1).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Config, Dataset, Model
from llmworks.core.context import Context
from llmworks.core.errors import DataError, ModelError, UserError
from llmworks.data.conversations.training_rows import training_rows

if TYPE_CHECKING:
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    from llmworks.model.nn.decoder import DecoderForCausalLM
    from llmworks.train.finetune.examples import Example


class PruneConfig(Config):
    """Which blocks stay."""

    num_hidden_layers: int = Field(
        0, ge=0, description="how many blocks stay: those that change their input most, on `data`"
    )
    drop_layers: list[int] = Field([], description="or the blocks that are left out, by number from 0")
    num_calibration_samples: int = Field(64, gt=0, description="rows of `data` that are read")
    max_length: int = Field(512, gt=1, description="of a row, at most")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if bool(self.num_hidden_layers) == bool(self.drop_layers):
            raise ValueError("give either layers, how many stay, or drop, which go")
        if len(set(self.drop_layers)) < len(self.drop_layers) or any(number < 0 for number in self.drop_layers):
            raise ValueError("drop: block numbers, each once, from 0")
        return self


def prune(config: PruneConfig, model: Model, ctx: Context, data: Dataset | None = None) -> Model:
    """Leave blocks out.

    Errors: ModelError for a model that is not one of our decoder's architectures, or whose blocks are of two kinds in
    turn; UserError for blocks that it has not.
    """
    from llmworks.model.golden import record
    from llmworks.model.io.decoder_files import load_decoder, save_decoder
    from llmworks.model.nn.decoder import DecoderConfig, DecoderForCausalLM
    from llmworks.tokenize.load import load_tokenizer, read_json

    if model.format != "hf":
        raise ModelError(
            f"{model.name}: blocks are left out of a Hugging Face directory, this is {model.format}; convert it with"
            " the stage model.from_gguf"
        )
    whole = load_decoder(model.path)
    count = whole.shape.num_hidden_layers
    if whole.shape.sliding_window and whole.shape.global_attn_every_n_layers:
        raise ModelError(
            f"{model.name}: its blocks look back near and far in turn; without some of them the turns would change"
        )
    if (
        config.num_hidden_layers >= count
        or len(config.drop_layers) >= count
        or max(config.drop_layers, default=0) >= count
    ):
        raise UserError(f"{model.name} has {count} blocks, from 0 to {count - 1}; fewer, but one at least, can stay")
    tokenizer = load_tokenizer(model.path)
    found = _influence(data, config, model, whole, tokenizer)
    drop = sorted(
        config.drop_layers or sorted(range(count), key=lambda number: found[number])[: count - config.num_hidden_layers]
    )
    stay = [number for number in range(count) if number not in drop]
    small = DecoderForCausalLM(
        DecoderConfig(shape=whole.shape.model_copy(update={"num_hidden_layers": len(stay)}).model_dump())
    )
    small.load_state_dict(renumbered(whole.state_dict(), stay))
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
        golden=record(ctx.out),
        metrics={"blocks": len(stay), "parameters": after},
        about={"format": "hf", "dtype": "float32", "architecture": str(model.about.get("architecture", ""))},
    )


def _influence(
    data: Dataset | None,
    config: PruneConfig,
    model: Model,
    whole: DecoderForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
) -> list[float]:
    """How much each block changes its input; empty where blocks are named. UserError where nothing says which."""
    if data is None:
        if config.num_hidden_layers:
            raise UserError(
                "which blocks change their input least is seen on `data`; give it, or name them in config.drop"
            )
        return []
    from llmworks.train.finetune.examples import make_example

    examples = [
        example
        for row in training_rows(data)[: config.num_calibration_samples]
        if not isinstance(example := make_example(tokenizer, row, config.max_length, cut=True), str)
    ]
    if not examples:
        raise DataError(
            f"{data.name}: none of its first {config.num_calibration_samples} rows can be read by {model.name}"
        )
    return influence(whole, examples)


def _describe(
    whole: DecoderForCausalLM,
    small: DecoderForCausalLM,
    ctx: Context,
    model: Model,
    stay: list[int],
    count: int,
    drop: list[int],
    found: list[float],
) -> int:
    """Write the page."""
    before, after = (sum(p.numel() for p in m.parameters()) for m in (whole, small))
    ctx.report.title = f"{model.name} with {len(stay)} of {count} blocks"
    ctx.report.lead = (
        f"{after:,} of {before:,} parameters. Left out: {', '.join(map(str, drop))}. What is left has to learn again,"
        " as by train.distill."
    )
    ctx.report.data = {"drop": drop, "influence": [round(value, 5) for value in found]}
    if found:
        ctx.report.table(
            "How much a block changes its input",
            ("block", "influence", "stays"),
            [(number, round(value, 4), number in stay) for number, value in enumerate(found)],
            note="One less the cosine between a token's state before and after the block, the mean over tokens.",
        )
    return after


def renumbered(state: Mapping[str, Any], stay: Sequence[int]) -> dict[str, Any]:
    """The weights of the blocks that stay, under their new numbers, and of all else."""
    head = "decoder.blocks."
    found = {}
    for name, tensor in state.items():
        number, _, rest = name.removeprefix(head).partition(".")
        if not name.startswith(head):
            found[name] = tensor
        elif int(number) in stay:
            found[f"{head}{stay.index(int(number))}.{rest}"] = tensor
    return found


def influence(network: Any, examples: list[Example]) -> list[float]:
    """Of each block one less the cosine of a token's state [width] before and after it, the mean over all tokens."""
    import torch
    from torch.nn import functional as F

    sums, tokens = [0.0] * len(network.decoder.blocks), 0

    def watch(number: int) -> Any:
        def hook(block: Any, given: Any, made: Any) -> None:
            x, y = given[0], made[0] if isinstance(made, tuple) else made
            sums[number] += float((1 - F.cosine_similarity(x.float(), y.float(), dim=-1)).sum())

        return hook

    hooks = [block.register_forward_hook(watch(number)) for number, block in enumerate(network.decoder.blocks)]
    try:
        with torch.inference_mode():
            for example in examples:
                network(input_ids=torch.tensor([example.ids]), logits_to_keep=1)
                tokens += len(example.ids)
    finally:
        for hook in hooks:
            hook.remove()
    return [total / tokens for total in sums]
