"""Sweeps on a real Ray: two objectives, trials that end badly, the last epoch under ASHA."""

from pathlib import Path

import pytest
from cluster_toys import toy_trial
from sweep_toys import fragile_trial, tradeoff_trial

from pipeline.cluster.sweep import search
from pipeline.config.chain import ChainConfig
from pipeline.config.load import load_config
from pipeline.config.scaling import ScalingConfig

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
SCALING = ScalingConfig(num_cpus=1, health_check_interval=0.2)


def config(root: Path, space: str, *settings: str) -> ChainConfig:
    (root / "space.yaml").write_text(space)
    fixed = ["search.enabled=true", f"search.space={root / 'space.yaml'}", "search.scheduler=none"]
    return load_config("demo", [*fixed, "search.algorithm=random", "scaling.max_failures=1", *settings])


def test_two_objectives_give_the_known_front(tmp_path: Path):
    space = "training.threat.eps: {choice: [0.1, 0.2, 0.3]}\ntraining.label_smoothing: {choice: [0.0, 0.1]}"
    objectives = ("search.objectives=[robust,clean]", "search.algorithm=optuna", "search.num_trials=6")
    found = search(config(tmp_path, space, *objectives), data=tmp_path, output=tmp_path / "out", train=tradeoff_trial)
    assert len(found.trials) == 6
    front = [trial.values["training.threat.eps"] for trial in found.front]
    assert front == [0.3, 0.2, 0.1]  # the first objective's best first
    assert all(trial.values["training.label_smoothing"] == 0 for trial in found.front)
    assert found.overrides["training.threat.eps"] == 0.3


def test_a_trial_out_of_memory_and_killed_ones_are_recorded_as_failed_and_the_sweep_goes_on(tmp_path: Path):
    space = "training.optimizer.momentum: {choice: [0.4, 0.5, 0.6, 0.7]}"
    settings = config(tmp_path, space, "search.algorithm=grid", "search.num_trials=4", "search.epochs=2")
    found = search(settings, data=tmp_path, output=tmp_path / "out", train=fragile_trial)
    well, *ill = sorted(found.trials, key=lambda trial: trial.values["training.optimizer.momentum"])
    assert well.state == "done"
    assert [trial.state for trial in ill] == ["failed"] * 3
    assert ill[0].error == "MemoryError: no room"
    assert all(trial.error for trial in ill[1:])
    assert found.best == well


def test_asha_lets_a_trial_that_reached_its_last_epoch_finish(tmp_path: Path):
    # The last epoch, 3, is a rung of grace 1 and factor 3, and only the first trial to get there is the best.
    space = "training.optimizer.lr: {choice: [0.1, 0.11]}"
    settings = config(
        tmp_path, space, "search.algorithm=grid", "search.num_trials=2", "search.epochs=3", "search.scheduler=asha",
        "search.grace_epochs=3",
    )  # fmt: skip
    found = search(settings, data=tmp_path, output=tmp_path / "out", train=toy_trial)
    assert [trial.state for trial in found.trials] == ["done", "done"]
    assert all((tmp_path / "out" / trial.job_directory / "outcome.json").is_file() for trial in found.trials)
