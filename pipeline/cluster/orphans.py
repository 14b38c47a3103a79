"""Taking back what a training holds whose controller is dead.

Ray Train's controller reserves a placement group for its workers. When the controller is killed, as that of a stopped
trial is, Ray keeps the group until the whole job ends. Ray Train's own cleaner asks the dashboard who is alive: without
a dashboard it frees nothing, and with a second Ray on the machine it may ask that one. Ray's control service, to which
every driver is connected, knows it by itself.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline.cluster.capacity import connected
from pipeline.cluster.session import start_thread

_log = logging.getLogger(__name__)
_LOOK = 1.0  # seconds between two looks
_END = 5.0  # seconds that a look may take which is under way at the end


@contextmanager
def freeing_orphans() -> Iterator[None]:
    """Free orphans every second inside the block, so that whoever waits there for room gets it."""
    over = threading.Event()
    thread = start_thread(_free_until, over)
    try:
        yield
    finally:
        over.set()
        thread.join(_END)


def free_orphans() -> int:
    """Remove the placement groups of this job whose creating actor is dead; returns how many. 0 without a Ray."""
    if not connected():  # asking one would start one
        return 0
    import ray
    from ray._private.state import state  # no public call says whose a placement group is
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job, service = ray.get_runtime_context().get_job_id(), state._connect_and_get_accessor()
    groups = map(PlacementGroupTableData.FromString, service.get_placement_group_table())
    orphans = [group for group in groups if group.creator_job_id.hex() == job and _is_orphan(group, service)]
    for group in orphans:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return len(orphans)


def _free_until(over: threading.Event) -> None:
    while not over.wait(_LOOK):
        try:
            free_orphans()
        except Exception as error:  # the control service is away for a moment, or the cluster is ending
            _log.debug("could not look for orphans: %s", error)


def _is_orphan(group: Any, service: Any) -> bool:
    from ray import ActorID
    from ray.core.generated.gcs_pb2 import ActorTableData

    if group.state == group.REMOVED or group.is_detached or not group.creator_actor_dead:
        return False
    creator = ActorID(group.creator_actor_id)
    if creator.is_nil():  # a driver's or a task's group, which counts as that of a dead actor too
        return False
    record = service.get_actor_info(creator)  # an actor that was started again counts as dead there as well
    return record is None or ActorTableData.FromString(record).state == ActorTableData.DEAD
