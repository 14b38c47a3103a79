"""Out of memory, explained: the numbers, and the settings that change them."""

from collections.abc import Iterator
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
    try:
        yield settled
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise OutOfMemoryError(_explanation(job, context, settled, error)) from error
        raise


def _explanation(job: TrainJob, context: Context, settled: Settled, error: RuntimeError) -> str:
    config = job.training
    share = -(-config.batch_size // context.world_size)
    knobs = [f"lower training.batch_size={config.batch_size}", f"raise scaling.num_workers={context.world_size}"]
    if settled.precision == "fp32":
        knobs.append('set training.precision="bf16"')
    if config.method.kind in ("trades", "mart"):
        knobs.append(f'use method.kind="pgd_at", which holds one batch and not two as "{config.method.kind}" does')
    reason = str(error).splitlines()[0]
    return (
        f"{job.model.name} with {share} images per worker does not fit on {context.device}{_memory(context.device)}: "
        f"{reason}. To go on from the last checkpoint: {'; '.join(knobs)}"
    )


def _memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    return f" ({peak / 2**30:.1f} GiB used at most, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free)"
