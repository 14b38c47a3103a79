"""What a cluster has against what a training needs.

Ray waits for ever for resources that no node has. Looking at the nodes first takes a millisecond and says what is
missing.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.scaling import ScalingConfig

Resources = Mapping[str, float]


class ClusterTooSmall(Exception):  # noqa: N818 - reads as the sentence it is
    """The cluster cannot satisfy the request, now or ever; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Capacity:
    """The resources of every living node of a cluster."""

    nodes: tuple[Resources, ...]

    @classmethod
    def of_cluster(cls) -> "Capacity":
        """The nodes of the Ray that this process is connected to."""
        import ray

        return cls(tuple(node["Resources"] for node in ray.nodes() if node["Alive"]))

    @classmethod
    def of_this_machine(cls, num_cpus: int | None = None) -> "Capacity":
        """What a Ray of its own will offer here; known without starting one."""
        import torch

        cpus = num_cpus or len(os.sched_getaffinity(0))
        return cls(({"CPU": cpus, "GPU": torch.cuda.device_count()},))

    def total(self, resource: str) -> float:
        """Amount of `resource` on all nodes together."""
        return sum(node.get(resource, 0) for node in self.nodes)

    def slots(self, bundle: Resources, *, placement: str = "PACK") -> int:
        """How many workers that need `bundle` each fit; a worker cannot be divided between nodes."""
        per_node = self._per_node(bundle)
        if placement == "STRICT_SPREAD":
            return sum(count > 0 for count in per_node)
        if placement == "STRICT_PACK":
            return max(per_node, default=0)
        return sum(per_node)

    def groups(self, scaling: ScalingConfig) -> int:
        """How many trainings of the workers of `scaling` there is room for side by side; at least one."""
        per_node, size = self._per_node(worker_bundle(scaling, self)), scaling.max_workers
        if scaling.placement == "STRICT_PACK":  # each on a node of its own choice
            return max(1, sum(count // size for count in per_node))
        num = sum(per_node) // size
        if scaling.placement == "STRICT_SPREAD":  # each has at most one worker on a node
            while sum(min(count, num) for count in per_node) < num * size:
                num -= 1
        return max(1, num)

    def _per_node(self, bundle: Resources) -> list[int]:
        return [min(int(node.get(name, 0) // amount) for name, amount in bundle.items()) for node in self.nodes]

    def describe(self, names: Sequence[str]) -> str:
        """For example "CPU=8, GPU=0 on 2 nodes"."""
        amounts = ", ".join(f"{name}={self.total(name):g}" for name in names)
        return f"{amounts} on {len(self.nodes)} {'node' if len(self.nodes) == 1 else 'nodes'}"


def connected() -> bool:
    """Whether this process is connected to a Ray; does not import it to find out."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def uses_gpu(scaling: ScalingConfig, capacity: Capacity) -> bool:
    """Whether workers get a GPU each: as asked for, or with "auto" whether there is one."""
    return capacity.total("GPU") > 0 if scaling.use_gpu == "auto" else scaling.use_gpu


def worker_bundle(scaling: ScalingConfig, capacity: Capacity) -> dict[str, float]:
    """The resources that one worker reserves."""
    bundle: dict[str, float] = {"CPU": scaling.cpus_per_worker}
    if uses_gpu(scaling, capacity):
        bundle["GPU"] = 1
    return bundle


def current_capacity(scaling: ScalingConfig) -> Capacity:
    """The cluster this process is connected to or, before that, what a Ray of its own will have."""
    return Capacity.of_cluster() if connected() else Capacity.of_this_machine(scaling.num_cpus)


def preflight(scaling: ScalingConfig, capacity: Capacity | None = None) -> Capacity:
    """Raise ClusterTooSmall unless the fewest workers of `scaling` fit; return the capacity that was looked at.

    Without a running Ray the machine itself is asked, so an impossible request is refused before anything starts.
    """
    capacity = capacity or current_capacity(scaling)
    bundle = worker_bundle(scaling, capacity)
    slots = capacity.slots(bundle, placement=scaling.placement)
    if slots >= scaling.min_workers or scaling.allow_autoscale:
        return capacity
    need = " + ".join(f"{name}={amount:g}" for name, amount in bundle.items())
    raise ClusterTooSmall(
        f"need {scaling.min_workers} workers x {need} (placement {scaling.placement}), cluster has "
        f"{capacity.describe(list(bundle))}, room for {slots}; lower scaling.num_workers or scaling.cpus_per_worker"
        f"{', set scaling.use_gpu=false' if 'GPU' in bundle else ''}, add nodes, or set scaling.allow_autoscale=true"
    )
