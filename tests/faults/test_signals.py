"""SIGTERM, Ctrl-C and kill -9 amid trainings and searches on Ray: MLflow told, exit code, and on to the same end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from pipeline.cluster.sweep import Trial, load_trials
from pipeline.config.load import load_config
from pipeline.tracking import read_history, read_journal
from tests.faults.chains import Mirror, undisturbed
from tests.faults.toys import figures

SETTINGS = (
    "name=stopped",
    "training.epochs=30",
    "training.checkpoint.every_steps=2",
    "model.options.width=8",
    "transfer=[]",
    "scaling.num_workers=1",
    "scaling.num_cpus=2",
)
BRANCHES = ("source", "source-control")
SEARCH = (
    "name=searched",
    "transfer=[]",
    "model.options.width=8",
    "search.enabled=true",
    "search.algorithm=random",
    "search.scheduler=none",
    "search.num_trials=2",
    "search.epochs=15",
    "scaling.num_workers=1",
    "scaling.num_cpus=1",  # one trial after the other
)
KILLED_WITHIN = 3.0  # seconds that Ray leaves a job between SIGTERM and SIGKILL
pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1500),  # four times 240 s until it trains, and 300 s to the end
]


@contextmanager
def chain(
    root: Path, settings: tuple[str, ...] = SETTINGS, until: str = "pretrain"
) -> Iterator["subprocess.Popen[bytes]"]:
    """A chain under way, killed at the end where it is not over."""
    command = [sys.executable, "-m", "pipeline.run", *settings, "--until", until]
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and its children
    with (root / "log").open("wb") as log:
        child = subprocess.Popen(command, env={**kept, "SPARTA_RUNS": str(root)}, stdout=log, stderr=log)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def said(root: Path) -> str:
    return (root / "log").read_text()


def directory(root: Path, branch: str) -> Path:
    (record,) = root.glob(f"stopped/pretrain/{branch}/*/artifact.json")
    return record.parent


def epochs_logged(root: Path) -> int:
    """How many epochs the journal of the source's training has."""
    entries = [
        entry for path in root.glob("stopped/pretrain/source/*/metrics.jsonl") for entry in read_journal(path)[0]
    ]
    return sum("epoch" in entry.metrics for entry in entries)


def wait_for_epochs(root: Path, child: "subprocess.Popen[bytes]", count: int) -> None:
    """Until the source's training has gone on by so many epochs."""
    deadline, before = time.monotonic() + 240, epochs_logged(root)
    while epochs_logged(root) < before + count:
        assert child.poll() is None, said(root)
        assert time.monotonic() < deadline, said(root)
        time.sleep(0.05)
    assert epochs_logged(root) < 30, "it was over before it was disturbed"


