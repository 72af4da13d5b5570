"""The score of a return: 0 is random play, 1 the oracle of the task."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Reference:
    """Both ends of a task's score, per episode of a trial.

    Args:
        random: (E,) expected return of uniformly random actions in each of the trial's episodes.
        oracle: (E,) expected return of the best reference known.
    """

    random: np.ndarray
    oracle: np.ndarray

    def score(self, episode: np.ndarray, episode_return: np.ndarray) -> np.ndarray:
        """0 where an episode's return equals the random policy's, 1 where the oracle's.

        Episodes beyond the last of a trial are measured against the last. NaN where the oracle is
        no better than the random policy: the score has no scale.
        """
        index = np.minimum(episode, len(self.random) - 1)
        return np.asarray((episode_return - self.random[index]) / self._span()[index])

    @property
    def is_scorable(self) -> bool:
        """Whether every episode has a score."""
        return bool(np.isfinite(self._span()).all())

    def _span(self) -> np.ndarray:
        size = np.maximum(np.abs(self.random), np.abs(self.oracle))
        span = self.oracle - self.random
        return np.where(span > 1e-9 * size, span, np.nan)  # Both may be sums with rounding errors.
