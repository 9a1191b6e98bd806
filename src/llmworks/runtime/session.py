"""Make artifacts in a workspace. The only caller of `execute`.

The command line, recipes and workflows call `Session(...).make("train.sft", model=..., data=...)`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from llmworks.core import artifact as artifacts
from llmworks.core.artifact import Adapter, Artifact, Config, Model
from llmworks.core.errors import ArtifactError, UserError
from llmworks.core.workers import WorkerPool
from llmworks.core.workspace import Workspace, check_out, default_workspace
from llmworks.lineage.digests import check_unchanged
from llmworks.runtime import references
from llmworks.runtime.config.errors import describe_errors
from llmworks.runtime.execute import Inputs, StageResult, compute_step_key, execute, find_missing_inputs
from llmworks.runtime.names import find_input
from llmworks.runtime.resolve import ResolvedStage, find_conversion, resolve_stage

if TYPE_CHECKING:
    from llmworks.core.types import Engine

A = TypeVar("A", bound=Artifact)
InputValue = Artifact | str | Path | Sequence[Artifact | str | Path] | Mapping[str, Artifact | str | Path]


class Session:
    """A workspace to make artifacts in, with the seed, worker pool and trackers of its stages.

    Args:
        workspace: a `Workspace` or its directory; default: `$LLMWORKS_WORKSPACE`, else `./workspace`.
        seed: random seed of every stage.
        quiet: show no progress.
        pool: processes for stages that work in parts; does not change results.
        track: experiment trackers that also receive metrics (tensorboard, wandb, mlflow, trackio).
        say: receives status lines, for example that another run created a result meanwhile.
    """

    def __init__(
        self,
        workspace: Workspace | Path | str | None = None,
        *,
        seed: int = 0,
        quiet: bool = False,
        pool: WorkerPool | None = None,
        track: Sequence[str] = (),
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.workspace = (
            workspace if isinstance(workspace, Workspace) else Workspace(Path(workspace or default_workspace()))
        )
        self._reference_workspace = self.workspace  # where references are resolved; not changed by `at`
        self.seed = seed
        self.quiet = quiet
        self.pool = pool or WorkerPool()
        self.track = tuple(track)
        self.say = say

    def make(
        self,
        stage: str,
        *,
        kind: type[A] = Artifact,  # type: ignore[assignment]
        config: Mapping[str, Any] | Config | None = None,
        out: Path | str | None = None,
        **inputs: InputValue,
    ) -> A:
        """Make the artifact of a stage, or reuse one in the workspace.

        Args:
            stage: its name, as `train.sft`; `llmworks stages` lists them.
            kind: the class that the result is checked against, and typed as.
            config: fields of the stage; `llmworks stages NAME` describes them.
            out: a name for the result: a link to it.
            inputs: artifacts, or references that `load` resolves, by the names of the stage's inputs.

        Errors: UserError for an unknown stage, field or input, or an input of the wrong kind; errors of the stage.
        """
        resolved = resolve_stage(stage)
        if out is not None:
            check_out(Path(out))
        fields = validate(resolved, config)
        if not issubclass(resolved.get_output(fields), kind):
            raise UserError(f"{stage} makes a {resolved.get_output(fields).kind}, kind is {kind.kind}")
        made = self.run_stage(resolved, fields, self.resolve_inputs(resolved, inputs)).artifact
        assert isinstance(made, kind)
        if out is not None:
            self.workspace.link_out(Path(out), made)
        return made

    def run_stage(self, stage: ResolvedStage, config: Config, inputs: Inputs) -> StageResult:
        """Run one stage, or reuse its result. Missing inputs are filled with the stage's defaults."""
        given = self.add_default_inputs(stage, config, inputs)
        check_inputs(stage, given)
        return execute(
            stage,
            config,
            given,
            self.workspace,
            seed=self.seed,
            open_engine=self.open_engine,
            quiet=self.quiet,
            pool=self.pool,
            track=self.track,
            announce=self.say,
        )

    def add_default_inputs(self, stage: ResolvedStage, config: Config, inputs: Inputs) -> Inputs:
        """Add a stage's default inputs where none are given, for example the rows that a task names."""
        fill = stage.load_attribute(stage.stage.inputs)
        found: Inputs = inputs if fill is None else fill(config, dict(inputs), self.load)
        return found

    def resolve_inputs(self, stage: ResolvedStage, given: Mapping[str, InputValue]) -> dict[str, Any]:
        """Resolve inputs to artifacts. UserError for an unknown input, and for a wrong kind or shape."""
        found: dict[str, Any] = {}
        for name, value in given.items():
            wanted = stage.inputs.get(name)
            if wanted is None:
                field = f"it is a field: config={{{name!r}: ...}}" if name in stage.config.model_fields else ""
                near = find_input(name, stage.inputs)
                answer = f"did you mean {near!r}?" if near else f"inputs: {', '.join(stage.inputs)}"
                raise UserError(f"{stage.name} has no input {name!r}; {field or answer}")
            if value is None:
                raise UserError(f"{stage.name}: {name} is None; it takes {wanted.describe()}")
            shape = (
                "dict" if isinstance(value, Mapping) else "one" if isinstance(value, (Artifact, str, Path)) else "list"
            )
            if shape != wanted.shape:
                raise UserError(f"{stage.name}: {name} takes {wanted.describe()}, got a {shape}")
            if isinstance(value, Mapping):
                found[name] = {key: self.load(item, name=key) for key, item in value.items()}
            elif isinstance(value, (Artifact, str, Path)):
                found[name] = self.load(value)
            else:
                found[name] = [self.load(item) for item in value]
            every = found[name].values() if shape == "dict" else found[name] if shape == "list" else [found[name]]
            for item in every:
                check_kind(stage, name, item)
        return found

    def load(self, ref: Artifact | str | Path, *, name: str = "", schema: str = "", format: str = "") -> Artifact:
        """Return the artifact behind a reference.

        A path, a name in the workspace, `asset:NAME`, `hf:ORG/NAME`, `gguf:FILE` or `http://HOST/v1#MODEL`.

        Args:
            ref: the reference; an artifact is returned as it is.
            name: display name; default: from the reference.
            schema: schema to convert to (`chat`: conversations); `format`: how its rows are read then.

        Errors: UserError or ArtifactError when there is none.
        """
        if isinstance(ref, Artifact):
            found = ref
        else:
            found = references.resolve_reference(
                str(ref), name=name, workspace=self._reference_workspace, convert=self.convert
            )
        return self.convert(found, schema, {"format": format} if format else {}) if schema else found

    def convert(self, artifact: Artifact, to: str, config: Mapping[str, Any] | None = None) -> Artifact:
        """Convert an external artifact to a form that stages accept, once, in the cache's workspace."""
        stage = find_conversion(to)
        outcome = execute(
            stage,
            validate(stage, config),
            {next(iter(stage.inputs)): artifact},
            references.get_conversion_workspace(),
            seed=0,
            open_engine=self.open_engine,
            quiet=self.quiet or to != "model",
        )
        return artifacts.load(outcome.artifact.path, name=artifact.name, ref=artifact.ref)

    def is_local(self, ref: str) -> bool:
        """Return whether a reference can be resolved without a download or conversion."""
        if not references.is_local(ref):
            return False
        source = references.get_unconverted(ref)
        if source is None:
            return True
        stage = find_conversion("model")
        key = compute_step_key(stage, stage.config(), {next(iter(stage.inputs)): source}, 0)
        return references.get_conversion_workspace().find(key) is not None

    def open_engine(self, model: Artifact | str | Path) -> Engine:
        """Open an engine over a Hugging Face directory, a GGUF file, a server, or an adapter with its base.

        Close it after use: it holds a model in memory, or a connection.

        Errors: ArtifactError for a published model whose files were changed; UserError for what is no model.
        """
        found = self.load(model)
        check_unchanged(found)
        if isinstance(found, Adapter):
            from llmworks.generate.engines.torch import TorchEngine

            base = self.find_base(found)
            check_unchanged(base)
            return TorchEngine.open(base.path, adapter=found.path, name=found.name)
        if not isinstance(found, Model):
            raise UserError(f"{found.path}: is a {found.kind}, not a model")
        return references.open_model(found)

    def find_base(self, adapter: Adapter) -> Model:
        """Return an adapter's base model, found by digest, else by the recorded reference."""
        base = str(adapter.about.get("base", ""))
        found = references.find_digest(base, self.workspace) if base else None
        if found is None:
            ref = references.get_base_reference(adapter)
            found = self.load(ref) if ref else None
        if not isinstance(found, Model) or (base and found.digest != base):
            raise ArtifactError(
                f"{adapter.path}: the adapter's base model {base[:12] or '(not recorded)'} was not found; merge"
                " the adapter first, or run in its workspace"
            )
        return found

    def with_workspace(self, root: Path) -> Session:
        """Return a copy of the session that writes to another workspace; references are resolved as before."""
        other = copy.copy(self)
        other.workspace = Workspace(root)
        return other


