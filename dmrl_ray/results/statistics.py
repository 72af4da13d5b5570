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

SHARE: Interval = (0.0, 1.0)
"""Ends of an outcome, or of the share of several."""

DIFFERENCE_OF_SHARES: Interval = (-1.0, 1.0)

_UPPER = 0.5 + LEVEL / 2
_CHUNK = 4_000_000  # 32 MB of resampled values at a time
_UNKNOWN = (float("nan"), float("nan"))
_ROUNDING = 1e-12  # of the values: they differ by no more than the last digits of a sum


def policy_interval(values: np.ndarray, ends: Interval | None = None) -> Interval:
    """Interval of one policy's mean over tasks.

    Outcomes have the exact interval of a proportion, and their differences that of pairs, only
    where `ends` say that they are outcomes: returns of a sample may all be 0 or 1 by chance. Other
    values have the studentised bootstrap, and fewer than `MIN_RESAMPLED` of them Student's t; where
    most values are one value, the interval holds both. Values that are all the same do not show how
    far apart others are.

    Args:
        values: (N,) one mean per task; NaN where a task's is not known.
        ends: the least and greatest possible: `SHARE`, or `DIFFERENCE_OF_SHARES`; None where values
            are not bounded.

    Returns:
        Its ends, within those of the values; NaN for fewer than two values, infinite ones, or where
        all are the same and no outcomes.
    """
    values = np.sort(np.asarray(values, float))  # The interval is the same in whatever order.
    values = values[~np.isnan(values)]
    if len(values) < 2 or not np.isfinite(values).all():
        return _UNKNOWN
    won, lost = int((values == 1).sum()), int((values == -1).sum())
    ties = int((values == 0).sum())
    if ends == SHARE and won + ties == len(values):
        return exact_interval(won, len(values))
    if ends == DIFFERENCE_OF_SHARES and won + lost + ties == len(values):
        return pairs_interval(won, lost, len(values))
    low, high = t_interval(values)
    if len(values) >= MIN_RESAMPLED:
        resampled = studentised_interval(values)
        # Of a few that differ, as of a single one, the bootstrap takes the skewness for known.
        most_differ = np.unique(values, return_counts=True)[1].max() <= len(values) / 2
        both = np.array([resampled, resampled if most_differ else (low, high)])
        low, high = both.min(axis=0)[0], both.max(axis=0)[1]
    return _within(ends, (low, high))


def method_interval(table: np.ndarray, ends: Interval | None = None) -> Interval:
    """Interval of a method's mean over training seeds and, where seeds share tasks, over those.

    The variance of seed means is that of training and of the tasks that only one seed met. Tasks
    that seeds share move all their means together, which no difference between seeds shows: that
    part is the mean covariance of two seeds' means, estimated by products of different seeds'
    residuals on the same task, and is zero where no task is shared. Degrees of freedom follow
    Satterthwaite; the interval is never narrower than Student's t on the seed means.

    Args:
        table: (S, N) a row per seed, a column per task; NaN where a seed did not meet a task.
        ends: as of `policy_interval`.

    Returns:
        Its ends, within those of the values; NaN for fewer than two seeds, infinite values, or
        where a seed's only task is that of another, so that tasks could differ in any way.
    """
    table = np.asarray(table, float)
    table = table[~np.isnan(table).all(axis=1)]
    num_seeds = len(table)
    if num_seeds < 2 or np.isinf(table).any():
        return _UNKNOWN
    if _same(table[~np.isnan(table)]):  # What one of the seeds shows.
        return policy_interval(table[0], ends)
    means = np.nanmean(table, axis=1)
    own = 0.0 if _same(means) else float(means.var(ddof=1)) / num_seeds
    shared, num_tasks = _shared_variance(table, means)
    if np.isnan(shared):
        return _UNKNOWN
    if own + shared == 0:  # Seeds that agree to the last digit: what one of them shows.
        return policy_interval(table[0], ends)
    share = own / (own + shared)
    freedom = 1 / (share**2 / (num_seeds - 1) + (1 - share) ** 2 / max(num_tasks - 1, 1))
    half = _t_quantile(freedom) * np.sqrt(own + shared)
    half = max(half, _t_quantile(num_seeds - 1) * np.sqrt(own))
    return _within(ends, (float(means.mean() - half), float(means.mean() + half)))


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


def pairs_interval(won: int, lost: int, pairs: int) -> Interval:
    """Interval of the difference of two success rates, of which the same tasks were asked.

    The normal approximation after two further pairs, one won and one lost, by which even a sample
    without any difference leaves some possible; with Student's quantile, for few pairs.

    Source: Bonett and Price, "Adjusted Wald Confidence Interval for a Difference of Binomial
    Proportions Based on Paired Data", 2012.
    """
    mean = (won - lost) / (pairs + 2)
    variance = ((won + lost + 2) / (pairs + 2) - mean**2) / (pairs + 2)
    half = _t_quantile(pairs - 1) * float(np.sqrt(variance))
    return _within(DIFFERENCE_OF_SHARES, (mean - half, mean + half))


def studentised_interval(values: np.ndarray, reps: int = 2000, seed: int = 0) -> Interval:
    """Bootstrap of ``(mean* - mean) / error*``, which follows the skewness of the values.

    A resample of few distinct values has hardly an error of its own; it is given at least
    1 / sqrt(N) of the sample's, or one such resample could make the interval endless.

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
        spread = np.maximum(drawn.std(axis=1, ddof=1), deviation / np.sqrt(count))
        ratios.append((drawn.mean(axis=1) - mean) / spread)
    low, high = np.quantile(np.concatenate(ratios), [1 - _UPPER, _UPPER])
    return float(mean - high * deviation), float(mean - low * deviation)


def t_interval(values: np.ndarray) -> Interval:
    """Student's t, exact for normal values; NaN where all are the same."""
    if _same(values):
        return _UNKNOWN
    half = _t_quantile(len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def _shared_variance(table: np.ndarray, means: np.ndarray) -> tuple[float, int]:
    """Mean covariance of two seeds' means through tasks that they share, and the number of those.

    A seed's residuals sum to zero, which lessens their products by the factor (N - 1) / N; of a
    single task nothing is left, and the covariance is NaN.
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


def _within(ends: Interval | None, interval: Interval) -> Interval:
    """What of an interval is possible."""
    low, high = interval if ends is None else np.clip(interval, *ends)
    return float(low), float(high)
