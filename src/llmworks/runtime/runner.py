"""Run a recipe in a workspace: skip existing results, make missing ones, stop at a failed gate, and explain why.

`plan` and `run` share the same check of every step, so that `plan` shows what `run` will do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llmworks import assets
from llmworks.assets.catalog import CATALOG
from llmworks.core.artifact import Artifact, load
from llmworks.core.errors import ArtifactError, GateFailed, UserError
from llmworks.core.workers import WorkerPool
from llmworks.core.workspace import Workspace, get_size
from llmworks.lineage.digests import check_unchanged
from llmworks.runtime.code_digest import compute_code_digest
from llmworks.runtime.execute import Inputs, compute_step_key, flatten_inputs
from llmworks.runtime.read_recipe import load_recipe
from llmworks.runtime.recipe import Expect, GateStep, Recipe, StageStep, UseStep, check_gate, find_referenced_steps
from llmworks.runtime.session import Session

StepState = Literal["up to date", "to run", "waits", "external", "gate holds", "gate fails", "made"]


@dataclass(frozen=True)
class StepStatus:
    """The state of a step, and why."""

    name: str
    state: StepState
    reason: str
    artifact: Artifact | None = None
    expect: Expect | None = None
    expect_source: str = ""


@dataclass
class RecipeRun:
    """One recipe in one workspace. `say` receives status lines."""

    recipe: Recipe
    workspace: Workspace
    say: Callable[[str], None] = lambda line: None
    quiet: bool = False
    pool: WorkerPool = field(default_factory=WorkerPool)
    track: Sequence[str] = ()
    artifacts: dict[str, Artifact] = field(default_factory=dict)

    @property
    def session(self) -> Session:
        """Session that makes the recipe's artifacts."""
        return Session(
            self.workspace,
            seed=self.recipe.seed,
            quiet=self.quiet,
            pool=self.pool,
            track=self.track,
            say=lambda line: self.say(f"  {line}"),
        )

    def get_current(self, name: str) -> Artifact | None:
        """Return the artifact that the step's name currently points to."""
        link = self.workspace.root / self.recipe.name / name
        try:
            return load(link.resolve(), name=name) if link.is_symlink() else None
        except ArtifactError:
            return None

    def resolve_inputs(self, step: StageStep) -> Inputs | None:
        """Return the step's artifacts by role, or None while one of them is missing."""
        if any(name not in self.artifacts for name in find_referenced_steps(step.inputs)):
            return None
        out: dict[str, Any] = {}
        for role, value in step.inputs.items():
            if isinstance(value, str):
                out[role] = self.artifacts[value]
            elif isinstance(value, list):
                out[role] = [self.artifacts[name] for name in value]
            else:
                out[role] = {key: self.artifacts[name] for key, name in value.items()}
        for role, artifact in flatten_inputs(out):
            accepted = step.stage.inputs[role.partition("[")[0]].kinds
            if not isinstance(artifact, accepted):
                raise UserError(
                    f"{self.recipe.path}: {step.name}.inputs.{role}: {artifact.name!r} is a {artifact.kind},"
                    f" expected {' or '.join(k.kind for k in accepted)}"
                )
        return out

    def check_step(self, name: str) -> StepStatus:
        """Return what `run` would do with a step, given the artifacts found so far. Downloads nothing."""
        step = self.recipe.steps[name]
        if isinstance(step, UseStep):
            return self._check_use(step)
        if isinstance(step, GateStep):
            if step.step not in self.artifacts:
                return StepStatus(name, "waits", f"for {step.step}")
            holds, line = check_gate(step, self.artifacts[step.step])
            return StepStatus(name, "gate holds" if holds else "gate fails", line)
        expect, source = self._get_expected(step)
        inputs = self.resolve_inputs(step)
        if inputs is None:
            missing = sorted({n for n in find_referenced_steps(step.inputs) if n not in self.artifacts})
            return StepStatus(name, "waits", f"for {', '.join(missing)}", expect=expect, expect_source=source)
        key = compute_step_key(step.stage, step.config, inputs, self.recipe.seed)
        artifact = self.workspace.find(key)
        if artifact is not None:
            assert artifact.manifest is not None
            changed = artifact.manifest.code != compute_code_digest(step.stage.name)
            return StepStatus(
                name,
                "up to date",
                "same stage, config and parents"
                + ("; its code has changed since then, without a new revision" if changed else ""),
                artifact,
            )
        return StepStatus(name, "to run", self._explain(step, inputs, key), expect=expect, expect_source=source)

    def _check_use(self, step: UseStep) -> StepStatus:
        asset = CATALOG.get(step.ref.removeprefix("asset:")) if step.ref.startswith("asset:") else None
        if asset is not None and not assets.is_cached(asset):
            return StepStatus(
                step.name,
                "to run",
                f"{step.ref} is not in the cache, {asset.bytes / 1e6:.0f} MB to download",
                expect=Expect(disk_mb=asset.bytes / 1e6),
                expect_source="catalogue",
            )
        if not self.session.is_local(step.ref):
            return StepStatus(step.name, "to run", f"{step.ref} must be downloaded or converted")
        return StepStatus(step.name, "external", step.ref)

    def _explain(self, step: StageStep, inputs: Inputs, key: str) -> str:
        """Return why a step must run: what differs from its current artifact."""
        scratch = self.workspace.root / "scratch" / key[:12]
        if scratch.is_dir():
            return "was interrupted" + ("; resumes from its checkpoint" if any(scratch.iterdir()) else "")
        last = self.get_current(step.name)
        if last is None or last.manifest is None:
            return "was never run here"
        m = last.manifest
        reasons: list[str] = []
        if (m.stage, m.revision) != (step.stage.name, step.stage.stage.revision):
            reasons.append(
                f"stage {m.stage} revision {m.revision} became {step.stage.name} revision {step.stage.stage.revision}"
            )
        new = step.config.model_dump(mode="json")
        reasons += [
            f"config.{k} was {m.config.get(k)!r}, is {new.get(k)!r}"
            for k in {**m.config, **new}
            if m.config.get(k) != new.get(k)
        ]
        old_parents, new_parents = (
            {p.role: p.digest for p in m.parents},
            {r: a.digest for r, a in flatten_inputs(inputs)},
        )
        reasons += [
            f"input {r} changed" for r in {**old_parents, **new_parents} if old_parents.get(r) != new_parents.get(r)
        ]
        if m.seed != self.recipe.seed:
            reasons.append(f"seed was {m.seed}, is {self.recipe.seed}")
        return "; ".join(reasons) or "its artifact is no longer in the store"

    def _get_expected(self, step: StageStep) -> tuple[Expect, str]:
        """Return a step's cost: last measured here, else the recipe's estimate."""
        last = self.get_current(step.name)
        if last is not None and last.manifest is not None and last.manifest.stage == step.stage.name:
            m = last.metrics
            return (
                Expect(
                    seconds=m.get("wall_seconds", 0),
                    memory_mb=m.get("peak_memory_bytes", 0) / 1e6,
                    disk_mb=get_size(last.path) / 1e6,
                ),
                "measured here",
            )
        return step.expect, "recipe estimate" if step.expect != Expect() else ""

    def plan(self) -> list[StepStatus]:
        """Check every step without running any; existing results allow later steps to be checked.

        Errors: ArtifactError for an existing result that was changed after it was made.
        """
        out: list[StepStatus] = []
        for name, step in self.recipe.steps.items():
            judgement = self.check_step(name)
            if isinstance(step, UseStep) and judgement.state == "external":
                self.artifacts[name] = self._load_use(step)
            elif judgement.artifact is not None:
                check_unchanged(judgement.artifact)
                self.artifacts[name] = self._set_name(judgement.artifact, name)
            out.append(judgement)
        return out

    def _load_use(self, step: UseStep) -> Artifact:
        return self.session.load(step.ref, name=step.name)

    @staticmethod
    def _set_name(artifact: Artifact, name: str) -> Artifact:
        artifact.name = name
        return artifact

    def run(self, explain: bool = False) -> list[StepStatus]:
        """Run every step in order. GateFailed when a gate fails; results made before are kept."""
        with self.workspace.mark_in_use():
            return self._run(explain)

    def _run(self, explain: bool) -> list[StepStatus]:
        done: list[StepStatus] = []
        width = max(map(len, self.recipe.steps))
        for name, step in self.recipe.steps.items():
            judgement = self.check_step(name)
            label = name.ljust(width)
            if isinstance(step, UseStep):
                if judgement.state == "to run":
                    self.say(f"· {label}  {judgement.reason}")
                artifact = self._load_use(step)
                self._bind(name, artifact)
                self.say(f"✓ {label}  {step.ref}  {artifact.kind} {artifact.digest[:12]}")
                done.append(StepStatus(name, "external", step.ref, artifact))
            elif isinstance(step, GateStep):
                self._record_gate(step, judgement)
                self.say(
                    f"{'✓' if judgement.state == 'gate holds' else '✗'} {label}  {judgement.state}: {judgement.reason}"
                )
                done.append(judgement)
                if judgement.state != "gate holds":
                    raise GateFailed(
                        f"gate {name}: {judgement.reason}{f' ({step.because})' if step.because else ''}; the run"
                        " stops here, finished results are kept"
                    )
            else:
                done.append(self._run_stage(step, judgement, label, explain))
        return done

    def _run_stage(self, step: StageStep, judgement: StepStatus, label: str, explain: bool) -> StepStatus:
        if judgement.artifact is not None:
            check_unchanged(judgement.artifact)
            self._bind(step.name, judgement.artifact)
            self.say(
                f"✓ {label}  up to date  {judgement.artifact.kind} {judgement.artifact.digest[:12]}"
                + (f"  ({judgement.reason})" if explain else "")
            )
            return judgement
        self.say(f"▸ {label}  {step.stage.name}  ({judgement.reason})")
        inputs = self.resolve_inputs(step)
        assert inputs is not None
        outcome = self.session.run_stage(step.stage, step.config, inputs)
        self._bind(step.name, outcome.artifact)
        self.say(
            f"✓ {label}  {outcome.artifact.kind} {outcome.artifact.digest[:12]}  {outcome.seconds:.1f} s "
            f" {format_metrics(outcome.artifact.metrics)}"
        )
        return StepStatus(step.name, "made", judgement.reason, outcome.artifact)

    def _record_gate(self, step: GateStep, judgement: StepStatus) -> None:
        """Record in the workspace's journal what a gate found in which artifact, which must be as it was made."""
        artifact = self.artifacts[step.step]
        check_unchanged(artifact)
        self.workspace.record(
            {
                "digest": artifact.digest,
                "manifest": artifact.manifest_digest,
                "gate": f"{self.recipe.name}/{step.name}",
                "state": judgement.state,
                "reason": judgement.reason,
            }
        )

    def _bind(self, name: str, artifact: Artifact) -> None:
        self.artifacts[name] = self._set_name(artifact, name)
        if artifact.manifest is not None and artifact.manifest.stage:
            self.workspace.bind(self.recipe.name, name, artifact)

    def report_path(self) -> Path | None:
        """Return the HTML page of the recipe's last report."""
        reports = [a for a in self.artifacts.values() if a.kind == "report"]
        return self.workspace.root / self.recipe.name / reports[-1].name / "report.html" if reports else None