def validate(stage: ResolvedStage, config: Mapping[str, Any] | Config | None) -> Config:
    """Return the validated config of a stage. UserError that names each wrong field."""
    if isinstance(config, stage.config):
        return config
    if config is not None and not isinstance(config, Mapping):
        kind = stage.config.__name__
        raise UserError(f"{stage.name}: config takes a mapping of fields or {kind}, not {config!r:.80}")
    try:
        return stage.config.model_validate(dict(config or {}))
    except ValidationError as error:
        problems = describe_errors(stage.config, [*error.errors()], f"{stage.name}.config", stage.name)
        raise UserError("\n".join(text for _, text in problems)) from None


def check_inputs(stage: ResolvedStage, given: Inputs) -> None:
    """Raise UserError for a missing required input."""
    missing = find_missing_inputs(stage, given)
    if missing:
        raise UserError(f"--{missing[0]} ({stage.inputs[missing[0]].describe()}) is missing")


def check_kind(stage: ResolvedStage, name: str, item: Artifact) -> None:
    """Raise UserError for an input of the wrong kind."""
    wanted = stage.inputs[name]
    if isinstance(item, wanted.kinds):
        return
    hint = (
        "; pass its base model here and the adapter as --adapter, or fold it into that model (llmworks merge adapter)"
        if item.kind == "adapter" and "adapter" in stage.inputs
        else ""
    )
    article = "an" if item.kind[0] in "aei" else "a"
    raise UserError(f"--{name}: {item.name} is {article} {item.kind}, expected {wanted.describe()}{hint}")


def load(ref: str | Path, *, name: str = "", workspace: Workspace | Path | str | None = None) -> Artifact:
    """Return the artifact behind a reference, see `Session.load`."""
    return Session(workspace).load(ref, name=name)


def open_engine(model: Artifact | str | Path, workspace: Workspace | Path | str | None = None) -> Engine:
    """Open an engine over a model, see `Session.open_engine`."""
    return Session(workspace).open_engine(model)
