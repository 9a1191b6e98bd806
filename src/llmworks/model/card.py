"""Write the YAML front matter of a model card (README.md) as the Hub reads it: license, languages, base model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmworks.assets.catalog import CATALOG
from llmworks.core.artifact import Adapter, Artifact, Model
from llmworks.lineage.claims import parents as declared

INHERITED_FIELDS = ("license", "license_name", "license_link", "language")
BASE_INPUTS = ("base", "student", "policy", "model")  # input roles that name the base model, in order of preference


def get_front_matter(model: Model) -> dict[str, Any]:
    """Return license and languages from a model's card, else from the catalogue."""
    card_fields = declared.read_front_matter(model.path)
    front = {key: card_fields[key] for key in INHERITED_FIELDS if key in card_fields}
    return front if "license" in front else front | _get_license_fields(find_asset(model))


def find_asset(model: Model) -> str:
    """Return the asset that a model is or was derived from in one step (conversion, merged adapter), else ""."""
    parents = model.manifest.parents if model.manifest is not None else ()
    refs = [model.ref, *(parent.ref for parent in parents if parent.kind == "model")]
    return next((ref.removeprefix("asset:") for ref in refs if ref.startswith("asset:")), "")


def get_base_model_fields(models: Sequence[Model], relation: str) -> dict[str, Any]:
    """Return `base_model` and `base_model_relation` of the models that are on the Hub."""
    names = list(dict.fromkeys(name for model in models for name in get_hub_names(model)))
    return {"base_model": names[0] if len(names) == 1 else names, "base_model_relation": relation} if names else {}


def get_hub_names(model: Model) -> list[str]:
    """Return a model's Hub names, or those of the models it was derived from, as far as known."""
    if model.ref.startswith("hf:"):
        return [model.ref.removeprefix("hf:")]
    if find_asset(model) in CATALOG:
        return [CATALOG[find_asset(model)].hub] if CATALOG[find_asset(model)].hub else []
    base_models = declared.read_front_matter(model.path).get("base_model", []) if model.manifest is not None else []
    return [str(one) for one in (base_models if isinstance(base_models, list) else [base_models])]


def complete_card(out: Path, artifact: Artifact, inputs: Mapping[str, Any], stage: str) -> None:
    """Write the model card of a model or adapter directory, or add front matter to a card without one.

    The card has license, base model and stage. A model in another format (input `source`) gets no card.
    """
    config = out / ("adapter_config.json" if isinstance(artifact, Adapter) else "config.json")
    file = out / "README.md"
    body = file.read_text(encoding="utf-8") if file.exists() else ""
    if (
        not isinstance(artifact, (Model, Adapter))
        or artifact.about.get("format", "hf") != "hf"
        or not config.exists()
        or body.startswith("---")
        or "source" in inputs
    ):
        return
    base = next((inputs[role] for role in BASE_INPUTS if isinstance(inputs.get(role), Model)), None)
    own = str(json.loads(config.read_text(encoding="utf-8")).get("model_type", "")).startswith("llmworks")
    front: dict[str, Any] = {
        **(get_front_matter(base) if base is not None else {}),
        "library_name": "peft" if isinstance(artifact, Adapter) else "llmworks" if own else "transformers",
    }
    front |= {"pipeline_tag": "text-classification" if artifact.about.get("head") else "text-generation"}
    front |= (
        get_base_model_fields([base], "adapter" if isinstance(artifact, Adapter) else "finetune")
        if base is not None
        else {}
    )
    front["tags"] = [stage.rpartition(".")[2]]
    what = "An adapter" if isinstance(artifact, Adapter) else "A model"
    of = "" if base is None else f" of {' '.join(base.name.split())}"
    lines = (
        body.split("\n")
        if body
        else [
            f"# {to_hub_name(base.name) + '-' if base is not None else ''}{stage.rpartition('.')[2]}",
            "",
            (f"{what}, made{of} by stage `{stage}` of llmworks; `manifest.json` has its config, inputs and metrics."),
            "",
        ]
    )
    file.unlink(missing_ok=True)  # may be a link to another model's card
    write_model_card(out, front, lines)


def write_model_card(out: Path, front: Mapping[str, Any], lines: Sequence[str]) -> None:
    """Write README.md."""
    (out / "README.md").write_text(
        "---\n" + yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True) + "---\n" + "\n".join(lines),
        encoding="utf-8",
    )


def to_hub_name(name: str) -> str:
    """Replace characters that Hub names may not contain."""
    return (
        re.sub(r"[^\w.-]+", "-", name.rpartition("/")[2].removeprefix("asset:").removesuffix(".gguf")).strip("-.")
        or "model"
    )


def _get_license_fields(name: str) -> dict[str, str]:
    """Return the license fields of an asset, as the Hub writes them."""
    found = CATALOG[name].license if name in CATALOG else ""
    return (
        {"license": found.lower()}
        if re.fullmatch(r"[A-Za-z0-9.-]+", found)
        else {"license": "other", "license_name": found}
        if found
        else {}
    )
