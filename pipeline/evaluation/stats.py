"""Accuracies with their uncertainty: Wilson intervals, paired tests, and intervals for differences."""

import math

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.stats import binomtest, norm

from pipeline.config.base import Section

CONFIDENCE = 0.95


class Accuracy(Section):
    """A share of correct examples with its 95 % Wilson score interval (Wilson, 1927)."""

    correct: int = Field(ge=0)
    """Examples classified correctly."""
    n: int = Field(ge=1)
    """Examples judged."""
    value: float
    """correct / n."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""

    @classmethod
    def of(cls, correct: int, n: int) -> "Accuracy":
        """Accuracy of `correct` out of `n`; ValueError unless 0 <= correct <= n and n > 0."""
        if n < 1 or not 0 <= correct <= n:
            raise ValueError(f"expected 0 <= correct <= n and n >= 1, got correct {correct} of n {n}")
        interval = binomtest(correct, n).proportion_ci(CONFIDENCE, method="wilson")
        return cls(correct=correct, n=n, value=correct / n, low=float(interval.low), high=float(interval.high))

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] (n = {self.n})"


class Difference(Section):
    """Accuracy of a minus accuracy of b with a 95 % interval, and McNemar's exact p-value for paired examples."""

    value: float
    """Difference of the two shares."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    p_value: float | None = None
    """Two-sided exact p-value of the paired test; none when only counts are known."""

    def __str__(self) -> str:
        test = "" if self.p_value is None else f", McNemar p = {self.p_value:.3g}"
        return f"{100 * self.value:+.1f} points [{100 * self.low:+.1f}, {100 * self.high:+.1f}]{test}"


def difference(a: Accuracy, b: Accuracy) -> Difference:
    """a - b from counts alone: Newcombe's (1998) hybrid score interval, which treats the samples as independent.

    On the same examples it is wider than the paired interval would be, hence on the safe side.
    """
    gap = a.value - b.value
    return Difference(
        value=gap,
        low=gap - math.hypot(a.value - a.low, b.high - b.value),
        high=gap + math.hypot(a.high - a.value, b.value - b.low),
    )


def mcnemar(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> Difference:
    """a - b on the same examples.

    The exact McNemar (1947) test, and the paired interval of Agresti and Min (2005).

    Args:
        a, b: (N,) whether each example is classified correctly by the one and the other.

    Raises:
        ValueError: the two are not over the same number of examples.
    """
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise ValueError(f"expected two (N,) arrays over the same examples, got shapes {a.shape} and {b.shape}")
    only_a, only_b, n = int((a & ~b).sum()), int((b & ~a).sum()), a.size
    discordant = only_a + only_b
    p_value = binomtest(only_a, discordant).pvalue if discordant else 1.0
    m, gained, lost = n + 2, only_a + 0.5, only_b + 0.5
    centre = (gained - lost) / m
    half = float(norm.ppf((1 + CONFIDENCE) / 2)) * math.sqrt(gained + lost - (gained - lost) ** 2 / m) / m
    return Difference(
        value=(only_a - only_b) / n, low=max(centre - half, -1.0), high=min(centre + half, 1.0), p_value=float(p_value)
    )
