"""Intervals: by hand, in their limits, and as often right as they say."""

import numpy as np
import pytest
from scipy.stats import binom

from dmrl_ray.results.intervals import (
    DIFFERENCE_OF_PROPORTIONS,
    PROPORTION,
    exact_interval,
    method_interval,
    policy_interval,
    studentised_interval,
    t_interval,
)


def coverage(intervals, mean):
    low, high = np.array(intervals).T
    return np.mean((low <= mean) & (mean <= high))


def own_tasks(table):
    """Every seed's values as columns that no other seed has met."""
    seeds, tasks = table.shape
    wide = np.full((seeds, seeds, tasks), np.nan)
    wide[range(seeds), range(seeds)] = table
    return wide.reshape(seeds, -1)


def test_three_values_have_students_t():
    # Mean 2, standard deviation 1, error 1 / sqrt(3), quantile 4.3027 of two degrees of freedom.
    half = 4.3027 / 3**0.5
    assert policy_interval([1, 2, 3]) == pytest.approx((2 - half, 2 + half), abs=1e-4)


def test_sixteen_failures_leave_a_fifth_possible():
    # The largest rate p at which sixteen failures have probability 0.025: 1 - 0.025 ** (1 / 16).
    assert policy_interval(np.zeros(16), PROPORTION) == pytest.approx((0, 1 - 0.025 ** (1 / 16)))
    assert policy_interval(np.ones(16), PROPORTION) == pytest.approx((0.025 ** (1 / 16), 1))


@pytest.mark.parametrize("trials", [2, 16, 64])
def test_the_exact_interval_covers_every_rate(trials):
    rates = np.linspace(0.001, 0.999, 499)
    covered = np.zeros_like(rates)
    for successes in range(trials + 1):
        low, high = exact_interval(successes, trials)
        covered += binom.pmf(successes, trials, rates) * ((low <= rates) & (rates <= high))
    assert covered.min() >= 0.95


@pytest.mark.parametrize("value", [0.0, 1.0, 3.0, 0.1 + 0.2])
@pytest.mark.parametrize("count", [4, 16])
def test_values_that_are_all_the_same_do_not_bound_others(value, count):
    same = value * (1 + 2.3e-16 * np.arange(count))  # As sums in another order are.
    assert np.isnan(policy_interval(same)).all()
    assert np.isnan(t_interval(same)).all()
    assert np.isnan(method_interval(np.tile(same, (5, 1)))).all()


def test_only_declared_outcomes_have_the_exact_interval():
    values = 1.0 * (np.arange(16) % 4 == 0)
    assert policy_interval(values, PROPORTION) == exact_interval(4, 16)
    both = t_interval(values), studentised_interval(np.sort(values))
    assert policy_interval(values) == (min(both)[0], max(end for _, end in both))


@pytest.mark.parametrize("won", [0.5, 0.8, 1.0])  # of the tasks that differ
@pytest.mark.parametrize("rate", [0.02, 0.04, 0.1, 0.3])
@pytest.mark.parametrize("pairs", [4, 16, 64])
def test_differences_of_outcomes_are_covered_however_rare_they_are(pairs, rate, won):
    rng = np.random.default_rng(0)
    chances = [rate * won, rate * (1 - won), 1 - rate]
    samples = rng.choice([1.0, -1.0, 0.0], (600, pairs), p=chances)
    intervals = [policy_interval(sample, DIFFERENCE_OF_PROPORTIONS) for sample in samples]
    assert coverage(intervals, rate * (2 * won - 1)) >= 0.92


@pytest.mark.parametrize("rate", [0.02, 0.04, 0.1, 0.3])
def test_returns_that_seldom_differ_are_covered_where_an_interval_is_known(rate):
    rng = np.random.default_rng(0)
    samples = rng.choice([1.0, -1.0, 0.0], (600, 64), p=[rate / 2, rate / 2, 1 - rate])
    intervals = [policy_interval(sample) for sample in samples if sample.any()]
    assert coverage(intervals, 0.0) >= 0.92


def test_a_single_task_that_differs_does_not_distinguish_two_policies():
    # Two more pairs, won and lost: mean 1 / 66, variance (3 / 66 - 1 / 66^2) / 66 = 0.02614^2, and
    # Student's t of 63 degrees of freedom is 1.998.
    differences = np.eye(64)[0]
    low, high = policy_interval(differences, DIFFERENCE_OF_PROPORTIONS)
    assert (low, high) == pytest.approx((-0.0371, 0.0674), abs=2e-4)
    assert policy_interval(-differences, DIFFERENCE_OF_PROPORTIONS) == (-high, -low)


