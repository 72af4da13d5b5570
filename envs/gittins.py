"""Finite-horizon Gittins indices of Bernoulli arms with a uniform prior.

    W(s, f, r) = max(0, p - x + p W(s + 1, f, r - 1) + (1 - p) W(s, f + 1, r - 1))

with s wins, f losses, r remaining pulls and p = (s + 1) / (s + f + 2). W is the value of pulling
the arm at a charge x per pull, or stopping; the index is the smallest x at which W is 0.

Source: Kaufmann, "On Bayesian index policies for sequential resource allocation", 2018
(arXiv:1601.01190).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

MAX_PULLS = 600
"""The maximum number of pulls. A table of n pulls takes n^3 / 3 bytes: 42 MB, and about 10 s to
compute, at 500."""

CHARGES = 128
"""The number of intervals in the grid of charges, between which W is interpolated linearly."""

_SCALE = 65_535


class GittinsTable:
    """The indices of every posterior of an arm that can occur in a trial of `pulls` pulls."""

    def __init__(self, pulls: int):
        if not 1 <= pulls <= MAX_PULLS:
            raise ValueError(f"a table has 1 to {MAX_PULLS} pulls, not {pulls}")
        self.pulls = pulls
        # A pull does not change r + s + f, so that there is a separate recursion for each such end.
        # The rows of one end are contiguous, ordered by s + f and then by s.
        self._levels = np.concatenate([_indices_until(end) for end in range(1, pulls + 1)])

    def __call__(
        self, pulls_left: np.ndarray | int, wins: np.ndarray, pulled: np.ndarray
    ) -> np.ndarray:
        """Returns the indices (...), in [0, 1].

        Where an episode is repeated on the same task, an arm may have more pulls than the table
        has. Its index is its posterior mean, as little is left to explore.

        Args:
            pulls_left: the remaining pulls, at least 1, broadcast against the others.
            wins: (...) rewards of the arm.
            pulled: (...) pulls of the arm.
        """
        end = pulled + pulls_left
        beyond = end > self.pulls
        inside = np.where(beyond, 1, end)
        depth, won = np.where(beyond, 0, pulled), np.where(beyond, 0, wins)
        row = (inside - 1) * inside * (inside + 1) // 6 + depth * (depth + 1) // 2 + won
        index = self._levels.take(row) * np.float32(1 / _SCALE)
        return np.where(beyond, (wins + 1) / (pulled + 2), index) if beyond.any() else index


@lru_cache(maxsize=2)
def gittins_table(pulls: int) -> GittinsTable:
    """Returns the table of a trial's length, computed once per process.

    Raises:
        ValueError: the trial has more than `MAX_PULLS` pulls.
    """
    return GittinsTable(pulls)


def _indices_until(end: int) -> np.ndarray:
    """Computes the indices (end (end + 1) / 2,) uint16 of all posteriors with r + s + f = end."""
    charge = (np.arange(CHARGES + 1, dtype=np.float32) / CHARGES)[:, None]
    value = np.zeros((CHARGES + 1, end + 1), np.float32)
    levels = np.empty(end * (end + 1) // 2, np.uint16)
    for depth in range(end - 1, -1, -1):
        wins = np.arange(depth + 1)
        p = ((wins + 1) / (depth + 2)).astype(np.float32)
        gain = p * (1 + value[:, 1:] - value[:, :-1]) + value[:, :-1] - charge
        # The gain decreases in the charge: positive at 0, negative at 1, linear on each interval.
        below = (gain > 0).sum(axis=0) - 1
        low, high = gain[below, wins], gain[below + 1, wins]
        index = (below + low / (low - high)) / CHARGES
        levels[depth * (depth + 1) // 2 :][: depth + 1] = np.rint(index * _SCALE)
        value = np.maximum(gain, 0, out=gain)
    return levels
