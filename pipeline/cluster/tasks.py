"""Independent calls of a function in Ray tasks, as many at a time as the cluster has room for."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from pipeline.cluster.capacity import connected, current_capacity, uses_gpu, worker_bundle
from pipeline.cluster.orphans import freeing_orphans
from pipeline.cluster.session import ensure_ray
from pipeline.cluster.signals import raised_as_such
from pipeline.config.scaling import ScalingConfig

Argument = TypeVar("Argument")
Result = TypeVar("Result")

_LOOK = 0.5  # seconds that a signal may wait
_MAX_RETRIES = 3  # of a task whose process or node died; an exception of the function itself is its result


def run_tasks(
    function: Callable[[Argument], Result],
    arguments: Sequence[Argument],
    scaling: ScalingConfig,
    *,
    on_done: Callable[[int], None] | None = None,
) -> list[Result | Exception]:
    """Call `function` with every argument; results in order, an exception where the call raised one.

    Args:
        function: importable by the workers; called with what one worker of `scaling` reserves.
        arguments: picklable; small, since files on the shared filesystem carry what is large.
        scaling: the cluster, and CPUs and GPUs of one call.
        on_done: told the index of every call that has returned.
    """
    import ray

    with ensure_ray(scaling), freeing_orphans():
        capacity = current_capacity(scaling)
        bundle = worker_bundle(scaling, capacity)
        gpus = 1 if uses_gpu(scaling, capacity) else 0
        remote = ray.remote(num_cpus=bundle["CPU"], num_gpus=gpus, max_retries=_MAX_RETRIES)(function)
        index = {remote.remote(argument): number for number, argument in enumerate(arguments)}
        results: dict[int, Result | Exception] = {}
        waiting = list(index)
        while waiting:
            with raised_as_such():
                ended, waiting = ray.wait(waiting, num_returns=1, timeout=_LOOK)
            for reference in ended:
                number = index[reference]
                results[number] = result = _outcome(reference)
                if on_done is not None and not isinstance(result, Exception):
                    on_done(number)
    return [results[number] for number in range(len(arguments))]


def reserved_device() -> torch.device:
    """The GPU that this task or trial has reserved, or the CPU: one that has none may see those of the others. Outside
    of Ray, whichever there is."""
    import ray

    mine = not connected() or ray.get_runtime_context().get_accelerator_ids()["GPU"]
    return torch.device("cuda", 0) if mine and torch.cuda.is_available() else torch.device("cpu")


def num_task_slots(scaling: ScalingConfig) -> int:
    """How many calls run at a time, at least 1."""
    capacity = current_capacity(scaling)
    return max(1, capacity.slots(worker_bundle(scaling, capacity)))


def _outcome(reference: Any) -> Any:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        return error.cause if isinstance(error.cause, Exception) else error
    except RayError as error:
        return error
