"""Asynchronous successive halving (Li et al., arXiv 1810.05934) as Ray Tune has it, with two things mended.

A trial is never stopped at its last epoch, where nothing is saved by it and its finished model would be lost. And the
rungs of an interrupted sweep are filled again from the trials' own records, each trial once, so that who goes on does
not depend on it: finished trials at the start, the others when Tune takes them up under their new names.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from pipeline.cluster.sweep.trials import Trial
from pipeline.config.search import SearchConfig


def asha(search: SearchConfig, epochs: int, known: Sequence[Trial] = ()) -> Any:
    """The scheduler of a sweep.

    Args:
        search: grace_epochs, reduction_factor and objectives.
        epochs: of a trial that is not stopped.
        known: trials of an earlier run of this sweep.
    """
    from ray.tune.schedulers import ASHAScheduler, TrialScheduler

    unfinished = {trial.number: trial for trial in known if not trial.finished}

    class ResumableASHA(ASHAScheduler):  # type: ignore[misc]
        def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
            """Tune tells metric and mode here, once, before any trial."""
            accepted: bool = super().set_search_properties(metric, mode, **spec)
            for trial in known if accepted else ():
                if trial.finished:
                    past = SimpleNamespace(trial_id=f"known-{trial.number}")
                    super().on_trial_add(None, past)
                    self._replay(past, trial)
            return accepted

        def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
            super().on_trial_add(tune_controller, trial)
            if (record := unfinished.get(trial.config["trial"]["number"])) is not None:
                self._replay(trial, record)

        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            decision: str = super().on_trial_result(tune_controller, trial, result)
            return str(TrialScheduler.CONTINUE) if result[self._time_attr] >= epochs else decision

        def _replay(self, trial: Any, record: Trial) -> None:
            for point in record.history:  # what was decided then stays decided
                self.on_trial_result(None, trial, point.model_dump())

    return ResumableASHA(
        time_attr="epoch",
        max_t=epochs + 1,  # Tune stops at max_t whatever came out
        grace_period=search.grace_epochs,
        reduction_factor=search.reduction_factor,
    )
