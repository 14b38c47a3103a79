"""Which images are judged where not all are: the first ones of one fixed order, whatever the model and the seed.

A folder of images is read class by class, so the head of a split may hold one class alone. And since a smaller
sample is a part of every larger one, results on the same images can be paired.
"""

import numpy as np
import numpy.typing as npt

Positions = npt.NDArray[np.int64]
_ORDER = 0


def sample(available: int, count: int | None) -> Positions:
    """Positions in a split of `available` images: `count` of them, or all in their own order where it has no more."""
    if count is None or count >= available:
        return np.arange(available)
    return np.random.default_rng(_ORDER).permutation(available)[:count]
