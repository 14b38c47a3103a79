"""The driver's view of a sweep: the record of every trial, kept on disk, told to the sampler and shown."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifacts import fingerprint
from pipeline.cluster.outcome import load_outcome
from pipeline.cluster.sweep.adopt import inherited
from pipeline.cluster.sweep.samplers import Sampler
from pipeline.cluster.sweep.trials import Leg, Point, State, Trial, save_trial
from pipeline.config.load import ConfigError
from pipeline.config.search import Objective

OnTrial = Callable[[Trial], None]
"""Called in the driver at the start of a trial, after each of its epochs, and at its end."""


class Board:
    """All trials of a sweep in `root`. Its methods are called by one thread, the one that runs the sweep."""

    def __init__(
        self,
        root: Path,
        run: str,
        *,
        sampler: Sampler,
        identify: Callable[[dict[str, Any]], str],
        num_trials: int,
        objective: Objective,
        known: Sequence[Trial],
        on_trial: OnTrial,
    ) -> None:
        self.root, self.run, self._sampler, self._identify = root, run, sampler, identify
        self._objective = objective
        self.trials = {trial.number: trial for trial in known}
        self._waiting = [trial for trial in known if not trial.finished]
        self._new = num_trials - len(known)
        self._started: dict[int, float] = {}
        self._on_trial = on_trial

    @property
    def num_left(self) -> int:
        """Trials that are yet to be started."""
        return len(self._waiting) + self._new

    def next(self) -> Trial | None:
        """The next trial to run: interrupted ones first, then new points; None when there are no more.

        A point that is no valid configuration, whose values are each allowed but not together, is a failed trial.
        """
        if self._waiting:
            return self._waiting.pop(0)
        while self._new > 0 and (values := self._sampler.ask()) is not None:
            self._new -= 1
            trial = self._made(values)
            self._keep(trial)
            if not trial.finished:
                return trial
            self._sampler.tell(trial)
        self._new = 0
        return None

    def _made(self, values: dict[str, Any]) -> Trial:
        state: State = "running"
        try:
            identity, error = self._identify(values), ""
        except ConfigError as refusal:
            state, identity, error = "failed", fingerprint(values), str(refusal)
        return Trial(
            number=max(self.trials, default=-1) + 1,
            identity=identity,
            legs=(Leg(epoch=0, values=values),),
            objective=self._objective,
            state=state,
            error=error,
        )

    def started(self, number: int, values: dict[str, Any]) -> None:
        """A trial was started or, with other values, goes on as a changed copy of another one."""
        self._started[number] = time.monotonic()
        self._keep(self.trials[number].with_values(values))

    def reported(self, number: int, point: Point) -> None:
        """A trial has finished an epoch."""
        self._keep(self.trials[number].with_point(point).lasting(self._elapsed(number)))

    def ended(self, number: int, error: str = "") -> None:
        """A trial has ended by itself, by the scheduler, or with an error."""
        trial = self.trials[number]
        job = self.root / trial.job_directory
        outcome = load_outcome(job, self.run)
        state: State = "failed" if error or not trial.history else "stopped"
        if outcome is not None:
            state, error = outcome.state, outcome.error or error
            trial = trial.with_missing(_unheard(outcome.result, after=inherited(job)))
        elif state == "failed" and not error:
            error = "ended without a single epoch"
        # What a training fails of by itself, it leaves as its outcome.
        retry = state == "failed" and (outcome is None or outcome.outside)
        trial = trial.lasting(self._elapsed(number)).model_copy(update={"state": state, "error": error, "retry": retry})
        self._keep(trial)
        self._sampler.tell(trial)

    def _elapsed(self, number: int) -> float:
        now = time.monotonic()
        before, self._started[number] = self._started.get(number, now), now
        return now - before

    def _keep(self, trial: Trial) -> None:
        self.trials[trial.number] = trial
        save_trial(self.root, trial)
        self._on_trial(trial)


def _unheard(result: dict[str, Any], *, after: int) -> list[Point]:
    """The epochs that a finished training has on record, but for those of the trial that it is a copy of.

    One that is killed between the checkpoint and the report of an epoch goes on after it: nobody heard of that epoch.
    """
    history = result.get("history", ())
    points = [Point(epoch=e["epoch"], robust=e["val_robust"], clean=e["val_clean"]) for e in history]
    return [point for point in points if point.epoch > after]
