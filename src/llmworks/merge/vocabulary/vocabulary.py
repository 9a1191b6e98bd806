"""Whose tokens a merge's result has, and where each token's row comes from in each model: mergekit's rules
(`tokenizer`, `tokenizer_source`).

Knows no weights.

Other models' plain tokens are in the result's vocabulary without merges: they can be decoded and have rows, while texts
are split as the base splits them. mergekit adds them as texts to be found before any merge, which changes how other
texts are split.
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
from llmworks.merge.plan.layout import Layout
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
class Vocabulary:
    """`rows` of the result's embedding, of which the first `tokens` have one.

    `take`: by model, the row that each comes from, or -1; `spare`: where a model has none, the rows of models that are
    averaged (of none: zeros).
    """

    tokens: int
    rows: int
    take: Mapping[str, Any]
    spare: Mapping[int, tuple[tuple[str, int], ...]]
    source: Path
    definition: Mapping[str, Any] | None = field(
        default=None, repr=False
    )  # of tokenizer.json, where it is not the source's own

    def bare(self, models: Sequence[str]) -> list[int]:
        """Tokens that none of these models has a row for, nor a rule says what stands for it: they get zeros, and are
        others' own.
        """
        return [
            row
            for row in range(self.tokens)
            if all(self.take[name][row] < 0 for name in models)
            and self.spare.get(row)
            and not any(name in models for name, _ in self.spare[row])
        ]

    def write(self, out: Path) -> None:
        """The tokenizer's files."""
        copy_tokenizer(self.source, out)
        if self.definition is not None:
            (out / "tokenizer.json").write_text(json.dumps(self.definition, ensure_ascii=False), encoding="utf-8")


def copy_tokenizer(source: Path, out: Path) -> None:
    """A tokenizer's files, as they are."""
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)


