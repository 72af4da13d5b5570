"""Intervals of a mean: over the tasks of one policy, and over the training seeds of a method.

A claim about a policy generalises over tasks, one about a method over training seeds. Values of one
seed share its training, so five seeds of 64 tasks are five independent values, not 320. All
intervals are two-sided at 95 %; ``benchmarks/COVERAGE.md`` has their simulated coverage.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

LEVEL = 0.95
FEW_SEEDS = 5
"""With fewer seeds, intervals are marked with the number of seeds."""

MIN_RESAMPLED = 8
"""Fewer values get Student's t: their resamples too often repeat a single value."""

Interval: TypeAlias = tuple[float, float]

PROPORTION: Interval = (0.0, 1.0)
"""Bounds of a binary outcome, or of a proportion of outcomes."""

DIFFERENCE_OF_PROPORTIONS: Interval = (-1.0, 1.0)

_UPPER = 0.5 + LEVEL / 2
_CHUNK = 4_000_000  # resampled values at a time, 32 MB
_UNKNOWN = (float("nan"), float("nan"))
_ROUNDING = 1e-12  # relative difference of values that counts as rounding error


def policy_interval(values: np.ndarray, bounds: Interval | None = None) -> Interval:
    """Returns the interval of one policy's mean over tasks.

    Binary outcomes have the exact interval of a proportion, and their differences that of pairs,
    only if `bounds` declare them as outcomes: all returns of a sample may be 0 or 1 at random.
    Other values have the studentised bootstrap, and fewer than `MIN_RESAMPLED` of them Student's t;
    if more than half of the values are equal, the union of both. Equal values have no interval, as
    they do not show the variance.

    Args:
        values: (N,) one mean per task; NaN if unknown.
        bounds: the least and greatest possible value, `PROPORTION` or `DIFFERENCE_OF_PROPORTIONS`;
            None if values are unbounded.

    Returns:
        Its ends, clipped to `bounds`; NaN for fewer than two values, infinite values, or equal
        values that are not outcomes.
    """
    values = np.sort(np.asarray(values, float))  # Makes the result independent of the order.
    values = values[~np.isnan(values)]
    if len(values) < 2 or not np.isfinite(values).all():
        return _UNKNOWN
    won, lost = int((values == 1).sum()), int((values == -1).sum())
    ties = int((values == 0).sum())
    if bounds == PROPORTION and won + ties == len(values):
        return exact_interval(won, len(values))
    if bounds == DIFFERENCE_OF_PROPORTIONS and won + lost + ties == len(values):
        return pairs_interval(won, lost, len(values))
    low, high = t_interval(values)
    if len(values) >= MIN_RESAMPLED:
        resampled = studentised_interval(values)
        # If few values differ, the bootstrap underestimates the uncertainty of the skewness.
        most_differ = np.unique(values, return_counts=True)[1].max() <= len(values) / 2
        both = np.array([resampled, resampled if most_differ else (low, high)])
        low, high = both.min(axis=0)[0], both.max(axis=0)[1]
    return _within(bounds, (low, high))


def method_interval(table: np.ndarray, bounds: Interval | None = None) -> Interval:
    """Returns the interval of a method's mean over training seeds and tasks.

    The variance between seed means includes training and the tasks of a single seed, but not tasks
    that seeds share, which shift all their means together. That part is the mean covariance of two
    seeds' means, estimated by products of different seeds' residuals on the same task; it is zero
    if no task is shared. Degrees of freedom follow Satterthwaite; the interval is never narrower
    than Student's t on the seed means.

    Args:
        table: (S, N) a row per seed, a column per task; NaN for tasks that a seed does not have.
        bounds: as in `policy_interval`.

    Returns:
        Its ends, clipped to `bounds`; NaN for fewer than two seeds, infinite values, or if the only
        task of a seed is shared, so that the variance between tasks is unknown.
    """
    table = np.asarray(table, float)
    table = table[~np.isnan(table).all(axis=1)]
    num_seeds = len(table)
    if num_seeds < 2 or np.isinf(table).any():
        return _UNKNOWN
    if _same(table[~np.isnan(table)]):  # All seeds have the same interval.
        return policy_interval(table[0], bounds)
    means = np.nanmean(table, axis=1)
    own = 0.0 if _same(means) else float(means.var(ddof=1)) / num_seeds
    shared, num_tasks = _shared_variance(table, means)
    if np.isnan(shared):
        return _UNKNOWN
    if own + shared == 0:  # Equal seed means, so that all seeds have the same interval.
        return policy_interval(table[0], bounds)
    share = own / (own + shared)
    freedom = 1 / (share**2 / (num_seeds - 1) + (1 - share) ** 2 / max(num_tasks - 1, 1))
    half = _t_quantile(freedom) * np.sqrt(own + shared)
    half = max(half, _t_quantile(num_seeds - 1) * np.sqrt(own))
    return _within(bounds, (float(means.mean() - half), float(means.mean() + half)))


