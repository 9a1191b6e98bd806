"""Tokenizer, chat template and golden tokens of a merge: written and replayed before any weight, recorded after.

Does not know the methods.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmworks.core.artifact import Model
from llmworks.core.context import Context
from llmworks.core.errors import ModelError, UserError
from llmworks.merge.plan.config import MergeConfig
from llmworks.merge.plan.layout import CheckpointLayout
from llmworks.merge.vocabulary.vocabulary import (
    MergedVocabulary,
    check_token_ids,
    copy_tokenizer,
    write_special_token_ids,
)
from llmworks.tokenize.chat import golden
from llmworks.tokenize.chat.named_templates import FOLDER, NAMED_TEMPLATES
from llmworks.tokenize.load import get_stop_ids, load_tokenizer, read_json


def write_tokenizer(
    config: MergeConfig,
    layouts: Mapping[str, CheckpointLayout],
    donor: str,
    vocabulary: MergedVocabulary | None,
    out: Path,
) -> str:
    """Write the tokenizer's files and chat template; return the model they come from, or "" if it has none."""
    source = (
        donor
        if vocabulary is None
        else next(name for name, layout in layouts.items() if layout.path == vocabulary.source)
    )
    if vocabulary is None:
        copy_tokenizer(layouts[donor].path, out)
    else:
        vocabulary.write(out)
        check_token_ids(out, vocabulary)
        if source != donor:  # configs refer to special tokens by id
            write_special_token_ids(out, load_tokenizer(out), layouts[source].path)
    if config.chat_template:
        if not (out / "tokenizer_config.json").exists():
            raise UserError(f"chat_template: {donor} has no tokenizer to write it to")
        template = resolve_template(config.chat_template, layouts, source)
        if template:
            (out / "chat_template.jinja").write_text(template, encoding="utf-8")
            settings = read_json(out / "tokenizer_config.json")
            settings.pop("chat_template", None)
            (out / "tokenizer_config.json").write_text(
                json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
    return source if (out / "tokenizer.json").exists() else ""


def resolve_template(chat_template: str, layouts: Mapping[str, CheckpointLayout], source: str) -> str:
    """Return the chat template: auto: the most common one; a name of `tokenize.named`; or the template itself.

    UserError for anything else.
    """
    if chat_template == "auto":
        found = [
            load_tokenizer(layout.path).chat_template
            for layout in layouts.values()
            if (layout.path / "tokenizer_config.json").exists()
        ]
        templates = [str(one).strip() for one in found if one]
        return max(templates, key=templates.count) if templates else ""
    if chat_template in NAMED_TEMPLATES:
        known = load_tokenizer(layouts[source].path).get_vocab()
        missing = [token for token in NAMED_TEMPLATES[chat_template].special_tokens if token not in known]
        if missing:
            raise UserError(f"chat_template: {chat_template} uses {missing[0]}, which is not a token of {source}")
        return (FOLDER / f"{chat_template}.jinja").read_text(encoding="utf-8")
    if len(chat_template) < 20 or "{" not in chat_template:
        raise UserError(
            f"chat_template: {chat_template!r} is neither auto, nor a known name ({', '.join(NAMED_TEMPLATES)}), nor"
            " a Jinja template"
        )
    return chat_template


def replay_tokenizer(source: Model, ctx: Context, layouts: Mapping[str, CheckpointLayout]) -> tuple[Any, list[int]]:
    """Return (the result's tokenizer, its stop ids), before any weight is written; token ids, loss mask and stop tokens
    must match the model whose tokenizer it has.

    Warns of models that end their replies with other tokens.

    Errors: ModelError for unreadable tokenizer files of a model or of the result, UserError for a template that cannot
    be rendered; GoldenMismatch.
    """
    owns = {
        name: get_stop_tokens(layout.path)
        for name, layout in layouts.items()
        if (layout.path / "tokenizer_config.json").exists()
    }
    theirs = load_tokenizer(source.path)
    tokenizer = load_tokenizer(ctx.out)
    stops = get_stop_ids(ctx.out, tokenizer)
    templates = [str(one.chat_template or "").strip() for one in (theirs, tokenizer)]
    if templates[0] != templates[1] and not golden.render_golden_conversations(tokenizer):
        raise UserError("chat_template: the template cannot be rendered for any conversation; check its Jinja")
    if templates[0] == templates[1]:
        golden_tokens = source.golden or golden.record_golden(
            theirs, get_stop_ids(source.path, theirs), lambda ids: [[0.0]] * len(ids)
        )
        golden.require_replay(golden_tokens, tokenizer, stops, step="merge")
    ends = [str(tokenizer.convert_ids_to_tokens(i)) for i in stops]
    for name, own in owns.items():
        other = [token for token in own if token not in ends]
        if other:
            ctx.progress.log(
                f"warning: {name} ends its replies with {', '.join(other)}, the result with {', '.join(ends)}; a"
                f" reply in the style of {name} may not end"
            )
    return tokenizer, stops


def get_stop_tokens(path: Path) -> list[str]:
    """Return the tokens that end a model's replies."""
    tokenizer = load_tokenizer(path)
    return [str(tokenizer.convert_ids_to_tokens(i)) for i in get_stop_ids(path, tokenizer)]


def make_logits_function(path: Path) -> golden.Logits:
    """Return a function that computes a directory's logits, block by block if its decoder is supported, otherwise
    with the whole model loaded.
    """
    from llmworks.model.golden import make_logits_function
    from llmworks.model.io.layer_forward import compute_logits
    from llmworks.model.io.layer_reader import LayerReader
    from llmworks.model.io.load import load_model

    try:
        source = LayerReader(path)
    except ModelError:
        return make_logits_function(load_model(path))
    return lambda ids: compute_logits(source, [list(ids)])[0]
