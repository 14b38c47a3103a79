"""search: a Ray Tune sweep over a space of `tune_spaces`; later stages run with the best trial's settings."""

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from pipeline.cluster.sweep import SearchResult, search
from pipeline.config.chain import ChainConfig
from pipeline.report import Trial
from pipeline.stages.node import Node, StageContext, StageResult, one_by_one
from pipeline.stages.trial_runs import TrialRuns


class TunedConfig(BaseModel):
    """What the search found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    overrides: dict[str, Any]
    """Dotted keys of the configuration with the best trial's values."""
    trials: tuple[Trial, ...]
    """All trials that came to a result."""


@dataclass(frozen=True)
class SearchTask:
    """The sweep's configuration, and the node that prepared its data."""

    config: ChainConfig
    data: str


def search_node(task: SearchTask) -> Node[SearchTask]:
    """The node that searches."""
    sections = task.config.model_dump(mode="json", include={"search", "model", "training", "augment", "seed"})
    sections["threat"] = task.config.evaluation.threat.model_dump(mode="json")
    return Node("search", "best", task, sections, run_search, (task.data,), trains=True)


def _search(context: StageContext[SearchTask]) -> StageResult:
    found = search(
        context.task.config,
        data=context.upstream[context.task.data].directory,
        output=context.directory,
        on_trial=TrialRuns(context.services.chain_run, context.directory),
    )
    for name in found.files:
        context.run.artifact(context.directory / name)
    payload = TunedConfig(overrides=found.overrides, trials=_trials(found))
    return StageResult(payload.model_dump(mode="json"), found.files)


def _trials(found: SearchResult) -> tuple[Trial, ...]:
    """The trials that came to a result, as the report shows them."""
    return tuple(
        Trial(
            name=f"trial {trial.number}",
            clean=trial.best.clean,
            robust=trial.best.robust,
            settings=trial.values,
            best=trial.number == found.best.number,
        )
        for trial in found.trials
        if trial.best is not None
    )


run_search = one_by_one(_search)
