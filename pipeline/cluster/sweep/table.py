"""What a sweep shows while it runs: a live table on a terminal, a plain line per event otherwise."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from pipeline.cluster.sweep.trials import Trial

_KEYS = 5  # more columns do not fit a terminal
_ROWS = 20
_PROGRESS = ("epoch", "clean", "robust", "best")


class Table:
    """Shows the trials of a sweep. A context manager; `update` may also be called outside, to no visible effect."""

    def __init__(
        self,
        num_trials: int,
        keys: Sequence[str],
        *,
        known: Sequence[Trial] = (),
        console: Console | None = None,
    ) -> None:
        self._console = console or Console()
        self._num_trials, self._keys = num_trials, short_names(keys)
        self._trials = {trial.number: trial for trial in known}
        self._live: Live | None = None
        self._open = False

    def __enter__(self) -> Self:
        self._open = True
        if self._console.is_terminal:
            self._live = Live(self._render(), console=self._console, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open = False
        if self._live:
            self._live.update(self._render(), refresh=True)
            self._live.stop()
            self._live = None

    def update(self, trial: Trial) -> None:
        """Show the present state of a trial."""
        self._trials[trial.number] = trial
        if self._live:
            self._live.update(self._render())
        elif self._open and (trial.finished or trial.history):
            self._console.print(self._line(trial), highlight=False, soft_wrap=True, markup=False)

    def _line(self, trial: Trial) -> str:
        fields = [f"trial {trial.number + 1:>{len(str(self._num_trials))}}/{self._num_trials} {trial.state:<8}"]
        fields += [f"{name} {value:>5}" for name, value in zip(_PROGRESS, _progress(trial), strict=True)]
        values = [f"{name}={brief(trial.values[key])}" for key, name in self._keys.items() if key in trial.values]
        return "  ".join([*fields, *values, trial.error]).rstrip()

    def _render(self) -> RichTable:
        shown = dict(list(self._keys.items())[:_KEYS])
        table = RichTable(title=f"search: {len(self._trials)} of {self._num_trials} trials")
        for name in ("trial", *shown.values(), *_PROGRESS, "state"):
            table.add_column(name, justify="right" if name in ("trial", *_PROGRESS) else "left")
        # The ones under way, then the best of the others.
        order = sorted(self._trials.values(), key=lambda t: (t.finished, -_best(t)))
        for trial in order[:_ROWS]:
            values = [brief(trial.values[key]) if key in trial.values else "" for key in shown]
            cells = (str(trial.number + 1), *values, *_progress(trial), trial.state)
            table.add_row(*map(Text, cells))  # a value or an error in brackets is no style
        return table


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Every dotted key with as few of its last parts as tell it from the others."""
    names: dict[str, str] = {}
    for key in keys:
        parts = key.split(".")
        lengths = range(1, len(parts) + 1)
        others = [other.split(".") for other in keys if other != key]
        names[key] = next(".".join(parts[-n:]) for n in lengths if all(parts[-n:] != o[-n:] for o in others))
    return names


def brief(value: Any) -> str:
    """A value in a few characters."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _progress(trial: Trial) -> list[str]:
    """What the last epoch came to, and the highest accuracy of all, by which trials are compared."""
    if not trial.history:
        return ["-"] * len(_PROGRESS)
    last = trial.history[-1]
    return [str(last.epoch), *(f"{100 * share:.1f}" for share in (last.clean, last.robust, _best(trial)))]


def _best(trial: Trial) -> float:
    return trial.score([trial.objective])[0] if trial.history else 0.0
