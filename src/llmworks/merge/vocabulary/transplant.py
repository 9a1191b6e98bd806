"""Map one vocabulary to another: the bytes of tokens, tokens that both tokenizers have, and substitutes for the others.

See `merge/transplant.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from llmworks.core.artifact import Dataset, Model, Tokenizer
from llmworks.core.context import Context
from llmworks.core.errors import DataError, LlmworksError, ModelError, RequestError
from llmworks.data.conversations.training_rows import read_training_rows, tokenize_row
from llmworks.merge.execute.run import write_config, write_weights
from llmworks.merge.execute.stream import MergeStream
from llmworks.merge.plan.config import MergeConfig
from llmworks.merge.plan.layout import read_layout
from llmworks.merge.plan.plan import plan_merge
from llmworks.merge.vocabulary.config import TransplantConfig
from llmworks.merge.vocabulary.tokenizer_files import make_logits_function
from llmworks.merge.vocabulary.vocabulary import (
    TOKENIZER_FILES,
    MergedVocabulary,
    copy_tokenizer,
    read_definition,
    write_special_token_ids,
)
from llmworks.model.card import get_base_model_fields, get_front_matter, to_hub_name, write_model_card
from llmworks.model.io.safetensors_io import TORCH_DTYPES
from llmworks.tokenize.bpe.bulk_encoder import get_byte_characters
from llmworks.tokenize.chat import golden
from llmworks.tokenize.load import count_embedding_rows as rows_of
from llmworks.tokenize.load import get_stop_ids, load_tokenizer, read_json

ROLES = ("bos", "eos", "pad", "unk")
MODEL_NAME = "model"  # the model's name in the plan


@dataclass(frozen=True)
class TokenMapping:
    """Where each new token's row comes from: the row of the same token (`same`), of the token of the same role
    (`role`), the mean of pieces (`pieces`); `lost`: no piece was found.
    """

    same: Mapping[int, int]
    role: Mapping[int, int]
    pieces: Mapping[int, tuple[int, ...]]
    lost: tuple[int, ...]


def token_bytes(tokenizer: Any, definition: Mapping[str, Any]) -> dict[int, bytes]:
    """Return tokens as bytes, by id; added tokens as their UTF-8 text.

    Byte-level vocabularies are decoded to bytes, SentencePiece's space mark to a space; subword prefixes and word-end
    suffixes (##, </w>) are removed.
    """
    added, model = (
        {one["id"]: one["content"].encode() for one in definition.get("added_tokens", [])},
        definition.get("model") or {},
    )
    inside, end = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    vocab, level = (
        tokenizer.get_vocab(),
        "ByteLevel" in json.dumps([definition.get("pre_tokenizer"), definition.get("decoder")]),
    )
    letters, found = get_byte_characters(), dict(added)
    for token, at in vocab.items():
        if at in added:
            continue
        if inside and token.startswith(inside) and token != inside:
            token = token.removeprefix(inside)
        if end and token.endswith(end) and token != end:
            token = token.removesuffix(end)
        if level and all(letter in letters for letter in token):
            found[at] = bytes(letters[letter] for letter in token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            found[at] = bytes([int(token[3:5], 16)])
        else:
            found[at] = token.replace("\u2581", " ").encode()
    return found


def map_tokens(old: Any, new: Any, definitions: tuple[Mapping[str, Any], Mapping[str, Any]], rows: int) -> TokenMapping:
    """Map the ids of a tokenizer with `rows` embedding rows to those of another."""
    before, after = (token_bytes(one, definition) for one, definition in zip((old, new), definitions, strict=True))
    special = [
        {one["id"] for one in definition.get("added_tokens", []) if one.get("special")} for definition in definitions
    ]
    by_bytes = {(data, at in special[0]): at for at, data in sorted(before.items(), reverse=True)}
    roles = {getattr(new, f"{role}_token_id"): getattr(old, f"{role}_token_id") for role in ROLES}
    same: dict[int, int] = {}
    role: dict[int, int] = {}
    pieces: dict[int, tuple[int, ...]] = {}
    lost: list[int] = []
    for at, data in sorted(after.items()):
        if (data, at in special[1]) in by_bytes:
            same[at] = by_bytes[data, at in special[1]]
        elif roles.get(at) is not None:
            role[at] = int(roles[at])
        else:
            parts = tuple(part for part in _split_token(old, data, by_bytes) if part < rows)
            if parts:
                pieces[at] = parts
            else:
                lost.append(at)
    return TokenMapping(same, role, pieces, tuple(lost))


def _split_token(old: Any, data: bytes, by_bytes: Mapping[tuple[bytes, bool], int]) -> Sequence[int]:
    """Split a new token with the old tokenizer: its text, or, if it is not valid UTF-8, its single bytes."""
    try:
        found = list(old(data.decode(), add_special_tokens=False, split_special_tokens=True)["input_ids"])
    except UnicodeDecodeError:
        found = []
    if not found:
        single = [by_bytes.get((bytes([one]), False)) for one in data]
        return [one for one in single if one is not None] if all(one is not None for one in single) else []
    return [at for at in found if at != old.unk_token_id]


def run(
    config: TransplantConfig, model: Model, tokenizer: Model | Tokenizer, ctx: Context, data: Dataset | None
) -> Model:
    """Run the stage."""
    if model.format != "hf":
        raise ModelError(
            f"{model.name}: is a {model.format} file; only a Hugging Face directory can be given another tokenizer"
        )
    layout = read_layout(model.name, model.path)
    if layout.find_embedding() is None:
        raise ModelError(f"{model.name}: no embedding with {layout.vocab_size} rows was found")
    old, new = load_tokenizer(model.path), load_tokenizer(tokenizer.path)
    definitions = read_definition(layout), _read_tokenizer_json(tokenizer.path)
    mapping = map_tokens(old, new, definitions, layout.vocab_size)
    count = rows_of(new)
    take = np.full(count, -1, np.int64)
    for at, row in {**mapping.same, **mapping.role}.items():
        take[at] = row
    strange = next((row for row in take.tolist() if row >= layout.vocab_size), None)
    if strange is not None:
        raise ModelError(
            f"{model.name}: its tokenizer has an id {strange}, but its embedding only {layout.vocab_size} rows"
        )
    spare = _get_new_token_rows(config, mapping)
    vocabulary = MergedVocabulary(count, count, {MODEL_NAME: take}, spare, tokenizer.path)
    merge = MergeConfig.model_validate(
        {"merge_method": "passthrough", "models": [{"model": MODEL_NAME}], "max_shard_size": config.max_shard_size}
    )
    plan = plan_merge(merge, {MODEL_NAME: layout}, count)
    size = write_weights(
        MergeStream(plan, {MODEL_NAME: layout}, vocabulary, ctx.seed), config.max_shard_size, {MODEL_NAME: layout}, ctx
    )
    write_config(merge, layout, plan, vocabulary, ctx.out)
    for name in TOKENIZER_FILES:
        (ctx.out / name).unlink(missing_ok=True)
    copy_tokenizer(tokenizer.path, ctx.out)
    write_special_token_ids(ctx.out, new, tokenizer.path)
    metrics: dict[str, Any] = {
        "bytes": size,
        "vocabulary": count,
        "same": len(mapping.same),
        "by_role": len(mapping.role),
        "by_pieces": len(mapping.pieces),
        "lost": len(mapping.lost),
    }
    if data is not None:
        rows = read_training_rows(data)[: config.eval_samples]
        metrics |= {
            "bits_per_byte_before": round(compute_bits_per_byte(model.path, old, rows), 5),
            "bits_per_byte": round(compute_bits_per_byte(ctx.out, new, rows), 5),
        }
    out_tokenizer = load_tokenizer(ctx.out)
    recorded = golden.record_golden(out_tokenizer, get_stop_ids(ctx.out, out_tokenizer), make_logits_function(ctx.out))
    _write_report(config, model, tokenizer, mapping, old, new, metrics, ctx)
    return Model(
        ctx.out,
        golden=recorded,
        metrics=metrics,
        about={"format": "hf", "method": "transplant", "dtype": TORCH_DTYPES[plan.jobs[0].out_dtype]},
    )


def _get_new_token_rows(config: TransplantConfig, mapping: TokenMapping) -> dict[int, tuple[tuple[str, int], ...]]:
    """Return the rows of the old embedding whose mean initializes a new token."""
    spare = (
        {at: tuple((MODEL_NAME, part) for part in parts) for at, parts in mapping.pieces.items()}
        if config.approximation_method == "subword"
        else {}
    )
    fresh = [*mapping.lost, *(mapping.pieces if config.approximation_method != "subword" else ())]
    if config.approximation_method != "zero" and fresh:
        spare |= dict.fromkeys(
            fresh,
            tuple((MODEL_NAME, row) for row in sorted(set(mapping.same.values()))[:: max(1, len(mapping.same) // 256)]),
        )  # the mean of some hundreds of evenly spaced rows
    return spare


def _read_tokenizer_json(path: Path) -> dict[str, Any]:
    if not (path / "tokenizer.json").exists():
        raise ModelError(f"{path}: has no tokenizer.json")
    return read_json(path / "tokenizer.json")


def compute_bits_per_byte(path: Path, tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> float:
    """Compute a model's bits per byte on rows. DataError if no row can be tokenized."""
    logits, loss, size = make_logits_function(path), 0.0, 0
    refused: LlmworksError | None = None
    for row in rows:
        try:
            ids = list(tokenize_row(tokenizer, dict(row))[0])[:512]
        except (RequestError, ModelError) as error:
            refused = error
            continue
        if len(ids) > 1:
            token_logits = torch.as_tensor(np.asarray(logits(ids)))
            loss += float(F.cross_entropy(token_logits[:-1], torch.tensor(ids[1:]), reduction="sum"))
            size += len(
                tokenizer.decode(ids[1:], skip_special_tokens=True, clean_up_tokenization_spaces=False).encode()
            )
    if not size:
        raise DataError(
            f"none of {len(rows)} rows can be tokenized by this tokenizer" + (f": {refused}" if refused else "")
        )
    return loss / size / math.log(2)


def _write_report(
    config: TransplantConfig,
    model: Model,
    tokenizer: Model | Tokenizer,
    mapping: TokenMapping,
    old: Any,
    new: Any,
    metrics: Mapping[str, Any],
    ctx: Context,
) -> None:
    page = ctx.report
    page.title = f"{model.name} with the tokenizer of {tokenizer.name}"
    bits_sentence = (
        f" Bits per byte: {metrics['bits_per_byte_before']:.3f} before, {metrics['bits_per_byte']:.3f} after."
        if "bits_per_byte" in metrics
        else ""
    )
    start = "the mean of their pieces" if config.approximation_method == "subword" else config.approximation_method
    page.subtitle = (
        f"Of {metrics['vocabulary']:,} tokens {metrics['same']:,} are the model's own, {metrics['by_role']:,} are"
        f" matched by role, {metrics['by_pieces']:,} are initialized to"
        f" {start}.{bits_sentence}"
    )
    names, letters = (
        {at: token for token, at in new.get_vocab().items()},
        {at: token for token, at in old.get_vocab().items()},
    )
    shown = [*mapping.pieces.items()][:: max(1, len(mapping.pieces) // 40)][:40]
    page.add_table(
        "Some new tokens",
        ("token", "pieces"),
        [(repr(names.get(at, "")), " ".join(repr(letters.get(part, "")) for part in parts)) for at, parts in shown],
    )
    page.add_table(
        "By role",
        ("token", "old token"),
        [(repr(names.get(at, "")), repr(letters.get(row, ""))) for at, row in mapping.role.items()],
    )
    page.data = dict(metrics)
    front = {
        **get_front_matter(model),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **get_base_model_fields([model], "finetune"),
        "tags": ["tokenizer-transplant"],
    }
    write_model_card(
        ctx.out,
        front,
        [
            f"# {to_hub_name(model.name)}-{to_hub_name(tokenizer.name)}-tokenizer",
            "",
            page.subtitle,
            "",
            "Train it further before use.",
            "",
        ],
    )
    ctx.progress.log(page.subtitle)
