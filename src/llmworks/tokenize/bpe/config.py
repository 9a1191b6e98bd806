"""Config fields of `tokenize.train`. Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from llmworks.core.artifact import Config


class TrainConfig(Config):
    """How text is divided, how many tokens there are, and which of them control."""

    algorithm: Literal["bpe", "unigram", "wordpiece"] = Field(
        "bpe",
        description=(
            "bpe: over bytes, as GPT-2 and Llama 3; unigram: pieces, and bytes for what is rare, as SentencePiece;"
            " wordpiece: as BERT"
        ),
    )
    vocab_size: int = Field(32_000, gt=0, description="tokens in all; multiples of 64 compute fastest")
    pre_tokenizer: Literal["gpt2", "digits", "llama-3"] = Field(
        "llama-3",
        description=(
            "words of bpe, which no token goes beyond. digits: as gpt2, digits alone; llama-3: up to three digits,"
            " contractions in any case"
        ),
    )
    normalizer: Literal["none", "nfc", "nfkc"] = Field(
        "none", description="Unicode form that text is brought to; none gives back what was there"
    )
    lowercase: bool = Field(False, description="wordpiece: without case and accents")
    min_frequency: int = Field(2, ge=1, description="times that a pair must stand to be joined (bpe, wordpiece)")
    max_token_length: int = Field(
        32, ge=2, description="longest token: bytes (bpe) or characters (unigram, at most 16)"
    )
    chat_template: Literal[
        "none", "chatml", "alpaca", "llama-2", "llama-3", "mistral", "mistral-v3", "gemma", "phi", "zephyr"
    ] = Field("none", description="chat template, with its control tokens")
    end: str = Field(
        "",
        description=(
            "the token that ends texts and answers; default: the template's, else <|endoftext|>, </s> or [SEP] by"
            " algorithm"
        ),
    )
    special_tokens: list[str] = Field([], description="more control tokens")
    max_characters: int = Field(500_000_000, gt=0, description="learn from at most so many, of documents spread evenly")
