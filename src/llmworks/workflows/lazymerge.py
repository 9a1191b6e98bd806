"""One-line merge: write the mergekit YAML, merge, evaluate parents and child, and record the scores in the child's
model card in the Hub's format.

Merging and evaluation are defined in their own packages.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from llmworks.core.artifact import MANIFEST, Model, Report
from llmworks.core.errors import LlmworksError, UserError
from llmworks.core.workspace import Workspace
from llmworks.evaluate.suites import SuiteTask
from llmworks.lineage.claims.parents import read_front_matter
from llmworks.merge.plan.catalogue import METHODS
from llmworks.merge.plan.config import MergeConfig
from llmworks.model.card import write_model_card
from llmworks.runtime.session import Session

DENSITY = 0.5


def build_merge_config(
    method: str,
    models: Sequence[str],
    base: str = "",
    weights: Sequence[float] = (),
    density: float = DENSITY,
    t: float = 0.5,
) -> MergeConfig:
    """Build a mergekit configuration of models and method, with common default parameters.

    UserError for an unknown method, or arguments that it does not take.
    """
    if method not in METHODS:
        return MergeConfig(
            merge_method=method, models=[{"model": name} for name in models]
        )  # raises the error that lists the known methods
    method_spec = METHODS[method]
    others = [name for name in models if name != base]
    if method_spec.base == "required" and not base:
        raise UserError(
            f"--method {method} "
            + (
                "interpolates from one of the two models; give it as --base"
                if method == "slerp"
                else "needs a base model; give it as --base"
            )
        )
    if weights and len(weights) != len(others):
        raise UserError(f"--weights: {len(weights)} numbers for {len(others)} models")
    twice = next((name for name in models if list(models).count(name) > 1), None)
    if twice is not None:
        raise UserError(f"--models: {twice} is given twice")
    if len(models) < 2:
        raise UserError("--models: give two models or more")
    parameters = {parameter.name: parameter for parameter in method_spec.parameters}
    entries: list[dict[str, Any]] = []
    for at, name in enumerate(others):
        own = {"weight": weights[at] if weights else round(1 / len(others), 4)} if "weight" in parameters else {}
        if "density" in parameters and method != "task_arithmetic":
            own["density"] = density
        entries.append({"model": name, **({"parameters": own} if own else {})})
    config: dict[str, Any] = {
        "merge_method": method,
        "models": entries,
        **({"base_model": base} if base and method_spec.base != "none" else {}),
    }
    if "t" in parameters:
        config["parameters"] = {"t": t}
    if method == "passthrough":
        raise UserError("--method passthrough stacks layers; write its slices in a file and run llmworks merge FILE")
    return MergeConfig.model_validate(config)


@dataclass
class LazyMergeJob:
    """One merge: its configuration, models and evaluation tasks."""

    config: MergeConfig
    models: Mapping[str, Model]
    items: Sequence[SuiteTask]
    session: Session
    say: Callable[[str], None] = print
    scores: dict[str, dict[str, str]] = field(default_factory=dict)  # results by model and task


def lazymerge(job: LazyMergeJob, name: str) -> tuple[Model, Report | None]:
    """Merge and evaluate; return (the child, the leaderboard, or None where every evaluation failed)."""
    job.say(format_yaml(job.config))
    plain = job.config.model_dump(mode="json", exclude_defaults=True)
    child = job.session.make("merge", kind=Model, config=plain, models=dict(job.models))
    child.name = name
    reports: list[Report] = []
    for model_name, model in {name: child, **job.models}.items():
        model.name = model_name
        for item in job.items:
            try:
                config = {"task": item.task, "limit": item.limit}
                report = job.session.make("evaluate", kind=Report, config=config, model=model)
            except LlmworksError as error:
                job.say(f"  evaluation failed: {model_name} on {item.task}: {error}")
                continue
            job.say(
                f"✓ {model_name}  {item.task}  {report.metrics['score']:.3f} ({report.metrics['low']:.3f} to"
                f" {report.metrics['high']:.3f})"
            )
            job.scores.setdefault(model_name, {})[item.task] = (
                f"{report.metrics['score']:.3f} ({report.metrics['low']:.3f} to {report.metrics['high']:.3f})"
            )
            reports.append(report)
    if not reports:
        return child, None
    different = {report.digest: report for report in reports}
    board = job.session.make(
        "evaluate.leaderboard",
        kind=Report,
        config={"model": child.digest, "title": f"{name} and its parents"},
        reports=[different[digest] for digest in sorted(different)],
    )
    return child, board


def list_evaluations(child: Model, workspace: Workspace) -> list[Report]:
    """List the evaluations of a model in the workspace."""
    return [
        one
        for one in workspace.artifacts()
        if isinstance(one, Report)
        and one.manifest is not None
        and one.manifest.stage == "evaluate"
        and any(parent.digest == child.digest for parent in one.manifest.parents)
    ]


def format_yaml(config: MergeConfig) -> str:
    """Format the configuration as mergekit YAML."""
    return yaml.safe_dump(
        config.model_dump(mode="json", exclude_defaults=True),
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=None,
        width=120,
    )


def export(child: Model, board: Report | None, name: str, target: Path, scores: Sequence[Report] = ()) -> None:
    """Write a directory ready for upload: the child's files (weights hard-linked where possible) and a model card with
    the scores.

    UserError where the target exists and is not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: already exists and is not empty; choose another --export")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.parent / f".{target.name}.part"
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir()
        _write_files(child, board, name, draft, scores)
        if target.exists():
            target.rmdir()
        draft.replace(target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_files(child: Model, board: Report | None, name: str, target: Path, scores: Sequence[Report]) -> None:
    for file in child.path.iterdir():
        if file.is_file() and file.name not in (MANIFEST, "README.md"):
            try:
                if file.suffix != ".safetensors":  # copy files that users may edit before the upload
                    raise OSError
                os.link(file.resolve(), target / file.name)
            except OSError:
                shutil.copyfile(file, target / file.name)
    front = read_front_matter(child.path)
    body = (child.path / "README.md").read_text(encoding="utf-8").split("---\n", 2)[-1].split("\n")
    body = [
        f"# {name}" if at == next((i for i, line in enumerate(body) if line.startswith("# ")), -1) else line
        for at, line in enumerate(body)
    ]
    section = board.path / "model-card.md" if board is not None else None
    if section is not None and section.exists():
        body += ["", section.read_text(encoding="utf-8")]
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": str(report.read()["task"]), "type": str(report.read()["task"])},
            "metrics": [
                {
                    "type": str(report.metrics.get("metric", "score")),
                    "value": round(float(report.metrics["score"]), 4),
                    "name": str(report.metrics.get("metric", "score")),
                }
            ],
        }
        for report in scores
    ]
    if results:
        front["model-index"] = [{"name": name, "results": results}]
    write_model_card(target, front, body)
