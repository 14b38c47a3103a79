"""Faults of a training in real processes: in the end weights and metrics are exactly those of an undisturbed one."""

import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.artifacts import write_atomic
from pipeline.evaluation.blocks import save_arrays
from pipeline.tracking import Journal
from pipeline.tracking.journal import read_journal
from pipeline.training import Context, TrainJob, train
from pipeline.training.files import save_tensors
from tests.faults.conftest import Disk
from tests.faults.toys import Result, figures, finish, kill_at, log_of, newest, start, steps_done, wait_for_step

pytestmark = pytest.mark.slow
MakeJob = Callable[[Path], TrainJob]
DAY = 86_400.0


def test_killed_again_and_again(make_job: MakeJob, undisturbed: Result, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run")
    for step in (1, 4, 7, 10, 15):
        kill_at(job, step)
    assert finish(job, start(job)) == undisturbed


def test_newest_checkpoint_is_truncated_or_has_a_flipped_bit(
    make_job: MakeJob, undisturbed: Result, tmp_path: Path
) -> None:
    job = make_job(tmp_path / "run")
    kill_at(job, 5)
    weights = newest(job) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    kill_at(job, 9)
    assert "is damaged and passed over" in log_of(job).read_text()
    for name in ("optimizer.safetensors", "state.json"):
        log_of(job).unlink()
        file = newest(job) / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        kill_at(job, steps_done(job) + 1)
        assert "is damaged and passed over" in log_of(job).read_text()
    assert finish(job, start(job)) == undisturbed


def test_both_checkpoints_are_damaged(make_job: MakeJob, undisturbed: Result, tmp_path: Path) -> None:
    """The training starts again from nothing; what the journal has of it is neither lost nor doubled."""
    job = make_job(tmp_path / "run")
    kill_at(job, 6)
    for slot in (job.output / "checkpoints").glob("[ab]"):
        (slot / "state.json").write_text("{}")
    assert finish(job, start(job)) == undisturbed


@pytest.mark.parametrize("every_steps", [None, 1])
@pytest.mark.parametrize("logged", [False, True])
def test_ended_around_the_journal_entry_of_an_epoch(
    logged: bool,
    every_steps: int | None,
    make_job: MakeJob,
    undisturbed: Result,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before or after the entry; with a checkpoint of the epoch's last step there is no step left to do again."""
    job = make_job(tmp_path / "run")
    checkpoint = job.training.checkpoint.model_copy(update={"every_steps": every_steps})
    job = job.model_copy(update={"training": job.training.model_copy(update={"checkpoint": checkpoint})})
    log = Journal.log

    def failing(journal: Journal, metrics: Mapping[str, float], step: int) -> None:
        due = metrics.get("epoch") == epoch
        if logged or not due:
            log(journal, metrics, step)
        if due:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "log", failing)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for epoch in (3, 5):  # noqa: B007 - `failing` looks at it
            with pytest.raises(KeyboardInterrupt):
                train(job, Context())
        monkeypatch.undo()
        trained = train(job, Context())
    finally:
        torch.set_num_threads(threads)
    assert figures(job.output) == undisturbed.metrics
    assert trained.weights_sha256 == undisturbed.weights


def test_clock_is_set_back(make_job: MakeJob, undisturbed: Result, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run")
    kill_at(job, 4, clock=DAY)
    kill_at(job, 9, clock=-DAY)
    assert finish(job, start(job)) == undisturbed


def test_disk_is_full_while_checkpoints_are_written(make_job: MakeJob, undisturbed: Result, disk: Disk) -> None:
    job = make_job(disk.root / "run")
    for leave in (0, 30_000):
        process = start(job, pause=0.5)
        wait_for_step(job, process, steps_done(job) + 2)
        disk.fill(leave)
        process.join(60)
        assert process.exitcode == 1
        assert "No space left on device" in log_of(job).read_text()
        assert not list(job.output.glob("checkpoints/.*")), "a half-written checkpoint takes up space"
        disk.empty()
    assert finish(job, start(job)) == undisturbed


def test_what_could_not_be_written_takes_up_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: write_atomic(tmp_path / "a", "x"),
        lambda: save_tensors(tmp_path / "b", {"x": torch.ones(9)}),
        lambda: save_arrays(tmp_path / "c", {"x": np.ones(9)}),
    ):
        with pytest.raises(OSError, match="No space left"):
            write()
    assert list(tmp_path.iterdir()) == []


def test_disk_is_full_while_a_journal_is_written(disk: Disk) -> None:
    path = disk.root / "metrics.jsonl"
    with Journal(path) as journal:
        journal.log({"loss": 0.0}, 0)
        disk.fill()
        with pytest.raises(OSError, match=r"space|disk full"):  # noqa: PT012 - the page in use still takes some
            for step in range(1000):
                journal.log({"loss": float(step)}, step)
        logged = len(read_journal(path)[0])
        disk.empty()
        for step in range(1000):
            journal.log({"loss": float(step)}, step)
    entries = read_journal(path)[0]
    assert 0 < logged < 1000
    assert [(e.step, e.metrics["loss"]) for e in entries] == [(n, float(n)) for n in range(1000)]