def run(
    recipe: Path | str,
    workspace: Workspace | Path | str | None = None,
    *,
    overrides: Sequence[str] = (),
    quiet: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Artifact]:
    """Run a recipe; existing results are reused, interrupted steps resume from their checkpoints.

    Args:
        recipe: its YAML file.
        workspace: where artifacts are stored; default: `$LLMWORKS_WORKSPACE`, else `./workspace`.
        overrides: `step.field=value`, as for `--set`.
        quiet: show no progress.
        say: receives one line per step.

    Returns: the artifact of each step, by step name.

    Errors: RecipeError before anything runs; GateFailed when a gate fails; errors of the stages.
    """
    job = RecipeRun(load_recipe(Path(recipe), overrides), Session(workspace).workspace, say=say, quiet=quiet)
    job.run()
    return job.artifacts


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Format a step's main metrics on one line."""
    shown = (
        "rows",
        "documents",
        "dropped",
        "contaminated_test_rows",
        "auc",
        "rejected",
        "initial_reward",
        "reward",
        "win_rate",
        "alarms",
        "loss",
        "score",
        "difference",
        "low",
        "high",
        "models",
        "votes",
        "best",
        "clusters",
        "golden_gap_mean",
        "vocabulary",
        "bytes_per_token",
        "parameters",
        "bytes",
        "tokens_per_second",
        "shared_groups",
        "shared_texts",
    )
    named = {"score": f"score ({metrics['metric']})"} if isinstance(metrics.get("metric"), str) else {}
    return "  ".join(
        (
            f"{named.get(k, k)} {metrics[k]:.4g}"
            if isinstance(metrics[k], float)
            else f"{k} {metrics[k]}"
            if isinstance(metrics[k], str)
            else f"{k} {metrics[k]:,}"
        )
        for k in shown
        if k in metrics
    )
