"""Observations for RLlib's modules, optionally with the previous action, reward and done."""

from __future__ import annotations

from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete

from dmrl_ray.errors import ConfigError
from dmrl_ray.tasks.distribution import TaskDistribution


class ObservationBuilder:
    """Builds observations, identically for training and for evaluation.

    * ``none``: the observation.
    * ``flat``: one float32 vector of the observation, the previous action (one-hot where it is
      discrete), reward and done. At the start of a trial action and reward are 0, and done is 1.
    * ``parts``: a dictionary of obs, action, reward and done; a discrete action is its index, -1 at
      the start of a trial.

    Attributes:
        space: the space of one environment.
    """

    space: gym.Space[Any]

    def __init__(
        self, family: TaskDistribution, previous: Literal["none", "flat", "parts"] = "none"
    ) -> None:
        obs_space, action_space = family.observation_space, family.action_space
        assert isinstance(obs_space, Box)
        self._previous = previous
        self._choices = int(action_space.n) if isinstance(action_space, Discrete) else 0
        self._width = self._choices or int(np.prod(action_space.shape or ()))
        # A plain Box: RLlib does not support its subclass `Packed`.
        box = Box(obs_space.low, obs_space.high, obs_space.shape, obs_space.low.dtype.type)
        self.space = box
        if previous == "flat":
            if len(obs_space.shape) > 1:
                raise ConfigError(
                    f"previous: observations of {family.family!r} have shape {obs_space.shape}; "
                    "flat needs vectors, use parts"
                )
            self.space = Box(-np.inf, np.inf, (sum(obs_space.shape) + self._width + 2,), np.float32)
        elif previous == "parts":
            action = Box(-1, self._choices - 1, (), np.int64)
            self.space = Dict(
                {
                    "obs": box,
                    "action": action
                    if self._choices
                    else Box(-1, 1, action_space.shape, np.float32),
                    "reward": Box(-np.inf, np.inf, (), np.float32),
                    "done": Box(0, 1, (), np.float32),
                }
            )

    def first(self, obs: np.ndarray) -> Any:
        """Returns the first observations of a trial, (B, ...)."""
        none = np.full(len(obs), -1) if self._choices else np.zeros((len(obs), self._width))
        return self(obs, none, np.zeros(len(obs)), np.ones(len(obs)))

    def __call__(
        self, obs: np.ndarray, action: np.ndarray, reward: np.ndarray, done: np.ndarray
    ) -> Any:
        """Returns the observations after a step, (B, ...)."""
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

    def row(self, obs: Any, b: int) -> Any:
        """Returns the observation of environment b."""
        if isinstance(obs, dict):
            return {name: np.asarray(part[b]) for name, part in obs.items()}
        return obs[b]
