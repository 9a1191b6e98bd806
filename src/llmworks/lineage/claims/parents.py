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

MERGEKIT_FILES = ("mergekit_config.yml", "mergekit_config.yaml", "mergekit_moe_config.yml")
HUB = re.compile(r"https?://huggingface\.co/([\w.-]+/[\w.-]+)")


@dataclass(frozen=True)
class ParentClaim:
    """A parent named by a file. `relation`: finetune, adapter, merge, quantized, or as stated in the file."""

    name: str
    relation: str
    file: str


def list_claims(path: Path) -> list[ParentClaim]:
    """List the parents named in a model's files; each once, from the first file that names it."""
    claims_by_name: dict[str, ParentClaim] = {}
    for claim in _iterate_claims(path):
        if claim.name and claim.name.lower() not in ("none", "null", "."):
            name = claim.name.encode("utf-8", "replace").decode()[:200]
            claims_by_name.setdefault(
                name, ParentClaim(name, claim.relation.encode("utf-8", "replace").decode()[:100], claim.file)
            )
    return list(claims_by_name.values())


def read_license(path: Path) -> str:
    """Return the license stated in a model's card or GGUF metadata, in the Hub's spelling; empty where none is."""
    front_matter = read_front_matter(path)
    stated = front_matter.get("license")
    if isinstance(stated, list):
        stated = stated[0] if stated else ""
    if str(stated or "").lower() == "other" and front_matter.get("license_name"):
        stated = front_matter["license_name"]
    if not stated:
        stated = _read_gguf_metadata(path).get("general.license", "")
    return str(stated or "").strip().lower()


def _iterate_claims(path: Path) -> Iterator[ParentClaim]:
    folder = path if path.is_dir() else path.parent
    for name in MERGEKIT_FILES:
        yield from _read_mergekit_config(folder / name)
    adapter = _read_json(folder / "adapter_config.json")
    if adapter.get("base_model_name_or_path"):
        yield ParentClaim(str(adapter["base_model_name_or_path"]), "adapter", "adapter_config.json")
    front = read_front_matter(path)
    bases = front.get("base_model") or []
    relation = str(
        front.get("base_model_relation") or ("merge" if isinstance(bases, list) and len(bases) > 1 else "finetune")
    )
    for base in bases if isinstance(bases, list) else [bases]:
        yield ParentClaim(str(base), relation, "README.md")
    metadata = _read_gguf_metadata(path)
    for number in range(int(metadata.get("general.base_model.count", 0) or 0)):
        url = str(metadata.get(f"general.base_model.{number}.repo_url", ""))
        named = HUB.match(url)
        yield ParentClaim(
            named[1] if named else str(metadata.get(f"general.base_model.{number}.name", "")), "quantized", path.name
        )


def _read_mergekit_config(file: Path) -> Iterator[ParentClaim]:
    """Yield the models that a mergekit configuration names."""
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return
    method = str(config.get("merge_method") or "experts") if isinstance(config, dict) else ""
    todo: list[Any] = [config]
    while todo:
        value = todo.pop(0)
        if isinstance(value, dict):
            for key, inside in value.items():
                if key in ("model", "base_model", "source_model"):
                    name = inside.get("path") or (inside.get("model") or {}) if isinstance(inside, dict) else inside
                    yield ParentClaim(
                        str(name.get("path", "")) if isinstance(name, dict) else str(name or ""),
                        f"merge, {method}",
                        file.name,
                    )
                elif isinstance(inside, (dict, list)):
                    todo.append(inside)
        elif isinstance(value, list):
            todo += value


def read_front_matter(path: Path) -> dict[str, Any]:
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


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_gguf_metadata(path: Path) -> dict[str, Any]:
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
