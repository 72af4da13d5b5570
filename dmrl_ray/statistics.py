"""Intervals of a mean: over the tasks of one policy, and over the training seeds of a method.

A claim about a policy generalises over tasks, one about a method over training seeds. Values of one
seed share its training, so five seeds of 64 tasks are five independent values, never 320. All
intervals are two-sided at 95 %; ``benchmarks/COVERAGE.md`` holds how often they cover the truth.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

LEVEL = 0.95
FEW_SEEDS = 5
"""With fewer seeds an interval is as wide as it must be, and is marked with their number."""

MIN_RESAMPLED = 8
"""Of fewer values a resample is too often one value repeated; they get Student's t."""

Interval: TypeAlias = tuple[float, float]

_UPPER = 0.5 + LEVEL / 2
_CHUNK = 4_000_000  # 32 MB of resampled values at a time
_UNKNOWN = (float("nan"), float("nan"))


def policy_interval(values: np.ndarray) -> Interval:
    """Interval of one policy's mean over tasks.

    Outcomes that are 0 or 1, or take two values, have the exact interval of a proportion; other
    values the studentised bootstrap, and fewer than `MIN_RESAMPLED` of them Student's t.

    Args:
        values: (N,) one mean per task; NaN where a task's is not known.

    Returns:
        Its ends; NaN for fewer than two values, or infinite ones.
    """
    values = np.sort(np.asarray(values, float))  # The interval is the same in whatever order.
    values = values[~np.isnan(values)]
    if len(values) < 2 or not np.isfinite(values).all():
        return _UNKNOWN
    found = np.unique(values)
    if np.isin(found, (0.0, 1.0)).all():
        return exact_interval(int(values.sum()), len(values))
    if len(values) < MIN_RESAMPLED:
        return t_interval(values)
    if len(found) == 2:
        low, high = exact_interval(int((values == found[1]).sum()), len(values))
        return _between(found, low), _between(found, high)
    return studentised_interval(values)


def method_interval(table: np.ndarray) -> Interval:
    """Interval of a method's mean over training seeds and, where seeds share tasks, over those.

    The variance of seed means is that of training and of the tasks that only one seed met. Tasks
    that seeds share move all their means together, which no difference between seeds shows: that
    part is the mean covariance of two seeds' means, estimated by products of different seeds'
    residuals on the same task, and is zero where no task is shared. Degrees of freedom follow
    Satterthwaite; the interval is never narrower than Student's t on the seed means.

    Args:
        table: (S, N) a row per seed, a column per task; NaN where a seed did not meet a task.

    Returns:
        Its ends; NaN for fewer than two seeds, or infinite values.
    """
    table = np.asarray(table, float)
    table = table[~np.isnan(table).all(axis=1)]
    num_seeds = len(table)
    if num_seeds < 2 or np.isinf(table).any():
        return _UNKNOWN
    means = np.nanmean(table, axis=1)
    own = float(means.var(ddof=1)) / num_seeds if np.ptp(means) else 0.0
    shared, num_tasks = _shared_variance(table, means)
    if own + shared == 0:  # Seeds that agree to the last digit: what one of them shows.
        return policy_interval(table[0])
    share = own / (own + shared)
    freedom = 1 / (share**2 / (num_seeds - 1) + (1 - share) ** 2 / max(num_tasks - 1, 1))
    half = _t_quantile(freedom) * np.sqrt(own + shared)
    half = max(half, _t_quantile(num_seeds - 1) * np.sqrt(own))
    return float(means.mean() - half), float(means.mean() + half)


def exact_interval(successes: int, trials: int) -> Interval:
    """Interval of a proportion whose coverage is at least `LEVEL` for every true one.

    Source: Clopper and Pearson, "The Use of Confidence or Fiducial Limits Illustrated in the Case
    of the Binomial", 1934.
    """
    from scipy.special import betaincinv

    failures, tail = trials - successes, 1 - _UPPER
    low = betaincinv(successes, failures + 1, tail) if successes else 0.0
    high = betaincinv(successes + 1, failures, 1 - tail) if failures else 1.0
    return float(low), float(high)


def studentised_interval(values: np.ndarray, reps: int = 2000, seed: int = 0) -> Interval:
    """Bootstrap of ``(mean* - mean) / error*``, which follows the skewness of the values.

    A resample of few distinct values has hardly an error of its own; it is given at least
    1 / sqrt(N) of the sample's, or one such resample could make the interval endless.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, section 12.5.
    """
    count, mean, deviation = len(values), values.mean(), values.std(ddof=1)
    if deviation == 0:
        return float(mean), float(mean)
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // count)
    ratios = []
    for start in range(0, reps, step):
        drawn = values[rng.integers(count, size=(min(step, reps - start), count))]
        spread = np.maximum(drawn.std(axis=1, ddof=1), deviation / np.sqrt(count))
        ratios.append((drawn.mean(axis=1) - mean) / spread)
    low, high = np.quantile(np.concatenate(ratios), [1 - _UPPER, _UPPER])
    return float(mean - high * deviation), float(mean - low * deviation)


def t_interval(values: np.ndarray) -> Interval:
    """Student's t, exact for normal values."""
    half = _t_quantile(len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def _shared_variance(table: np.ndarray, means: np.ndarray) -> tuple[float, int]:
    """Mean covariance of two seeds' means through tasks that they share, and the number of those.

    A seed's residuals sum to zero, which lessens their products by the factor (N - 1) / N.
    """
    known = ~np.isnan(table)
    num_seeds, num_tasks = len(table), int((known.sum(axis=0) > 1).sum())
    if num_tasks < 2:
        return 0.0, num_tasks
    residual = np.where(known, table - means[:, None], 0.0) / known.sum(axis=1, keepdims=True)
    products = (residual.sum(axis=0) ** 2 - (residual**2).sum(axis=0)).sum()
    covariance = products / (num_seeds * (num_seeds - 1)) * num_tasks / (num_tasks - 1)
    return max(0.0, float(covariance)), num_tasks


def _t_quantile(freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, _UPPER))


def _between(ends: np.ndarray, share: float) -> float:
    return float(ends[0] + share * (ends[1] - ends[0]))
