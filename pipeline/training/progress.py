"""Where a training stands: everything that is saved besides tensors, and the sums of the epoch under way."""

from collections.abc import Sequence
from typing import Self

from pydantic import BaseModel

from pipeline.training.job import EpochRecord
from pipeline.training.precision import Arithmetic


class Sums(BaseModel):
    """Sums over examples. `robust` of `robust_count` and `clean` of `clean_count` were right: `clean_count` is a sample
    where the method does not train on clean images, `robust_count` is 0 where it does not attack."""

    count: float = 0
    loss: float = 0
    robust: float = 0
    robust_count: float = 0
    clean: float = 0
    clean_count: float = 0

    def add(self, values: Sequence[float]) -> None:
        """Take in one step: values in the order of the fields."""
        for name, value in zip(Sums.model_fields, values, strict=True):
            setattr(self, name, getattr(self, name) + value)

    @property
    def mean_loss(self) -> float:
        """Loss per example."""
        return self.loss / max(self.count, 1)

    @property
    def robust_accuracy(self) -> float | None:
        """Share of adversarial training examples that were classified right."""
        return self.robust / self.robust_count if self.robust_count else None

    @property
    def clean_accuracy(self) -> float | None:
        """Share of clean training examples that were classified right."""
        return self.clean / self.clean_count if self.clean_count else None


class Progress(BaseModel):
    """State of a training between two steps."""

    epoch: int = 0
    """The epoch under way, from 0."""
    batch: int = 0
    """Batches of it that are done."""
    step: int = 0
    """Steps done in all."""
    sums: Sums = Sums()
    best_metric: float = -1.0
    best_epoch: int = 0
    """Counted from 1; 0 when nothing was selected yet."""
    validations_since_best: int = 0
    collapsed: bool = False
    """FGSM-RS has given way to PGD training."""
    stopped_early: str | None = None
    history: list[EpochRecord] = []
    world_size: int = 1
    arithmetic: Arithmetic | None = None
    """How rank 0 computes its steps; None in states from before this was noted."""
    bit_exact: bool = True
    seconds: float = 0.0
    """Time in training steps, over all runs."""
    images: float = 0.0
    """Images trained on, over all ranks and runs."""

    def advance(self, sums: Sequence[float]) -> None:
        """Note a step that was done; `sums` in the order of the fields of Sums."""
        self.step, self.batch, self.images = self.step + 1, self.batch + 1, self.images + sums[0]
        self.sums.add(sums)

    def next_epoch(self) -> None:
        """Begin the next epoch."""
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, Sums()

    def resumed_by(self, world_size: int, arithmetic: Arithmetic, *, alike: bool) -> Self:
        """Note how many workers go on with it, how the first one computes, and whether all do as is noted here."""
        same = alike and world_size == self.world_size
        noted = {"world_size": world_size, "arithmetic": arithmetic, "bit_exact": self.bit_exact and same}
        return self.model_copy(update=noted)
