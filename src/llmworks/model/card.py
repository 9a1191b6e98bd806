"""Write the YAML front matter of a model card (README.md) as the Hub reads it: license, languages, base model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmworks.assets.catalogue import CATALOGUE
from llmworks.core.artifact import Adapter, Artifact, Model
from llmworks.lineage import claims as declared

CARRIED = ("license", "license_name", "license_link", "language")
BASES = ("base", "student", "policy", "model")  # input roles that name the base model, in order of preference


def front_of(model: Model) -> dict[str, Any]:
    """Return license and languages from a model's card, else from the catalogue."""
    said = declared.front_of(model.path)
    front = {key: said[key] for key in CARRIED if key in said}
    return front if "license" in front else front | _licence(asset_of(model))


def asset_of(model: Model) -> str:
    """Return the asset that a model is or was derived from in one step (conversion, merged adapter), else ""."""
    parents = model.manifest.parents if model.manifest is not None else ()
    refs = [model.ref, *(parent.ref for parent in parents if parent.kind == "model")]
    return next((ref.removeprefix("asset:") for ref in refs if ref.startswith("asset:")), "")


def bases_of(models: Sequence[Model], relation: str) -> dict[str, Any]:
    """Return `base_model` and `base_model_relation` of the models that are on the Hub."""
    names = list(dict.fromkeys(name for model in models for name in hub_names(model)))
    return {"base_model": names[0] if len(names) == 1 else names, "base_model_relation": relation} if names else {}


def hub_names(model: Model) -> list[str]:
    """Return a model's Hub names, or those of the models it was derived from, as far as known."""
    if model.ref.startswith("hf:"):
        return [model.ref.removeprefix("hf:")]
    if asset_of(model) in CATALOGUE:
        return [CATALOGUE[asset_of(model)].hub] if CATALOGUE[asset_of(model)].hub else []
    said = declared.front_of(model.path).get("base_model", []) if model.manifest is not None else []
    return [str(one) for one in (said if isinstance(said, list) else [said])]


def complete(out: Path, made: Artifact, inputs: Mapping[str, Any], stage: str) -> None:
    """Write the model card of a model or adapter directory, or add front matter to a card without one.

    The card has license, base model and stage. A model in another format (input `source`) gets no card.
    """
    config = out / ("adapter_config.json" if isinstance(made, Adapter) else "config.json")
    file = out / "README.md"
    body = file.read_text(encoding="utf-8") if file.exists() else ""
    if (
        not isinstance(made, (Model, Adapter))
        or made.about.get("format", "hf") != "hf"
        or not config.exists()
        or body.startswith("---")
        or "source" in inputs
    ):
        return
    base = next((inputs[role] for role in BASES if isinstance(inputs.get(role), Model)), None)
    own = str(json.loads(config.read_text(encoding="utf-8")).get("model_type", "")).startswith("llmworks")
    front: dict[str, Any] = {
        **(front_of(base) if base is not None else {}),
        "library_name": "peft" if isinstance(made, Adapter) else "llmworks" if own else "transformers",
    }
    front |= {"pipeline_tag": "text-classification" if made.about.get("head") else "text-generation"}
    front |= bases_of([base], "adapter" if isinstance(made, Adapter) else "finetune") if base is not None else {}
    front["tags"] = [stage.rpartition(".")[2]]
    what = "An adapter" if isinstance(made, Adapter) else "A model"
    of = "" if base is None else f" of {' '.join(base.name.split())}"
    lines = (
        body.split("\n")
        if body
        else [
            f"# {plain(base.name) + '-' if base is not None else ''}{stage.rpartition('.')[2]}",
            "",
            (f"{what}, made{of} by stage `{stage}` of llmworks; `manifest.json` has its config, inputs and metrics."),
            "",
        ]
    )
    file.unlink(missing_ok=True)  # may be a link to another model's card
    write(out, front, lines)


def write(out: Path, front: Mapping[str, Any], lines: Sequence[str]) -> None:
    """Write README.md."""
    (out / "README.md").write_text(
        "---\n" + yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True) + "---\n" + "\n".join(lines),
        encoding="utf-8",
    )


def plain(name: str) -> str:
    """Replace characters that Hub names may not contain."""
    return (
        re.sub(r"[^\w.-]+", "-", name.rpartition("/")[2].removeprefix("asset:").removesuffix(".gguf")).strip("-.")
        or "model"
    )


def _licence(name: str) -> dict[str, str]:
    """Return the license fields of an asset, as the Hub writes them."""
    found = CATALOGUE[name].licence if name in CATALOGUE else ""
    return (
        {"license": found.lower()}
        if re.fullmatch(r"[A-Za-z0-9.-]+", found)
        else {"license": "other", "license_name": found}
        if found
        else {}
    )
