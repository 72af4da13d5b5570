"""Simulated coverage of 95 % intervals.

    python -m benchmarks.coverage

Draws samples with a known mean and counts the intervals that contain it: of one policy over tasks,
and of a method over training seeds. Writes ``benchmarks/COVERAGE.md``; takes one minute on one
core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from scipy.special import ndtr, ndtri

from dmrl_ray.results.intervals import (
    DIFFERENCE_OF_PROPORTIONS,
    PROPORTION,
    Interval,
    method_interval,
    policy_interval,
    studentised_interval,
    t_interval,
)

PAGE = Path(__file__).resolve().parent / "COVERAGE.md"
TRIALS = 2000
RESAMPLES = 1000
NUM_TASKS = 64
TAILS = np.array([0.025, 0.975])

HEAD = """# Coverage of the intervals

Made by `python -m benchmarks.coverage`: {trials} samples a row, the fraction of 95 % intervals that
contain the true mean (standard error {error:.3f}). A sample of equal values has no interval, which
counts as not covering; "none" is the fraction of such samples. "Width" is the median width of the
last interval, in standard deviations of a value.

## One policy, over tasks

"Exponential" is skewed, "often 0" is uniform on [0, 1] in three of ten tasks and else 0,
"4 episodes" is the success rate over four episodes of a task. "Pairs" are differences of two
policies' outcomes, of which the given fraction is not 0: won or lost with equal probability, so
that the true difference is 0, or only won; "returns" are the former without declared bounds.
`policy_interval` is exact for 0/1 outcomes, that of Bonett and Price for pairs, Student's t for
fewer than 8 tasks, and else the studentised bootstrap, with Student's t if most values are equal.

"""
SEEDS_HEAD = """
## A method, over training seeds

{tasks} tasks per seed; "between" is the ratio of the standard deviations between seeds and between
tasks. "Own" tasks are sampled for each seed, "shared" ones are the same for all; the true mean is
over all tasks and seeds. "Pooled" treats all tasks of all seeds as independent. The success rates
of seeds follow a Beta distribution; where "between" is 0.5, most are near 0 and a few are large,
which five seeds cannot show.

