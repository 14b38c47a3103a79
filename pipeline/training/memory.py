"""Out of memory, explained: the numbers, and the settings that change them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pipeline.training.context import Context
from pipeline.training.errors import OutOfMemoryError
from pipeline.training.job import TrainJob


@dataclass
class Settled:
    """What a training has made of its settings, as far as it has come."""

    precision: str


@contextmanager
def explain_out_of_memory(job: TrainJob, context: Context) -> Iterator[Settled]:
    """Turn torch's out-of-memory errors, of a GPU or of the CPU's allocator, into one that names the settings."""
    settled = Settled(job.training.precision)
    with _explained(job, context, lambda: _of_training(job, context, settled)):
        yield settled


@contextmanager
def explain_validation_memory(job: TrainJob, context: Context) -> Iterator[None]:
    """The same for a validation, which has a batch size of its own."""
    size = job.training.selection.batch_size
    what = f"{size} validation images per worker", f"lower training.selection.batch_size={size} and begin anew"
    with _explained(job, context, lambda: what):
        yield


@contextmanager
def _explained(job: TrainJob, context: Context, explain: Callable[[], tuple[str, str]]) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            what, advice = explain()
            raise OutOfMemoryError(
                f"{job.model.name} with {what} does not fit on {context.device}{_memory(context.device)}: "
                f"{str(error).splitlines()[0]}; {advice}"
            ) from error
        raise


def _of_training(job: TrainJob, context: Context, settled: Settled) -> tuple[str, str]:
    config = job.training
    share = -(-config.batch_size // context.world_size)
    others = [f"lower training.batch_size={config.batch_size}"]
    if settled.precision == "fp32":
        others.append('set training.precision="bf16"')
    if config.method.kind in ("trades", "mart"):
        others.append(f'use method.kind="pgd_at", which holds one batch and not two as "{config.method.kind}" does')
    return (
        f"{share} images per worker",
        f"to go on from the last checkpoint, raise scaling.num_workers={context.world_size}; "
        f"or begin anew: {'; '.join(others)}",
    )


def _memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    return f" ({peak / 2**30:.1f} GiB used at most, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free)"
