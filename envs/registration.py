"""The native families as gymnasium environments: ``dmrl/Bandit-v0``, ``dmrl/PointGoal-v0``, ...

Importing this module registers nothing: call `register`.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorWrapper

from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Array, Split

from .bandit import Bandit
from .cartpole import CartPole
from .grid_nav import GridNav
from .informative_bandit import InformativeBandit
from .point_goal import PointGoal
from .restless_bandit import RestlessBandit
from .tabular_mdp import TabularMDP
from .two_step import TwoStep

FAMILIES: dict[str, type[TaskDistribution]] = {
    family.__name__: family
    for family in (
        Bandit,
        CartPole,
        GridNav,
        InformativeBandit,
        PointGoal,
        RestlessBandit,
        TabularMDP,
        TwoStep,
    )
}


def register() -> None:
    """Registers ``dmrl/<Family>-v0`` for `gymnasium.make` and `gymnasium.make_vec`.

    Their keyword arguments are the family's settings: ``make("dmrl/Bandit-v0", arms=3)``.
    """
    for name in FAMILIES:
        if f"dmrl/{name}-v0" in gym.registry:
            continue
        gym.register(
            f"dmrl/{name}-v0",
            entry_point=f"{__name__}:make_single",
            vector_entry_point=f"{__name__}:make_vector",
            kwargs={"family": name},
        )


def make_single(
    family: str, render_mode: str | None = None, split: Split = "train", **settings: object
) -> SingleEnv:
    """Returns a single environment of a family, given by name."""
    return SingleEnv(_distribution(family, settings), render_mode, split)


def make_vector(
    family: str, num_envs: int, split: Split = "train", **settings: object
) -> SampledTasks:
    """Returns a vector environment of a family, given by name."""
    return SampledTasks(_distribution(family, settings), num_envs, split)


def _distribution(family: str, settings: dict[str, object]) -> TaskDistribution:
    chosen = FAMILIES[family]
    return chosen(chosen.Config.model_validate(settings))


class SingleEnv(gym.Env[Any, Any]):
    """A single environment of a task family.

    `reset` samples a task of the split, or takes the one in ``options={"task": task}``.
    """

    def __init__(
        self, distribution: TaskDistribution, render_mode: str | None = None, split: Split = "train"
    ):
        self.distribution = distribution
        self.split = split
        self.render_mode = render_mode
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
        self.observation_space = distribution.observation_space
        self.action_space = distribution.action_space
        self._env = distribution.make_vec(1)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode; returns the observation, and the task's id in the info."""
        super().reset(seed=seed)
        self._env.np_random = self.np_random
        task = (options or {}).get("task")
        if task is None:
            task = self.distribution.sample(self.np_random, 1, self.split)[0]
        self._env.set_tasks([task])
        obs, _ = self._env.reset()
        return obs[0], {"task_id": task.id}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Steps the environment."""
        obs, reward, terminated, truncated, infos = self._env.step(np.asarray([action]))
        next_obs = infos.pop("final_obs", obs)
        info = {key: value[0] for key, value in infos.items()}
        return next_obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self) -> Any:
        """Returns an image (H, W, 3) uint8 if the render mode is rgb_array."""
        return self._env.render() if self.render_mode == "rgb_array" else None


class SampledTasks(VectorWrapper):
    """Environments whose `reset` samples their tasks, unless ``options["tasks"]`` has them."""

    def __init__(self, distribution: TaskDistribution, num_envs: int, split: Split = "train"):
        env = distribution.make_vec(num_envs)
        super().__init__(env)
        self.distribution = distribution
        self.split = split

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Starts an episode in every environment."""
        if seed is not None:
            self.env.np_random = np.random.default_rng(seed)
        options = dict(options or {})
        if "tasks" not in options:
            options["tasks"] = self.distribution.sample(
                self.env.np_random, self.num_envs, self.split
            )
        obs, infos = self.env.reset(options=options)
        return obs, infos