def exact_interval(successes: int, trials: int) -> Interval:
    """Returns the interval of a proportion, with coverage of at least `LEVEL`.

    Source: Clopper and Pearson, "The Use of Confidence or Fiducial Limits Illustrated in the Case
    of the Binomial", 1934.
    """
    from scipy.special import betaincinv

    failures, tail = trials - successes, 1 - _UPPER
    low = betaincinv(successes, failures + 1, tail) if successes else 0.0
    high = betaincinv(successes + 1, failures, 1 - tail) if failures else 1.0
    return float(low), float(high)


def pairs_interval(won: int, lost: int, pairs: int) -> Interval:
    """Returns the interval of the difference of two success rates on the same tasks.

    The normal approximation with two additional pairs, one won and one lost, so that the variance
    is positive for a sample without differences; with Student's quantile, for few pairs.

    Source: Bonett and Price, "Adjusted Wald Confidence Interval for a Difference of Binomial
    Proportions Based on Paired Data", 2012.
    """
    mean = (won - lost) / (pairs + 2)
    variance = ((won + lost + 2) / (pairs + 2) - mean**2) / (pairs + 2)
    half = _t_quantile(pairs - 1) * float(np.sqrt(variance))
    return _within(DIFFERENCE_OF_PROPORTIONS, (mean - half, mean + half))


def studentised_interval(values: np.ndarray, reps: int = 2000, seed: int = 0) -> Interval:
    """Returns the bootstrap-t interval, from ``(mean* - mean) / error*``; it adapts to skewness.

    The error of a resample with few distinct values is near 0; its lower bound is 1 / sqrt(N) of
    the sample's error, as a single resample could otherwise make the interval unbounded.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 12.5.
    """
    count, mean, deviation = len(values), values.mean(), values.std(ddof=1)
    if _same(values):
        return _UNKNOWN
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // count)
    ratios = []
    for start in range(0, reps, step):
        drawn = values[rng.integers(count, size=(min(step, reps - start), count))]
        error = np.maximum(drawn.std(axis=1, ddof=1), deviation / np.sqrt(count))
        ratios.append((drawn.mean(axis=1) - mean) / error)
    low, high = np.quantile(np.concatenate(ratios), [1 - _UPPER, _UPPER])
    return float(mean - high * deviation), float(mean - low * deviation)


def t_interval(values: np.ndarray) -> Interval:
    """Returns Student's t interval, exact for normal values; NaN if all values are equal."""
    if _same(values):
        return _UNKNOWN
    half = _t_quantile(len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def _shared_variance(table: np.ndarray, means: np.ndarray) -> tuple[float, int]:
    """Returns the mean covariance of two seeds' means due to shared tasks, and their number.

    A seed's residuals sum to zero, which shrinks their products by the factor (N - 1) / N; for a
    single task they vanish, and the covariance is NaN.
    """
    known = ~np.isnan(table)
    shared = known.sum(axis=0) > 1
    num_seeds, num_tasks = len(table), int(shared.sum())
    if not num_tasks:
        return 0.0, 0
    least = int(known.sum(axis=1)[known[:, shared].any(axis=1)].min())
    if least < 2:
        return float("nan"), num_tasks
    residual = np.where(known, table - means[:, None], 0.0) / known.sum(axis=1, keepdims=True)
    products = (residual.sum(axis=0) ** 2 - (residual**2).sum(axis=0)).sum()
    covariance = products / (num_seeds * (num_seeds - 1)) * least / (least - 1)
    return max(0.0, float(covariance)), num_tasks


def _t_quantile(freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, _UPPER))


def _same(values: np.ndarray) -> bool:
    return bool(np.ptp(values) <= _ROUNDING * np.abs(values).max())


def _within(bounds: Interval | None, interval: Interval) -> Interval:
    low, high = interval if bounds is None else np.clip(interval, *bounds)
    return float(low), float(high)
