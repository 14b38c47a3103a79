"""What rank 0 shows: a progress bar on a terminal, otherwise one fixed-field line now and then."""

import sys
import time
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.training.progress import Progress as State

LINE_SECONDS = 10.0
"""Shortest time between two lines off a terminal."""


class Reporter:
    """Shows the progress of a training of `steps` steps; silent on ranks above 0. A context manager.

    epochs: also show the line of every epoch off a terminal; not where a launcher does.
    """

    def __init__(self, steps: int, *, rank: int, epochs: bool = True, stream: TextIO | None = None) -> None:
        self.steps, self.stream = steps, stream or sys.stdout
        self.shown, self.epochs = rank == 0, epochs
        self._began, self._first, self._last = time.monotonic(), -1, float("-inf")
        terminal = self.shown and self.stream.isatty()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(file=self.stream), transient=True) if terminal else None
        self._task = self._bar.add_task("", total=steps) if self._bar else None

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, state: State, lr: float) -> None:
        """Show a step that was done."""
        if not self.shown:
            return
        if self._first < 0:
            self._first = state.step - 1
        due = time.monotonic() - self._last >= LINE_SECONDS or state.step == self.steps
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=state.step, description=self._line(state, lr, eta=False))
        elif due:
            self._last = time.monotonic()
            print(self._line(state, lr), file=self.stream, flush=True)

    def epoch(self, text: str) -> None:
        """Show a line that stays."""
        if self._bar:
            self._bar.console.print(text, highlight=False)
        elif self.shown and self.epochs:
            print(text, file=self.stream, flush=True)

    def _line(self, state: State, lr: float, *, eta: bool = True) -> str:
        sums, speed = state.sums, state.images / max(state.seconds, 1e-9)
        left = (self.steps - state.step) * (time.monotonic() - self._began) / max(state.step - self._first, 1)
        fields = [
            f"step {state.step:>{len(str(self.steps))}}/{self.steps} {100 * state.step // self.steps:3d}%",
            f"loss {sums.mean_loss:7.4f}",
            f"clean {percent(sums.clean_accuracy)}",
            f"robust {percent(sums.robust_accuracy)}",
            f"lr {lr:.5f}",
            f"{1000 * state.seconds / max(state.step, 1):6.1f} ms",
            f"{speed:7.0f} img/s",
        ]
        return "  ".join([*fields, f"eta {left:5.0f} s"] if eta else fields)


def percent(accuracy: float | None) -> str:
    """An accuracy in %, or dashes where there is none."""
    return "   -- " if accuracy is None else f"{100 * accuracy:5.1f}%"
