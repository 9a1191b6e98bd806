"""mergekit YAML files: one merge, or several where later ones use earlier ones; the named models are resolved before
planning.

Merging itself is in `merge/`; this module handles files, references and the workspace.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from llmworks.core.artifact import Adapter, Model
from llmworks.core.errors import ArtifactError, UserError
from llmworks.core.text.yaml import load_all_yaml
from llmworks.merge.moe.config import ExpertsConfig
from llmworks.merge.plan.config import Condition, MergeConfig
from llmworks.merge.plan.layout import read_layout
from llmworks.merge.plan.plan import MergePlan, get_method
from llmworks.runtime.config.errors import describe_errors, unknown
from llmworks.runtime.config.overrides import assign
from llmworks.runtime.execute import StageResult
from llmworks.runtime.resolve import resolve_stage
from llmworks.runtime.session import Session


@dataclass(frozen=True)
class MergeDocument:
    """One merge or mixture of experts in a file; `name`: for use by other documents, empty for the last one."""

    name: str
    config: MergeConfig | ExpertsConfig

    @property
    def stage(self) -> str:
        """The stage that runs it."""
        return "merge" if isinstance(self.config, MergeConfig) else "merge.experts"


def read_documents(file: Path, sets: Sequence[str] = ()) -> list[MergeDocument]:
    """Read the merges of a file in dependency order.

    `sets`: KEY=VALUE overrides for the document without a name, or the only one. UserError in one line for anything
    that is not mergekit YAML.
    """
    try:
        found = [one for one in load_all_yaml(file.read_text(encoding="utf-8")) if one is not None]
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; give mergekit's YAML") from None
    except yaml.MarkedYAMLError as error:
        raise UserError(
            f"{file}:{error.problem_mark.line + 1 if error.problem_mark else 1}: not YAML: {error.problem}"
        ) from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(
            f"{file}: cannot be read as YAML ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from None
    if not found or not all(isinstance(one, dict) for one in found):
        raise UserError(f"{file}: contains no merge; expected a mapping with merge_method and models (mergekit YAML)")
    names = [one.pop("name", "") or "" for one in found]
    if not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{file}: name is {next(name for name in names if not isinstance(name, str))!r}, it must be a string"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"{file}: {f'the name {twice!r} is used twice' if twice else 'more than one merge has no name'}"
        )
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: write it as key=value")
        assign(found[names.index("")] if "" in names else found[-1], key.split("."), value)
    documents = {
        name: MergeDocument(name, _validate(one, f"{file}{f', {name}' if name else ''}"))
        for name, one in zip(names, found, strict=True)
    }
    return _sort_by_dependency(documents, file)


def _validate(values: dict[str, Any], where: str) -> MergeConfig | ExpertsConfig:
    kind: type[MergeConfig | ExpertsConfig] = (
        ExpertsConfig if "experts" in values and "merge_method" not in values else MergeConfig
    )
    try:
        config = kind.model_validate(values)
        if isinstance(config, MergeConfig):
            get_method(config.merge_method)  # before models are resolved
    except ValidationError as error:
        raise UserError("; ".join(dict.fromkeys(_format_problem(kind, error, where)))) from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return config


def _format_problem(kind: type[MergeConfig | ExpertsConfig], error: ValidationError, where: str) -> list[str]:
    """Describe what is wrong, without the errors of every alternative type that pydantic reports for a setting."""
    errors: list[dict[str, Any]] = [dict(one) for one in error.errors()]
    inside = [
        one
        for one in errors
        if any("Condition" in str(part) for part in one["loc"]) and one["type"] in ("extra_forbidden", "missing")
    ]
    if inside:
        one = min(inside, key=lambda each: each["type"] != "extra_forbidden")
        place = ".".join(
            [
                where,
                *(
                    str(part)
                    for part in one["loc"][:-1]
                    if not (isinstance(part, str) and ("[" in part or part == "Condition"))
                ),
            ]
        )
        return [
            f"{place}: "
            + (
                unknown("key", str(one["loc"][-1]), list(Condition.model_fields))
                if one["type"] == "extra_forbidden"
                else f"{one['loc'][-1]} is missing"
            )
        ]
    return [text for _, text in describe_errors(kind, errors, where)[:4]]


def _sort_by_dependency(documents: Mapping[str, MergeDocument], file: Path) -> list[MergeDocument]:
    done: dict[str, MergeDocument] = {}

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise UserError(
                f"{file}: merges depend on each other in a cycle: {' uses '.join([*above[above.index(name) :], name])}"
            )
        if name not in done:
            for used in documents[name].config.model_names():
                if used.partition("+")[0] and used.partition("+")[0] in documents:
                    visit(used.partition("+")[0], (*above, name))
            done[name] = documents[name]

    for name in documents:
        visit(name, ())
    return sorted(done.values(), key=lambda one: one.name == "")  # the requested merge comes last


def find_unused_model(documents: Sequence[MergeDocument], given: Mapping[str, Model]) -> str:
    """Return a given model that no merge of the file names; empty where all are named."""
    named = {
        part
        for document in documents
        for name in document.config.model_names()
        for part in (name, name.partition("+")[0])
    }
    return next((name for name in given if name not in named), "")


def resolve_models(
    config: MergeConfig | ExpertsConfig, given: Mapping[str, Model], session: Session
) -> dict[str, Model]:
    """Resolve the models that a merge names: the given ones, else by reference.

    An adapter after + is merged into its model first.
    """
    return {
        name: given[name] if name in given else _resolve_model(name, given, session) for name in config.model_names()
    }


def _resolve_model(name: str, given: Mapping[str, Model], session: Session) -> Model:
    base, plus, adapter = name.partition("+")
    if not base or (plus and not adapter):
        raise UserError(f"{name!r} is not a model name; write MODEL or MODEL+ADAPTER")
    found = given[base] if base in given else _load_reference(base, session)
    if not isinstance(found, Model):
        raise UserError(
            f"{base}: is {'an' if found.kind[0] in 'aei' else 'a'} {found.kind}, but only models can be merged"
            + ("; write MODEL+ADAPTER" if isinstance(found, Adapter) else "")
        )
    if not plus:
        return found
    folded = _load_reference(adapter, session)
    made = session.make("merge.adapter", kind=Model, adapter=folded, model=found)
    made.name = name
    return made


def _load_reference(name: str, session: Session) -> Any:
    """Load a path, workspace name or reference, else a Hub model id as mergekit writes it."""
    try:
        return session.load(name, name=name)
    except UserError:
        if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) and not name.startswith((".", "/")):
            return session.load(f"hf:{name}", name=name)
        raise


def merge_file(documents: Sequence[MergeDocument], session: Session, *, given: Mapping[str, Model]) -> StageResult:
    """Run all merges of a file; return the result of the last one."""
    known, outcome = dict(given), None
    for document in documents:
        models = resolve_models(document.config, known, session)
        if document.name:
            session.say(f"merge {document.name}")
        outcome = session.run_stage(resolve_stage(document.stage), document.config, {"models": models})
        if document.name:
            assert isinstance(outcome.artifact, Model)
            outcome.artifact.name = document.name
            known[document.name] = outcome.artifact
    assert outcome is not None
    return outcome


def plan_file(documents: Sequence[MergeDocument], session: Session, given: Mapping[str, Model]) -> MergePlan:
    """Plan what a file's only merge would read and write; reads only headers. UserError for several merges."""
    from llmworks.merge.plan.prepare import prepare_merge

    if len(documents) > 1:
        raise UserError(
            f"--plan: the file has {len(documents)} merges, and the inputs of later ones do not exist yet; run it, or"
            " plan one merge at a time"
        )
    config = documents[0].config
    if not isinstance(config, MergeConfig):
        raise UserError(
            "--plan: experts are copied unchanged; the output size is that of the base plus each expert's"
            " feed-forward layers"
        )
    paths = {name: given[name].path if name in given else _find_path(name, session) for name in config.model_names()}
    return prepare_merge(config, {name: read_layout(name, path) for name, path in paths.items()})[2]


def _find_path(name: str, session: Session) -> Path:
    """Return a model's path; a local directory is not read."""
    for path in (Path(name.removeprefix("path:")).expanduser(), session.workspace.root / name):
        if path.is_dir():
            return path.resolve()
    found = _resolve_model(name, {}, session)
    if found.format != "hf":
        raise ArtifactError(f"{name}: is a {found.format} file; only Hugging Face model directories can be merged")
    return found.path
