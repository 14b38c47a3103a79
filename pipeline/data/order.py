"""Which samples make which batch: a function of (seed, epoch, rank, world size) and nothing else."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.errors import DataError

Indices = npt.NDArray[np.int64]
_ORDER, _PIXELS = 0, 1


@dataclass(frozen=True)
class Order:
    """Batches of one rank. Every sample comes once per epoch over all ranks, and all ranks have equally many batches.

    The epoch's order is cut into global batches of world_size * batch_size or, with `joint`, of batch_size, which need
    not divide; rank r takes every world_size-th sample of each, from r on. So a step sees the same samples whatever the
    number of ranks, for an equal global batch. Of a joint batch of four samples or more for each rank, every rank has
    two or more in every batch.

    Raises:
        DataError: fewer samples than ranks; with `joint`, less than two samples of a global batch for each of several
            ranks.
    """

    num_samples: int
    batch_size: int
    seed: int = 0
    shuffle: bool = False
    rank: int = 0
    world_size: int = 1
    joint: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataError(f"batch_size expected at least 1, got {self.batch_size}")
        if not 0 <= self.rank < self.world_size:
            raise DataError(f"rank expected from 0 to world_size - 1 = {self.world_size - 1}, got {self.rank}")
        if self.num_samples < self.world_size:
            raise DataError(f"{self.num_samples} samples cannot be shared by {self.world_size} ranks; use fewer ranks")
        if self.joint and self.world_size > 1 and self.batch_size < 2 * self.world_size:
            raise DataError(
                f"a joint batch_size expected at least 2 samples for each of {self.world_size} ranks, got "
                f"{self.batch_size}; use fewer ranks"
            )

    @property
    def _step(self) -> int:
        """Samples of a global batch."""
        return self.batch_size if self.joint else self.world_size * self.batch_size

    def may_pause(self, batch: int) -> bool:
        """Whether, after `batch` batches, another number of ranks sees exactly the other samples of the epoch.

        Not so before the last batch, where the rest is so small that its share depends on the number of ranks.
        """
        rest = self.num_samples % self._step
        return batch != len(self) - 1 or rest == 0 or 2 * rest >= self._step

    def _bounds(self) -> list[int]:
        """Where the global batches begin and end."""
        step = self._step
        full = self.num_samples // step * step
        bounds = list(range(0, full + 1, step))
        rest = self.num_samples - full
        if rest:
            # Too few for one sample per rank, or in training for two, without which a batch norm may have no variance:
            # the last two global batches share evenly, or become one.
            too_few = rest < (2 if self.joint else 1) * self.world_size and 2 * rest < step
            if full and too_few and step >= 2 * self.world_size:
                bounds[-1] -= (step - rest) // 2
            elif rest < self.world_size:
                bounds.pop()
            bounds.append(self.num_samples)
        return bounds

    def __len__(self) -> int:
        return len(self._bounds()) - 1

    def batches(self, epoch: int) -> list[Indices]:
        """Positions in the split, one array per batch."""
        order = np.arange(self.num_samples)
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch, _ORDER]).permutation(self.num_samples)
        return [order[a + self.rank : b : self.world_size] for a, b in pairwise(self._bounds())]

    def generator(self, epoch: int, batch: int) -> torch.Generator:
        """The source of randomness of one batch's augmentation: any batch can be redone without those before it."""
        entropy = [self.seed, epoch, _PIXELS, self.rank, self.world_size, batch]
        word = np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(word) >> 1)
