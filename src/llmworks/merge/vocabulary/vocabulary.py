"""The vocabulary of a merge's result, and where each token's row comes from in each model: mergekit's rules
(`tokenizer`, `tokenizer_source`).

Does not read weights.

Other models' plain tokens are added to the result's vocabulary without BPE merges: they can be decoded and have rows,
while text is tokenized as by the base. mergekit adds them as added tokens, matched before any merge, which changes how
other text is tokenized.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmworks.core.errors import ModelError, UserError
from llmworks.merge.plan.config import ModelToken, TokenizerRule, Zero
from llmworks.merge.plan.layout import CheckpointLayout
from llmworks.tokenize.load import load_tokenizer, read_json

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "added_tokens.json",
    "merges.txt",
    "vocab.json",
)


@dataclass(frozen=True)
class MergedVocabulary:
    """The merged vocabulary: `rows` of the result's embedding, the first `tokens` of which belong to tokens.

    `source_rows`: by model, the row that each comes from, or -1; `substitutes`: for tokens a model lacks, the models'
    rows to average (empty: zeros).
    """

    tokens: int
    rows: int
    source_rows: Mapping[str, Any]
    substitutes: Mapping[int, tuple[tuple[str, int], ...]]
    source: Path
    definition: Mapping[str, Any] | None = field(
        default=None, repr=False
    )  # tokenizer.json's content, if it differs from the source's

    def find_zero_rows(self, models: Sequence[str]) -> list[int]:
        """Return the tokens for which none of these models has a row or a substitute: they get zeros."""
        return [
            row
            for row in range(self.tokens)
            if all(self.source_rows[name][row] < 0 for name in models)
            and self.substitutes.get(row)
            and not any(name in models for name, _ in self.substitutes[row])
        ]

    def write(self, out: Path) -> None:
        """Write the tokenizer's files."""
        copy_tokenizer(self.source, out)
        if self.definition is not None:
            (out / "tokenizer.json").write_text(json.dumps(self.definition, ensure_ascii=False), encoding="utf-8")


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy a tokenizer's files unchanged."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)


def write_special_token_ids(out: Path, tokenizer: Any, source: Path) -> None:
    """Write the ids of special tokens to the configs that have them; `generation_config.json` comes from the
    tokenizer's directory, if it has one.
    """
    made = read_json(out / "config.json")
    for part in (made, made["text_config"] if isinstance(made.get("text_config"), dict) else made):
        for role in ("bos", "eos", "pad"):
            if f"{role}_token_id" in part:
                part[f"{role}_token_id"] = getattr(tokenizer, f"{role}_token_id")
    (out / "config.json").write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    generation = out / "generation_config.json"
    if (source / "generation_config.json").exists():
        shutil.copyfile(source / "generation_config.json", generation)
    elif generation.exists():
        generation_config = read_json(generation)
        generation_config |= {
            f"{role}_token_id": getattr(tokenizer, f"{role}_token_id")
            for role in ("bos", "eos", "pad")
            if f"{role}_token_id" in generation_config
        }
        generation.write_text(json.dumps(generation_config, indent=2) + "\n", encoding="utf-8")


def require_same_tokens(models: Mapping[str, CheckpointLayout]) -> None:
    """Check that all models with a tokenizer have the same tokens with the same ids.

    ModelError that names a token with different ids in two models.
    """
    known = {
        name: get_token_ids(read_definition(layout), layout)
        for name, layout in models.items()
        if (layout.path / "tokenizer.json").exists()
    }
    first, *others = known.items() or [("", {})]
    for name, tokens in others:
        if tokens == first[1]:
            continue
        token, ids = next(
            (
                (token, (first[1].get(token), tokens.get(token)))
                for token in {**first[1], **tokens}
                if first[1].get(token) != tokens.get(token)
            ),
            ("", (None, None)),
        )
        ids_by_model = " and ".join(
            f"{i} in {who}" if i is not None else f"none in {who}" for i, who in zip(ids, (first[0], name), strict=True)
        )
        raise ModelError(
            f"the vocabularies of {first[0]} and {name} differ: the token {token!r} is {ids_by_model}; rows of"
            " different"
            " tokens would be merged. Set tokenizer_source: union, base or a model"
        )


def read_definition(layout: CheckpointLayout) -> dict[str, Any]:
    """Read tokenizer.json, without added tokens beyond the embedding's rows. ModelError if there is none."""
    if not (layout.path / "tokenizer.json").exists():
        raise ModelError(f"{layout.name}: has no tokenizer.json, which tokenizer_source requires")
    definition = read_json(layout.path / "tokenizer.json")
    added = definition.get("added_tokens") or []
    if (
        not isinstance(definition.get("model"), dict)
        or not isinstance(added, list)
        or not all(
            isinstance(one, dict) and isinstance(one.get("id"), int) and isinstance(one.get("content"), str)
            for one in added
        )
    ):
        raise ModelError(
            f"{layout.path}/tokenizer.json: is not a valid tokenizer (it needs a model, and added_tokens with id and"
            " content); copy or download it again"
        )
    definition["added_tokens"] = [one for one in added if not layout.vocab_size or one["id"] < layout.vocab_size]
    return definition


def get_token_ids(definition: Mapping[str, Any], layout: CheckpointLayout) -> dict[str, int]:
    """Return ids by token. ModelError for an unsupported kind of vocabulary."""
    found = definition["model"].get("vocab")
    if isinstance(found, list):  # Unigram: [token, score]
        found = {one[0]: at for at, one in enumerate(found)}
    if not isinstance(found, dict):
        raise ModelError(f"{layout.name}: tokenizer.json holds no supported vocabulary")
    most = layout.vocab_size
    return {
        token: at
        for token, at in {**found, **{one["content"]: one["id"] for one in definition["added_tokens"]}}.items()
        if not most or at < most
    }


