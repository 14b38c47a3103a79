"""What runs in every Ray Train worker: the jobs of a launch, one after the other."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel

from pipeline.cluster.outcome import done, failed, load_outcome, stop_requested, stopped
from pipeline.training import Context, TrainingStopped


class Job(Protocol):
    """What the launcher needs to know of a training job."""

    @property
    def output(self) -> Path:
        """Directory of the job, the same on all nodes."""


Train = Callable[[Any, Any], BaseModel]
"""`train(job, context)`."""


@dataclass(frozen=True)
class Work:
    """Jobs for one worker group. Pickled into the workers."""

    run: str
    jobs: Sequence[Job]
    train: Train


def run_work(work: Work) -> None:
    """Run every job that this run has not settled yet; each leaves its outcome in its directory.

    A job that raises for a reason of its own is settled as failed. With other workers in the group the exception is
    raised too, because they may be waiting in a collective: the group is started again and goes on with the next job.
    A job that is asked to stop ends after its next step, where all workers agree on it.
    """
    # One line for every report of every worker, at a level that RunConfig.logging_config does not reach.
    logging.getLogger("ray.train.v2._internal.execution.context").setLevel(logging.WARNING)
    for job in work.jobs:
        if load_outcome(job.output, work.run) is None:
            _run_job(job, work)


def _run_job(job: Job, work: Work) -> None:
    context = _context(job)
    try:
        result = work.train(job, context)
    except TrainingStopped as stop:
        if context.rank == 0:
            stopped(work.run, str(stop)).save(job.output)
        return
    except Exception as error:
        if worth_retrying(error):
            raise
        failed(work.run, error).save(job.output)
        if context.world_size > 1:
            raise
        return
    if context.rank == 0:
        done(work.run, result).save(job.output)
    _barrier()  # nobody looks at the outcome of this job before it is written


def worth_retrying(error: Exception) -> bool:
    """Whether an exception may come from outside the job, so that a new attempt makes sense."""
    from ray.exceptions import RayError

    # A worker sees the death of another as a RuntimeError of the process group, that of its controller as a RayError
    # when it reports, a failing disk or network as an OSError. Any other exception comes from the job itself and would
    # come again.
    return isinstance(error, OSError | RuntimeError | RayError) and not isinstance(error, torch.OutOfMemoryError)


def _context(job: Job) -> Context:
    import ray.train
    import ray.train.torch

    def report(metrics: Mapping[str, float], checkpoint: Path | None = None) -> None:
        # Metrics only: the loop's own checkpoints are atomic, verified and already on the shared filesystem.
        ray.train.report(dict(metrics))

    world = ray.train.get_context()
    return Context(
        rank=world.get_world_rank(),
        world_size=world.get_world_size(),
        device=ray.train.torch.get_device(),
        report=report,
        stop_requested=lambda: stop_requested(job.output),
    )


def _barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