"""

Candidate = Callable[[np.ndarray], Interval]


def percentile_interval(values: np.ndarray) -> Interval:
    """Returns quantiles of the means of resamples."""
    low, high = np.quantile(_resampled_means(values), TAILS)
    return float(low), float(high)


def bca_interval(values: np.ndarray) -> Interval:
    """Returns the bias-corrected and accelerated interval (Efron 1987)."""
    if not np.ptp(values):
        return percentile_interval(values)
    means = _resampled_means(values)
    below = np.mean(means < values.mean()) + np.mean(means == values.mean()) / 2
    bias = ndtri(np.clip(below, 1 / RESAMPLES, 1 - 1 / RESAMPLES))
    influence = values - values.mean()
    acceleration = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    shifted = bias + ndtri(TAILS)
    low, high = np.quantile(means, ndtr(bias + shifted / (1 - acceleration * shifted)))
    return float(low), float(high)


def _resampled_means(values: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(0)
    return values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)


OVER_VALUES: dict[str, Candidate] = {
    "percentile": percentile_interval,
    "BCa": bca_interval,
    "Student's t": t_interval,
    "studentised": partial(studentised_interval, reps=RESAMPLES),
}


def _of_seed_means(candidate: Candidate, table: np.ndarray) -> Interval:
    return candidate(np.nanmean(table, axis=1))


METHOD: dict[str, Candidate] = {
    "pooled": lambda table: t_interval(table[~np.isnan(table)]),
    **{name: partial(_of_seed_means, candidate) for name, candidate in OVER_VALUES.items()},
}
USED = "`method_interval`"

Draw = Callable[[np.random.Generator, "tuple[int, ...]"], np.ndarray]
VALUES: dict[str, tuple[Draw, float, float]] = {
    "normal": (lambda rng, size: rng.normal(size=size), 0.0, 1.0),
    "exponential": (lambda rng, size: rng.exponential(size=size), 1.0, 1.0),
    "0/1, 0.1": (lambda rng, size: rng.binomial(1, 0.1, size), 0.1, 0.3),
    "0/1, 0.5": (lambda rng, size: rng.binomial(1, 0.5, size), 0.5, 0.5),
    "4 episodes, 0.3": (lambda rng, size: rng.binomial(4, 0.3, size) / 4, 0.3, 0.23),
    "often 0": (lambda rng, size: rng.random(size) * (rng.random(size) < 0.3), 0.15, 0.28),
}
"""Distributions of values: sampler, mean and standard deviation."""


def _pairs(rng: np.random.Generator, size: tuple[int, ...], rate: float, won: float) -> np.ndarray:
    return rng.choice([1.0, -1.0, 0.0], size, p=[rate * won, rate * (1 - won), 1 - rate])


for _rate in (0.02, 0.04, 0.1, 0.3):
    _fair, _better = partial(_pairs, rate=_rate, won=0.5), partial(_pairs, rate=_rate, won=1.0)
    VALUES[f"pairs, {_rate}"] = _fair, 0.0, _rate**0.5
    VALUES[f"pairs won, {_rate}"] = _better, _rate, (_rate * (1 - _rate)) ** 0.5
    VALUES[f"returns, {_rate}"] = _fair, 0.0, _rate**0.5


def coverage(
    draw: Callable[[np.random.Generator], np.ndarray],
    mean: float,
    candidates: dict[str, Candidate],
    trials: int,
) -> tuple[list[float], float, float]:
    """Returns the coverage by candidate and, of the last, fraction of NaN and median width."""
    rng = np.random.default_rng(0)
    samples = [np.asarray(draw(rng), float) for _ in range(trials)]
    covered, ends = [], np.empty((trials, 2))
    for candidate in candidates.values():
        ends = np.array([candidate(sample) for sample in samples])
        covered.append(float(np.mean((ends[:, 0] <= mean) & (mean <= ends[:, 1]))))
    width = ends[:, 1] - ends[:, 0]
    return covered, float(np.isnan(width).mean()), float(np.nanmedian(width))


def policy_rows(trials: int) -> list[list[str]]:
    """Returns a row for each distribution and number of tasks."""
    rows = []
    for name, (draw, mean, deviation) in VALUES.items():
        for tasks in (4, 8, 16, 64):
            sample = partial(lambda rng, draw, tasks: draw(rng, (tasks,)), draw=draw, tasks=tasks)
            used = partial(policy_interval, bounds=_bounds(name))
            candidates = OVER_VALUES | {"`policy_interval`": used}
            shares, none, width = coverage(sample, mean, candidates, trials)
            rows.append([name, str(tasks), *_cells([*shares, none]), f"{width / deviation:.2f}"])
    return rows


def method_rows(trials: int) -> list[list[str]]:
    """Returns a row for each design, distribution, number of seeds and deviation between seeds."""
    designs = [(kind, "normal", seeds) for kind in ("own", "shared") for seeds in (3, 5, 10)]
    designs += [("own", "exponential", 5), ("shared", "exponential", 5), ("own", "0/1, 0.1", 5)]
    rows = []
    for tasks, name, seeds in designs:
        _, mean, deviation = VALUES[name]
        for between in (0.1, 0.5, 1.0):
            if name.startswith("0/1") and between == 1.0:  # Each seed always or never succeeds.
                continue
            table = seeds_of(name, seeds, between, shared=tasks == "shared")
            candidates = METHOD | {USED: partial(method_interval, bounds=_bounds(name))}
            shares, _, width = coverage(table, mean, candidates, trials)
            cells = [tasks, name, str(seeds), str(between), *_cells(shares)]
            rows.append([*cells, f"{width / deviation:.2f}"])
    return rows


def seeds_of(
    name: str, seeds: int, between: float, *, shared: bool
) -> Callable[[np.random.Generator], np.ndarray]:
    """Returns a sampler of tables (seeds, tasks); NaN for tasks that a seed does not have."""
    draw, mean, deviation = VALUES[name]

    def table(rng: np.random.Generator) -> np.ndarray:
        if shared:
            return draw(rng, (1, NUM_TASKS)) + between * rng.normal(size=(seeds, 1))
        if name.startswith("0/1"):
            total = mean * (1 - mean) / (between * deviation) ** 2 - 1  # of a Beta distribution
            rate = rng.beta(mean * total, (1 - mean) * total, size=(seeds, 1))
            values = (rng.random((seeds, NUM_TASKS)) < rate) * 1.0
        else:
            values = draw(rng, (seeds, NUM_TASKS)) + between * rng.normal(size=(seeds, 1))
        own = np.full((seeds, seeds, NUM_TASKS), np.nan)
        own[range(seeds), range(seeds)] = values
        return own.reshape(seeds, -1)

    return table


def _bounds(name: str) -> Interval | None:
    """Returns the bounds of values that are outcomes; None for others."""
    if name.startswith("pairs"):
        return DIFFERENCE_OF_PROPORTIONS
    return PROPORTION if name.startswith(("0/1", "4 episodes")) else None


def _cells(shares: Sequence[float]) -> list[str]:
    return [f"{share:.3f}" for share in shares]


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(trials: int) -> str:
    """Returns both tables as Markdown."""
    text = HEAD.format(trials=f"{trials:,}", error=np.sqrt(0.95 * 0.05 / trials))
    text += _table(
        ("values", "tasks", *OVER_VALUES, "`policy_interval`", "none", "width"),
        policy_rows(trials),
    )
    text += SEEDS_HEAD.format(tasks=NUM_TASKS)
    titles = ("tasks", "values", "seeds", "between", *METHOD, USED, "width")
    return text + _table(titles, method_rows(trials))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=TRIALS)
    PAGE.write_text(page(parser.parse_args().trials))


if __name__ == "__main__":
    main()
