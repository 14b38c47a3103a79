"""Population-based training (Jaderberg et al., arXiv 1711.09846) as Ray Tune has it, with two things mended.

A trial that reaches its last epoch is done: changed there, it would lose what it reached for values that it never
trains with. And Tune draws from Python's global generator; here it is the sweep's own, seeded.
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipeline.config.load import ConfigError
from pipeline.config.search import SearchConfig
from tune_spaces import Choice, Distribution, Integer, Space, Value


def pbt(search: SearchConfig, space: Space, epochs: int, seed: int) -> Any:
    """The scheduler of a sweep.

    Args:
        search: grace_epochs, between two changes of a trial.
        space: what may be changed is said by `mutable_keys`.
        epochs: of a trial.
        seed: of the draws.
    """
    from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

    mutable, draws = mutable_keys(space), _Draws(seed)

    class SeededPBT(PopulationBasedTraining):  # type: ignore[misc]
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            if result[self._time_attr] >= epochs:
                return str(TrialScheduler.CONTINUE)
            with draws.in_charge():
                return str(super().on_trial_result(tune_controller, trial, result))

    return SeededPBT(
        time_attr="epoch",
        perturbation_interval=search.grace_epochs,
        hyperparam_mutations={"values": {key: _drawer(distribution) for key, distribution in mutable.items()}},
        custom_explore_fn=lambda settings: {**settings, "values": _clipped(settings["values"], mutable)},
        log_config=False,  # the trials' own records have it
    )


def num_checkpoints(search: SearchConfig) -> int:
    """How many of a trial's latest checkpoints must be kept, so that none is gone that another trial is to copy.

    It copies the one of the last change, up to grace_epochs old, perhaps only after waiting for as many epochs again.
    """
    return 2 * search.grace_epochs + 2


class _Draws:
    """A generator that can stand in for Python's global one."""

    def __init__(self, seed: int) -> None:
        self._state = random.Random(seed).getstate()  # noqa: S311 - no secret

    @contextmanager
    def in_charge(self) -> Iterator[None]:
        outside = random.getstate()
        random.setstate(self._state)
        try:
            yield
        finally:
            self._state = random.getstate()
            random.setstate(outside)


def mutable_keys(space: Space) -> dict[str, Distribution]:
    """What population-based training may change between two epochs: unconditional settings of the training, no kinds.

    The network itself must stay as it is, because the weights go on.
    """
    found: dict[str, Distribution] = {
        key: rule
        for key, rule in space.items()
        if key.startswith("training.") and not key.endswith(".kind") and isinstance(rule, Distribution)
    }
    if not found:
        raise ConfigError(
            f"search.scheduler=pbt needs an unconditional training.* key in the space, got {', '.join(space)}; "
            "add one or take another scheduler"
        )
    return found


def _drawer(distribution: Distribution) -> Any:
    if isinstance(distribution, Choice):
        return list(distribution.options)
    return lambda: distribution.sample(random.Random(random.getrandbits(64)))  # noqa: S311 - no secret


def _clipped(values: Mapping[str, Value], mutable: Mapping[str, Distribution]) -> dict[str, Value]:
    """Tune multiplies by 0.8 or 1.2 without a look at the range."""
    return {key: _clip(value, mutable[key]) if key in mutable else value for key, value in values.items()}


def _clip(value: Any, distribution: Distribution) -> Value:
    if isinstance(distribution, Choice):
        return value  # type: ignore[no-any-return]
    inside = min(max(value, distribution.low), distribution.high)
    return round(inside) if isinstance(distribution, Integer) else float(inside)
