"""The trials of a search as MLflow runs: children of the chain's run, fed from the trials' own journals."""

from pathlib import Path

from pipeline.cluster.sweep import Trial
from pipeline.tracking import ChainRun, StageRun

JOURNAL = "metrics.jsonl"


class TrialRuns:
    """Hears of every change of a trial, as `on_trial` of `search`; what it notes is delivered in the background."""

    def __init__(self, chain: ChainRun, directory: Path) -> None:
        self._chain, self._directory = chain, directory
        self._runs: dict[tuple[int, int], StageRun] = {}

    def __call__(self, trial: Trial) -> None:
        """Begin the run with a trial's first epoch, and end it with the trial.

        A trial that went on with other values is another run, because MLflow's parameters cannot change.
        """
        leg = (trial.number, len(trial.legs))
        if leg not in self._runs and trial.history:
            self._runs[leg] = self._begin(trial)
        run = self._runs.get(leg)
        if trial.finished and run is not None:
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
