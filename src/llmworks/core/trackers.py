"""Experiment trackers: send the metric stream also to TensorBoard, Weights & Biases, MLflow or trackio.

Off by default; results do not depend on it. A tracker that fails is dropped with a warning and the run continues. Rows
need a `step`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmworks.core.errors import MissingDependency, UserError

PROJECT = "llmworks"


class Tracker(NamedTuple):
    """One run in one tool: `log(step, values)`, then `close()`."""

    log: Callable[[int, Mapping[str, float]], None]
    close: Callable[[], None]


def _open_tensorboard(folder: Path, run: str, config: Mapping[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard" / run))
    writer.add_text("config", "\n".join(f"    {k}: {v}" for k, v in config.items()))

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _open_wandb(folder: Path, run: str, config: Mapping[str, Any]) -> Tracker:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    offline = not (
        os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE")
    )  # without a key it would prompt for one
    made = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=run,
        name=run,
        dir=str(folder),
        config=dict(config),
        resume="allow",
        mode="offline" if offline else None,
        settings=wandb.Settings(silent=True),
    )
    made.define_metric(
        "*", step_metric="step"
    )  # a resumed run starts at an earlier step, which wandb's own step counter refuses
    return Tracker(lambda step, values: made.log({"step": step, **values}), made.finish)


def _open_mlflow(folder: Path, run: str, config: Mapping[str, Any]) -> Tracker:
    place = os.environ.get("MLFLOW_TRACKING_URI") or f"file:{folder / 'mlflow'}"
    if place.startswith("file:"):
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(place)
    found = client.get_experiment_by_name(PROJECT)
    experiment = found.experiment_id if found is not None else client.create_experiment(PROJECT)
    earlier = client.search_runs([experiment], filter_string=f"attributes.run_name = '{run}'")
    made = earlier[0].info.run_id if earlier else client.create_run(experiment, run_name=run).info.run_id
    for name, value in {} if earlier else config.items():
        client.log_param(made, name, str(value)[:500])

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            client.log_metric(made, name, value, step=step)

    return Tracker(log, lambda: client.set_terminated(made))


def _open_trackio(folder: Path, run: str, config: Mapping[str, Any]) -> Tracker:
    os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
    import trackio

    with contextlib.redirect_stdout(io.StringIO()):  # it prints status messages to stdout
        trackio.init(project=PROJECT, name=run, config=dict(config), resume="allow", embed=False)

    def close() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()  # type: ignore[no-untyped-call]

    return Tracker(lambda step, values: trackio.log(dict(values), step=step), close)


TRACKERS: dict[str, tuple[str, Callable[[Path, str, Mapping[str, Any]], Tracker]]] = {
    "tensorboard": ("tensorboard", _open_tensorboard),
    "wandb": ("wandb", _open_wandb),
    "mlflow": ("mlflow", _open_mlflow),
    "trackio": ("trackio", _open_trackio),
}


def check_trackers(names: Sequence[str]) -> None:
    """Check that all tools are available.

    Errors: UserError for an unknown tool; MissingDependency for one that is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--track {name}: unknown tool; choose from {', '.join(TRACKERS)}")
        if importlib.util.find_spec(TRACKERS[name][0]) is None:
            raise MissingDependency(
                f"--track {name} needs the package {TRACKERS[name][0]}; install it with: pip install 'llmworks[track]'"
            )


class MetricTracking:
    """Sends rows to the named tools, each opened at the first row. `say` receives warnings about failures."""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        run: str,
        config: Mapping[str, Any],
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Errors: UserError for an unknown tool; MissingDependency for one that is not installed."""
        check_trackers(names)
        self.names, self.folder, self.run, self.config, self.say = list(dict.fromkeys(names)), folder, run, config, say
        self.trackers: dict[str, Tracker] = {}

    def log(self, row: Mapping[str, Any]) -> None:
        """Send a row of the metric stream; values that are not numbers, and rows without a step, are skipped."""
        values = {
            name: float(value) for name, value in row.items() if name != "step" and isinstance(value, (int, float))
        }
        if "step" not in row or not values:
            return
        for name in list(self.names):
            with self._guard(name):
                if name not in self.trackers:
                    self.trackers[name] = TRACKERS[name][1](self.folder, self.run, self.config)
                self.trackers[name].log(int(row["step"]), values)

    def close(self) -> None:
        """Flush and close all trackers."""
        for name, tracker in self.trackers.items():
            with self._guard(name):
                tracker.close()
        self.trackers.clear()

    @contextlib.contextmanager
    def _guard(self, name: str) -> Any:
        try:
            yield
        except Exception as error:  # a tracker's failure must not stop the run
            self.say(
                f"{name}: failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); the"
                " run continues without it"
            )
            self.names = [n for n in self.names if n != name]
