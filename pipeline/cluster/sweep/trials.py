"""A trial, its objective (`Trial.best`, `Trial.score`), and its record, from which an interrupted sweep goes on."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.artifacts import fingerprint, write_atomic
from pipeline.config.search import Objective

_log = logging.getLogger(__name__)
_NAME = "trial.json"

State = Literal["running", "done", "stopped", "failed"]


class Point(BaseModel):
    """What one epoch of a trial came to: accuracies in [0, 1] on the validation split."""

    model_config = ConfigDict(frozen=True)

    epoch: int
    robust: float
    clean: float


class Leg(BaseModel):
    """The values that a trial trained with from some epoch on. Only population-based training has more than one."""

    model_config = ConfigDict(frozen=True)

    epoch: int
    values: dict[str, Any]
    """The point of the search space, by dotted key."""


class Trial(BaseModel):
    """One training of a sweep. "stopped" means that the scheduler ended it; what it reached counts."""

    model_config = ConfigDict(frozen=True)

    number: int
    identity: str
    """Fingerprint of everything that the trial's result depends on."""
    legs: tuple[Leg, ...]
    objective: Objective = "robust"
    """The accuracy that decides which of its epochs counts: the first of `search.objectives`."""
    state: State = "running"
    history: tuple[Point, ...] = ()
    seconds: float = 0.0
    """Wall time over all runs of it."""
    error: str = ""
    retry: bool = False
    """Whether a fault from outside, such as a full disk, made it fail: the next run of the sweep goes on with it."""

    @property
    def values(self) -> dict[str, Any]:
        """The point of the search space that it trains with, or trained with last."""
        return self.legs[-1].values

    @property
    def directory(self) -> str:
        """Its directory below the sweep's."""
        return f"trials/{self.number:04d}-{self.identity[:8]}"

    @property
    def job_directory(self) -> str:
        """The directory of its training with the present values, below the sweep's."""
        return f"{self.directory}/run-{fingerprint(self.values)[:8]}"

    @property
    def best(self) -> Point | None:
        """The epoch that is highest in the objective, by which trials are compared; of equals the more robust one.

        What training keeps is decided by its own `training.selection.metric`.
        """
        return max(
            self.history, key=lambda point: (getattr(point, self.objective), point.robust, point.clean), default=None
        )

    @property
    def finished(self) -> bool:
        """Whether it need not be run again."""
        return self.state != "running"

    @property
    def ranked(self) -> bool:
        """Whether it can be the best one."""
        return self.state in ("done", "stopped") and bool(self.history)

    def score(self, objectives: Sequence[str]) -> list[float]:
        """Its best epoch's value of every objective."""
        assert self.best is not None, "only trials with a history have a score"
        return [float(getattr(self.best, name)) for name in objectives]

    def again(self) -> "Trial":
        """The trial as the next run of the sweep takes it up: under way, where it failed by no fault of its own."""
        return self.model_copy(update={"state": "running", "error": "", "retry": False}) if self.retry else self

    def with_values(self, values: dict[str, Any]) -> "Trial":
        """The same trial going on with these values, from its last epoch where they are others."""
        if values == self.values:
            return self
        epoch = self.history[-1].epoch if self.history else 0
        return self.model_copy(update={"legs": (*self.legs, Leg(epoch=epoch, values=values))})

    def lasting(self, seconds: float) -> "Trial":
        """The same trial, so much longer under way."""
        return self.model_copy(update={"seconds": self.seconds + seconds})

    def with_missing(self, points: Iterable[Point]) -> "Trial":
        """The same trial with the epochs among `points` that it has not heard of."""
        known = {point.epoch for point in self.history}
        history = (*self.history, *(point for point in points if point.epoch not in known))
        return self.model_copy(update={"history": tuple(sorted(history, key=lambda point: point.epoch))})

    def with_point(self, point: Point) -> "Trial":
        """The same trial one epoch later; an epoch that is repeated after a crash replaces itself."""
        kept = tuple(old for old in self.history if old.epoch < point.epoch)
        return self.model_copy(update={"history": (*kept, point)})


def save_trial(root: Path, trial: Trial) -> None:
    """Write the record into the trial's directory below the sweep's."""
    write_atomic(root / trial.directory / _NAME, trial.model_dump_json(indent=1))


def load_trials(root: Path) -> list[Trial]:
    """All trials of a sweep's directory, by number; one that cannot be read is passed over with a warning."""
    trials = []
    for path in sorted((root / "trials").glob(f"*/{_NAME}")):
        try:
            trials.append(Trial.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError) as error:
            _log.warning("the record of a trial, %s, cannot be read and is passed over: %s", path, error)
    return sorted(trials, key=lambda trial: trial.number)


def pareto_front(trials: Sequence[Trial], objectives: Sequence[str]) -> list[Trial]:
    """Trials that no other one beats in an objective without losing in another; best first by the first objective."""
    ranked = [trial for trial in trials if trial.ranked]
    scores = [trial.score(objectives) for trial in ranked]
    front = [trial for trial, own in zip(ranked, scores, strict=True) if not any(_beats(o, own) for o in scores)]
    return sorted(front, key=lambda trial: trial.score(objectives), reverse=True)


def _beats(other: Sequence[float], own: Sequence[float]) -> bool:
    return list(other) != list(own) and all(a >= b for a, b in zip(other, own, strict=True))
