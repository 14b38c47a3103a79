"""What stages share while a chain runs: the MLflow runs, the registry and Ray, each started when first asked for."""

import logging
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.artifacts import write_atomic
from pipeline.cluster import cluster_address, ensure_ray, preflight
from pipeline.cluster.sweep import preflight_trial
from pipeline.config.chain import ChainConfig
from pipeline.config.tracking import redact
from pipeline.tracking import Registry, StageRun, Tracker

_log = logging.getLogger(__name__)


class Services:
    """A context manager around one execution of a chain whose files lie in `root`/<name>."""

    def __init__(self, config: ChainConfig, root: Path) -> None:
        self.config = config
        self.output = root / config.name
        # The database is shared by all chains of a root, so that they can be compared; the spool is this chain's own.
        tracking = config.tracking.model_copy(update={"uri": config.tracking.resolved_uri(root)})
        self.tracker = Tracker(tracking, self.output)
        self.registry = Registry(tracking, self.output)
        self._ray = ExitStack()
        self._has_ray = False
        params: dict[str, Any] = config.model_dump(mode="json", exclude={"tracking", "scaling", "plan"})
        # By name, and only what a target sets itself: MLflow would cut one long text.
        params["transfer"] = {
            target.name: target.model_dump(mode="json", exclude={"name"}, exclude_none=True)
            for target in config.transfer
        }
        self.chain_run = self.tracker.chain(config.name, params=params)

    def __enter__(self) -> Self:
        self.chain_run.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After a signal MLflow hears of the end first: Ray takes seconds to stop, and a Ray job has three in all.
        stopped = kind is not None and not issubclass(kind, Exception)
        first, second = (self.chain_run, self._ray) if stopped else (self._ray, self.chain_run)
        try:
            first.__exit__(kind, error, trace)
        finally:
            second.__exit__(kind, error, trace)

    def stage_run(self, key: str, fingerprint: str, sections: dict[str, Any], upstream: Mapping[str, str]) -> StageRun:
        """The MLflow run of a node, to be entered with `with`; `upstream` has the fingerprints of what it needs."""
        tags = {"stage": key.partition(":")[0], "branch": key.partition(":")[2], "fingerprint": fingerprint}
        return self.chain_run.stage(key, params=sections, tags=tags, upstream=upstream)

    def ray(self) -> None:
        """Be connected to Ray from here to the end of the chain, so that all stages share one start.

        Raises:
            ClusterTooSmall: when the cluster can never hold the workers of `scaling`.
            ConnectionError: when a cluster was named and does not answer.
        """
        if not self._has_ray:
            self._ray.enter_context(ensure_ray(self.config.scaling))
            preflight(self.config.scaling)
            self._has_ray = True

    def check_cluster(self, *, searching: bool) -> None:
        """Refuse an impossible request before anything is written; a Ray of our own is asked without being started.

        Args:
            searching: whether the search is among what is to be done.

        Raises:
            ClusterTooSmall: when the cluster can never hold the workers of `scaling`, or those of one trial.
            ConnectionError: when a cluster was named and does not answer.
        """
        if cluster_address(self.config.scaling) is not None:
            self.ray()
        else:
            preflight(self.config.scaling)
        if searching:
            preflight_trial(self.config)

    def log_failure(self, key: str, error: Exception) -> str:
        """Keep the traceback of a failed node in a file; people are shown one line that names it."""
        path = self.output / "failures" / f"{key.replace(':', '-')}.txt"
        details = getattr(error, "details", "") or "".join(traceback.format_exception(error))
        try:
            write_atomic(path, redact(details))
        except OSError as refusal:  # the disk that failed the node may have no room for this either
            return f"not kept, {refusal.strerror}"
        return str(path)

    def lineage(self, reference: str | None, digest: str) -> str | None:
        """Where a registered activation comes from, in words; None while MLflow is away or refuses, or where the
        registry has no such version with this digest."""
        if reference is None:
            return None
        try:
            return self.registry.lineage(reference, digest=digest)
        except (ConnectionError, ValueError) as error:
            _log.warning("%s; the report goes without the lineage", error)
            return None
