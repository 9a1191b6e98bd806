"""Stage `tokenize.train`: a tokenizer of documents: byte-level BPE, Unigram or WordPiece, with its control tokens and
chat template, and a report.

The library learns the vocabulary (`bpe/trainers.py`); `bpe/reference.py` is the same to read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llmworks.core.artifact import Dataset, Tokenizer
from llmworks.core.context import Context
from llmworks.core.documents import count_characters, read_documents
from llmworks.core.errors import DataError, UserError
from llmworks.tokenize.bpe.config import TrainConfig
from llmworks.tokenize.chat.named import NAMED, named_template
from llmworks.tokenize.statistics import group_of, measure, report_usage

MEASURED = 5_000_000  # characters that the report looks at
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
    """Learn a tokenizer from documents; the report measures it on `held_out`, else on the beginning of the same
    documents.

    Errors: UserError for a vocabulary that control tokens and bytes fill; DataError for too little text.
    """
    from llmworks.tokenize.bpe.trainers import as_transformers, learn

    roles, control = control_tokens(config)
    floor = len(control) + (0 if config.algorithm == "wordpiece" else 256)
    if config.vocab_size <= floor:
        raise UserError(
            f"config.vocabulary is {config.vocab_size:,}, of which {floor:,} are control tokens and bytes; ask for more"
        )
    documents, characters = count_characters(data)
    share = min(1.0, config.max_characters / max(1, characters))
    with ctx.progress.bar("read", documents, "documents") as bar:
        made = learn(config, control, lambda: _texts(data, share, bar))
    if made.get_vocab_size() < config.vocab_size:
        raise DataError(
            f"{data.name}: {int(characters * share):,} characters give {made.get_vocab_size():,} tokens,"
            f" config.vocabulary asks for {config.vocab_size:,}; give more text or ask for fewer"
        )
    tokenizer = as_transformers(
        made, roles, "" if config.chat_template == "none" else named_template(config.chat_template)
    )
    tokenizer.save_pretrained(ctx.out)
    usage = measure(tokenizer, _measured(eval_data or data))
    where = f"{eval_data.name}, which it did not see" if eval_data else f"{data.name}, from which it was learned"
    ctx.report.title = f"{config.vocab_size:,} tokens ({config.algorithm}) of {data.name}"
    ctx.report.lead = (
        f"A token holds {usage.whole.bytes_per_token:.2f} bytes of {where}; a word takes {usage.whole.fertility:.2f}"
        " tokens."
    )
    figures = {"vocabulary": config.vocab_size, **report_usage(ctx.report, tokenizer, usage)}
    ctx.report.data |= {"characters": int(characters * share), "control": control}
    ctx.progress.say(ctx.report.lead)
    return Tokenizer(ctx.out, metrics=figures, about={"vocabulary": config.vocab_size, "algorithm": config.algorithm})


def control_tokens(config: TrainConfig) -> tuple[dict[str, str], list[str]]:
    """(control token of each role, all control tokens in the order of their ids)."""
    roles = dict(ROLES[config.algorithm])
    tokens = list(roles.values())
    if config.chat_template != "none":
        named = NAMED[config.chat_template]
        if "bos_token" in named_template(config.chat_template):
            roles.setdefault("bos_token", "<s>")
        roles["eos_token"] = named.end or roles["eos_token"]
        tokens += [roles.get("bos_token", ""), *named.tokens]
    roles["eos_token"] = config.end or roles["eos_token"]
    return roles, list(dict.fromkeys(token for token in (*tokens, roles["eos_token"], *config.special_tokens) if token))


def _texts(data: Dataset, share: float, bar: Any) -> Iterator[str]:
    """The texts to learn from, spread evenly over all."""
    bar.resume(0)
    for number, document in enumerate(read_documents(data)):
        bar.advance()
        if int((number + 1) * share) > int(number * share):
            yield document.text


def _measured(data: Dataset) -> Iterator[tuple[str, str]]:
    left = MEASURED
    for document in read_documents(data):
        yield group_of(document), document.text
        left -= len(document.text)
        if left <= 0:
            return
