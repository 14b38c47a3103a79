import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.stats import Accuracy, difference, mcnemar


def wilson(k: int, n: int) -> tuple[float, float]:
    """The formula as printed: (p + z2/2n -+ z sqrt(p q / n + z2 / 4n2)) / (1 + z2/n)."""
    z, p = 1.959963984540054, k / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_accuracy_has_the_wilson_interval_of_the_formula(counts):
    k, n = counts
    accuracy, (low, high) = Accuracy.of(k, n), wilson(k, n)
    assert accuracy.value == k / n
    assert accuracy.low == pytest.approx(max(low, 0), abs=1e-9)
    assert accuracy.high == pytest.approx(min(high, 1), abs=1e-9)


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0)])
def test_impossible_counts_are_refused(k, n):
    with pytest.raises(ValueError, match="expected 0 <= correct <= n"):
        Accuracy.of(k, n)


def test_mcnemar_is_the_binomial_tail_of_the_discordant_pairs():
    a = np.array([True] * 9 + [False] * 2 + [True] * 30)
    b = np.array([False] * 9 + [True] * 2 + [True] * 30)
    tail = sum(math.comb(11, i) for i in range(3)) / 2**11
    assert mcnemar(a, b).p_value == pytest.approx(2 * tail)
    assert mcnemar(a, b).value == pytest.approx(7 / 41)


def test_mcnemar_of_equal_models_sees_no_difference():
    a = np.array([True, False, True])
    found = mcnemar(a, a)
    assert (found.value, found.p_value) == (0, 1)
    assert found.low < 0 < found.high


@pytest.mark.parametrize("n", [1, 5, 50])
def test_an_interval_of_a_difference_stays_within_one(n):
    found = mcnemar(np.ones(n, bool), np.zeros(n, bool))
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low >= -1


def test_paired_arrays_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"same examples, got shapes \(3,\) and \(4,\)"):
        mcnemar(np.ones(3, bool), np.ones(4, bool))


def test_difference_matches_newcombes_published_example():
    # Newcombe (1998), Statistics in Medicine 17:873, table II, (a) 56/70 - 48/80, method 10.
    found = difference(Accuracy.of(56, 70), Accuracy.of(48, 80))
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_paired_interval_covers_the_truth_as_often_as_it_says():
    rng, covered, trials = np.random.default_rng(0), 0, 400
    for _ in range(trials):
        u = rng.random(300)
        found = mcnemar(u < 0.55, u + 0.1 * rng.standard_normal(300) < 0.5)
        truth = 0.55 - 0.5  # the noise is symmetric and the edges of u are far
        covered += found.low <= truth <= found.high
    assert covered / trials >= 0.92  # 95 % within three standard errors
