"""The trials of a search in MLflow."""

from pathlib import Path

import pytest

from pipeline.artifacts import JOURNAL
from pipeline.cluster.sweep.trials import Leg, Point, Trial
from pipeline.config.tracking import TrackingConfig
from pipeline.stages.trial_runs import TrialRuns
from pipeline.tracking import Journal, Tracker
from pipeline.tracking.client import open_client
from pipeline.tracking.spool import latest

LR = "training.optimizer.lr"


def runs_of(client):
    experiment = client.get_experiment_by_name("sparta")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def test_every_trial_is_a_child_run_with_its_values_metrics_and_end(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    directory = tmp_path / "search"
    with Tracker(TrackingConfig(flush_seconds=0.05), tmp_path).chain("demo", params={}) as chain:
        hear = TrialRuns(chain, directory)
        for number, state in enumerate(("done", "failed")):
            trial = Trial(number=number, identity=f"{number:064d}", legs=(Leg(epoch=0, values={LR: 0.1}),))
            hear(trial)
            with Journal(directory / trial.job_directory / JOURNAL) as journal:
                for epoch in (1, 2):
                    journal.log({"val_robust": 0.1 * epoch}, epoch)
                    trial = trial.with_point(Point(epoch=epoch, robust=0.1 * epoch, clean=0.5))
                    hear(trial)
            hear(trial.model_copy(update={"state": state, "error": "diverged" if state == "failed" else ""}))
        early = Trial(number=2, identity="2" * 64, legs=(Leg(epoch=0, values={LR: 1.0}),))
        hear(early)
        hear(early.model_copy(update={"state": "failed", "error": "no room"}))  # before its first epoch
        hear(early.model_copy(update={"number": 3}))  # no epoch yet, no run yet

    client = open_client(f"sqlite:///{tmp_path}/mlflow.db")
    runs = runs_of(client)
    assert set(runs) == {"demo", "search:trial-1", "search:trial-2", "search:trial-3"}
    assert (runs["search:trial-3"].info.status, runs["search:trial-3"].data.tags["error"]) == ("FAILED", "no room")
    well, ill = runs["search:trial-1"], runs["search:trial-2"]
    assert (well.info.status, ill.info.status) == ("FINISHED", "FAILED")
    assert well.data.params == {LR: "0.1"}
    assert well.data.metrics["val_robust"] == 0.2
    assert ill.data.tags["error"] == "diverged"
    assert well.data.tags["mlflow.parentRunId"] == runs["demo"].info.run_id


def test_a_trial_that_changes_ends_one_run_and_an_interrupted_sweep_all(tmp_path: Path):
    tracker = Tracker(TrackingConfig(enabled=False), tmp_path)

    def interrupted() -> None:
        trial = Trial(number=0, identity="0" * 64, legs=(Leg(epoch=0, values={LR: 0.1}),))
        trial = trial.with_point(Point(epoch=1, robust=0.1, clean=0.5))
        with tracker.chain("demo", params={}) as chain, TrialRuns(chain, tmp_path / "search") as hear:
            hear(trial)
            hear(trial.with_values({LR: 0.2}))
            assert status("search:trial-1", "search:trial-1-2") == ["FINISHED", "RUNNING"]
            raise KeyboardInterrupt

    def status(*names: str) -> list[str]:
        return [latest(tracker.spool.records(), name, parents=False).status for name in names]

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert status("search:trial-1", "search:trial-1-2") == ["FINISHED", "KILLED"]
