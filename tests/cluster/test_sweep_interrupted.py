"""A sweep whose driver is killed: called again, it keeps what is finished and goes on with the rest."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cluster.sweep import load_trials

pytestmark = [pytest.mark.ray, pytest.mark.slow]
DRIVER = """
import sys
from pathlib import Path
from cluster_toys import slow_trial
from pipeline.cluster.sweep import search
from pipeline.config.load import load_config
root = Path(sys.argv[1])
settings = ["search.enabled=true", "search.algorithm=random", "search.scheduler=none", "search.num_trials=5",
            "search.epochs=4", f"search.space={root / 'space.yaml'}", "scaling.num_cpus=1"]
search(load_config("demo", settings), data=root, output=root, train=slow_trial)
"""


def start(root: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(root)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
    )


def finished(root: Path) -> list[int]:
    return [trial.number for trial in load_trials(root) if trial.finished]


def wait_until(condition, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "the sweep made no progress"
        time.sleep(0.1)


def test_a_sweep_whose_driver_is_killed_keeps_its_finished_trials_and_resumes_the_others(tmp_path: Path):
    (tmp_path / "space.yaml").write_text("training.optimizer.lr: {log_uniform: [0.01, 1.0]}")
    driver = start(tmp_path)
    wait_until(lambda: len(finished(tmp_path)) >= 2 and _running_at(tmp_path) >= 2, timeout=120)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = {trial.number: trial for trial in load_trials(tmp_path)}
    kept = finished(tmp_path)
    assert len(kept) < 5

    time.sleep(3)  # Ray's own processes notice that their driver is gone
    assert start(tmp_path).wait(timeout=150) == 0
    after = load_trials(tmp_path)
    assert [trial.state for trial in after] == ["done"] * 5
    for trial in after:
        epochs = (tmp_path / trial.job_directory / "epochs.log").read_text().split()
        assert epochs == ["1", "2", "3", "4"], "every epoch of every trial was run exactly once"
    assert all(before[number] == after[number] for number in kept)


def _running_at(root: Path) -> int:
    """The last epoch of the trial that is under way."""
    return max(
        (trial.history[-1].epoch for trial in load_trials(root) if not trial.finished and trial.history), default=0
    )