def write_roles(out: Path, tokenizer: Any, source: Path) -> None:
    """The ids of tokens by their roles, where configs name them; `generation_config.json` is that of the directory that
    the tokenizer comes from, where it has one.
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
        said = read_json(generation)
        said |= {
            f"{role}_token_id": getattr(tokenizer, f"{role}_token_id")
            for role in ("bos", "eos", "pad")
            if f"{role}_token_id" in said
        }
        generation.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def same_tokens(models: Mapping[str, Layout]) -> None:
    """Whether all models that have a tokenizer have the same tokens under the same ids.

    ModelError that names a token which is another in two models.
    """
    known = {
        name: tokens_of(definition_of(layout), layout)
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
        told = " and ".join(
            f"{i} in {who}" if i is not None else f"none in {who}" for i, who in zip(ids, (first[0], name), strict=True)
        )
        raise ModelError(
            f"the vocabularies of {first[0]} and {name} differ: the token {token!r} is {told}; rows of other tokens"
            " would be merged. Give tokenizer_source: union, base or a model"
        )


def definition_of(layout: Layout) -> dict[str, Any]:
    """What tokenizer.json holds, without tokens that the embedding has no row for. ModelError where there is none."""
    if not (layout.path / "tokenizer.json").exists():
        raise ModelError(f"{layout.name}: has no tokenizer.json, which tokenizer_source needs")
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
            f"{layout.path}/tokenizer.json: is no tokenizer (it needs a model, and added_tokens with id and content);"
            " copy or fetch it again"
        )
    definition["added_tokens"] = [one for one in added if not layout.vocabulary or one["id"] < layout.vocabulary]
    return definition


def tokens_of(definition: Mapping[str, Any], layout: Layout) -> dict[str, int]:
    """Ids by token. ModelError for a kind of vocabulary that has none."""
    found = definition["model"].get("vocab")
    if isinstance(found, list):  # Unigram: [token, score]
        found = {one[0]: at for at, one in enumerate(found)}
    if not isinstance(found, dict):
        raise ModelError(f"{layout.name}: tokenizer.json holds no vocabulary that is known here")
    most = layout.vocabulary
    return {
        token: at
        for token, at in {**found, **{one["content"]: one["id"] for one in definition["added_tokens"]}}.items()
        if not most or at < most
    }


def vocabulary_of(rule: TokenizerRule, base: str, order: Sequence[str], models: Mapping[str, Layout]) -> Vocabulary:
    """The result's tokens, and where their rows come from.

    Errors: UserError for rules that name no token or no model; ModelError for tokenizers that cannot be joined.
    """
    definitions = {name: definition_of(models[name]) for name in order}
    known = {name: tokens_of(definition, models[name]) for name, definition in definitions.items()}
    chosen = base if rule.source in ("union", "base") else rule.source
    definition = json.loads(json.dumps(definitions[chosen]))
    tokens = dict(known[chosen])
    if rule.source == "union":
        for name in order:
            _join(definition, tokens, definitions[name], known[name], name)
    for token in rule.tokens:
        if token not in tokens:
            _add(
                definition,
                tokens,
                token,
                {
                    "content": token,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": False,
                },
            )
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
            and not 0 <= wanted.token_id < models[wanted.model].vocabulary
        ):
            raise UserError(
                f"tokenizer.tokens.{token}: {wanted.model} has {models[wanted.model].vocabulary} rows, and none of the"
                f" token {wanted.token_id}"
            )
    spare = {
        row: _spare(token, rule, base, order, known)
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
    return Vocabulary(count, rows, take, spare, models[chosen].path, definition if changed else None)


def _spare(
    token: str, rule: TokenizerRule, base: str, order: Sequence[str], known: Mapping[str, Mapping[str, int]]
) -> tuple[tuple[str, int], ...]:
    """The rows that stand for a token in models that have none: by its rule; of the only model that has it; of the
    base; else the mean of those that do.
    """
    given = rule.tokens.get(token)
    having = [(name, known[name][token]) for name in order if token in known[name]]
    if given is not None:
        source = given.source
        if isinstance(source, Zero):
            return ()
        if source is None:
            raise UserError(
                f"tokenizer.tokens.{token}: give its source: a model, {{kind: zero}}, or {{kind: model_token, model,"
                " token}"
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


def _join(
    definition: dict[str, Any], tokens: dict[str, int], other: Mapping[str, Any], known: Mapping[str, int], name: str
) -> None:
    """Add another model's tokens, in the order of their ids."""
    added = {one["content"]: one for one in other["added_tokens"]}
    fresh = sorted((at, token) for token, at in known.items() if token not in tokens)
    if any(token not in added for _, token in fresh) and definition["model"].get("type") != "BPE":
        raise ModelError(
            f"{name}: has plain tokens that the base has not, and a {definition['model'].get('type')} vocabulary cannot"
            " take them in; give tokenizer_source: base, or a model"
        )
    for _, token in fresh:
        _add(definition, tokens, token, added.get(token))


def _add(definition: dict[str, Any], tokens: dict[str, int], token: str, added: Mapping[str, Any] | None) -> None:
    """One token under the next id; one that is found before texts are split, too, where `added` says how."""
    at = max(tokens.values()) + 1
    tokens[token] = at
    vocab = definition["model"]["vocab"]
    if isinstance(vocab, dict):
        for one in definition[
            "added_tokens"
        ]:  # ids of added tokens are counted from the size of the vocabulary, where they are not in it
            vocab.setdefault(one["content"], one["id"])
        vocab[token] = at
    if added is not None:
        definition["added_tokens"].append({**added, "id": at})


def check_written(out: Path, vocabulary: Vocabulary) -> None:
    """Whether the tokenizer that was written has the ids that rows were made for.

    ModelError that names a token where it has not.
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
            f"the tokenizer that was made has {wrong!r} under {found.get(wrong)}, in place of {wanted[wrong]}; give"
            " tokenizer_source: base, or a model"
        )
