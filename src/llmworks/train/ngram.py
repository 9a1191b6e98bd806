"""Stage `train.ngram`: count an n-gram language model of packed tokens, as a baseline for neural models.

Interpolated Kneser-Ney smoothing (`model/ngram/kneser_ney.py`). It generates and is evaluated like every other model.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from llmworks.core.artifact import Adapter, Config, Dataset, Model, Tokenizer
from llmworks.core.context import Context
from llmworks.core.errors import DataError, ModelError
from llmworks.data.store.packed_tokens import PackedDataset

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmworks.core.report import ReportBuilder
    from llmworks.model.ngram.kneser_ney import NgramOrder
    from llmworks.model.ngram.ngram import NgramForCausalLM


class NgramConfig(Config):
    """Order and smoothing of the n-gram model."""

    order: int = Field(5, ge=1, le=8, description="maximum n-gram length in tokens; the context is one less")
    discount: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "absolute discount subtracted from each count; 0 = modified Kneser-Ney: three estimated discounts per order"
        ),
    )
    eval_samples: int = Field(0, ge=0, description="held-out rows to evaluate on; 0 = all")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if 0 < self.discount < 0.001:
            raise ValueError(f"discount is {self.discount}; set 0, or at least 0.001")
        return self


def ngram(
    config: NgramConfig,
    tokenizer: Model | Tokenizer | Adapter,
    data: Dataset,
    ctx: Context,
    eval_data: Dataset | None = None,
) -> Model:
    """Count the n-grams of all documents in packed rows, each document on its own.

    Needs about 60 bytes of memory per token of the data.

    Errors: DataError for data that are not packed tokens; ModelError for tokens of another tokenizer.
    """

    from llmworks.model.golden import record_golden
    from llmworks.model.ngram.kneser_ney import count_ngrams, estimate_all_discounts
    from llmworks.tokenize.chat.named_templates import load_model_tokenizer
    from llmworks.tokenize.load import count_embedding_rows
    from llmworks.train.loop.packed_steps import check_tokenizer

    loaded = load_model_tokenizer(tokenizer)
    packed = PackedDataset(data)
    vocabulary = count_embedding_rows(loaded)
    for one in (data, eval_data):
        if one is not None:
            check_tokenizer(one, loaded, tokenizer.name)
    tokens, begins = _concatenate(packed, data, vocabulary, tokenizer)
    with ctx.progress.bar("count", 1, "passes") as bar:
        orders = count_ngrams(tokens, begins, vocabulary, config.order)
        bar.advance()
    discounts, fallback_orders = estimate_all_discounts(orders)
    if config.discount:
        discounts, fallback_orders = [(config.discount,) * 3] * config.order, []
    model = _save(orders, discounts, ctx, loaded)
    report = ctx.report
    report.title = f"{config.order}-grams of {data.name}"
    report.subtitle = f"{sum(len(o.keys) for o in orders):,} n-grams in {len(tokens):,} tokens."
    metrics: dict[str, float] = {"tokens": len(tokens), "ngrams": sum(len(o.keys) for o in orders)}
    metrics = _measure(eval_data, model, loaded, config, report, metrics)
    _describe(report, orders, discounts, fallback_orders)
    report.data |= {**metrics, "order": config.order}
    ctx.progress.log(report.subtitle)
    return Model(
        ctx.out,
        golden=record_golden(ctx.out),
        metrics=metrics,
        about={"format": "hf", "dtype": "float32", "architecture": "ngram"},
    )


def _concatenate(
    packed: PackedDataset, data: Dataset, vocabulary: int, tokenizer: Model | Tokenizer | Adapter
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return all tokens and the offsets where documents begin.

    Errors: DataError if there are none; ModelError for tokens of another tokenizer.
    """
    import numpy as np

    tokens = np.concatenate([shard["tokens"] for shard in packed.shards]).astype(np.int64)
    if not len(tokens):
        raise DataError(f"{data.name}: has no tokens")
    if int(tokens.max()) >= vocabulary:
        raise ModelError(
            f"{data.name}: has token id {int(tokens.max()):,}, but {tokenizer.name} has a vocabulary"
            f" of {vocabulary:,}; use the tokenizer that the data was packed with"
        )
    ends = np.cumsum([0, *(len(shard["tokens"]) for shard in packed.shards)])
    begins = np.concatenate([shard["pieces"][:-1] + end for shard, end in zip(packed.shards, ends, strict=False)])
    return tokens, begins


def _save(
    orders: list[NgramOrder], discounts: list[tuple[float, float, float]], ctx: Context, loaded: Any
) -> NgramForCausalLM:
    """Save the model with its tokenizer."""
    from llmworks.model.ngram.ngram import NgramForCausalLM
    from llmworks.tokenize.load import silence_transformers

    ids = {
        name: getattr(loaded, name)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if getattr(loaded, name) is not None
    }
    model = NgramForCausalLM.from_counts(orders, discounts, **ids)
    silence_transformers()
    model.save_pretrained(ctx.out)
    loaded.save_pretrained(ctx.out)
    (ctx.out / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n", encoding="utf-8")
    return model


def _measure(
    held_out: Dataset | None,
    model: NgramForCausalLM,
    loaded: Any,
    config: NgramConfig,
    report: ReportBuilder,
    metrics: dict[str, float],
) -> dict[str, float]:
    """Evaluate on held-out tokens."""
    from llmworks.train.loop.eval_loss import evaluate_loss

    if held_out is not None:
        found = evaluate_loss(model, PackedDataset(held_out), loaded, max_rows=config.eval_samples)
        if not found.num_tokens:
            raise DataError(f"{held_out.name}: has no label tokens")
        metrics |= {
            "perplexity": round(found.perplexity, 4),
            "bits_per_byte": round(found.bits_per_byte, 5),
            "nats_per_token": round(found.loss, 5),
        }
        report.subtitle += (
            f" Eval set {held_out.name}: perplexity {found.perplexity:,.1f}, {found.bits_per_byte:.3f} bits per byte."
        )
    return metrics


def _describe(
    report: ReportBuilder,
    orders: list[NgramOrder],
    discounts: list[tuple[float, float, float]],
    fallback_orders: list[int],
) -> None:
    """Add the tables of n-grams and discounts to the report."""
    report.add_table(
        "n-grams",
        ("order", "distinct", "singletons", "discount of count 1", "count 2", "count 3+"),
        [
            (n, len(o.keys), int((o.counts == 1).sum()), *d)
            for n, (o, d) in enumerate(zip(orders, discounts, strict=True), 1)
        ],
    )
    if fallback_orders:
        report.add_text(
            "Discounts",
            f"The data is too small to estimate the discounts of order {', '.join(map(str, fallback_orders))}; 0.5,"
            " 1 and"
            " 1.5 were used.",
        )
