"""How jobs are settled where Ray cannot be asked, and where the disk has no room to note it; no Ray is started."""

import errno
import os
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cluster_toys import ToyJob, ToyResult, toy_train

from pipeline.cluster import Capacity, TrainingFailed, ensure_ray, reserved_device
from pipeline.cluster.outcome import Outcome, done, failed, load_outcome, request_stop
from pipeline.cluster.session import start_thread
from pipeline.cluster.worker import Work, worth_retrying
from pipeline.config.model import ModelConfig
from pipeline.config.scaling import ScalingConfig
from pipeline.config.training import CheckpointConfig, TrainingConfig
from pipeline.data.errors import DataError, DataUnreachableError
from pipeline.training import TrainingStopped, TrainJob

pytestmark = [
    pytest.mark.slow,  # imports ray.train
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]
launching = import_module("pipeline.cluster.launch")  # not the function of the same name


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[ToyJob]:
    """Run by a group whose workers all die; the last one was asked to stop."""

    def fit(*_: object) -> None:
        raise RuntimeError("the workers died")

    monkeypatch.setattr(launching, "_fit", fit)
    made = [ToyJob(output=tmp_path / str(number), seed=number) for number in range(3)]
    request_stop(made[2].output)
    launching._run_group(Work("run", made, toy_train), ScalingConfig(), Capacity(({"CPU": 1.0},)))
    return made


def results(jobs: list[ToyJob]) -> list[object]:
    return [launching._result(job, "run", ToyResult) for job in jobs]


def test_every_job_of_a_group_that_died_is_settled(jobs: list[ToyJob]) -> None:
    first, second, stopped = results(jobs)
    assert str(first) == str(second) == "RuntimeError: the workers died"
    assert isinstance(stopped, TrainingStopped)


