"""What a sweep leaves behind: a table of all trials, pictures, and the best configuration as a preset."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipeline.artifacts import write_atomic
from pipeline.cluster.sweep import plots
from pipeline.cluster.sweep.table import short_names
from pipeline.cluster.sweep.trials import Trial
from pipeline.config.chain import ChainConfig
from pipeline.config.load import overlay

TABLE, BEST = "trials.csv", "best.yaml"
COLUMNS, ERROR = ("trial", "state", "epochs", "clean", "robust", "best_epoch", "front", "seconds"), "error"
"""The table's own columns; the values of a trial stand between them."""


def write_results(
    output: Path, base: ChainConfig, trials: Sequence[Trial], front: Sequence[Trial], overrides: Mapping[str, Any]
) -> list[str]:
    """Write table, best configuration and pictures into `output`; return their names."""
    names = short_names(list(dict.fromkeys(key for trial in trials for key in trial.values)))
    pictures = plots.draw(output, trials, front, names, base.search.objectives)
    write_atomic(output / TABLE, _table(trials, front, names))
    write_atomic(output / BEST, _preset(base, front[0], overrides))
    return [TABLE, BEST, *pictures]


def _table(trials: Sequence[Trial], front: Sequence[Trial], names: Mapping[str, str]) -> str:
    numbers = {trial.number for trial in front}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *names, ERROR])
    for trial in trials:
        best, epochs = trial.best, trial.history[-1].epoch if trial.history else 0
        scores = [best.clean, best.robust, best.epoch] if best else ["", "", ""]
        values = [trial.values.get(key, "") for key in names]
        row = [trial.number + 1, trial.state, epochs, *scores, int(trial.number in numbers), round(trial.seconds, 1)]
        writer.writerow([*row, *values, trial.error])
    return text.getvalue()


def _preset(base: ChainConfig, best: Trial, overrides: Mapping[str, Any]) -> str:
    config = overlay(base, {**overrides, "search.enabled": False})
    assert best.best is not None, "the best trial has a result"
    header = (
        f"# The best of a search in the space {base.search.space}: trial {best.number + 1}, on the validation split "
        f"{best.best.robust:.4f} robust, {best.best.clean:.4f} clean.\n{_schedule(best)}"
    )
    return header + yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _schedule(best: Trial) -> str:
    """What population-based training changed on the way, as comments: the configuration can only hold its end."""
    if len(best.legs) == 1:
        return ""
    legs = (
        f"#   after epoch {leg.epoch}: {', '.join(f'{key}={value}' for key, value in leg.values.items())}\n"
        for leg in best.legs
    )
    return f"# It changed on the way, and only the last of these values are below:\n{''.join(legs)}"
