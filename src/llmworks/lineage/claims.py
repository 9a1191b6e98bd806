"""Read the provenance and license claims in an external model's files: model card, adapter config, mergekit
configuration, GGUF metadata.

Claims are not verified.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RECIPES = ("mergekit_config.yml", "mergekit_config.yaml", "mergekit_moe_config.yml")
HUB = re.compile(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)")


@dataclass(frozen=True)
class Claim:
    """A parent named by a file. `relation`: finetune, adapter, merge, quantized, or as stated in the file."""

    name: str
    relation: str
    file: str


def claims(path: Path) -> list[Claim]:
    """List the parents named in a model's files; each once, from the first file that names it."""
    found: dict[str, Claim] = {}
    for claim in _all(path):
        if claim.name and claim.name.lower() not in ("none", "null", "."):
            name = claim.name.encode("utf-8", "replace").decode()[:200]
            found.setdefault(name, Claim(name, claim.relation.encode("utf-8", "replace").decode()[:100], claim.file))
    return list(found.values())


def licence(path: Path) -> str:
    """Return the license stated in a model's card or GGUF metadata, in the Hub's spelling; empty where none is."""
    front = front_of(path)
    said = front.get("license")
    if isinstance(said, list):
        said = said[0] if said else ""
    if str(said or "").lower() == "other" and front.get("license_name"):
        said = front["license_name"]
    if not said:
        said = _gguf(path).get("general.license", "")
    return str(said or "").strip().lower()


def _all(path: Path) -> Iterator[Claim]:
    folder = path if path.is_dir() else path.parent
    for name in RECIPES:
        yield from _recipe(folder / name)
    adapter = _json(folder / "adapter_config.json")
    if adapter.get("base_model_name_or_path"):
        yield Claim(str(adapter["base_model_name_or_path"]), "adapter", "adapter_config.json")
    front = front_of(path)
    bases = front.get("base_model") or []
    relation = str(
        front.get("base_model_relation") or ("merge" if isinstance(bases, list) and len(bases) > 1 else "finetune")
    )
    for base in bases if isinstance(bases, list) else [bases]:
        yield Claim(str(base), relation, "README.md")
    metadata = _gguf(path)
    for number in range(int(metadata.get("general.base_model.count", 0) or 0)):
        url = str(metadata.get(f"general.base_model.{number}.repo_url", ""))
        named = HUB.match(url)
        yield Claim(
            named[1] if named else str(metadata.get(f"general.base_model.{number}.name", "")), "quantized", path.name
        )


def _recipe(file: Path) -> Iterator[Claim]:
    """Yield the models that a mergekit configuration names."""
    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return
    method = str(said.get("merge_method") or "experts") if isinstance(said, dict) else ""
    todo: list[Any] = [said]
    while todo:
        value = todo.pop(0)
        if isinstance(value, dict):
            for key, inside in value.items():
                if key in ("model", "base_model", "source_model"):
                    name = inside.get("path") or (inside.get("model") or {}) if isinstance(inside, dict) else inside
                    yield Claim(
                        str(name.get("path", "")) if isinstance(name, dict) else str(name or ""),
                        f"merge, {method}",
                        file.name,
                    )
                elif isinstance(inside, (dict, list)):
                    todo.append(inside)
        elif isinstance(value, list):
            todo += value


def front_of(path: Path) -> dict[str, Any]:
    """Read the YAML front matter of the model card (README.md); {} where there is none that is readable."""
    card = (path if path.is_dir() else path.parent) / "README.md"
    if path.is_file() and path.suffix == ".gguf" and not card.exists():
        return {}
    try:
        found = re.match(r"---\n(.*?)\n---\n", card.read_text(encoding="utf-8"), re.S)
        front = (
            yaml.load(found[1], yaml.BaseLoader) if found else None
        )  # all values as strings: the language code `no` is not false
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return dict(front) if isinstance(front, dict) else {}


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _gguf(path: Path) -> dict[str, Any]:
    """Read the general.* metadata of a GGUF file."""
    files = (
        [path]
        if path.suffix == ".gguf" and path.is_file()
        else sorted(path.glob("*.gguf"))[:1]
        if path.is_dir()
        else []
    )
    if not files:
        return {}
    from gguf import GGUFReader

    try:
        fields = GGUFReader(files[0]).fields
        return {name: field.contents() for name, field in fields.items() if name.startswith("general.")}
    except Exception:  # an invalid GGUF file raises many exception types
        return {}
