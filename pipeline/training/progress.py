"""Where a training stands: everything that is saved besides tensors, and the sums of the epoch under way."""

from typing import Self

from pydantic import BaseModel

from pipeline.training.job import EpochRecord


class Sums(BaseModel):
    """Sums over examples; a robust or clean count is only kept by methods that compute those logits anyway."""

    count: float = 0
    loss: float = 0
    robust: float = 0
    clean: float = 0

    def add(self, count: float, loss: float, robust: float, clean: float) -> None:
        """Take in one step."""
        self.count += count
        self.loss += loss
        self.robust += robust
        self.clean += clean


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
    bit_exact: bool = True
    seconds: float = 0.0
    """Time in training steps, over all runs."""
    images: float = 0.0

    def next_epoch(self) -> None:
        """Begin the next epoch."""
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, Sums()

    def resumed_by(self, world_size: int) -> Self:
        """Note how many workers go on with it."""
        exact = self.bit_exact and world_size == self.world_size
        return self.model_copy(update={"world_size": world_size, "bit_exact": exact})
