"""Build a transformers tokenizer from a GGUF file's metadata: byte-level BPE and SentencePiece BPE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from llmworks.core.errors import ModelError
from llmworks.model.gguf.layout import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_PATTERN = QWEN_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
PRE_TOKENIZERS = ("smollm", "gpt-2", "qwen2", "llama-bpe")  # pre-tokenizers, as llama.cpp names them


def make_pre_tokenizer(name: str) -> Any:
    """Return the pre-tokenizer for byte-level BPE."""
    if name in ("qwen2", "llama-bpe"):
        split = pre_tokenizers.Split(Regex(QWEN_PATTERN if name == "qwen2" else LLAMA_PATTERN), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
        if name == "smollm"
        else byte_level
    )


def write_tokenizer(meta: dict[str, Any], out: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    build_tokenizer(meta).save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **build_tokenizer_options(meta)}
    (out / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def build_transformers_tokenizer(meta: dict[str, Any]) -> Any:
    """Build the transformers tokenizer, chat template included, from GGUF metadata without writing a file."""
    from transformers import PreTrainedTokenizerFast

    make: Any = PreTrainedTokenizerFast
    return make(tokenizer_object=build_tokenizer(meta), **build_tokenizer_options(meta))


def build_tokenizer(meta: dict[str, Any]) -> Tokenizer:
    """Build the tokenizer from GGUF metadata: byte-level BPE ("gpt2"), or SentencePiece BPE ("llama").

    ModelError for any other.
    """
    kind = meta.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ModelError(f"the GGUF tokenizer {kind!r} is not supported, only 'gpt2' and 'llama'")
    tokenizer = _build_sentencepiece(meta) if kind == "llama" else _build_byte_level(meta)
    tokenizer.add_tokens(
        [
            AddedToken(token, special=one == CONTROL, normalized=False)
            for token, one in zip(meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"], strict=True)
            if one in (CONTROL, USER_DEFINED)
        ]
    )
    bos = meta.get("tokenizer.ggml.bos_token_id")
    if bos is not None and is_bos_added(meta):
        token = meta["tokenizer.ggml.tokens"][int(bos)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, int(bos))]
        )
    return tokenizer


def is_bos_added(meta: dict[str, Any]) -> bool:
    """Return whether a BOS token is prepended; by default as in llama.cpp."""
    usual = meta.get("tokenizer.ggml.model") == "llama" or meta.get("tokenizer.ggml.pre") == "llama-bpe"
    return bool(meta.get("tokenizer.ggml.add_bos_token", usual))


def _build_sentencepiece(meta: dict[str, Any]) -> Tokenizer:
    """Build SentencePiece BPE: merges ranked by score, with byte fallback."""
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    scores, types = meta["tokenizer.ggml.scores"], meta["tokenizer.ggml.token_type"]
    known = {token: i for i, token in enumerate(tokens) if types[i] in (NORMAL, BYTE)}
    ranked = sorted(
        (i for i in known.values() if types[i] == NORMAL and len(tokens[i]) > 1), key=lambda i: (-scores[i], i)
    )
    merges = [
        (tokens[i][:at], tokens[i][at:])
        for i in ranked
        for at in range(1, len(tokens[i]))
        if tokens[i][:at] in known and tokens[i][at:] in known
    ]
    unknown = next((tokens[i] for i, one in enumerate(types) if one == UNKNOWN), None)
    tokenizer = Tokenizer(
        BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    before = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if before else spaces
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if before else []),
        ]
    )
    return tokenizer


def _build_byte_level(meta: dict[str, Any]) -> Tokenizer:
    """Build byte-level BPE."""
    pre = meta.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise ModelError(f"the GGUF pre-tokenizer {pre!r} is not supported, only {', '.join(PRE_TOKENIZERS)}")
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, ignore_merges=pre == "llama-bpe")
    )
    tokenizer.pre_tokenizer = make_pre_tokenizer(pre)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def build_tokenizer_options(meta: dict[str, Any]) -> dict[str, Any]:
    """Return special tokens, maximum length and chat template for `tokenizer_config.json`."""
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    named = {
        "bos_token": "bos_token_id",
        "eos_token": "eos_token_id",
        "unk_token": "unknown_token_id",
        "pad_token": "padding_token_id",
    }
    options: dict[str, Any] = {
        role: tokens[int(meta[f"tokenizer.ggml.{key}"])]
        for role, key in named.items()
        if f"tokenizer.ggml.{key}" in meta
    }
    options |= {
        "model_max_length": int(meta[f"{meta['general.architecture']}.context_length"]),
        "clean_up_tokenization_spaces": False,
        "add_bos_token": is_bos_added(meta),
    }
    if "tokenizer.chat_template" in meta:
        options["chat_template"] = meta["tokenizer.chat_template"]
    return options
