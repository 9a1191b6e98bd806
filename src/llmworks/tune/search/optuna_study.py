"""The optimizer of a sweep: Optuna's TPE over a journal on disk, from which an interrupted sweep resumes.

Does not know recipes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmworks.core.errors import MissingDependency
from llmworks.tune.search.search_space import FieldSpace, SweepConfig


@dataclass(frozen=True)
class SweepTrial:
    """One trial: its values, and its score or error."""

    number: int
    values: Mapping[str, Any] = field(default_factory=dict)
    score: float | None = None
    error: str = ""
    seconds: float = 0.0


class SweepStudy:
    """Ask-and-tell interface of the sweep.

    A trial that was running when a sweep was interrupted is retried with the same values.
    """

    def __init__(self, search: SweepConfig, file: Path) -> None:
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise MissingDependency("a sweep needs optuna; install it with: pip install 'llmworks[tune]'") from None
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.search, self._states = search, optuna.trial.TrialState
        file.parent.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(str(file)))
        self._study = optuna.create_study(
            study_name="sweep", storage=storage, direction=search.direction, load_if_exists=True
        )
        done = len(self._study.trials)
        self._study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=search.random, seed=search.seed + done
        )  # a seed gives the same samples again after resuming
        waiting = [t for t in self._study.trials if t.state == self._states.WAITING]
        for trial in self._study.trials:
            if trial.state == self._states.RUNNING:
                self._study.tell(trial.number, state=self._states.FAIL)
                if trial.params and not any(w.system_attrs.get("fixed_params") == trial.params for w in waiting):
                    self._study.enqueue_trial(trial.params)
        self._open: dict[int, Any] = {}

    def ask(self) -> SweepTrial:
        """Return a trial with the next values."""
        trial = self._study.ask()
        self._open[trial.number] = trial
        return SweepTrial(
            trial.number, {name: _suggest(trial, name, space) for name, space in self.search.fields.items()}
        )

    def tell(self, trial: SweepTrial) -> None:
        """Record the result of a trial."""
        here = self._open.pop(trial.number)
        here.set_user_attr("why", trial.error)
        here.set_user_attr("seconds", trial.seconds)
        if trial.score is None:
            self._study.tell(trial.number, state=self._states.FAIL)
        else:
            self._study.tell(trial.number, trial.score)

    @property
    def trials(self) -> list[SweepTrial]:
        """All finished trials, in order; interrupted ones are left out."""
        ended = [
            t
            for t in self._study.trials
            if t.state == self._states.COMPLETE or (t.state == self._states.FAIL and t.user_attrs.get("why"))
        ]
        return [
            SweepTrial(
                t.number,
                {name: _decode_value(space, t.params[name]) for name, space in self.search.fields.items()},
                t.value,
                str(t.user_attrs.get("why", "")),
                float(t.user_attrs.get("seconds", 0)),
            )
            for t in ended
        ]

    @property
    def best(self) -> SweepTrial | None:
        """The best trial so far."""
        scored = [t for t in self.trials if t.score is not None]
        sign = 1 if self.search.direction == "maximize" else -1
        return max(scored, key=lambda t: sign * (t.score or 0.0), default=None)

    def compute_importance(self) -> dict[str, float]:
        """Compute parameter importance: each field's share of the score variance, given enough trials (PED-ANOVA:
        Watanabe et al. 2023, arXiv:2304.10255).
        """
        import warnings

        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        if len([t for t in self.trials if t.score is not None]) < 8 or len(self.search.fields) < 2:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return {
                    name: float(share)
                    for name, share in get_param_importances(
                        self._study, evaluator=PedAnovaImportanceEvaluator()
                    ).items()
                }
            except (ValueError, RuntimeError):  # all scores equal
                return {}


def _suggest(trial: Any, name: str, space: FieldSpace) -> Any:
    if space.choices:
        return _decode_value(space, trial.suggest_categorical(name, [json.dumps(choice) for choice in space.choices]))
    if space.whole:
        return trial.suggest_int(name, int(space.low or 0), int(space.high or 0), log=space.log)
    return trial.suggest_float(name, space.low, space.high, log=space.log)


def _decode_value(space: FieldSpace, stored: Any) -> Any:
    """Decode a stored value. Choices are stored as JSON, because they may be lists or mappings."""
    return json.loads(stored) if space.choices else stored
