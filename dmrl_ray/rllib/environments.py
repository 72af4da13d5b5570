"""Task families as environments for RLlib and Tune.

    dmrl_ray.rllib.register("goals", {"type": "point_goal", "horizon": 20})
    PPOConfig().environment("goals", env_config={"split": "test"})

An RLlib episode is an episode on a new task or, with ``whole_trials``, a trial of several
consecutive episodes on one task, which a recurrent module experiences as in RL^2. RLlib has no
trials, so the ends of episodes within a trial are not reported to it; with ``previous`` they are
part of the observation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from ray.tune.registry import register_env

from dmrl_ray.config.components import Component, Settings
from dmrl_ray.errors import ConfigError
from dmrl_ray.jobs.spec import load_family
from dmrl_ray.rllib.observations import ObservationBuilder
from dmrl_ray.rollout.finite import diverged
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.tasks.faults import answer_of, first_obs, sample
from dmrl_ray.types import EnvironmentFault, Split, Task

Row: TypeAlias = dict[str, Any]


class EnvSettings(Settings):
    """The tasks and the observations of an environment."""

    tasks: Component
    """The task family, as in a config."""

    split: Split = "train"
    """Split from which tasks are sampled."""

    task: dict[str, Any] | None = None
    """A fixed task, in the form of `Task.to_json`."""

    whole_trials: bool = False
    """An RLlib episode is a whole trial."""

    observe_task: bool = False
    """Adds the task's parameters to the observation, for a privileged reference."""

    previous: Literal["none", "flat", "parts"] = "none"
    """Adds the previous action, reward and done to the observation: flat concatenates them (action
    one-hot), parts is a dictionary of obs, action, reward and done."""

    def family(self) -> TaskDistribution:
        """Returns the task family, wrapped with `observe` if the task is observed."""
        if not self.observe_task:
            return load_family(self.tasks)
        return load_family(Component.model_validate({"type": "observe", "of": self.tasks}))


def register(name: str, tasks: Mapping[str, Any] | str, **settings: Any) -> None:
    """Registers a task family as an environment of RLlib and Tune.

    Args:
        name: the name for ``AlgorithmConfig.environment``.
        tasks: the family, as under ``tasks`` in a config; built-in, gym or ``module:Class``.
        **settings: fields of `EnvSettings`; an ``env_config`` overrides them.

    Raises:
        ValueError: there is no such family, or its settings are invalid.
    """
    creator = EnvCreator(EnvSettings.model_validate({"tasks": tasks, **settings}))
    creator.settings.family()
    register_env(name, creator)


class EnvCreator:
    """Creates an environment for RLlib or, as ``vector_entry_point``, a vector of them."""

    def __init__(self, settings: EnvSettings) -> None:
        self.settings = settings

    def __call__(self, env_config: Mapping[str, Any]) -> TaskEnv | TaskVectors:
        """Returns the environment; `env_config` overrides the registered settings."""
        changes = dict(env_config)
        num_envs = changes.pop("num_envs", None)
        settings = EnvSettings.model_validate({**dict(self.settings), **changes})
        return TaskEnv(settings) if num_envs is None else TaskVectors(settings, num_envs)


