"""Stage `tokenize.train`: train a byte-level BPE, Unigram or WordPiece tokenizer with special tokens and chat template.

The `tokenizers` library trains the vocabulary (`bpe/trainers.py`); `bpe/reference.py` is a readable reference of BPE.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmworks.core.artifact import Dataset, Tokenizer
from llmworks.core.context import Context
from llmworks.core.documents import count_characters, read_documents
from llmworks.core.errors import DataError, UserError
from llmworks.tokenize.bpe.config import TrainConfig
from llmworks.tokenize.chat.named_templates import NAMED_TEMPLATES, get_named_template
from llmworks.tokenize.statistics import get_group, measure_usage, report_usage

MAX_MEASURED_CHARACTERS = 5_000_000  # maximum number of characters measured for the report
ROLES = {
    "bpe": {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"},
    "unigram": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    "wordpiece": {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
        "eos_token": "[SEP]",
    },
}


def train(config: TrainConfig, data: Dataset, ctx: Context, eval_data: Dataset | None = None) -> Tokenizer:
    """Train a tokenizer on documents; the report measures it on `eval_data`, else on the first training documents.

    Errors: UserError when special tokens and bytes alone fill the vocabulary; DataError for too little text.
    """
    from llmworks.tokenize.bpe.trainers import to_transformers, train_tokenizer

    roles, control = collect_special_tokens(config)
    floor = len(control) + (0 if config.algorithm == "wordpiece" else 256)
    if config.vocab_size <= floor:
        raise UserError(
            f"config.vocab_size is {config.vocab_size:,}, but special tokens and bytes alone take {floor:,}; raise it"
        )
    documents, characters = count_characters(data)
    share = min(1.0, config.max_characters / max(1, characters))
    with ctx.progress.bar("read", documents, "documents") as bar:
        made = train_tokenizer(config, control, lambda: _iterate_training_texts(data, share, bar))
    if made.get_vocab_size() < config.vocab_size:
        raise DataError(
            f"{data.name}: {int(characters * share):,} characters give only {made.get_vocab_size():,} tokens,"
            f" config.vocab_size is {config.vocab_size:,}; give more text or lower vocab_size"
        )
    tokenizer = to_transformers(
        made, roles, "" if config.chat_template == "none" else get_named_template(config.chat_template)
    )
    tokenizer.save_pretrained(ctx.out)
    usage = measure_usage(tokenizer, _iterate_measured_texts(eval_data or data))
    where = f"{eval_data.name} (held-out)" if eval_data else f"{data.name} (training data)"
    ctx.report.title = f"{config.algorithm} tokenizer with {config.vocab_size:,} tokens, trained on {data.name}"
    ctx.report.subtitle = (
        f"{usage.total.bytes_per_token:.2f} bytes per token and {usage.total.fertility:.2f} tokens per word on {where}."
    )
    figures = {"vocab_size": config.vocab_size, **report_usage(ctx.report, tokenizer, usage)}
    ctx.report.data |= {"characters": int(characters * share), "control": control}
    ctx.progress.log(ctx.report.subtitle)
    return Tokenizer(ctx.out, metrics=figures, about={"vocabulary": config.vocab_size, "algorithm": config.algorithm})


def collect_special_tokens(config: TrainConfig) -> tuple[dict[str, str], list[str]]:
    """Return (special token of each role such as eos_token, all special tokens in the order of their ids)."""
    roles = dict(ROLES[config.algorithm])
    tokens = list(roles.values())
    if config.chat_template != "none":
        named = NAMED_TEMPLATES[config.chat_template]
        if "bos_token" in get_named_template(config.chat_template):
            roles.setdefault("bos_token", "<s>")
        roles["eos_token"] = named.eos_token or roles["eos_token"]
        tokens += [roles.get("bos_token", ""), *named.special_tokens]
    roles["eos_token"] = config.end or roles["eos_token"]
    return roles, list(dict.fromkeys(token for token in (*tokens, roles["eos_token"], *config.special_tokens) if token))


def _iterate_training_texts(data: Dataset, share: float, bar: Any) -> Iterator[str]:
    """Yield the training documents, an evenly spaced share of all."""
    bar.resume(0)
    for number, document in enumerate(read_documents(data)):
        bar.advance()
        if int((number + 1) * share) > int(number * share):
            yield document.text


def _iterate_measured_texts(data: Dataset) -> Iterator[tuple[str, str]]:
    left = MAX_MEASURED_CHARACTERS
    for document in read_documents(data):
        yield get_group(document), document.text
        left -= len(document.text)
        if left <= 0:
            return
