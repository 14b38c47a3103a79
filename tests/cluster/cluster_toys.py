"""Stand-ins for pipeline.training.train, importable in Ray's workers: they obey the same contract and take no time."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import BaseModel

from pipeline.cluster.outcome import request_stop
from pipeline.tracking.journal import Journal
from pipeline.training import Context, EpochRecord, TrainedModel, TrainingStopped, TrainJob


class ToyJob(BaseModel):
    output: Path
    seed: int = 0
    fault: str = ""
    epochs: int = 3


class ToyResult(BaseModel):
    seed: int
    world_size: int
    total: float
    backend: str


def toy_train(job: ToyJob, context: Context) -> ToyResult:
    """Sums ones over the ranks in every epoch; `fault` is what goes wrong in the second one. As in a real training, the
    ranks agree on when to stop."""
    journal = Journal(job.output / "metrics.jsonl") if context.rank == 0 else None
    total = torch.zeros(1)
    for epoch in range(1, job.epochs + 1):
        if epoch == 2 and context.rank == context.world_size - 1:
            _go_wrong(job)
        ones, asked = sums = torch.tensor([1.0, float(context.stop_requested())])
        dist.all_reduce(sums)
        total += ones
        if journal:
            journal.log({"epoch": epoch}, epoch)
        context.report({"epoch": epoch}, None)
        if asked:
            raise TrainingStopped(f"stopped on request after step {epoch}")
    return ToyResult(seed=job.seed, world_size=context.world_size, total=total.item(), backend=dist.get_backend())


def _go_wrong(job: ToyJob) -> None:
    attempts = job.output / "attempts"
    with attempts.open("a") as file:
        file.write("x")
    if job.fault == "stop":
        request_stop(job.output)
    if job.fault == "value":
        raise ValueError("expected something else")
    if job.fault == "kill once" and len(attempts.read_text()) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if job.fault == "kill always":
        os.kill(os.getpid(), signal.SIGKILL)


def score(job: TrainJob, epoch: int) -> float:
    """Robust accuracy of the toy: best at lr = 0.1 and warm-up 0, growing with the epochs."""
    lr = job.training.optimizer.lr
    distance = abs(torch.log10(torch.tensor(lr / 0.1)).item()) + 0.1 * job.training.eps_warmup_epochs
    return max(0.0, (1 - distance / 3) * (0.5 + 0.5 * epoch / job.training.epochs))


def toy_trial(job: TrainJob, context: Context) -> TrainedModel:
    """A training with a known optimum. It resumes from its own file; momentum 0.5 makes it raise, 0.6 die once."""
    state = job.output / "epochs.log"
    first = len(state.read_text().split()) if state.exists() else 0
    if context.world_size > 1:
        dist.barrier()  # all ranks have read before one writes
    journal = Journal(job.output / "metrics.jsonl") if context.rank == 0 else None
    for epoch in range(first + 1, job.training.epochs + 1):
        if epoch == 2 and job.training.optimizer.momentum == 0.5:
            raise ArithmeticError("diverged")
        if context.rank == 0:
            with state.open("a") as file:
                file.write(f"{epoch}\n")
        if epoch == 2 and job.training.optimizer.momentum == 0.6 and first == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        metrics = {"epoch": epoch, "val_robust": score(job, epoch), "val_clean": 0.9}
        if journal:
            journal.log(metrics, epoch)
        context.report(metrics, None)
    return trained(job, context)


def trained(job: TrainJob, context: Context) -> TrainedModel:
    """What is on record of `toy_trial`."""
    return record_of([(score(job, epoch), 0.9) for epoch in range(1, job.training.epochs + 1)], context)


def record_of(accuracies: Sequence[tuple[float, float]], context: Context) -> TrainedModel:
    """What is on record of a training with these robust and clean accuracies, one pair for each epoch."""
    history = tuple(
        EpochRecord(epoch=n, train_loss=0.0, train_clean=None, train_robust=None, val_clean=clean, val_robust=robust)
        for n, (robust, clean) in enumerate(accuracies, 1)
    )
    return TrainedModel(
        fingerprint="toy",
        weights_sha256="",
        epochs=len(history),
        selected_epoch=len(history),
        val_clean=history[-1].val_clean,
        val_robust=history[-1].val_robust,
        history=history,
        activation_digest="",
        images_per_second=1.0,
        flops_per_step=1.0,
        precision="fp32",
        world_size=context.world_size,
    )


def slow_trial(job: TrainJob, context: Context) -> TrainedModel:
    """`toy_trial` that can be caught in the middle."""

    def report(metrics, checkpoint):
        context.report(metrics, checkpoint)
        time.sleep(0.5)

    return toy_trial(job, replace(context, report=report))


def elastic_train(job: ToyJob, context: Context) -> ToyResult:
    """Writes the world size of every epoch to a file, from which it resumes, until the file `enough` is there."""
    log, epoch = job.output / "epochs.log", 0
    dist.barrier()
    begun = len(log.read_text().split()) if log.exists() else 0
    dist.barrier()
    enough = torch.zeros(1)
    for epoch in range(begun + 1, job.epochs + 1):
        time.sleep(0.3)
        enough = torch.tensor([float((job.output / "enough").exists())])
        dist.all_reduce(enough)
        if context.rank == 0:
            with log.open("a") as file:
                file.write(f"{context.world_size}\n")
        context.report({"epoch": epoch}, None)
        if enough.item() > 0:
            break
    return ToyResult(seed=job.seed, world_size=context.world_size, total=float(epoch), backend=dist.get_backend())