def test_intervals_of_success_are_within_zero_and_one():
    rates = np.array([1.0, 0.9375, 0.9375, 0.9375, 0.5])
    assert t_interval(rates)[1] > 1
    assert policy_interval(rates, PROPORTION)[1] == 1
    assert method_interval(own_tasks(np.tile(rates[:, None], (1, 2))), PROPORTION)[1] == 1


def test_a_skewed_mean_over_sixteen_tasks_is_covered():
    rng = np.random.default_rng(0)
    samples = rng.exponential(size=(600, 16))
    assert coverage([policy_interval(sample) for sample in samples], 1.0) > 0.925


def test_the_studentised_interval_of_many_normal_values_is_the_textbook_one():
    values = np.random.default_rng(0).normal(size=2000)
    expected = t_interval(values)
    assert studentised_interval(values, reps=5000) == pytest.approx(expected, abs=0.003)


def test_the_studentised_interval_moves_and_scales_with_its_values():
    values = np.random.default_rng(0).exponential(size=16)
    low, high = studentised_interval(values)
    assert studentised_interval(7 - 3 * values) == pytest.approx((7 - 3 * high, 7 - 3 * low))


def test_the_order_of_tasks_does_not_matter():
    values = np.random.default_rng(0).exponential(size=16)
    assert policy_interval(values[::-1]) == policy_interval(values)


def test_a_few_values_that_are_not_zero_do_not_make_the_interval_endless():
    values = np.zeros(16)
    values[:2] = 0.4, 0.6
    low, high = policy_interval(values)
    assert -1 < low < values.mean() < high < 1


def test_one_value_has_no_interval_and_unknown_ones_do_not_count():
    assert np.isnan(policy_interval([1.0])).all()
    assert np.isnan(policy_interval([1.0, np.inf, 2.0])).all()
    assert policy_interval([1.0, np.nan, 2.0, 4.0]) == policy_interval([1.0, 2.0, 4.0])


def test_seeds_on_tasks_of_their_own_have_students_t_on_their_means():
    table = np.random.default_rng(0).normal(size=(5, 64)) + np.arange(5)[:, None]
    expected = t_interval(table.mean(axis=1))
    assert method_interval(own_tasks(table)) == pytest.approx(expected)


def test_more_tasks_do_not_make_up_for_seeds():
    # Seeds differ and tasks do not: 6400 values are as good as the five that differ.
    means = np.array([8.7, 10.0, 8.0, 9.1, 8.2])
    few, many = (method_interval(np.repeat(means[:, None], tasks, 1)) for tasks in (2, 6400))
    assert few == pytest.approx(many)
    assert few == pytest.approx(t_interval(means))


def test_copies_of_one_policy_are_as_uncertain_as_it_is_alone():
    values = np.random.default_rng(0).normal(size=64)
    assert method_interval(np.tile(values, (5, 1))) == pytest.approx(t_interval(values))


def test_tasks_that_all_seeds_share_are_part_of_the_uncertainty():
    # Seeds differ ten times less than tasks: t on the seed means covers 0.60 here.
    rng = np.random.default_rng(0)
    tables = rng.normal(size=(600, 1, 64)) + 0.1 * rng.normal(size=(600, 5, 1))
    assert coverage([method_interval(table) for table in tables], 0.0) > 0.925
    assert coverage([t_interval(table.mean(axis=1)) for table in tables], 0.0) < 0.7


def test_shared_tasks_never_narrow_the_interval_of_three_seeds():
    rng = np.random.default_rng(0)
    for _ in range(50):
        table = rng.normal(size=(3, 64)) + rng.normal(size=(3, 1))
        low, high = method_interval(table)
        seeds_low, seeds_high = t_interval(table.mean(axis=1))
        assert low <= seeds_low + 1e-12
        assert high >= seeds_high - 1e-12


def test_seeds_that_all_always_succeed_are_not_certain():
    assert method_interval(np.ones((5, 64)), PROPORTION) == exact_interval(64, 64)


def test_a_single_task_that_seeds_share_could_be_any():
    # Seeds hardly differ; how far this task lies from the others, none of them shows.
    assert np.isnan(method_interval(10 + 0.01 * np.arange(5.0)[:, None])).all()
    two = np.random.default_rng(0).normal(size=(1000, 1, 2))
    tables = two + 0.02 * np.random.default_rng(1).normal(size=(1000, 5, 1))
    assert coverage([method_interval(table) for table in tables], 0.0) > 0.9


def test_one_seed_has_no_interval_over_seeds():
    assert np.isnan(method_interval(np.ones((1, 64)))).all()
    assert np.isnan(method_interval(np.array([[1.0, 2.0], [np.nan, np.nan]]))).all()
    assert np.isnan(method_interval(np.array([[1.0, np.inf], [1.0, 2.0]]))).all()
