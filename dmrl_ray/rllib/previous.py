"""What RLlib's modules are shown: observations, alone or with what came before them."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete

from dmrl_ray.tasks.distribution import TaskDistribution


class Shown:
    """Makes what is shown, in the same way for training and for evaluation.

    * ``none``: the observation.
    * ``flat``: one float32 vector of the observation, the previous action (one-hot where it is
      discrete), reward and done. At the start of a trial the first two are 0 and done is 1.
    * ``parts``: the same as a dictionary of obs, action, reward and done; there a discrete action
      is a number, and -1 at the start of a trial.

    Attributes:
        space: of one column.
    """

    space: gym.Space[Any]

    def __init__(
        self, family: TaskDistribution, previous: Literal["none", "flat", "parts"] = "none"
    ) -> None:
        seen, acts = family.observation_space, family.action_space
        assert isinstance(seen, Box)
        self._previous = previous
        self._choices = int(acts.n) if isinstance(acts, Discrete) else 0
        self._width = self._choices or int(np.prod(acts.shape or ()))
        box = Box(seen.low, seen.high, seen.shape, seen.low.dtype.type)  # RLlib knows no `Packed`.
        self.space = box
        if previous == "flat":
            if len(seen.shape) > 1:
                raise ValueError(
                    f"previous: observations of {family.family!r} are {seen.shape}; only vectors "
                    "can be joined by what came before, use parts"
                )
            self.space = Box(-np.inf, np.inf, (sum(seen.shape) + self._width + 2,), np.float32)
        elif previous == "parts":
            action = Box(-1, self._choices - 1, (), np.int64)
            self.space = Dict(
                {
                    "obs": box,
                    "action": action if self._choices else Box(-1, 1, acts.shape, np.float32),
                    "reward": Box(-np.inf, np.inf, (), np.float32),
                    "done": Box(0, 1, (), np.float32),
                }
            )

    def first(self, obs: np.ndarray) -> Any:
        """What is shown where a trial begins, (B, ...)."""
        none = np.full(len(obs), -1) if self._choices else np.zeros((len(obs), self._width))
        return self(obs, none, np.zeros(len(obs)), np.ones(len(obs)))

    def __call__(
        self, obs: np.ndarray, action: np.ndarray, reward: np.ndarray, done: np.ndarray
    ) -> Any:
        """What is shown after a step, (B, ...)."""
        if self._previous == "none":
            return obs
        reward, done = reward.astype(np.float32), done.astype(np.float32)
        if self._previous == "parts":
            dtype = np.int64 if self._choices else np.float32
            return {"obs": obs, "action": action.astype(dtype), "reward": reward, "done": done}
        if self._choices:
            action = action[:, None] == np.arange(self._choices)
        parts = [obs, action.reshape(len(obs), self._width), reward[:, None], done[:, None]]
        return np.concatenate(parts, axis=1, dtype=np.float32)

    def row(self, shown: Any, b: int) -> Any:
        """Column b of what is shown."""
        if isinstance(shown, dict):
            return {name: np.asarray(part[b]) for name, part in shown.items()}
        return shown[b]
