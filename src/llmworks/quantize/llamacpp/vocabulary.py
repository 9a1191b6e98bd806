"""Write a tokenizer as GGUF keys: byte-level BPE with its merges, SentencePiece BPE with its scores. Does not know
weights.

SentencePiece's scores are not in `tokenizer.json`; only their order matters, which is that of the merges: a token's
score is minus the rank of the first merge that produces it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from llmworks.core.errors import ModelError
from llmworks.model.gguf.layout import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from llmworks.model.gguf.tokenizer import LLAMA_PATTERN, QWEN_PATTERN
from llmworks.tokenize.load import get_stop_ids, load_tokenizer

NEVER = -1e6  # score of a token that no merge produces


def add_vocabulary(writer: Any, source: Path, config: dict[str, Any]) -> None:
    """Write the `tokenizer.*` keys.

    Errors: ModelError for a tokenizer that llama.cpp does not support, or would not reproduce exactly.
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
        raise ModelError(f"{source}: its tokenizer has an id {largest}, but its embedding only {size} rows")
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
        writer.add_token_scores(compute_scores(model, types, source))
    writer.add_token_types(types)
    if not pieces:
        writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    _add_ids(writer, source, tokenizer)
    writer.add_add_bos_token(_adds_bos(tokenizer))
    writer.add_add_space_prefix(_adds_space_prefix(definition) if pieces else False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _add_ids(writer: Any, source: Path, tokenizer: Any) -> None:
    stops, size = get_stop_ids(source, tokenizer), len(tokenizer)
    beyond = next((i for i in stops if not 0 <= i < size), None)
    if beyond is not None:
        raise ModelError(
            f"{source}: the stop id {beyond} is beyond the vocabulary of {size} tokens; correct eos_token_id in"
            " generation_config.json"
        )
    if tokenizer.eos_token_id is not None:
        writer.add_eos_token_id(tokenizer.eos_token_id)
    others = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in stops if i != tokenizer.eos_token_id}
    eom = next((i for i, token in others.items() if "eom" in token), None)  # end of message: a tool is to be called
    turns = [i for i in others if i != eom]
    if eom is None and len(turns) == 2:
        eom = turns.pop()
    if len(turns) > 1:
        named = ", ".join(repr(others[i]) for i in turns)
        raise ModelError(f"{source}: has the stop tokens {named}; beside eos, GGUF stores two (eot and eom)")
    if turns:
        writer.add_eot_token_id(turns[0])
    if eom is not None:
        writer.add_eom_token_id(eom)
    for role, add in (
        ("bos", writer.add_bos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        index = getattr(tokenizer, f"{role}_token_id")
        if index is not None:
            add(index)


def _adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer prepends its BOS token."""
    return tokenizer.bos_token_id is not None and list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]


def _adds_space_prefix(definition: dict[str, Any]) -> bool:
    """Return whether a space is prepended to the text."""
    normal, pre = definition.get("normalizer") or {}, definition.get("pre_tokenizer") or {}
    parts = [normal, pre, *(normal.get("normalizers") or ()), *(pre.get("pretokenizers") or ())]
    return any(
        part.get("type") == "Prepend" or (part.get("type") == "Metaspace" and part.get("prepend_scheme") != "never")
        for part in parts
    )


def compute_scores(model: dict[str, Any], types: list[int], source: Path) -> list[float]:
    """Return scores with which llama.cpp merges pieces as the BPE merges do.

    ModelError if that is impossible: merges that produce the same token must be consecutive, and any two pieces that
    form a token must have a merge.
    """
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    vocabulary = model["vocab"]
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for rank, (left, right) in enumerate(pairs):
        first.setdefault(left + right, rank)
        if last.get(left + right, rank - 1) != rank - 1:
            raise ModelError(
                f"{source}: merges that produce {left + right!r} are not consecutive, so llama.cpp would tokenize"
                " differently"
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
                        f"{source}: {token[:at]!r} and {token[at:]!r} have no merge although {token!r} is a token, so"
                        " llama.cpp would tokenize differently"
                    )
    return made


def pre_tokenizer_name(definition: dict[str, Any], source: Path) -> str:
    """Return llama.cpp's name of the pre-tokenizer: plain byte level is "gpt-2", with individual digits "smollm",
    split by a regex "qwen2" or "llama-bpe".
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
    if pattern == QWEN_PATTERN and (definition.get("normalizer") or {}).get("type") == "NFC":
        return "qwen2"
    if pattern == LLAMA_PATTERN and definition["model"].get("ignore_merges"):
        return "llama-bpe"
    raise ModelError(f"{source}: its pre-tokenizer is not supported by llama.cpp (no known name)")
