"""The trials of a search as MLflow runs: children of the chain's run, fed from the trials' own journals."""

from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.artifacts import JOURNAL
from pipeline.cluster.sweep import Trial
from pipeline.tracking import ChainRun, StageRun


class TrialRuns:
    """Hears of every change of a trial, as `on_trial` of `search`; what it notes is delivered in the background.

    A context manager: the runs of trials that are still under way at its end, as after Ctrl-C, end with it.
    """

    def __init__(self, chain: ChainRun, directory: Path) -> None:
        self._chain, self._directory = chain, directory
        self._runs: dict[tuple[int, int], StageRun] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for leg in list(self._runs):
            self._runs.pop(leg).__exit__(kind, error, trace)

    def __call__(self, trial: Trial) -> None:
        """Begin the run with a trial's first epoch, or with the end of one that has none, and end it with the trial.

        A trial that goes on with other values is another run, because MLflow's parameters cannot change.
        """
        leg = (trial.number, len(trial.legs))
        if (earlier := self._runs.pop((trial.number, len(trial.legs) - 1), None)) is not None:
            earlier.__exit__(None, None, None)
        if leg not in self._runs and (trial.history or trial.finished):
            self._runs[leg] = self._begin(trial)
        if trial.finished:
            run = self._runs.pop(leg)
            run.tag({"state": trial.state, **({"error": trial.error} if trial.error else {})})
            if trial.state == "failed":
                run.fail()
            run.__exit__(None, None, None)

    def _begin(self, trial: Trial) -> StageRun:
        suffix = f"-{len(trial.legs)}" if len(trial.legs) > 1 else ""
        tags = {"stage": "search", "branch": f"trial-{trial.number + 1}", "fingerprint": trial.identity}
        run = self._chain.stage(f"search:trial-{trial.number + 1}{suffix}", params=trial.values, tags=tags)
        run.__enter__()
        run.mirror(self._directory / trial.job_directory / JOURNAL)
        return run
