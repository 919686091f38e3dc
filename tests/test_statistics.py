"""Errors and intervals: against published tables, the jackknife, and simulations whose truth is known."""

import math

import numpy as np
import pytest

from evaluation.statistics import Comparison, compare, mean_interval, ratio, t_quantile, two_digits, verdict


def test_the_error_of_a_ratio_is_that_of_the_jackknife():
    """The jackknife leaves out each unit once, and knows nothing of the formula."""
    rng = np.random.default_rng(0)
    weights = rng.integers(20, 200, 300)
    values = weights * rng.normal(2, 0.3, 300)
    mean, error = ratio(values, weights)
    without = (values.sum() - values) / (weights.sum() - weights)
    assert mean == pytest.approx(values.sum() / weights.sum())
    assert error == pytest.approx(math.sqrt(299 / 300 * ((without - without.mean()) ** 2).sum()), rel=0.01)
    same = ratio(values, np.full(300, 4.0))
    assert same[1] == pytest.approx(np.std(values / 4, ddof=1) / math.sqrt(300))
    assert math.isnan(ratio(values[:1], weights[:1])[1])


def test_quantiles_of_t_are_those_of_the_tables():
    for degrees, expected in {1: 12.706, 2: 4.303, 4: 2.776, 10: 2.228, 30: 2.042, 120: 1.980}.items():
        assert t_quantile(0.95, degrees) == pytest.approx(expected, abs=6e-4)
    assert t_quantile(0.99, 3) == pytest.approx(5.841, abs=6e-4)


def test_the_interval_of_runs_is_that_of_a_textbook():
    """Of 4, 5, 6: standard deviation 1, t of 2 degrees of freedom 4.303."""
    mean, deviation, half = mean_interval(np.array([4.0, 5.0, 6.0]))
    assert (mean, deviation) == (5, 1) and half == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)


@pytest.mark.parametrize(("n", "n_simulations"), [(64, 400), (12, 1500)])
def test_intervals_contain_the_true_difference_95_times_of_100(n, n_simulations):
    """Two models on the same windows, of uneven size: what they share is a hundred times as large as the difference."""
    rng, covered = np.random.default_rng(n), 0
    for _ in range(n_simulations):
        weights = rng.integers(50, 200, n)
        b = rng.gamma(4, 0.4, n)
        found = compare((b + rng.normal(0.01, 0.04, n)) * weights, b * weights, weights)
        covered += found.low <= 0.01 <= found.high
    assert 0.93 <= covered / n_simulations <= 0.97


@pytest.mark.parametrize("n", range(1, 9))
def test_few_units_claim_no_difference_where_there_is_none(n):
    """A coin falls five times alike in one of 16 tries, which is more than one of 20, and six times in one of 32."""
    rng = np.random.default_rng(n)
    claims = [compare(rng.choice([-1.0, 1.0], n), np.zeros(n), np.ones(n)).is_shown for _ in range(300)]
    assert np.mean(claims) < 0.07
    assert compare(np.full(n, 2.0), np.ones(n), np.ones(n)).is_shown == (n >= 6)


def test_as_many_units_as_it_asks_for_show_the_difference_four_times_of_five():
    rng = np.random.default_rng(1)
    differences = rng.normal(size=200)
    differences = 0.3 + (differences - differences.mean()) / differences.std(ddof=1)  # exactly: mean 0.3, deviation 1
    needed = compare(differences, np.zeros(200), np.ones(200)).n_needed
    n = round(needed)
    assert needed == pytest.approx(((1.960 + 0.842) / 0.3) ** 2, rel=0.01)
    shown = [compare(rng.normal(0.3, 1, n), np.zeros(n), np.ones(n)).is_shown for _ in range(200)]
    assert 0.73 <= np.mean(shown) <= 0.87


def test_the_bootstrap_gives_the_same_twice_and_swaps_with_its_models():
    a, b = np.random.default_rng(2).normal(size=(2, 30))
    one, two, swapped = compare(a, b, np.ones(30)), compare(a, b, np.ones(30)), compare(b, a, np.ones(30))
    assert one == two
    assert (swapped.low, swapped.high) == pytest.approx((-one.high, -one.low))


def test_verdicts_say_what_they_found():
    shown = Comparison(0.0123, 0.0071, 0.0169, 64, 10)
    interval = "by 0.0123 nats, 95% 0.0071 to 0.0169"
    assert verdict("A", "B", shown, "nats", 9000, "characters") == f"B is better than A {interval}"
    worse = Comparison(-0.0123, -0.0169, -0.0071, 64, 10)
    assert verdict("A", "B", worse, "nats", 9000, "characters") == f"A is better than B {interval}"
    unsure = Comparison(0.03, -0.01, 0.07, 100, 541)
    assert verdict("A", "B", unsure, "percentage points", 100, "questions", scale=100) == (
        "no difference that these questions can show: B is better than A by 3.0 percentage points, 95% -1.0 to 7.0; "
        "about 440 more questions would"
    )
    other_way = Comparison(-0.03, -0.07, 0.01, 100, 541)
    assert "show: A is better than B by 3.0 percentage points, 95% -1.0 to 7.0; about 440" in (
        verdict("A", "B", other_way, "percentage points", 100, "questions", scale=100)
    )
    assert "this text can show" in verdict("A", "B", unsure, "nats", 9000, "characters")
    hopeless = verdict("A", "B", Comparison(0.001, -1, 1, 10, 9e6), "nats", 9000, "characters")
    assert hopeless.endswith("a hundred times as many characters would hardly show it")
    same = compare(np.ones(9), np.ones(9), np.ones(9))
    assert verdict("A", "B", same, "nats", 9000, "characters") == "no difference between A and B"
    few = compare(np.ones(5), np.zeros(5), np.ones(5))
    assert verdict("A", "B", few, "nats", 9000, "characters") == (
        "nothing can be said of B against A from 5 units: at least 6 are needed"
    )
    assert [two_digits(value) for value in (0.2, 7.4, 38_765, 40_400_000)] == [1, 7, 39_000, 40_000_000]
