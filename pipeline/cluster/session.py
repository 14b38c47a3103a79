"""Ray, started when it is first needed and stopped by whoever started it."""

import logging
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.cluster.capacity import connected
from pipeline.cluster.signals import raised_as_such
from pipeline.config.base import one_line
from pipeline.config.scaling import ScalingConfig

_log = logging.getLogger(__name__)
_THREADS_END_SECONDS = 20.0


class _RayThread(threading.Thread):
    """A thread that uses Ray."""


@contextmanager
def ensure_ray(scaling: ScalingConfig) -> Iterator[None]:
    """Be connected to a Ray inside the block.

    A Ray that is already connected is used and left alone. `scaling.address`, or RAY_ADDRESS, which Ray sets inside a
    submitted job, names a cluster to join. Otherwise a Ray of its own is started on this machine, bound to it, and
    stopped at the end.

    Raises ConnectionError when the named cluster does not answer, or a Ray of its own does not start.
    """
    if connected():
        yield
        return
    import ray

    _set_environment(scaling)
    with _own_sigterm():
        if address := cluster_address(scaling):
            _join(address)
        else:
            _start(scaling)
    try:
        yield
    finally:
        try:
            _wait_for_threads()
        finally:
            ray.shutdown()


def start_thread(target: Callable[..., None], *args: Any) -> threading.Thread:
    """Start a daemon thread that uses Ray; Ray is not shut down under it.

    A thread that asks Ray after its shutdown ends the whole process, with exit code 1 whatever had been decided.
    """
    thread = _RayThread(target=target, args=args, daemon=True)
    thread.start()
    return thread


def _wait_for_threads() -> None:
    """Give the threads that were asked to stop the time that it takes their workers to save a checkpoint."""
    deadline = time.monotonic() + _THREADS_END_SECONDS
    for thread in threading.enumerate():
        if isinstance(thread, _RayThread):
            thread.join(max(0.0, deadline - time.monotonic()))


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray replaces the handler of SIGTERM by one that exits with 15; the application's own comes back at the end, and
    is told of a signal that came in between."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with raised_as_such():
            yield
    except SystemExit as error:
        signal.signal(signal.SIGTERM, handler)
        if error.code == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


def cluster_address(scaling: ScalingConfig) -> str | None:
    """The cluster to join; None when a Ray of its own is to be started."""
    return scaling.address or os.environ.get("RAY_ADDRESS") or None


def _set_environment(scaling: ScalingConfig) -> None:
    # Ray Train reads these in the driver and hands them on to its controller and workers.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(scaling.health_check_interval))
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(scaling.start_timeout))
    # Off: copies of every print, gauges that nobody reads, and a change of directory that breaks relative paths.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A SIGTERM is no crash: no native stack trace for it.
    os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
    # Ray leaves CUDA_VISIBLE_DEVICES of tasks without a GPU as it is (see tasks.reserved_device); this says we know.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def _join(address: str) -> None:
    import ray
    from ray.exceptions import RayError

    try:
        ray.init(address=address, logging_level="WARNING", log_to_driver=False)
    except (ConnectionError, RuntimeError, RayError) as error:
        raise ConnectionError(
            f"expected a Ray cluster at {address!r}, got {one_line(error)}; "
            "check scaling.address, RAY_ADDRESS and RAY_AUTH_TOKEN"
        ) from error


def _start(scaling: ScalingConfig) -> None:
    import ray

    if others := _running_instances():
        _log.warning(
            "another Ray runs on this machine (%s) and competes for its CPUs; scaling.address=auto would use it",
            ", ".join(sorted(others)),
        )
    # Nobody takes this machine away with notice, so nobody needs to watch for it.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    _authenticate()
    try:
        ray.init(
            address="local",
            num_cpus=scaling.num_cpus,
            object_store_memory=scaling.object_store_mb * 1_000_000,
            include_dashboard=False,
            logging_level="WARNING",
            log_to_driver=False,  # people are shown the journals' entries instead, in order and by name
        )
    except Exception as error:  # Ray raises the base class where its node is not up within 30 s
        ray.shutdown()
        raise ConnectionError(
            f"expected a Ray of its own to start on this machine, got {one_line(error)}; "
            "where the machine is busy or short of memory, the same command goes on later"
        ) from error


def _authenticate() -> None:
    """Ray switches token authentication on for a Ray of its own; see that it is quiet, and works without a home."""
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if not token.exists() and not os.access(Path.home(), os.W_OK):
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _running_instances() -> set[str]:
    from ray._private.services import find_gcs_addresses  # no public way to ask

    return set(find_gcs_addresses())
