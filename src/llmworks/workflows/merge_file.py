"""mergekit's YAML files as they are: one merge, or several of which later ones use earlier ones; the models that they
name are found before anything is planned.

What a merge does is in `merge/`; this knows files, references and the workspace.
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
from llmworks.merge.moe.config import ExpertsConfig
from llmworks.merge.plan.config import Condition, MergeConfig
from llmworks.merge.plan.layout import layout_of
from llmworks.merge.plan.plan import Plan, method_of
from llmworks.runtime.execute import Outcome
from llmworks.runtime.overrides import assign, config_problem, unknown
from llmworks.runtime.resolve import resolve
from llmworks.runtime.session import Session


@dataclass(frozen=True)
class Document:
    """One merge of a file, or one mixture of experts; `name`: by which others may use it, empty for the last one."""

    name: str
    config: MergeConfig | ExpertsConfig

    @property
    def stage(self) -> str:
        """What carries it out."""
        return "merge" if isinstance(self.config, MergeConfig) else "merge.experts"


def read(file: Path, sets: Sequence[str] = ()) -> list[Document]:
    """The merges of a file, those that others use before these.

    `sets`: KEY=VALUE for the one without a name, or the only one. UserError, in one line, for anything that is not
    mergekit's YAML.
    """
    try:
        found = [one for one in yaml.safe_load_all(file.read_text(encoding="utf-8")) if one is not None]
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
        raise UserError(f"{file}: holds no merge; it is a mapping with merge_method and models (mergekit's YAML)")
    names = [one.pop("name", "") or "" for one in found]
    if not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{file}: name is {next(name for name in names if not isinstance(name, str))!r}, it must be a text"
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{file}: {f'the name {twice!r} stands twice' if twice else 'more than one merge has no name'}")
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: write it as key=value")
        assign(found[names.index("")] if "" in names else found[-1], key.split("."), value)
    documents = {
        name: Document(name, _checked(one, f"{file}{f', {name}' if name else ''}"))
        for name, one in zip(names, found, strict=True)
    }
    return _ordered(documents, file)


def _checked(values: dict[str, Any], where: str) -> MergeConfig | ExpertsConfig:
    kind: type[MergeConfig | ExpertsConfig] = (
        ExpertsConfig if "experts" in values and "merge_method" not in values else MergeConfig
    )
    try:
        config = kind.model_validate(values)
        if isinstance(config, MergeConfig):
            method_of(config.merge_method)  # before models are looked for
    except ValidationError as error:
        raise UserError("; ".join(dict.fromkeys(_problem(kind, error, where)))) from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return config


def _problem(kind: type[MergeConfig | ExpertsConfig], error: ValidationError, where: str) -> list[str]:
    """What is wrong, without all that a value could have been: pydantic tells an error for each form that a setting may
    have.
    """
    said: list[dict[str, Any]] = [dict(one) for one in error.errors()]
    inside = [
        one
        for one in said
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
    return [config_problem(kind, one, where) for one in said[:4]]


def _ordered(documents: Mapping[str, Document], file: Path) -> list[Document]:
    done: dict[str, Document] = {}

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise UserError(
                f"{file}: merges use one another in a circle: {' uses '.join([*above[above.index(name) :], name])}"
            )
        if name not in done:
            for used in documents[name].config.named():
                if used.partition("+")[0] and used.partition("+")[0] in documents:
                    visit(used.partition("+")[0], (*above, name))
            done[name] = documents[name]

    for name in documents:
        visit(name, ())
    return sorted(done.values(), key=lambda one: one.name == "")  # the one that is asked for comes last


def unnamed(documents: Sequence[Document], given: Mapping[str, Model]) -> str:
    """A model that is given and that no merge of a file names; empty where all are named."""
    named = {
        part for document in documents for name in document.config.named() for part in (name, name.partition("+")[0])
    }
    return next((name for name in given if name not in named), "")


def found_models(config: MergeConfig | ExpertsConfig, given: Mapping[str, Model], session: Session) -> dict[str, Model]:
    """The models that a merge names: those given, else by reference.

    An adapter behind + is folded into its model first.
    """
    return {name: given[name] if name in given else _model(name, given, session) for name in config.named()}


def _model(name: str, given: Mapping[str, Model], session: Session) -> Model:
    base, plus, adapter = name.partition("+")
    if not base or (plus and not adapter):
        raise UserError(f"{name!r} names no model; write MODEL, or MODEL+ADAPTER")
    found = given[base] if base in given else _reference(base, session)
    if not isinstance(found, Model):
        raise UserError(
            f"{base}: is {'an' if found.kind[0] in 'aei' else 'a'} {found.kind}, and models are merged"
            + ("; write MODEL+ADAPTER" if isinstance(found, Adapter) else "")
        )
    if not plus:
        return found
    folded = _reference(adapter, session)
    made = session.make("merge.adapter", kind=Model, adapter=folded, model=found)
    made.name = name
    return made


def _reference(name: str, session: Session) -> Any:
    """A path, a name in the workspace, a reference; or a model of the Hub, as mergekit writes it."""
    try:
        return session.load(name, name=name)
    except UserError:
        if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", name) and not name.startswith((".", "/")):
            return session.load(f"hf:{name}", name=name)
        raise


def merge_file(documents: Sequence[Document], session: Session, *, given: Mapping[str, Model]) -> Outcome:
    """Carry out all merges of a file; the last one's result."""
    known, outcome = dict(given), None
    for document in documents:
        models = found_models(document.config, known, session)
        if document.name:
            session.say(f"merge {document.name}")
        outcome = session.run_stage(resolve(document.stage), document.config, {"models": models})
        if document.name:
            assert isinstance(outcome.artifact, Model)
            outcome.artifact.name = document.name
            known[document.name] = outcome.artifact
    assert outcome is not None
    return outcome


def plan_file(documents: Sequence[Document], session: Session, given: Mapping[str, Model]) -> Plan:
    """What a file's only merge would read and write; nothing is read but headers. UserError for a file of several."""
    from llmworks.merge.plan.prepare import prepared

    if len(documents) > 1:
        raise UserError(
            f"--plan: the file holds {len(documents)} merges, and what later ones read is not there yet; run it, or"
            " plan one at a time"
        )
    config = documents[0].config
    if not isinstance(config, MergeConfig):
        raise UserError(
            "--plan: experts are copied as they are; what is written is as large as the base and each expert's"
            " feed-forward layers"
        )
    paths = {name: given[name].path if name in given else _path(name, session) for name in config.named()}
    return prepared(config, {name: layout_of(name, path) for name, path in paths.items()})[2]


def _path(name: str, session: Session) -> Path:
    """Where a model is, without a look at its bytes where it is a directory here."""
    for path in (Path(name.removeprefix("path:")).expanduser(), session.workspace.root / name):
        if path.is_dir():
            return path.resolve()
    found = _model(name, {}, session)
    if found.format != "hf":
        raise ArtifactError(f"{name}: is a {found.format} file; Hugging Face directories are merged")
    return found.path
