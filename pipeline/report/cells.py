"""The 2 x 2 of a study: what the activations of each cell reach, and what each of the two properties brings.

An activation's rule may vary over positions, and it may depend on the input beyond its own element
(`ACTIVATIONS[name].cell`). The value of a cell is the mean over its contenders, seed by seed; what a property brings is
the difference of two cells that differ in it alone.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from pipeline.report.study import Mean, Study, What
from sparta_models import ACTIVATIONS
from sparta_models.activations.base import (
    SHARED_DEPENDENT,
    SHARED_INDEPENDENT,
    VARYING_DEPENDENT,
    VARYING_INDEPENDENT,
    Cell,
)

CELLS = (SHARED_INDEPENDENT, SHARED_DEPENDENT, VARYING_INDEPENDENT, VARYING_DEPENDENT)
PROPERTIES = (
    ("varying minus shared, input independent", VARYING_INDEPENDENT, SHARED_INDEPENDENT),
    ("varying minus shared, input dependent", VARYING_DEPENDENT, SHARED_DEPENDENT),
    ("dependent minus independent, spatially shared", SHARED_DEPENDENT, SHARED_INDEPENDENT),
    ("dependent minus independent, spatially varying", VARYING_DEPENDENT, VARYING_INDEPENDENT),
)


class TwoByTwo:
    """One group's contenders, sorted into cells."""

    def __init__(self, study: Study, group: str) -> None:
        """Take those contenders in that learned their activation in the main contender's network and epochs."""
        self._study, self._group = study, group
        self.members: dict[Cell, list[str]] = {cell: [] for cell in CELLS}
        for main in study.with_role(group, "main")[:1]:
            model = study.of(group, main)[0]
            for name in study.contenders(group):
                entry = study.of(group, name)[0]
                if (entry.architecture, entry.epochs, entry.frozen_digest) == (model.architecture, model.epochs, None):
                    self.members[ACTIVATIONS[entry.activation].cell].append(name)
        names = [name for cell in CELLS for name in self.members[cell]]
        seeds = [{entry.seed for entry in study.of(group, name)} for name in names]
        self.seeds: list[int] = sorted(set.intersection(*seeds)) if seeds else []

    @property
    def whole(self) -> bool:
        """Whether every cell has a contender, and all contenders share a seed."""
        return all(self.members.values()) and bool(self.seeds)

    def mean(self, cell: Cell, what: What) -> Mean:
        """Accuracy of a cell, with its interval over the seeds that all contenders share."""
        return Mean.of(self._by_seed(cell, what))

    def brings(self, one: Cell, other: Cell, what: What) -> Mean:
        """Accuracy of one cell minus another's, paired by seed."""
        return Mean.of(self._by_seed(one, what) - self._by_seed(other, what))

    def _by_seed(self, cell: Cell, what: What) -> npt.NDArray[np.float64]:
        values: npt.NDArray[np.float64] = np.mean([self._of(name, what) for name in self.members[cell]], axis=0)
        return values

    def _of(self, name: str, what: What) -> Sequence[float]:
        entries = {entry.seed: entry for entry in self._study.of(self._group, name)}
        return [entries[seed].accuracy(what).value for seed in self.seeds]
