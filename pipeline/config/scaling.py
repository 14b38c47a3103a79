"""How many workers a training gets, what each of them reserves, and which Ray it runs on."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator

from pipeline.config.base import Section


class ScalingConfig(Section):
    """Workers and cluster. Nothing here but the number of workers changes a result."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Data-parallel workers. A pair (min, max) is elastic: training shrinks and grows with the cluster, every time from
    its last checkpoint, see training.checkpoint.every_steps. They share each batch, to one image evenly; it needs two
    images for each of them."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU per worker. "auto": if the cluster has GPUs."""
    cpus_per_worker: PositiveInt = 1
    """CPUs that each worker reserves; with GPUs, leave enough for the loader's threads."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray distributes the workers over nodes."""
    max_failures: Annotated[int, Field(ge=0, le=1000)] = 3
    """How often a training is restarted from its last checkpoint after a worker or a node died; once more than twice as
    often, at most, where several trainings share their workers."""
    start_attempts: PositiveInt = 3
    """How often Ray tries to start the worker group before it gives up."""
    start_timeout: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that one attempt to start the workers waits for resources."""
    health_check_interval: Annotated[float, Field(gt=0, le=60)] = 0.5
    """Seconds between two looks of the controller at its workers: the delay with which a death or an end is noticed."""
    resize_interval: Annotated[float, Field(gt=0)] = 60.0
    """Seconds between two looks for nodes to grow onto; elastic training only."""
    collective_timeout: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds a collective operation may wait for the other workers."""
    allow_autoscale: bool = False
    """Accept a request that the cluster of this moment cannot hold, and wait for the autoscaler to add nodes."""
    address: str | None = None
    """Ray cluster to join: "auto" for one that runs on this host, or "host:port".

    None: RAY_ADDRESS, which is set inside a Ray job, else a Ray of its own."""
    num_cpus: PositiveInt | None = None
    """CPUs that a Ray of its own offers. None: as many as the machine has. More than that oversubscribes on purpose."""
    object_store_mb: Annotated[int, Field(ge=80)] = 100
    """Shared memory of a Ray of its own, in MB. Batches never pass through it."""

    @field_validator("num_workers")
    @classmethod
    def _ordered(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError(f"expected (min, max) with min <= max, got {value}; swap the two")
        return value

    @property
    def min_workers(self) -> int:
        """The fewest workers that training starts with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that training uses."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]
