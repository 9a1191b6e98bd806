"""The head of a model card (README.md): licence, languages, what it was made of, as the Hub reads them. Knows no step that makes models."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmworks.artifact import Model
from llmworks.assets.catalogue import CATALOGUE
from llmworks.lineage import declared

CARRIED = ("license", "license_name", "license_link", "language")


def front_of(model: Model) -> dict[str, Any]:
    """What a model's card, or the catalogue, says of its licence and languages."""
    said = declared.front_of(model.path)
    front = {key: said[key] for key in CARRIED if key in said}
    return front if "license" in front else front | _licence(asset_of(model))


def asset_of(model: Model) -> str:
    """The asset that a model is, or was made of in one step (converted, an adapter folded into it); nothing for any other."""
    parents = model.manifest.parents if model.manifest is not None else ()
    refs = [model.ref, *(parent.ref for parent in parents if parent.kind == "model")]
    return next((ref.removeprefix("asset:") for ref in refs if ref.startswith("asset:")), "")


def bases_of(models: Sequence[Model], relation: str) -> dict[str, Any]:
    """`base_model` and its relation, for those that are on the Hub."""
    found = [model.ref.removeprefix("hf:") if model.ref.startswith("hf:") else CATALOGUE[asset_of(model)].hub if asset_of(model) in CATALOGUE else "" for model in models]
    names = list(dict.fromkeys(name for name in found if name))
    return {"base_model": names[0] if len(names) == 1 else names, "base_model_relation": relation} if names else {}


def write(out: Path, front: Mapping[str, Any], lines: Sequence[str]) -> None:
    """README.md."""
    (out / "README.md").write_text("---\n" + yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True) + "---\n" + "\n".join(lines), encoding="utf-8")


def plain(name: str) -> str:
    """A name without what the Hub's names may not have."""
    return re.sub(r"[^\w.-]+", "-", name.rpartition("/")[2].removeprefix("asset:").removesuffix(".gguf")).strip("-.") or "model"


def _licence(name: str) -> dict[str, str]:
    """Of an asset, as the Hub writes licences."""
    found = CATALOGUE[name].licence if name in CATALOGUE else ""
    return {"license": found.lower()} if re.fullmatch(r"[A-Za-z0-9.-]+", found) else {"license": "other", "license_name": found} if found else {}
