"""What a training tells: the display, the journal, and where its time goes."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from pipeline.artifacts import JOURNAL
from pipeline.data import Loader
from pipeline.training.floor import floor_seconds
from pipeline.training.methods import Cost
from pipeline.training.network import Forward
from pipeline.training.reporter import Reporter
from pipeline.training.run import Run

JOURNAL_STEPS = 50
"""Steps between two journal entries inside an epoch."""


class Monitor:
    """Times steps, waits and epochs of a run; displays and journals on rank 0. A context manager."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.reporter = Reporter(run.total_steps, rank=run.context.rank, epochs=not run.context.reports)
        self._log, self._close = _journal(run)
        self._elapsed, self._busy, self._waited, self._saved, self._steps = 0.0, 0.0, 0.0, 0.0, 0
        self._images = 0.0
        self._cost = run.cost
        self._measured: Cost | None = None  # the cost that the floor is of
        self._floor: float | None = None  # per image

    def __enter__(self) -> Self:
        self.reporter.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reporter.__exit__(kind, error, trace)
        self._close()

    def watched(self, loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
        """The loader's batches, with the waiting for them timed; the first one also measures the floor, and the first
        of an epoch whose steps cost something else, after the fallback of FGSM-RS or when AWP sets in."""
        self._elapsed, self._busy, self._waited, self._steps = 0.0, 0.0, 0.0, 0
        self._images, self._cost = 0.0, self.run.cost
        begin = time.perf_counter()
        for x, y in loader:
            self._waited += time.perf_counter() - begin
            if self._measured != self._cost:
                self._measure(x)
            begin = time.perf_counter()
            yield x, y
            self._elapsed += time.perf_counter() - begin
            begin = time.perf_counter()
        self._elapsed += self._waited

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Time what is written to disk at the end of an epoch; what is written after `times` counts in the next one."""
        begin = time.perf_counter()
        yield
        self._saved += time.perf_counter() - begin

    def _measure(self, x: Tensor) -> None:
        """On the very network that the steps attack, folded and compiled as they have it; the full pass is eager."""
        run = self.run
        trained = Forward(copy.deepcopy(run.model), run.trained.precision)
        x = x.contiguous(memory_format=torch.channels_last)
        seconds, self._measured = floor_seconds(run.attacked, trained, x, self._cost), self._cost
        self._floor = seconds / (len(x) * run.context.world_size)

    def step(self, seconds: float, images: float) -> None:
        """Take in a step that was done, on so many images of all ranks together."""
        state = self.run.state
        self._busy, self._steps, self._images = self._busy + seconds, self._steps + 1, self._images + images
        state.seconds += seconds
        self.reporter.step(state, self.run.learning_rate)
        if state.step % JOURNAL_STEPS == 0:
            self.log({"running_loss": state.sums.mean_loss, "lr": self.run.learning_rate})

    def log(self, metrics: Mapping[str, float]) -> None:
        """Journal metrics at the current step."""
        if self._log is not None:
            self._log(metrics, self.run.state.step)

    def times(self) -> dict[str, float]:
        """Speed of the epoch: of its steps, and the shares of the loader's wait and of all that is neither step nor
        validation: waits, display, journal, checkpoints."""
        if not self._steps:
            return {}
        elapsed, self._saved = self._elapsed + self._saved, 0.0
        metrics = {
            "loader_wait_share": self._waited / elapsed,
            "overhead_share": 1 - self._busy / elapsed,
            "step_ms": 1000 * self._busy / self._steps,
            "images_per_second": self._images / self._busy,
            "flops_per_step": self.flops_per_step,
        }
        return metrics if self.share_of_floor is None else {**metrics, "share_of_floor": self.share_of_floor}

    @property
    def flops_per_step(self) -> float:
        """Floating-point operations of a step of this epoch over the joint batch."""
        return self.run.forward_flops * self.run.job.training.batch_size * self._cost.forward_equivalents

    @property
    def share_of_floor(self) -> float | None:
        """Time of the bare arithmetic of this epoch's steps over the time of the steps."""
        return None if self._floor is None or not self._steps else self._floor * self._images / self._busy


def _journal(run: Run) -> tuple[Callable[[Mapping[str, float], int], None] | None, Callable[[], None]]:
    """Where metrics go on this rank: the context's own log, a journal in the output directory, nowhere above rank 0."""
    if run.context.rank > 0:
        return None, lambda: None
    if run.context.log is not None:
        return run.context.log, lambda: None
    from pipeline.tracking.journal import Journal

    journal = Journal(run.job.output / JOURNAL)
    return journal.log, journal.close
