"""Training jobs in Ray Train workers.

Starting a worker group costs seconds, so jobs share groups: as many groups run side by side as the cluster has room
for, and each takes its share of the jobs one after the other.
"""

import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel

from pipeline.artifacts import JOURNAL
from pipeline.cluster.capacity import Capacity, connected, preflight, uses_gpu, worker_bundle
from pipeline.cluster.orphans import freeing_orphans
from pipeline.cluster.outcome import Outcome, clear_stop, failed, load_outcome, request_stop, stop_requested, stopped
from pipeline.cluster.session import cluster_address, ensure_ray, start_thread
from pipeline.cluster.worker import Job, Train, Work, run_work
from pipeline.config.scaling import ScalingConfig
from pipeline.tracking.journal import Entry, read_journal
from pipeline.training import TrainedModel, TrainingStopped, TrainJob, train

Result = TypeVar("Result", bound=BaseModel)
OnProgress = Callable[[Any, Entry], None]
"""Called in the driver with the job and each new entry of its journal."""

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.2
_STOP_GRACE_SECONDS = 1.0  # a Ray job gets 3 s between SIGTERM and SIGKILL; MLflow is told in the rest


class TrainingFailed(Exception):  # noqa: N818 - reads as the sentence it is
    """A job failed in its workers; `details` holds the traceback from there."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


def launch(job: TrainJob, scaling: ScalingConfig, *, on_progress: OnProgress | None = None) -> TrainedModel:
    """Train one job in Ray Train workers; see `launch_many`. Raises what became of it, or ClusterTooSmall."""
    (result,) = launch_many([job], scaling, on_progress=on_progress)
    if isinstance(result, Exception):
        raise result
    return result


def launch_many(
    jobs: Sequence[TrainJob], scaling: ScalingConfig, *, on_progress: OnProgress | None = None
) -> list[TrainedModel | TrainingFailed | TrainingStopped]:
    """Train independent jobs; one result for each, in order. A job that fails does not take the others along.

    Every job has the workers and the result that it would have alone. A worker or node that dies is replaced and the
    job resumes from its own last checkpoint, at most `scaling.max_failures` times. Interrupted by an exception such as
    KeyboardInterrupt, the jobs are asked to checkpoint and stop before it goes on. A job that somebody else asked (by a
    file `stop` in its directory) comes back as TrainingStopped: called again, it goes on from its checkpoint.

    Raises ClusterTooSmall when the cluster can never hold one job, ConnectionError when it does not answer.
    """
    if scaling.min_workers < scaling.max_workers and any(job.training.checkpoint.every_steps is None for job in jobs):
        _log.warning(
            "elastic training goes back to its last checkpoint when nodes come or go, by default the end of an epoch; "
            "set training.checkpoint.every_steps"
        )
    return run_jobs(jobs, scaling, train=train, result_type=TrainedModel, on_progress=on_progress)


def run_jobs(
    jobs: Sequence[Job],
    scaling: ScalingConfig,
    *,
    train: Train,
    result_type: type[Result],
    on_progress: OnProgress | None = None,
    run: str | None = None,
) -> list[Result | TrainingFailed | TrainingStopped]:
    """`launch_many` for any `train(job, context)` that returns a `result_type`. Outcomes are filed under `run`."""
    if cluster_address(scaling) is None:
        preflight(scaling)  # refused before a Ray of its own is started
    run = run or uuid.uuid4().hex[:8]
    for job in jobs:
        clear_stop(job.output)
    if not jobs:
        return []
    with ensure_ray(scaling):
        capacity = preflight(scaling)
        groups = [Work(run, share, train) for share in _shares(jobs, scaling, capacity)]
        with freeing_orphans(), _running(groups, scaling, capacity) as alive:
            _follow(jobs, alive, on_progress)
    return [_result(job, run, result_type) for job in jobs]


def _shares(jobs: Sequence[Job], scaling: ScalingConfig, capacity: Capacity) -> list[Sequence[Job]]:
    num_groups = min(capacity.groups(scaling), len(jobs))
    return [jobs[start::num_groups] for start in range(num_groups)]


@contextmanager
def _running(groups: Sequence[Work], scaling: ScalingConfig, capacity: Capacity) -> Iterator[Callable[[], bool]]:
    """Run the groups in threads; yield whether any of them is still alive. On an exception, ask the jobs to stop."""
    threads = [start_thread(_run_group, work, scaling, capacity) for work in groups]
    try:
        yield lambda: any(thread.is_alive() for thread in threads)
    except BaseException:
        for job in (job for work in groups for job in work.jobs):
            with suppress(OSError):  # on a full disk they end with Ray, without a checkpoint
                request_stop(job.output)
        for thread in threads:
            thread.join(_STOP_GRACE_SECONDS / len(threads))
        raise


def _follow(jobs: Sequence[Job], alive: Callable[[], bool], on_progress: OnProgress | None) -> None:
    offsets = [read_journal(job.output / JOURNAL)[1] for job in jobs]  # entries of an earlier run are no progress
    running = True
    while running:
        running = alive()  # asked before the last look at the journals
        for index, job in enumerate(jobs):
            entries, offsets[index] = read_journal(job.output / JOURNAL, offsets[index])
            if on_progress is not None:
                for entry in entries:
                    on_progress(job, entry)
        if running:
            time.sleep(_POLL_SECONDS)


def _run_group(work: Work, scaling: ScalingConfig, capacity: Capacity) -> None:
    """Fit until every job of the group is settled: each fit settles at least one more, or makes up for a death."""
    from ray.train import WorkerGroupError

    failure: Exception | None
    pending, deaths = list(work.jobs), 0
    while pending:
        failure = None
        try:
            _fit(replace(work, jobs=pending), scaling, capacity)
        except Exception as caught:
            failure = caught
        outcomes = [load_outcome(job.output, work.run) for job in pending]
        unsettled = [job for job, outcome in zip(pending, outcomes, strict=True) if outcome is None]
        ends = {outcome.state for outcome in outcomes if outcome is not None}
        deaths = 0 if ends else deaths
        settled = len(unsettled)
        if failure is None:
            failure = RuntimeError("left no outcome; put its output on a filesystem that all nodes share")
        elif isinstance(failure, WorkerGroupError):
            # A job that failed for a reason of its own has said so. Otherwise, the jobs run in order, it was the first
            # one without an outcome. But Ray counts the failures of all together: where another one has ended
            # meanwhile, they were not all its own, and it gets a count of its own.
            settled = 0 if "failed" in ends or (ends and scaling.max_failures) else 1
        elif deaths < scaling.max_failures and _is_death(failure) and _may_go_on(unsettled):
            deaths, pending = deaths + 1, unsettled
            continue
        else:  # no workers, or no cluster any more: the next attempt would end the same way
            failure = _in_our_words(failure, scaling)
        asked = [job for job in unsettled if stop_requested(job.output)]
        for job in asked:
            _settle(job, stopped(work.run, "stopped on request; the same job goes on from its last checkpoint"))
        for job in unsettled[:settled]:
            if job not in asked:
                _settle(job, failed(work.run, failure, outside=True))
        pending = [job for job in unsettled[settled:] if job not in asked]


def _is_death(failure: Exception) -> bool:
    """Whether a process died where Ray Train does not make up for it: its controller, or a worker that was starting."""
    from ray.exceptions import RayActorError
    from ray.train import ControllerError

    return isinstance(failure.controller_failure if isinstance(failure, ControllerError) else failure, RayActorError)


def _in_our_words(failure: Exception, scaling: ScalingConfig) -> Exception:
    """Ray advises a variable of its environment, which `scaling` sets."""
    if "WORKER_GROUP_START_TIMEOUT" not in str(failure):
        return failure
    return TimeoutError(
        f"the cluster had no room for {scaling.num_workers} workers within {scaling.start_timeout:g} s, "
        f"{scaling.start_attempts} times; the same command goes on when others are done, or raise scaling.start_timeout"
    )


def _may_go_on(jobs: Sequence[Job]) -> bool:
    """Whether nobody wants the jobs to end; where the driver is about to, Ray must not be started again."""
    return connected() and not any(stop_requested(job.output) for job in jobs)


def _settle(job: Job, outcome: Outcome) -> None:
    """Leave an outcome for `_result`, which can tell what it means when the disk has no room for it."""
    with suppress(OSError):
        outcome.save(job.output)


def _fit(work: Work, scaling: ScalingConfig, capacity: Capacity) -> None:
    import ray.train
    from ray.train.torch import TorchConfig

    gpu = uses_gpu(scaling, capacity)
    storage = work.jobs[0].output / "ray"
    trainer = _trainer_class()(
        partial(run_work, work),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=int(scaling.collective_timeout)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=gpu,
            resources_per_worker=worker_bundle(scaling, capacity),
            placement_strategy=scaling.placement,
            elastic_resize_monitor_interval_s=scaling.resize_interval,
        ),
        run_config=ray.train.RunConfig(
            # Ray takes up a run whose name it knows and then trains nothing. Resuming is the jobs' own affair.
            name=f"sparta-{work.run}-{uuid.uuid4().hex[:8]}",
            storage_path=str(storage.resolve()),
            failure_config=ray.train.FailureConfig(
                max_failures=scaling.max_failures, controller_failure_limit=scaling.start_attempts - 1
            ),
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        trainer.fit()
    finally:
        shutil.rmtree(storage, ignore_errors=True)


def _trainer_class() -> Any:
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class WithoutCleaner(TorchTrainer):  # type: ignore[misc]
        """The cleaner may ask a dashboard that is not there, or another Ray's; see orphans.py."""

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]

    return WithoutCleaner


def _result(job: Job, run: str, result_type: type[Result]) -> Result | TrainingFailed | TrainingStopped:
    outcome = load_outcome(job.output, run)
    if outcome is None:
        return TrainingFailed(f"left no outcome in {job.output}; is the disk full? The same job goes on from there")
    if outcome.state == "done":
        return result_type.model_validate(outcome.result)
    if outcome.state == "stopped":
        return TrainingStopped(outcome.error)
    return TrainingFailed(outcome.error, outcome.details)
