"""What the arms of a bandit may be: five priors of Wang et al. 2016 (arXiv:1611.05763, sec. 3.1).

`independent` arms are uniform on [0, 1]. Under the others there are two arms, p and 1 - p, with p
uniform on [0, 1] or on one of three pairs. A pull of either of them tells the same, so that
playing the better mean is Bayes-optimal there.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, TypeAlias

import numpy as np

Prior: TypeAlias = Literal["independent", "correlated_uniform", "easy", "medium", "hard"]

PAIRS: dict[Prior, float] = {"easy": 0.9, "medium": 0.75, "hard": 0.6}
"""The larger of the two values that p takes under a prior."""


def draw_chances(prior: Prior, arms: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n, arms) chances of a reward."""
    if prior == "independent":
        return rng.random((n, arms))
    high = PAIRS.get(prior)
    p = rng.random(n) if high is None else rng.choice([high, 1 - high], n)
    return np.stack([p, 1 - p], axis=1)


def posterior_mean(prior: Prior, wins: np.ndarray, pulled: np.ndarray) -> np.ndarray:
    """(..., k) expected chances of a reward after wins and pulls (..., k)."""
    if prior == "independent":
        return (wins + 1) / (pulled + 2)
    for_first = wins[..., 0] + pulled[..., 1] - wins[..., 1]
    p = _mean_of_first(prior, for_first, pulled.sum(axis=-1))
    return np.stack([p, 1 - p], axis=-1)


def _mean_of_first(prior: Prior, for_first: np.ndarray, pulled: np.ndarray) -> np.ndarray:
    high = PAIRS.get(prior)
    if high is None:
        return np.asarray((for_first + 1) / (pulled + 2))
    odds = np.log(high / (1 - high)) * (2 * for_first - pulled)
    return 1 - high + (2 * high - 1) * np.asarray(1 / (1 + np.exp(-odds)))


@cache
def dependent_return(prior: Prior, pulls: int) -> float:
    """The Bayes-optimal return of two dependent arms; exact.

    The evidence for the first arm is one of 0 to t after t pulls, whichever arms were pulled; the
    better mean is earned in expectation.
    """
    total, chance = 0.0, np.ones(1)  # of each amount of evidence
    for done in range(pulls):
        mean = _mean_of_first(prior, np.arange(done + 1), np.asarray(done))
        total += float(chance @ np.maximum(mean, 1 - mean))
        chance = np.append(chance * (1 - mean), 0) + np.append(0, chance * mean)
    return total
