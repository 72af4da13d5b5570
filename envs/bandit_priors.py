"""Five priors of a bandit's arms, from Wang et al. 2016 (arXiv:1611.05763, sec. 3.1).

`independent` arms are uniform on [0, 1]. The others have two arms, p and 1 - p, with p uniform on
[0, 1] or on one of three pairs. Both arms are equally informative then, so that pulling the arm of
the higher posterior mean is Bayes-optimal.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, TypeAlias

import numpy as np

Prior: TypeAlias = Literal["independent", "correlated_uniform", "easy", "medium", "hard"]

PAIRS: dict[Prior, float] = {"easy": 0.9, "medium": 0.75, "hard": 0.6}
"""The larger of the two values of p under a prior."""


def sample_reward_probs(prior: Prior, arms: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Samples reward probabilities (n, arms)."""
    if prior == "independent":
        return rng.random((n, arms))
    high = PAIRS.get(prior)
    p = rng.random(n) if high is None else rng.choice([high, 1 - high], n)
    return np.stack([p, 1 - p], axis=1)


def posterior_mean(prior: Prior, wins: np.ndarray, pulled: np.ndarray) -> np.ndarray:
    """Returns the posterior means (..., k) of the reward probabilities after wins and pulls."""
    if prior == "independent":
        return (wins + 1) / (pulled + 2)
    evidence = wins[..., 0] + pulled[..., 1] - wins[..., 1]
    p = _mean_of_first(prior, evidence, pulled.sum(axis=-1))
    return np.stack([p, 1 - p], axis=-1)


def _mean_of_first(prior: Prior, evidence: np.ndarray, pulled: np.ndarray) -> np.ndarray:
    high = PAIRS.get(prior)
    if high is None:
        return np.asarray((evidence + 1) / (pulled + 2))
    odds = np.log(high / (1 - high)) * (2 * evidence - pulled)
    return 1 - high + (2 * high - 1) * np.asarray(1 / (1 + np.exp(-odds)))


@cache
def dependent_return(prior: Prior, pulls: int) -> float:
    """Computes the Bayes-optimal return of two dependent arms.

    The evidence for the first arm is its wins plus the second arm's losses: 0 to t after t pulls,
    whichever arms were pulled. The expected reward of a pull is the higher posterior mean.
    """
    total, prob = 0.0, np.ones(1)  # the distribution of the evidence
    for done in range(pulls):
        mean = _mean_of_first(prior, np.arange(done + 1), np.asarray(done))
        total += float(prob @ np.maximum(mean, 1 - mean))
        prob = np.append(prob * (1 - mean), 0) + np.append(0, prob * mean)
    return total
