"""Trials with a known front, and trials that end badly; importable in Ray's workers."""

import os
import signal

from cluster_toys import record_of, toy_trial

from pipeline.training import Context, TrainedModel, TrainJob


def tradeoff_trial(job: TrainJob, context: Context) -> TrainedModel:
    """One epoch. More eps is more robust and less clean; label smoothing costs both: the front has none."""
    eps, cost = job.training.threat.eps, job.training.label_smoothing
    robust, clean = eps - cost / 2, 1 - eps - cost / 2
    context.report({"epoch": 1, "val_robust": robust, "val_clean": clean}, None)
    return record_of([(robust, clean)], context)


def fragile_trial(job: TrainJob, context: Context) -> TrainedModel:
    """`toy_trial`, which in its first epoch momentum 0.5 costs its memory, 0.6 its process, and 0.7 a kill -9."""
    momentum = job.training.optimizer.momentum
    if momentum == 0.5:
        raise MemoryError("no room")
    if momentum == 0.6:
        os._exit(1)
    if momentum == 0.7:
        os.kill(os.getpid(), signal.SIGKILL)
    return toy_trial(job, context)