def ray_processes(child: "subprocess.Popen[bytes]", name: str) -> list[psutil.Process]:
    """The processes of a chain's Ray that bear a name: "RayTrainWorker" trains, "TrainController" looks after it."""
    found = []
    for process in psutil.Process(child.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if name in " ".join(process.cmdline()):
                found.append(process)
    assert found, f"there is no {name}"
    return found


def seconds_until_killed(mirror: Mirror, child: "subprocess.Popen[bytes]", sent: float, *names: str) -> float:
    """Until MLflow says KILLED of all runs of these names, seen while the chain is still ending."""
    ending = True
    while ending:
        ending = child.poll() is None
        found = mirror.statuses()
        if {found[name][-1] if name in found else "" for name in names} == {"KILLED"}:
            return time.monotonic() - sent
        time.sleep(0.02)
    raise AssertionError(f"it ended without telling MLflow: {found}")


def test_stopped_killed_and_submitted_again_to_the_same_weights_and_metrics(tmp_path: Path) -> None:
    mirror = Mirror(tmp_path)
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        with chain(tmp_path) as child:
            wait_for_epochs(tmp_path, child, 1)
            trainers, sent = ray_processes(child, "RayTrainWorker"), time.monotonic()
            child.send_signal(number)
            if number != signal.SIGKILL:
                names = ("stopped", *(f"pretrain:{branch}" for branch in BRANCHES))
                assert seconds_until_killed(mirror, child, sent, *names) < KILLED_WITHIN
            assert child.wait(60) == code, said(tmp_path)
            _, alive = psutil.wait_procs(trainers, timeout=90)
            assert not alive, "a training outlived its driver"
        if number != signal.SIGKILL:
            assert "Traceback" not in said(tmp_path)
            assert "the same command goes on from here" in said(tmp_path)

    with chain(tmp_path) as child:
        wait_for_epochs(tmp_path, child, 1)
        for name in ("RayTrainWorker", "TrainController"):
            ray_processes(child, name)[0].kill()
        assert child.wait(300) == 0, said(tmp_path)
    assert "was interrupted" in said(tmp_path)

    (data,) = tmp_path.glob("stopped/prepare/source/*/prepared.json")
    expected = undisturbed(load_config(None, SETTINGS), data.parent, tmp_path / "undisturbed")
    assert mirror.statuses() == {
        name: ["FINISHED"] for name in ("stopped", "prepare:source", *(f"pretrain:{branch}" for branch in BRANCHES))
    }
    for branch in BRANCHES:
        output = directory(tmp_path, branch)
        record = json.loads((output / "trained.json").read_text())
        assert record["weights_sha256"] == expected[branch].weights_sha256
        assert record["history"] == [json.loads(epoch.model_dump_json()) for epoch in expected[branch].history]
        assert figures(output) == figures(tmp_path / "undisturbed" / branch)
        journal = read_history(output / "metrics.jsonl")
        assert mirror.history(f"pretrain:{branch}") == {key: sorted(points) for key, points in journal.items()}


def trials(root: Path) -> list[Trial]:
    """The trials of the search, as far as they have come."""
    return [trial for path in root.glob("searched/search/best/*/trials") for trial in load_trials(path.parent)]


def test_a_search_that_is_stopped_keeps_its_trials_and_goes_on_in_the_same_runs(tmp_path: Path) -> None:
    mirror, space = Mirror(tmp_path), tmp_path / "space.yaml"
    space.write_text("training.optimizer.lr: {log_uniform: [0.01, 0.1]}")
    settings = (*SEARCH, f"search.space={space}")
    with chain(tmp_path, settings, until="search") as child:
        deadline = time.monotonic() + 240
        while [len(trial.history) > 2 for trial in trials(tmp_path)] != [True, True]:
            assert child.poll() is None, said(tmp_path)
            assert time.monotonic() < deadline, said(tmp_path)
            time.sleep(0.05)
        trainers, sent = ray_processes(child, "ray::"), time.monotonic()
        child.send_signal(signal.SIGTERM)
        assert seconds_until_killed(mirror, child, sent, "searched", "search:best", "search:trial-2") < KILLED_WITHIN
        assert child.wait(60) == 143, said(tmp_path)
        _, alive = psutil.wait_procs(trainers, timeout=90)
        assert not alive, "a trial outlived its driver"
    assert "Traceback" not in said(tmp_path)
    first, second = trials(tmp_path)
    assert first.finished
    assert not second.finished, "it was over before it was stopped"
    assert mirror.statuses()["search:trial-1"] == ["FINISHED"]
    points = mirror.history("search:trial-1")

    with chain(tmp_path, settings, until="search") as child:
        assert child.wait(300) == 0, said(tmp_path)
    runs = ("searched", "prepare:source", "search:best", "search:trial-1", "search:trial-2")
    assert mirror.statuses() == {name: ["FINISHED"] for name in runs}
    again, other = trials(tmp_path)
    assert again == first
    assert mirror.history("search:trial-1") == points
    assert [point.epoch for point in other.history] == list(range(1, 16))
    assert other.history[: len(second.history)] == second.history
    for name in runs[3:]:
        assert [epoch for _, epoch in mirror.history(name)["epoch"]] == [point.epoch for point in other.history], name