class LockstepEnvs:
    """Environments of a family whose episodes all begin and end together.

    There may be several only if the family's episodes have a fixed length.

    Attributes:
        tasks: the current tasks, one per environment.
    """

    def __init__(self, settings: EnvSettings, num_envs: int) -> None:
        self.family = settings.family()
        if num_envs > 1 and not self.family.fixed_length:
            raise ConfigError(
                f"gym_env_vectorize_mode: episodes of {self.family.family!r} differ in length, so "
                "that its environments cannot be stepped as one; use 'sync'"
            )
        self.num_envs = num_envs
        self.split = settings.split
        self.fixed_task = None if settings.task is None else Task.from_json(settings.task)
        self.observe = ObservationBuilder(self.family, settings.previous)
        self._env = answer_of(self.family, self.family.make_vec, num_envs)
        self._whole_trials = settings.whole_trials
        self._episodes = self.family.episodes_per_trial if settings.whole_trials else 1
        self._rng = np.random.default_rng()
        self._rows: list[Row] = []
        self._steps = 0
        self.tasks: list[Task] = []

    def restart(self, rng: np.random.Generator) -> np.ndarray:
        """Begins trials on new tasks; `rng` is used for all further random numbers."""
        self._rng = self._env.np_random = rng
        self._draw()
        return self._begin(first_obs(self.family, self._env))

    def proceed(self) -> np.ndarray:
        """Begins the trials after those that ended."""
        return self._begin(self._next_obs)

    def step(
        self, action: np.ndarray
    ) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Steps all environments; after the end of trials, `proceed` begins the next."""
        if isinstance(self.family.action_space, Box):
            if not np.isfinite(action).all():
                raise diverged()
            action = np.clip(action, -1.0, 1.0)
        answer = answer_of(self.family, self._env.step, action)
        obs, reward, terminated, truncated, infos = answer
        self._return += reward
        self._length += 1
        self._steps += 1
        done = np.logical_or(terminated, truncated)
        if done.any():
            obs, ended = self._end_episode(obs, done, infos)
            if self._whole_trials:
                terminated, truncated = np.full_like(done, ended), np.zeros_like(done)
        if not (np.isfinite(reward).all() and np.isfinite(obs).all()):
            raise EnvironmentFault(
                f"task family {self.family.family!r}: an observation or reward is not a finite "
                f"number, on one of the tasks {', '.join(t.id for t in self.tasks[:8])}"
            )
        return self.observe(obs, action, reward, done), reward, terminated, truncated, {}

    def take_episodes(self) -> tuple[list[Row], int]:
        """Returns the episodes since the last call, and the steps of all environments."""
        rows, steps = self._rows, self._steps * self.num_envs
        self._rows, self._steps = [], 0
        return rows, steps

    def _draw(self) -> None:
        """Samples and sets the tasks of the next reset."""
        n = self.num_envs
        drawn = (
            [self.fixed_task] * n
            if self.fixed_task
            else sample(self.family, self._rng, n, self.split)
        )
        self._drawn: list[Task] = list(drawn)
        answer_of(self.family, self._env.set_tasks, self._drawn)

    def _begin(self, obs: np.ndarray) -> np.ndarray:
        self.tasks = self._drawn
        self._number = 0
        self._return = np.zeros(self.num_envs)
        self._length = 0
        if self._episodes == 1:  # The step that ends an episode resets to the next task.
            self._draw()
        return self.observe.first(obs)

    def _end_episode(
        self, obs: np.ndarray, done: np.ndarray, infos: dict[str, Any]
    ) -> tuple[np.ndarray, bool]:
        """Records the episodes; returns the next observations, and whether the trials ended."""
        if not done.all():
            raise EnvironmentFault(
                f"task family {self.family.family!r}: declares episodes of a fixed length, but "
                "they do not end together"
            )
        success = infos.get("success", np.full(self.num_envs, np.nan))
        for b, task in enumerate(self.tasks):
            self._rows.append(
                {
                    "task": task,
                    "episode": self._number,
                    "return": float(self._return[b]),
                    "length": self._length,
                    "success": float(success[b]),
                    "step": self._steps * self.num_envs,
                }
            )
        self._return[:] = 0.0
        self._length = 0
        self._number += 1
        if self._number == self._episodes:
            self._next_obs = obs
            return infos["final_obs"], True
        if self._number == self._episodes - 1:
            self._draw()
        return obs, False


class TaskEnv(gym.Env[Any, Any]):
    """A single environment of a task family; `reset` samples a task, unless `set_task` fixed one.

    The methods for tasks are those of RLlib's former ``TaskSettableEnv``.
    """

    def __init__(self, settings: EnvSettings) -> None:
        self._envs = LockstepEnvs(settings, 1)
        self.observation_space = self._envs.observe.space
        self.action_space = self._envs.family.action_space
        self._begun = False  # whether the next trial has begun before `reset` is called

    def sample_tasks(self, n: int) -> list[Task]:
        """Samples tasks of the split."""
        return sample(self._envs.family, self.np_random, n, self._envs.split)

    def set_task(self, task: Task) -> None:
        """Fixes the task from the next reset on."""
        self._envs.fixed_task = task
        self._begun = False

    def get_task(self) -> Task | None:
        """Returns the current task; None before the first reset."""
        return next(iter(self._envs.tasks), None)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begins an episode or a trial; the info contains the id of its task."""
        super().reset(seed=seed)
        envs = self._envs
        continues = self._begun and seed is None
        obs = envs.proceed() if continues else envs.restart(self.np_random)
        self._begun = False
        return envs.observe.row(obs, 0), {"task_id": envs.tasks[0].id}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Steps the environment."""
        obs, reward, terminated, truncated, info = self._envs.step(np.asarray(action)[None])
        ended = bool(terminated[0]), bool(truncated[0])
        self._begun = any(ended)
        return self._envs.observe.row(obs, 0), float(reward[0]), *ended, info

    def take_episodes(self) -> tuple[list[Row], int]:
        """Returns the episodes since the last call, and the number of steps."""
        return self._envs.take_episodes()


class TaskVectors(VectorEnv[Any, Any, Any]):
    """Vectorised environments of a family with episodes of fixed length.

    Autoreset is as in RLlib: the step after an end begins the next trial and ignores its action.
    """

    def __init__(self, settings: EnvSettings, num_envs: int) -> None:
        self._envs = LockstepEnvs(settings, num_envs)
        self.num_envs = num_envs
        self.single_observation_space = self._envs.observe.space
        self.single_action_space = self._envs.family.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self._ended = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begins a trial in every environment."""
        super().reset(seed=seed)
        self._ended = False
        return self._envs.restart(self.np_random), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Steps all environments, or begins the next trials."""
        if self._ended:
            self._ended = False
            nothing = np.zeros(self.num_envs, np.bool_)
            reward = np.zeros(self.num_envs, np.float32)
            return self._envs.proceed(), reward, nothing, nothing.copy(), {}
        answer = self._envs.step(np.asarray(actions))
        self._ended = bool(answer[2][0] or answer[3][0])
        return answer

    def take_episodes(self) -> tuple[list[Row], int]:
        """Returns the episodes since the last call, and the steps of all environments."""
        return self._envs.take_episodes()
