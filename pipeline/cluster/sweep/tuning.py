"""Ray Tune as the engine of a sweep: it starts trials, schedulers stop or change them, the board keeps the books."""

import logging
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.cluster.capacity import Capacity, preflight, worker_bundle
from pipeline.cluster.orphans import freeing_orphans
from pipeline.cluster.signals import raised_as_such
from pipeline.cluster.sweep.asha import asha
from pipeline.cluster.sweep.board import Board
from pipeline.cluster.sweep.pbt import num_checkpoints, pbt
from pipeline.cluster.sweep.trainable import Sweep, run_trial
from pipeline.cluster.sweep.trials import Point, Trial
from tune_spaces import Space

_DRIVER = 1 << 28
"""Bytes of memory that the process of a nested trial reserves; Tune wants it to reserve something."""


def run_sweep(sweep: Sweep, space: Space, board: Board) -> None:
    """Run the trials that the board has left; returns when all are settled. Ray must be connected.

    Raises ClusterTooSmall when the cluster can never hold one trial.
    """
    _set_environment()
    from ray import tune

    capacity = preflight(sweep.scaling)
    # A population is there from the start; otherwise every trial is chosen when there is room for it.
    members = list(iter(board.next, None)) if sweep.perturbs else None
    if members == []:
        return
    tuner = tune.Tuner(
        tune.with_resources(lambda settings: run_trial(settings, sweep), _resources(sweep, capacity)),
        param_space=None if members is None else _population(members),
        tune_config=tune.TuneConfig(
            metric=sweep.base.search.objectives[0],
            mode="max",
            search_alg=_searcher(board) if members is None else None,
            scheduler=_scheduler(sweep, space, list(board.trials.values())),
            num_samples=board.num_left if members is None else 1,
            max_concurrent_trials=_concurrent(sweep, capacity),
            trial_dirname_creator=lambda trial: str(trial.trial_id),
            reuse_actors=sweep.scaling.max_workers == 1,  # a new process imports torch for seconds
        ),
        run_config=tune.RunConfig(
            name=f"sparta-{sweep.run}-{uuid.uuid4().hex[:8]}",
            storage_path=str(sweep.storage.resolve()),
            failure_config=tune.FailureConfig(max_failures=sweep.scaling.max_failures),
            checkpoint_config=tune.CheckpointConfig(num_to_keep=num_checkpoints(sweep.base.search)),
            callbacks=[_callback(board)],
            verbose=0,
        ),
    )
    with freeing_orphans(), raised_as_such():
        tuner.fit()
    shutil.rmtree(sweep.root / "ray", ignore_errors=True)


def _set_environment() -> None:
    # The trials' own files hold what Tune's loggers would copy, and interrupts are the chain's to handle.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    # A trial that fails before its first report has no metric; with the check that would end the whole sweep.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")


def _resources(sweep: Sweep, capacity: Capacity) -> dict[str, float]:
    # A nested trial's own process only waits for its workers. If it held a CPU, drivers could fill the machine and
    # wait for ever for workers that no longer fit.
    return worker_bundle(sweep.scaling, capacity) if sweep.scaling.max_workers == 1 else {"CPU": 0, "memory": _DRIVER}


def _concurrent(sweep: Sweep, capacity: Capacity) -> int:
    room = capacity.groups(sweep.scaling)
    return min(room, sweep.base.search.max_concurrent or room)


def _population(trials: Sequence[Trial]) -> dict[str, Any]:
    from ray import tune

    return {
        "trial": tune.grid_search([trial.model_dump(mode="json") for trial in trials]),
        "values": tune.sample_from(lambda settings: dict(settings["trial"]["legs"][-1]["values"])),
    }


def _searcher(board: Board) -> Any:
    from ray.tune.search import Searcher

    class NextTrial(Searcher):  # type: ignore[misc]
        """Tune asks, the board answers."""

        def __init__(self, board: Board) -> None:
            super().__init__()
            self.board = board

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune pickles it beside the trials; the trials' own records are the state

        def set_search_properties(self, *args: Any, **kwargs: Any) -> bool:
            return True

        def suggest(self, trial_id: str) -> dict[str, Any] | str:
            trial = self.board.next()
            if trial is None:
                return str(Searcher.FINISHED)
            return {"trial": trial.model_dump(mode="json"), "values": trial.values}

        def on_trial_complete(self, *args: Any, **kwargs: Any) -> None:
            """The board learns it from the callback, with more detail."""

        def save(self, checkpoint_path: str) -> None:
            """Nothing to keep."""

        def restore(self, checkpoint_path: str) -> None:
            """Nothing was kept."""

    return NextTrial(board)


def _callback(board: Board) -> Any:
    from ray import tune

    class Books(tune.Callback):  # type: ignore[misc]
        """Passes on what happens to trials."""

        def __init__(self, board: Board) -> None:
            self.board = board
            # By Tune's name of a trial, because a copy of another trial also gets the other one's settings.
            self.numbers: dict[str, int] = {}

        def __getstate__(self) -> dict[str, Any]:
            return {}

        def number(self, trial: Any) -> int:
            return self.numbers.setdefault(trial.trial_id, trial.config["trial"]["number"])

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.board.started(self.number(trial), trial.config["values"])

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
        ) -> None:
            point = Point(epoch=result["epoch"], robust=result["robust"], clean=result["clean"])
            self.board.reported(self.number(trial), point)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.board.ended(self.number(trial))

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            cause = trial.get_error() or "the trial's process died"
            self.board.ended(self.number(trial), error=" ".join(str(cause).split())[-500:])

    return Books(board)


def _scheduler(sweep: Sweep, space: Space, known: Sequence[Trial]) -> Any:
    from ray.tune.schedulers import FIFOScheduler

    search = sweep.base.search
    epochs = search.epochs or sweep.base.training.epochs
    if search.scheduler == "asha":
        return asha(search, epochs, known)
    if search.scheduler == "pbt":
        return pbt(search, space, epochs, sweep.base.seed)
    return FIFOScheduler()
