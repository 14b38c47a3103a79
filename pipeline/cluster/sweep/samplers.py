"""Which point of the space is tried next: random, grid, or Optuna's tree-structured Parzen estimator."""

import logging
import random
import warnings
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, Protocol

from pipeline.artifacts import canonical
from pipeline.cluster.sweep.trials import Trial
from pipeline.config.search import SearchConfig
from tune_spaces import Choice, Distribution, Integer, Space, Value, active, draw, grid

_log = logging.getLogger(__name__)

Values = dict[str, Value]
_REPEATS = 10
_DRAWS = 200  # so many known points in a row mean that a space is exhausted


class Sampler(Protocol):
    """Proposes points and learns what came of them. The same seed and answers give the same points."""

    def ask(self) -> Values | None:
        """The next point; None when the space is exhausted."""

    def tell(self, trial: Trial) -> None:
        """Learn of a finished trial, of this run or an earlier one."""


def make_sampler(space: Space, config: SearchConfig, seed: int, known: Sequence[Trial] = ()) -> Sampler:
    """The sampler of `config.algorithm`; it proposes none of the `known` points and learns from the finished."""
    taken = {canonical(trial.legs[0].values) for trial in known}  # as they were proposed
    if config.algorithm == "optuna":
        sampler: Sampler = OptunaSampler(space, config.objectives, seed + len(taken), taken)
    elif config.algorithm == "grid":
        _warn_of_a_long_grid(space, config)
        sampler = ListSampler(grid(space, config.grid_points), taken)
    else:
        sampler = RandomSampler(space, seed, taken)
    for trial in known:
        if trial.finished:
            sampler.tell(trial)
    return sampler


def _warn_of_a_long_grid(space: Space, config: SearchConfig) -> None:
    if next(islice(grid(space, config.grid_points), config.num_trials, None), None) is not None:
        _log.warning(
            "the grid has more than search.num_trials=%d points, and those at its end, where the first parameters of "
            "the space change, are not tried; raise it, lower search.grid_points=%d, or take another algorithm",
            config.num_trials,
            config.grid_points,
        )


class RandomSampler:
    """Independent draws without repetition."""

    def __init__(self, space: Space, seed: int, taken: set[str]) -> None:
        self._space, self._rng, self._taken = space, random.Random(seed), taken  # noqa: S311 - no secret

    def ask(self) -> Values | None:
        """A new draw; None when many in a row were old, as in a small space of choices."""
        for _ in range(_DRAWS + len(self._taken)):  # the same seed draws the points of an earlier run first
            values = draw(self._space, self._rng)
            if canonical(values) not in self._taken:
                self._taken.add(canonical(values))
                return values
        return None

    def tell(self, trial: Trial) -> None:
        """Nothing to learn."""


class ListSampler:
    """The given points, in order."""

    def __init__(self, points: Iterable[Values], taken: set[str]) -> None:
        self._points = (point for point in points if canonical(point) not in taken)

    def ask(self) -> Values | None:
        """The next point."""
        return next(self._points, None)

    def tell(self, trial: Trial) -> None:
        """Nothing to learn."""


class OptunaSampler:
    """TPE (Bergstra et al., 2011), define-by-run: a conditional parameter is only asked for where it exists."""

    def __init__(self, space: Space, objectives: Sequence[str], seed: int, taken: set[str]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            # Experimental by name only: it keeps trials that run side by side from being the same point.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=seed % 2**32, constant_liar=True)  # numpy takes no more
        self._study = optuna.create_study(directions=["maximize"] * len(objectives), sampler=sampler)
        self._space, self._objectives, self._taken = space, objectives, taken
        self._asked: dict[str, Any] = {}
        self._random = RandomSampler(space, seed, taken)

    def ask(self) -> Values | None:
        """The point that promises most; a random one where everything promising was tried, as in a small space."""
        import optuna

        for _ in range(_REPEATS):
            trial = self._study.ask()
            values = self._suggest(trial)
            if (name := canonical(values)) not in self._taken:
                self._taken.add(name)
                self._asked[name] = trial
                return values
            self._study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return self._random.ask()

    def tell(self, trial: Trial) -> None:
        """Give the study a trial's score, or that it failed."""
        import optuna

        scores = trial.score(self._objectives) if trial.ranked else None
        if asked := self._asked.pop(canonical(trial.values), None):
            self._study.tell(asked, scores, state=None if scores else optuna.trial.TrialState.FAIL)
        elif scores:
            self._study.add_trial(self._remembered(trial, scores))

    def _remembered(self, trial: Trial, scores: list[float]) -> Any:
        """A trial of an earlier run, as the study would have kept it."""
        import optuna

        rules = {key: rule for key, value in trial.values.items() if (rule := active(self._space[key], trial.values))}
        return optuna.trial.create_trial(
            params={key: _encode(rule, trial.values[key]) for key, rule in rules.items()},
            distributions={key: _optuna(rule) for key, rule in rules.items()},
            values=scores,
        )

    def _suggest(self, trial: Any) -> Values:
        values: Values = {}
        for key, rule in self._space.items():
            if (distribution := active(rule, values)) is not None:
                values[key] = _decode(distribution, _suggest(trial, key, distribution))
        return values


def _suggest(trial: Any, key: str, distribution: Distribution) -> Any:
    if isinstance(distribution, Choice):  # by index, because optuna's options may only be plain values
        return trial.suggest_categorical(key, range(len(distribution.options)))
    suggest = trial.suggest_int if isinstance(distribution, Integer) else trial.suggest_float
    return suggest(key, distribution.low, distribution.high, log=distribution.log)


def _optuna(distribution: Distribution) -> Any:
    from optuna import distributions

    if isinstance(distribution, Choice):
        return distributions.CategoricalDistribution(range(len(distribution.options)))
    if isinstance(distribution, Integer):
        return distributions.IntDistribution(distribution.low, distribution.high, log=distribution.log)
    return distributions.FloatDistribution(distribution.low, distribution.high, log=distribution.log)


def _decode(distribution: Distribution, value: Any) -> Value:
    decoded: Value = distribution.options[value] if isinstance(distribution, Choice) else value
    return decoded


def _encode(distribution: Distribution, value: Value) -> Any:
    return distribution.options.index(value) if isinstance(distribution, Choice) else value
