"""All that is done by Ray: start it, check that the cluster can hold a request, train in workers, search."""

from pipeline.cluster.capacity import Capacity, ClusterTooSmall, preflight
from pipeline.cluster.launch import TrainingFailed, launch, launch_many
from pipeline.cluster.session import cluster_address, ensure_ray
from pipeline.cluster.signals import raised_as_such
from pipeline.cluster.tasks import num_task_slots, reserved_device, run_tasks

__all__ = [
    "Capacity",
    "ClusterTooSmall",
    "TrainingFailed",
    "cluster_address",
    "ensure_ray",
    "launch",
    "launch_many",
    "num_task_slots",
    "preflight",
    "raised_as_such",
    "reserved_device",
    "run_tasks",
]