@pytest.mark.parametrize(("dies", "attempts"), [("once", 2), ("always", 4), ("stopped", 1), ("disconnected", 1)])
@pytest.mark.parametrize("of", ["controller", "worker"])
def test_a_death_that_ray_train_does_not_make_up_for_is_borne_as_often_as_any_other(
    dies: str, attempts: int, of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import ActorDiedError
    from ray.train import ControllerError

    job, fits = ToyJob(output=tmp_path), []

    def fit(work: Work, *_: object) -> None:
        fits.append(work.jobs)
        if dies == "once" and len(fits) == 2:
            done(work.run, ToyResult(seed=0, world_size=1, total=1.0, backend="gloo")).save(job.output)
            return
        if dies == "stopped":
            request_stop(job.output)
        raise ActorDiedError() if of == "controller" else ControllerError(ActorDiedError())

    monkeypatch.setattr(launching, "_fit", fit)
    monkeypatch.setattr(launching, "connected", lambda: dies != "disconnected")
    launching._run_group(Work("run", [job], toy_train), ScalingConfig(max_failures=3), Capacity(({"CPU": 1.0},)))
    (result,) = results([job])
    assert len(fits) == attempts
    expected = {"once": ToyResult, "stopped": TrainingStopped}.get(dies, TrainingFailed)
    assert isinstance(result, expected)


def test_a_job_that_fails_for_its_own_reason_takes_no_other_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.train import WorkerGroupError

    made, tried = [ToyJob(output=tmp_path / str(number), seed=number) for number in range(5)], []

    def fit(work: Work, *_: object) -> None:
        """As Ray Train does: the group is started again for every failure but the last one of three."""
        for _ in range(3):
            for job in (job for job in work.jobs if load_outcome(job.output, work.run) is None):
                tried.append(job.seed)
                if job.seed < 3:
                    failed(work.run, ValueError(f"reason {job.seed}")).save(job.output)
                    break
                done(work.run, ToyResult(seed=job.seed, world_size=2, total=1.0, backend="gloo")).save(job.output)
            else:
                return
        raise WorkerGroupError("workers failed", {0: ValueError("reason 2")})

    monkeypatch.setattr(launching, "_fit", fit)
    launching._run_group(Work("run", made, toy_train), ScalingConfig(num_workers=2), Capacity(({"CPU": 2.0},)))
    assert tried == [0, 1, 2, 3, 4]
    assert [str(result) for result in results(made)[:3]] == [f"ValueError: reason {number}" for number in range(3)]
    assert all(isinstance(result, ToyResult) for result in results(made)[3:])


def test_a_controller_that_always_dies_ends_the_group_also_after_a_job_of_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray.exceptions import ActorDiedError
    from ray.train import ControllerError

    made, fits = [ToyJob(output=tmp_path / str(number), seed=number) for number in range(2)], []

    def fit(work: Work, *_: object) -> None:
        fits.append(len(work.jobs))
        assert len(fits) < 20
        if len(fits) == 1:
            done(work.run, ToyResult(seed=0, world_size=1, total=1.0, backend="gloo")).save(made[0].output)
        raise ControllerError(ActorDiedError())

    monkeypatch.setattr(launching, "_fit", fit)
    monkeypatch.setattr(launching, "connected", lambda: True)
    launching._run_group(Work("run", made, toy_train), ScalingConfig(max_failures=3), Capacity(({"CPU": 1.0},)))
    assert fits == [2, 1, 1, 1]
    first, second = results(made)
    assert isinstance(first, ToyResult)
    assert isinstance(second, TrainingFailed)


@pytest.mark.parametrize("max_failures", [0, 3])
def test_every_job_bears_failures_of_its_own(
    max_failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six jobs that each lose a node `max_failures` times, in one group; the last one once more, in every fit."""
    from ray.train import WorkerGroupError

    made = [ToyJob(output=tmp_path / str(number), seed=number) for number in range(6)]
    left = dict.fromkeys(range(5), max_failures) | {5: 1000}

    def fit(work: Work, *_: object) -> None:
        for _ in range(max_failures + 1):  # as Ray Train counts: over all jobs of the group
            for job in (job for job in work.jobs if load_outcome(job.output, work.run) is None):
                if left[job.seed]:
                    left[job.seed] -= 1
                    break
                done(work.run, ToyResult(seed=job.seed, world_size=2, total=1.0, backend="gloo")).save(job.output)
            else:
                return
        raise WorkerGroupError("workers failed", {0: RuntimeError("node lost")})

    monkeypatch.setattr(launching, "_fit", fit)
    scaling = ScalingConfig(num_workers=2, max_failures=max_failures)
    launching._run_group(Work("run", made, toy_train), scaling, Capacity(({"CPU": 2.0},)))
    assert all(isinstance(result, ToyResult) for result in results(made)[:5])
    outcome = load_outcome(made[5].output, "run")
    assert outcome is not None
    assert (outcome.state, outcome.outside) == ("failed", True)
    assert max_failures + 1 <= 1000 - left[5] <= 2 * max_failures + 1


@pytest.mark.parametrize(("workers", "every_steps", "warned"), [((1, 2), None, 1), ((1, 2), 50, 0), (2, None, 0)])
def test_elastic_training_without_checkpoints_inside_epochs_is_warned_of(
    workers: int | tuple[int, int],
    every_steps: int | None,
    warned: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(launching, "run_jobs", lambda *_, **__: [])
    training = TrainingConfig(checkpoint=CheckpointConfig(every_steps=every_steps))
    job = TrainJob(model=ModelConfig(), data=tmp_path, training=training, output=tmp_path)
    launching.launch_many([job], ScalingConfig(num_workers=workers))
    assert caplog.text.count("set training.checkpoint.every_steps") == warned


@pytest.mark.parametrize(("reserved", "device"), [([], "cpu"), (["1"], "cuda:0")])
def test_a_task_without_a_gpu_of_its_own_leaves_those_of_others_alone(
    reserved: list[str], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(
        "ray.get_runtime_context", lambda: SimpleNamespace(get_accelerator_ids=lambda: {"GPU": reserved})
    )
    assert str(reserved_device()) == device


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(outcome: Outcome, output: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Outcome, "save", full)


def test_jobs_whose_outcome_finds_no_room_fail_with_a_word_of_it(full_disk: None, jobs: list[ToyJob]) -> None:
    for result in results(jobs):
        assert isinstance(result, TrainingFailed)
        assert "is the disk full?" in str(result)


def test_only_what_came_from_outside_the_job_is_tried_again() -> None:
    from ray.exceptions import ActorDiedError

    outside = (
        ActorDiedError(), RuntimeError("connection closed by peer"), OSError("disk"), DataUnreachableError("s3: 503")
    )  # fmt: skip
    inside = (
        ValueError("settings"),
        DataError("altered"),
        ArithmeticError("diverged"),
        torch.OutOfMemoryError("16 GiB"),
    )
    assert all(worth_retrying(error) for error in outside)
    assert not any(worth_retrying(error) for error in inside)


def test_ray_is_not_shut_down_under_a_thread_that_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.init", lambda **_: None)
    alive: list[bool] = []
    monkeypatch.setattr("ray.shutdown", lambda: alive.append(thread.is_alive()))
    with ensure_ray(ScalingConfig()):
        thread = start_thread(time.sleep, 0.3)
    assert alive == [False]