def merge_vocabularies(
    rule: TokenizerRule, base: str, order: Sequence[str], models: Mapping[str, CheckpointLayout]
) -> MergedVocabulary:
    """Build the result's vocabulary and where its rows come from.

    Errors: UserError for rules with an unknown token or model; ModelError for tokenizers that cannot be combined.
    """
    definitions = {name: read_definition(models[name]) for name in order}
    known = {name: get_token_ids(definition, models[name]) for name, definition in definitions.items()}
    chosen = base if rule.source in ("union", "base") else rule.source
    definition = json.loads(json.dumps(definitions[chosen]))
    tokens = dict(known[chosen])
    if rule.source == "union":
        for name in order:
            _add_model_tokens(definition, tokens, definitions[name], known[name], name)
    for token in rule.tokens:
        if token not in tokens:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
            _add_token(definition, tokens, token, {"content": token, **flags})
    count = max(tokens.values()) + 1
    rows = -(-count // (rule.pad_to_multiple_of or 1)) * (rule.pad_to_multiple_of or 1)
    take = {name: np.full(rows, -1, np.int64) for name in order}
    for name in order:
        for token, row in tokens.items():
            if token in known[name]:
                take[name][row] = known[name][token]
    for token, one in rule.tokens.items():
        wanted = one.source if isinstance(one.source, ModelToken) else None
        if (
            wanted is not None
            and wanted.token_id is not None
            and wanted.model in models
            and not 0 <= wanted.token_id < models[wanted.model].vocab_size
        ):
            raise UserError(
                f"tokenizer.tokens.{token}: {wanted.model} has {models[wanted.model].vocab_size} rows, so no row for"
                f" token {wanted.token_id}"
            )
    spare = {
        row: _find_substitutes(token, rule, base, order, known)
        for token, row in tokens.items()
        if token in rule.tokens or any(take[name][row] < 0 for name in order)
    }
    for token, one in rule.tokens.items():
        if one.force:
            for name in order:
                take[name][tokens[token]] = -1
    changed = tokens != known[chosen] or definition["added_tokens"] != read_json(
        models[chosen].path / "tokenizer.json"
    ).get("added_tokens", [])
    return MergedVocabulary(count, rows, take, spare, models[chosen].path, definition if changed else None)


def _find_substitutes(
    token: str, rule: TokenizerRule, base: str, order: Sequence[str], known: Mapping[str, Mapping[str, int]]
) -> tuple[tuple[str, int], ...]:
    """Return the substitute rows of a token for models that lack it: by its rule; of the only model that has it; of
    the base; otherwise the mean of those that have it.
    """
    given = rule.tokens.get(token)
    having = [(name, known[name][token]) for name in order if token in known[name]]
    if given is not None:
        source = given.source
        if isinstance(source, Zero):
            return ()
        if source is None:
            raise UserError(
                f"tokenizer.tokens.{token}: give a source: a model, {{kind: zero}}, or {{kind: model_token, model,"
                " token}}"
            )
        name = source.model if isinstance(source, ModelToken) else source
        wanted = token if isinstance(source, str) else source.token
        row = (
            source.token_id
            if isinstance(source, ModelToken) and source.token_id is not None
            else known.get(name, {}).get(str(wanted))
        )
        if row is None:
            raise UserError(f"tokenizer.tokens.{token}: {name} has no token {wanted!r}")
        return ((name, row),)
    of_base = [one for one in having if one[0] == base]
    return tuple(having if len(having) < 2 or not of_base else of_base)


def _add_model_tokens(
    definition: dict[str, Any], tokens: dict[str, int], other: Mapping[str, Any], known: Mapping[str, int], name: str
) -> None:
    """Add another model's tokens, in the order of their ids."""
    added = {one["content"]: one for one in other["added_tokens"]}
    fresh = sorted((at, token) for token, at in known.items() if token not in tokens)
    if any(token not in added for _, token in fresh) and definition["model"].get("type") != "BPE":
        raise ModelError(
            f"{name}: has plain tokens that the base lacks, and a {definition['model'].get('type')} vocabulary cannot"
            " be extended by them; set tokenizer_source: base, or a model"
        )
    for _, token in fresh:
        _add_token(definition, tokens, token, added.get(token))


def _add_token(definition: dict[str, Any], tokens: dict[str, int], token: str, added: Mapping[str, Any] | None) -> None:
    """Add one token with the next id; also as an added token, matched before tokenization, if `added` describes it."""
    at = max(tokens.values()) + 1
    tokens[token] = at
    vocab = definition["model"]["vocab"]
    if isinstance(vocab, dict):
        for one in definition[
            "added_tokens"
        ]:  # ids of added tokens count from the vocabulary's size if they are not in it
            vocab.setdefault(one["content"], one["id"])
        vocab[token] = at
    if added is not None:
        definition["added_tokens"].append({**added, "id": at})


def check_token_ids(out: Path, vocabulary: MergedVocabulary) -> None:
    """Check that the written tokenizer has the ids that rows were made for.

    ModelError that names a token with another id.
    """
    if vocabulary.definition is None:
        return
    found = load_tokenizer(out).get_vocab()
    wanted = (
        {
            **vocabulary.definition["model"]["vocab"],
            **{one["content"]: one["id"] for one in vocabulary.definition["added_tokens"]},
        }
        if isinstance(vocabulary.definition["model"].get("vocab"), dict)
        else found
    )
    wrong = next((token for token, at in wanted.items() if found.get(token) != at), None)
    if wrong is not None:
        raise ModelError(
            f"the tokenizer that was written has {wrong!r} with id {found.get(wrong)} instead of {wanted[wrong]}; set"
            " tokenizer_source: base, or a model"
        )
