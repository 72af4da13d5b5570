"""Finite-horizon Gittins indices of Bernoulli arms with a uniform prior.

    W(s, f, r) = max(0, p - x + p W(s + 1, f, r - 1) + (1 - p) W(s, f + 1, r - 1))

with s wins, f losses, r pulls left and p = (s + 1) / (s + f + 2); the index is the smallest
charge x per pull at which W is 0. Source: Kaufmann, "On Bayesian index policies for sequential
resource allocation", 2018 (arXiv:1601.01190).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

LONGEST = 600
"""Pulls of the largest table: n^3 / 3 bytes, 42 MB and some 10 s of work at 500."""

CHARGES = 128
"""Charges tried; between two of them the worth of an arm is taken as linear."""

_SCALE = 65_535


class GittinsTable:
    """Indices of every arm that can come up in a trial of `pulls` pulls."""

    def __init__(self, pulls: int):
        if not 1 <= pulls <= LONGEST:
            raise ValueError(f"a table is for 1 to {LONGEST} pulls, not {pulls}")
        self.pulls = pulls
        # A pull leaves r + s + f as it is, so that each such end is a recursion of its own. The
        # rows of one end stand together, by s + f and then by s.
        self._levels = np.concatenate([_indices_until(end) for end in range(1, pulls + 1)])

    def __call__(self, left: np.ndarray | int, wins: np.ndarray, pulled: np.ndarray) -> np.ndarray:
        """(...) indices in [0, 1].

        An arm pulled more often than its trial is long, in an episode played again, is known as
        well as it needs to be: its index is its mean.

        Args:
            left: pulls left, at least 1, broadcast against the others.
            wins: (...) rewards of the arm.
            pulled: (...) pulls of the arm.
        """
        end = pulled + left
        known = end > self.pulls
        inside = np.where(known, 1, end)
        depth, won = np.where(known, 0, pulled), np.where(known, 0, wins)
        row = (inside - 1) * inside * (inside + 1) // 6 + depth * (depth + 1) // 2 + won
        index = self._levels.take(row) * np.float32(1 / _SCALE)
        return np.where(known, (wins + 1) / (pulled + 2), index) if known.any() else index


@lru_cache(maxsize=2)
def gittins_table(pulls: int) -> GittinsTable:
    """The table of a trial's length, made once in a process.

    Raises:
        ValueError: the trial is longer than `LONGEST`.
    """
    return GittinsTable(pulls)


def _indices_until(end: int) -> np.ndarray:
    """(end (end + 1) / 2,) uint16 indices of all arms with r + s + f = end."""
    charge = (np.arange(CHARGES + 1, dtype=np.float32) / CHARGES)[:, None]
    worth = np.zeros((CHARGES + 1, end + 1), np.float32)
    levels = np.empty(end * (end + 1) // 2, np.uint16)
    for depth in range(end - 1, -1, -1):
        wins = np.arange(depth + 1)
        p = ((wins + 1) / (depth + 2)).astype(np.float32)
        gain = p * (1 + worth[:, 1:] - worth[:, :-1]) + worth[:, :-1] - charge
        # The gain falls with the charge: positive at 0, negative at 1, linear in between.
        below = (gain > 0).sum(axis=0) - 1
        low, high = gain[below, wins], gain[below + 1, wins]
        index = (below + low / (low - high)) / CHARGES
        levels[depth * (depth + 1) // 2 :][: depth + 1] = np.rint(index * _SCALE)
        worth = np.maximum(gain, 0, out=gain)
    return levels
