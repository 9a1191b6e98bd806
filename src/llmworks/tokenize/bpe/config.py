"""Config fields of `tokenize.train`. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Config


class TrainConfig(Config):
    """Algorithm, pre-tokenization, vocabulary size, special tokens and chat template."""

    algorithm: Literal["bpe", "unigram", "wordpiece"] = Field(
        "bpe",
        description=(
            "bpe: byte-level, as GPT-2 and Llama 3; unigram: with byte fallback, as SentencePiece; wordpiece: as BERT"
        ),
    )
    vocab_size: int = Field(32_000, gt=0, description="vocabulary size; multiples of 64 are fastest on GPUs")
    pre_tokenizer: Literal["gpt2", "digits", "llama-3"] = Field(
        "llama-3",
        description=(
            "pre-tokenization of bpe; no token crosses a word boundary. digits: as gpt2, but each digit alone; llama-3:"
            " up to three digits, contractions in any case"
        ),
    )
    normalizer: Literal["none", "nfc", "nfkc"] = Field(
        "none", description="Unicode normalization form; none keeps the text as it is"
    )
    lowercase: bool = Field(False, description="wordpiece: lowercase and strip accents")
    min_frequency: int = Field(2, ge=1, description="minimum frequency of a pair to be merged (bpe, wordpiece)")
    max_token_length: int = Field(
        32, ge=2, description="maximum token length: bytes (bpe) or characters (unigram, at most 16)"
    )
    chat_template: Literal[
        "none", "chatml", "alpaca", "llama-2", "llama-3", "mistral", "mistral-v3", "gemma", "phi", "zephyr"
    ] = Field("none", description="chat template, with its special tokens")
    end: str = Field(
        "",
        description=(
            "eos_token, which ends documents and answers; default: the template's, else <|endoftext|>, </s> or [SEP] by"
            " algorithm"
        ),
    )
    special_tokens: list[str] = Field([], description="additional special tokens")
    max_characters: int = Field(
        500_000_000, gt=0, description="maximum number of training characters, from evenly spaced documents"
    )
