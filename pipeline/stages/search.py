"""search: a Ray Tune sweep over a space of `tune_spaces`; later stages run with the best trial's settings."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import STARTED, temporary_name
from pipeline.cluster.sweep import SearchResult, checked_space, search
from pipeline.cluster.sweep.results import BEST, TABLE
from pipeline.cluster.sweep.table import brief, short_names
from pipeline.config.base import Section
from pipeline.config.chain import ChainConfig
from pipeline.report import Trial
from pipeline.stages.node import Node, StageContext, StageResult, one_by_one
from pipeline.stages.prepare import workers_data
from pipeline.stages.train import training_version
from pipeline.stages.trial_runs import TrialRuns

TRIALS = "trials"


class TunedConfig(Section):
    """What the search found."""

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
    """The node that searches. What a space holds is its identity, not where it is written; nor is how often trials
    write checkpoints.

    Raises:
        ConfigError: for a space that does not fit the configuration.
    """
    config = task.config
    sections = config.model_dump(mode="json", include={"search", "model", "training", "augment", "seed"})
    del sections["training"]["checkpoint"]
    sections["threat"] = (config.search.threat or config.evaluation.threat).model_dump(mode="json")
    for how in ("enabled", "max_concurrent", "threat"):
        del sections["search"][how]
    # In order: a grid that is cut off tries the first points of it.
    sections["search"]["space"] = [[key, repr(rule)] for key, rule in checked_space(config).items()]
    version = training_version(config.training)
    return Node("search", "best", task, sections, run_search, (task.data,), version=version, trains=True)


def _search(context: StageContext[SearchTask]) -> StageResult:
    _take_over(context.directory)
    with TrialRuns(context.services.chain_run, context.directory) as runs:
        found = search(
            context.task.config,
            data=workers_data(context, context.task.data)[1],
            output=context.directory,
            on_trial=runs,
        )
    for name in found.files:
        context.run.artifact(context.directory / name)
    payload = TunedConfig(overrides=found.overrides, trials=_trials(found))
    return StageResult(payload.model_dump(mode="json"), found.files, said=_said(found, context.directory))


def _said(found: SearchResult, directory: Path) -> str:
    best = found.best.best
    assert best is not None, "the best trial has a result"
    names = short_names(list(found.best.values))
    values = ", ".join(f"{names[key]}={brief(value)}" for key, value in found.best.values.items())
    return (
        f"trial {found.best.number + 1} of {len(found.trials)} is the best, {best.robust:.1%} robust and "
        f"{best.clean:.1%} clean on validation images ({values}); {directory / BEST}, {directory / TABLE}"
    )


def _take_over(directory: Path) -> None:
    """Begin with the trials of a search that differs in the number of trials alone, and so has another directory."""
    if (directory / TRIALS).exists() or list(directory.parent.glob(f"{directory.name}.superseded-*")):
        return  # it has its own, or is forced to begin anew
    own = _without_count(directory)
    others = [path for path in directory.parent.iterdir() if path != directory and not path.suffix]
    same = [path for path in others if (path / TRIALS).is_dir() and _without_count(path) == own]
    if same:
        longest = max(same, key=lambda path: len(list((path / TRIALS).iterdir())))
        copy = temporary_name(directory / TRIALS)
        shutil.copytree(longest / TRIALS, copy)
        copy.rename(directory / TRIALS)


def _without_count(directory: Path) -> Any:
    """What the search in `directory` was started with, less the number of trials; None where none was."""
    try:
        inputs = json.loads((directory / STARTED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    inputs["sections"]["search"].pop("num_trials")
    return inputs


def _trials(found: SearchResult) -> tuple[Trial, ...]:
    """The trials that came to a result, as the report shows them."""
    return tuple(
        Trial(
            name=f"trial {trial.number + 1}",
            clean=trial.best.clean,
            robust=trial.best.robust,
            settings={key: "null" if value is None else value for key, value in trial.values.items()},
            best=trial.number == found.best.number,
        )
        for trial in found.trials
        if trial.ranked and trial.best is not None
    )


run_search = one_by_one(_search)
