"""Stage `tokenize.train`: a tokenizer of documents: byte-level BPE, Unigram or WordPiece, with its control tokens and chat template, and a report.

The library learns the vocabulary (`algorithms.py`); `bpe.py` is the same to read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from llmworks.artifact import Config, Dataset, Tokenizer
from llmworks.context import Context
from llmworks.documents import count_characters, read_documents
from llmworks.errors import DataError, UserError
from llmworks.tokenize.named import NAMED, named_template
from llmworks.tokenize.vocabulary import group_of, measure, report_usage

MEASURED = 5_000_000  # characters that the report looks at
ROLES = {
    "bpe": {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"},
    "unigram": {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    "wordpiece": {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "eos_token": "[SEP]"},
}


class TrainConfig(Config):
    """How text is divided, how many tokens there are, and which of them control."""

    algorithm: Literal["bpe", "unigram", "wordpiece"] = Field("bpe", description="bpe: over bytes, as GPT-2 and Llama 3; unigram: pieces, and bytes for what is rare, as SentencePiece; wordpiece: as BERT")
    vocabulary: int = Field(32_000, gt=0, description="tokens in all; multiples of 64 compute fastest")
    divide: Literal["gpt2", "digits", "llama-3"] = Field("llama-3", description="words of bpe, which no token goes beyond. digits: as gpt2, digits alone; llama-3: up to three digits, contractions in any case")
    normalize: Literal["none", "nfc", "nfkc"] = Field("none", description="Unicode form that text is brought to; none gives back what was there")
    lowercase: bool = Field(False, description="wordpiece: without case and accents")
    least: int = Field(2, ge=1, description="times that a pair must stand to be joined (bpe, wordpiece)")
    longest: int = Field(32, ge=2, description="longest token: bytes (bpe) or characters (unigram, at most 16)")
    template: Literal["none", "chatml", "alpaca", "llama-2", "llama-3", "mistral", "mistral-v3", "gemma", "phi", "zephyr"] = Field("none", description="chat template, with its control tokens")
    end: str = Field("", description="the token that ends texts and answers; default: the template's, else <|endoftext|>, </s> or [SEP] by algorithm")
    special_tokens: list[str] = Field([], description="more control tokens")
    characters: int = Field(500_000_000, gt=0, description="learn from at most so many, of documents spread evenly")


def train(config: TrainConfig, data: Dataset, ctx: Context, held_out: Dataset | None = None) -> Tokenizer:
    """Learn a tokenizer from documents; the report measures it on `held_out`, else on the beginning of the same documents.

    Errors: UserError for a vocabulary that control tokens and bytes fill; DataError for too little text.
    """
    from llmworks.tokenize.algorithms import as_transformers, learn

    roles, control = control_tokens(config)
    floor = len(control) + (0 if config.algorithm == "wordpiece" else 256)
    if config.vocabulary <= floor:
        raise UserError(f"config.vocabulary is {config.vocabulary:,}, of which {floor:,} are control tokens and bytes; ask for more")
    documents, characters = count_characters(data)
    share = min(1.0, config.characters / max(1, characters))
    with ctx.progress.bar("read", documents, "documents") as bar:
        made = learn(config, control, lambda: _texts(data, share, bar))
    if made.get_vocab_size() < config.vocabulary:
        raise DataError(f"{data.name}: {int(characters * share):,} characters give {made.get_vocab_size():,} tokens, config.vocabulary asks for {config.vocabulary:,}; give more text or ask for fewer")
    tokenizer = as_transformers(made, roles, "" if config.template == "none" else named_template(config.template))
    tokenizer.save_pretrained(ctx.out)
    usage = measure(tokenizer, _measured(held_out or data))
    where = f"{held_out.name}, which it did not see" if held_out else f"{data.name}, from which it was learned"
    ctx.report.title = f"{config.vocabulary:,} tokens ({config.algorithm}) of {data.name}"
    ctx.report.lead = f"A token holds {usage.whole.bytes_per_token:.2f} bytes of {where}; a word takes {usage.whole.fertility:.2f} tokens."
    figures = {"vocabulary": config.vocabulary, **report_usage(ctx.report, tokenizer, usage)}
    ctx.report.data |= {"characters": int(characters * share), "control": control}
    ctx.progress.say(ctx.report.lead)
    return Tokenizer(ctx.out, metrics=figures, about={"vocabulary": config.vocabulary, "algorithm": config.algorithm})


def control_tokens(config: TrainConfig) -> tuple[dict[str, str], list[str]]:
    """(control token of each role, all control tokens in the order of their ids)."""
    roles = dict(ROLES[config.algorithm])
    tokens = list(roles.values())
    if config.template != "none":
        named = NAMED[config.template]
        if "bos_token" in named_template(config.template):
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
