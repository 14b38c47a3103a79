"""A sweep from beginning to end: space, trials, results. Interrupted at any time and called again, it goes on."""

import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import fingerprint
from pipeline.cluster.capacity import ClusterTooSmall, preflight
from pipeline.cluster.session import cluster_address, ensure_ray
from pipeline.cluster.sweep.adopt import without_lost_legs
from pipeline.cluster.sweep.board import Board, OnTrial
from pipeline.cluster.sweep.pbt import mutable_keys
from pipeline.cluster.sweep.results import write_results
from pipeline.cluster.sweep.samplers import make_sampler
from pipeline.cluster.sweep.space import check_space, judged, trial_config
from pipeline.cluster.sweep.table import Table
from pipeline.cluster.sweep.trainable import Sweep
from pipeline.cluster.sweep.trials import Trial, load_trials, pareto_front
from pipeline.cluster.sweep.tuning import run_sweep
from pipeline.cluster.worker import Train
from pipeline.config.chain import ChainConfig
from pipeline.config.load import ConfigError
from pipeline.config.scaling import ScalingConfig
from pipeline.training import train
from tune_spaces import Space, load_space, resolve

_log = logging.getLogger(__name__)


class SearchFailed(Exception):  # noqa: N818 - reads as the sentence it is
    """No trial of a sweep came to a result, or too many were kept from one."""


@dataclass(frozen=True)
class SearchResult:
    """What a sweep found."""

    overrides: dict[str, Any]
    """The best trial's values as overrides of the configuration, in the order to apply them."""
    best: Trial
    trials: list[Trial]
    front: list[Trial]
    """The trials that no other one beats; the best alone with one objective."""
    files: list[str]
    """Table, pictures and the best configuration, below the output directory."""


def search(
    base: ChainConfig, *, data: Path, output: Path, on_trial: OnTrial | None = None, train: Train = train
) -> SearchResult:
    """Search `base.search.space` around `base`, training on the PreparedData in `data`.

    Every trial is one training with its values laid over `base`, judged by its accuracies on the validation split under
    one fixed threat. Trials of an earlier call with the same settings are kept: finished ones are not run again, others
    go on from their last epoch, as do those that failed by a fault from outside. `on_trial` hears of every change of a
    trial; `train` is pipeline.training.train unless given.

    Raises ConfigError for a space that does not fit, ClusterTooSmall when not even one trial fits into the cluster,
    SearchFailed when every trial failed, or most of them by a fault from outside.
    """
    space = checked_space(base)
    scaling = _trial_scaling(base)
    known = _known_trials(output, base)
    table = Table(base.search.num_trials, list(space), known=known)

    def tell(trial: Trial) -> None:
        table.update(trial)
        if on_trial is not None:
            on_trial(trial)

    sweep = Sweep(uuid.uuid4().hex[:8], base, data, output, scaling, train)
    board = Board(
        output,
        sweep.run,
        sampler=make_sampler(space, base.search, base.seed, known),
        identify=_identify(base),
        num_trials=base.search.num_trials,
        objective=base.search.objectives[0],
        known=known,
        on_trial=tell,
    )
    if board.num_left:
        if cluster_address(scaling) is None:
            preflight_trial(base)
        with ensure_ray(scaling), table:
            run_sweep(sweep, space, board)
    return _result(base, list(board.trials.values()), output)


def preflight_trial(base: ChainConfig) -> None:
    """Raise ClusterTooSmall when not even one trial can run; without a running Ray, this machine is asked."""
    scaling = _trial_scaling(base)
    try:
        preflight(scaling)
    except ClusterTooSmall as error:
        raise ClusterTooSmall(str(error).replace("scaling.num_workers", "search.num_workers")) from None


def _trial_scaling(base: ChainConfig) -> ScalingConfig:
    """The workers of one trial."""
    return base.scaling.model_copy(update={"num_workers": base.search.num_workers})


def checked_space(base: ChainConfig) -> Space:
    """The space of `base.search` in absolute numbers, tried against `base`; starts nothing. Raises ConfigError."""
    try:
        space = resolve(load_space(base.search.space), base.model_dump(mode="json"))
    except ValueError as error:
        raise ConfigError(f"search.space: {error}") from error
    check_space(space, base)
    if base.search.scheduler == "pbt":
        mutable_keys(space)
    return space


def _identify(base: ChainConfig) -> Callable[[dict[str, Any]], str]:
    def identify(values: dict[str, Any]) -> str:
        config = trial_config(base, values)
        # Not the data: a search of other images has another output directory, and the same images may move.
        sections = config.model_dump(mode="json", include={"model", "augment", "training", "seed"})
        del sections["training"]["checkpoint"]
        return fingerprint({**sections, "workers": base.search.num_workers})

    return identify


def _known_trials(output: Path, base: ChainConfig) -> list[Trial]:
    identify = _identify(base)
    same = [trial for trial in load_trials(output) if _same(trial, identify)]
    first = {"objective": base.search.objectives[0]}  # which older records do not have
    known = [without_lost_legs(trial.again(), output).model_copy(update=first) for trial in same]
    if known:
        finished = sum(trial.finished for trial in known)
        _log.info("search: %d trials are finished, %d go on where they were", finished, len(known) - finished)
    return known[: base.search.num_trials]


def _same(trial: Trial, identify: Callable[[dict[str, Any]], str]) -> bool:
    values = trial.legs[0].values
    try:
        return identify(values) == trial.identity
    except ConfigError:  # a trial of another space, or one that was refused for just this
        return trial.identity == fingerprint(values)


def _result(base: ChainConfig, trials: Sequence[Trial], output: Path) -> SearchResult:
    lost = [trial for trial in trials if trial.retry]
    if lost:
        what = f"{len(lost)} of {len(trials)} trials failed by a fault from outside: {_errors(lost)}"
        if 2 * len(lost) > len(trials):  # the best of the others would be no choice
            raise SearchFailed(f"{what}; mend it, and the same command goes on with them")
        _log.warning("search: %s; the others decide", what)
    front = pareto_front(trials, base.search.objectives)
    if not front:
        raise SearchFailed(f"none of {len(trials)} trials came to a result: {_errors(trials)}")
    best = front[0]
    overrides = judged(base, best.values)
    files = write_results(output, base, trials, front, overrides)
    return SearchResult(overrides, best, list(trials), front, files)


def _errors(trials: Sequence[Trial]) -> str:
    return "; ".join(dict.fromkeys(trial.error for trial in trials if trial.error)) or "no error was recorded"
