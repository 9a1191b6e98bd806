"""A tokenizer as a GGUF file's keys: byte-level BPE with its merges, SentencePiece's with its scores. Knows no weights.

SentencePiece's scores are not in `tokenizer.json`; what counts is their order, which is that of the merges: a token's
score is minus the place of the first merge that makes it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from llmworks.core.errors import ModelError
from llmworks.model.gguf.layout import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from llmworks.model.gguf.tokenizer import LLAMA_WORDS, QWEN_WORDS
from llmworks.tokenize.load import load_tokenizer, stop_ids

NEVER = -1e6  # score of a token that no merge makes


def add_vocabulary(writer: Any, source: Path, config: dict[str, Any]) -> None:
    """The `tokenizer.*` keys.

    Errors: ModelError for a tokenizer that llama.cpp has no name for, or that it would not follow to the token.
    """
    tokenizer = load_tokenizer(source)
    definition = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    model = definition["model"]
    if model["type"] != "BPE":
        raise ModelError(
            f"{source}: a {model['type']} tokenizer cannot be written as GGUF, only byte-level BPE and"
            " SentencePiece's BPE"
        )
    pieces = bool(model.get("byte_fallback"))
    size = int(config["vocab_size"])
    named = {*model["vocab"], *(added["content"] for added in definition["added_tokens"])}
    tokens, types = (
        [f"[PAD{i}]" if f"[PAD{i}]" not in named else f"[PAD{i}, no token]" for i in range(size)],
        [UNUSED] * size,
    )
    largest = max([*model["vocab"].values(), *(added["id"] for added in definition["added_tokens"])])
    if largest >= size:
        raise ModelError(f"{source}: its tokenizer has an id {largest}, its embedding {size} rows")
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, BYTE if pieces and re.fullmatch(r"<0x[0-9A-F]{2}>", token) else NORMAL
    for added in definition["added_tokens"]:
        text = added["content"].replace("\u2581", " ") if not added["special"] else added["content"]
        tokens[added["id"]], types[added["id"]] = text, CONTROL if added["special"] else USER_DEFINED
    if pieces and model.get("unk_token") in model["vocab"]:
        types[model["vocab"][model["unk_token"]]] = UNKNOWN
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else pre_tokenizer_name(definition, source))
    writer.add_token_list(tokens)
    if pieces:
        writer.add_token_scores(scores_of(model, types, source))
    writer.add_token_types(types)
    if not pieces:
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    _add_ids(writer, source, tokenizer)
    writer.add_add_bos_token(_begins(tokenizer))
    writer.add_add_space_prefix(_prefixed(definition) if pieces else False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _add_ids(writer: Any, source: Path, tokenizer: Any) -> None:
    stops = stop_ids(source, tokenizer)
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
    others = [i for i in stops if i != tokenizer.eos_token_id]
    if len(others) > 1:
        raise ModelError(f"{source}: has {len(stops)} stop ids, GGUF keeps two (eos and eot)")
    if others:
        writer.add_eot_token_id(others[0])
    for role, add in (
        ("bos", writer.add_bos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        index = getattr(tokenizer, f"{role}_token_id")
        if index is not None:
            add(index)


def _begins(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its first token before a text."""
    return tokenizer.bos_token_id is not None and list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]


def _prefixed(definition: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""
    normal, pre = definition.get("normalizer") or {}, definition.get("pre_tokenizer") or {}
    parts = [normal, pre, *(normal.get("normalizers") or ()), *(pre.get("pretokenizers") or ())]
    return any(
        part.get("type") == "Prepend" or (part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in parts
    )


def scores_of(model: dict[str, Any], types: list[int], source: Path) -> list[float]:
    """Scores by which llama.cpp joins pieces as the merges do.

    ModelError where it would not: merges that make one token have to follow one another, and no two pieces that make a
    token may be without a merge.
    """
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    vocabulary = model["vocab"]
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        first.setdefault(left + right, rank)
        if last.get(left + right, rank - 1) != rank - 1:
            raise ModelError(
                f"{source}: merges that make {left + right!r} do not follow one another, so that llama.cpp would"
                " tokenize in another way"
            )
        last[left + right] = rank
    known = set(pairs)
    made = [NEVER] * len(types)
    for token, index in vocabulary.items():
        if token in first:
            made[index] = -float(first[token])
            for at in range(1, len(token)):
                if (
                    token[:at] in vocabulary
                    and token[at:] in vocabulary
                    and (token[:at], token[at:]) not in known
                    and all(types[vocabulary[part]] in (NORMAL, BYTE) for part in (token[:at], token[at:]))
                ):
                    raise ModelError(
                        f"{source}: {token[:at]!r} and {token[at:]!r} have no merge though {token!r} is a token, so"
                        " that llama.cpp would tokenize in another way"
                    )
    return made


def pre_tokenizer_name(definition: dict[str, Any], source: Path) -> str:
    """llama.cpp's name of the way texts are split: plain byte level is "gpt-2", digits apart "smollm", words by a
    pattern "qwen2" or "llama-bpe".
    """
    pre = definition.get("pre_tokenizer") or {}
    parts = pre.get("pretokenizers", [pre])
    shape = [
        (p.get("type"), p.get("individual_digits"), p.get("add_prefix_space"), p.get("use_regex", True)) for p in parts
    ]
    byte_level = ("ByteLevel", None, False, True)
    if shape == [("Digits", True, None, True), byte_level]:
        return "smollm"
    if shape == [byte_level]:
        return "gpt-2"
    pattern = (
        (parts[0].get("pattern") or {}).get("Regex")
        if len(parts) == 2 and parts[0].get("type") == "Split" and shape[1][0] == "ByteLevel"
        else None
    )
    if pattern == QWEN_WORDS and (definition.get("normalizer") or {}).get("type") == "NFC":
        return "qwen2"
    if pattern == LLAMA_WORDS and definition["model"].get("ignore_merges"):
        return "llama-bpe"
    raise ModelError(f"{source}: its pre-tokenizer has no name in llama.cpp that is known here")
