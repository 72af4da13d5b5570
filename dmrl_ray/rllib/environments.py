"""Task families as environments of RLlib and Tune.

    dmrl_ray.rllib.register("goals", {"type": "point_goal", "horizon": 20})
    PPOConfig().environment("goals", env_config={"split": "test"})

An RLlib episode is an episode of the family on a task of its own; with ``whole_trials`` it is a
trial: several episodes on one task, one after the other, which a recurrent module lives through as
RL^2 does. RLlib has no such word, so the ends of the episodes inside are not told to it as ends;
with ``previous`` they are part of the observation.
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
from dmrl_ray.jobs.spec import load_family
from dmrl_ray.rllib.previous import Shown
from dmrl_ray.rollout.finite import diverged
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.tasks.faults import answer_of, first_obs, sample
from dmrl_ray.types import EnvironmentFault, Split, Task

Row: TypeAlias = dict[str, Any]


class EnvSettings(Settings):
    """What an environment plays, and what it shows."""

    tasks: Component
    """The task family, as in a config."""

    split: Split = "train"
    """Where tasks are drawn from."""

    task: dict[str, Any] | None = None
    """Play this task alone, given as `Task.to_json`."""

    whole_trials: bool = False
    """An RLlib episode is a whole trial."""

    observe_task: bool = False
    """The task's parameters join the observation: the privileged reference."""

    previous: Literal["none", "flat", "parts"] = "none"
    """What came before joins the observation: action (one-hot), reward and done in one vector with
    it, or a dictionary of obs, action, reward and done."""

    def family(self) -> TaskDistribution:
        """The task family, with its task in sight if that is asked for."""
        if not self.observe_task:
            return load_family(self.tasks)
        return load_family(Component.model_validate({"type": "observe", "of": self.tasks}))


def register(name: str, tasks: Mapping[str, Any] | str, **settings: Any) -> None:
    """Make a task family known to RLlib and Tune.

    Args:
        name: what ``AlgorithmConfig.environment`` will call it.
        tasks: the family, as under ``tasks`` in a config; built-in, gym or ``module:Class``.
        **settings: of `EnvSettings`; an ``env_config`` overrides them.

    Raises:
        ValueError: there is no such family, or it refuses its settings.
    """
    creator = EnvCreator(EnvSettings.model_validate({"tasks": tasks, **settings}))
    creator.settings.family()
    register_env(name, creator)


class EnvCreator:
    """What RLlib calls for an environment, or (``vector_entry_point``) for many at once."""

    def __init__(self, settings: EnvSettings) -> None:
        self.settings = settings

    def __call__(self, env_config: Mapping[str, Any]) -> TaskEnv | TaskVectors:
        """Make the environment; `env_config` holds settings that differ from the registered."""
        changes = dict(env_config)
        num_envs = changes.pop("num_envs", None)
        settings = EnvSettings.model_validate({**dict(self.settings), **changes})
        return TaskEnv(settings) if num_envs is None else TaskVectors(settings, num_envs)


class Columns:
    """Columns of a family that all begin and end their episodes together.

    One column always does; several do where the family's episodes have a fixed length.

    Attributes:
        tasks: being played, one in each column.
    """

    def __init__(self, settings: EnvSettings, num_envs: int) -> None:
        self.family = settings.family()
        if num_envs > 1 and not self.family.fixed_length:
            raise ValueError(
                f"gym_env_vectorize_mode: episodes of {self.family.family!r} differ in length, so "
                "that its columns cannot be stepped as one; use 'sync'"
            )
        self.num_envs = num_envs
        self.split = settings.split
        self.held = None if settings.task is None else Task.from_json(settings.task)
        self.shown = Shown(self.family, settings.previous)
        self._env = answer_of(self.family, self.family.make_vec, num_envs)
        self._whole_trials = settings.whole_trials
        self._episodes = self.family.episodes_per_trial if settings.whole_trials else 1
        self._rng = np.random.default_rng()
        self._rows: list[Row] = []
        self._steps = 0
        self.tasks: list[Task] = []

    def restart(self, rng: np.random.Generator) -> np.ndarray:
        """Begin trials on fresh tasks; all randomness comes from `rng` from here on."""
        self._rng = self._env.np_random = rng
        self._draw()
        return self._begin(first_obs(self.family, self._env))

    def proceed(self) -> np.ndarray:
        """Begin the trials after those that ended."""
        return self._begin(self._next_obs)

    def step(
        self, action: np.ndarray
    ) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step in every column; where trials end, what follows them waits for `proceed`."""
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
            obs, over = self._end_episode(obs, done, infos)
            if self._whole_trials:
                terminated, truncated = np.full_like(done, over), np.zeros_like(done)
        if not (np.isfinite(reward).all() and np.isfinite(obs).all()):
            raise EnvironmentFault(
                f"task family {self.family.family!r}: an observation or reward is not a finite "
                f"number, on one of the tasks {', '.join(t.id for t in self.tasks[:8])}"
            )
        return self.shown(obs, action, reward, done), reward, terminated, truncated, {}

    def take_episodes(self) -> tuple[list[Row], int]:
        """Rows of the episodes that ended since the last call, and steps of all columns."""
        rows, steps = self._rows, self._steps * self.num_envs
        self._rows, self._steps = [], 0
        return rows, steps

    def _draw(self) -> None:
        """Set the tasks that the next reset begins."""
        n = self.num_envs
        drawn = [self.held] * n if self.held else sample(self.family, self._rng, n, self.split)
        self._drawn: list[Task] = list(drawn)
        answer_of(self.family, self._env.set_tasks, self._drawn)

    def _begin(self, obs: np.ndarray) -> np.ndarray:
        self.tasks = self._drawn
        self._number = 0
        self._return = np.zeros(self.num_envs)
        self._length = 0
        if self._episodes == 1:  # The step that ends the episode begins the next.
            self._draw()
        return self.shown.first(obs)

    def _end_episode(
        self, obs: np.ndarray, done: np.ndarray, infos: dict[str, Any]
    ) -> tuple[np.ndarray, bool]:
        """Note the episodes; returns what follows them, and whether their trials are over."""
        if not done.all():
            raise EnvironmentFault(
                f"task family {self.family.family!r}: says that its episodes have a fixed length, "
                "but they do not end together"
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
    """One column of a task family. A plain `reset` draws a task, `set_task` holds one.

    Those methods have the names that RLlib's own environments with tasks once had.
    """

    def __init__(self, settings: EnvSettings) -> None:
        self._columns = Columns(settings, 1)
        self.observation_space = self._columns.shown.space
        self.action_space = self._columns.family.action_space
        self._begun = False  # the column stands at the start of a trial that was not asked for yet

    def sample_tasks(self, n: int) -> list[Task]:
        """Tasks of the split."""
        return sample(self._columns.family, self.np_random, n, self._columns.split)

    def set_task(self, task: Task) -> None:
        """Play this task from the next reset on."""
        self._columns.held = task
        self._begun = False

    def get_task(self) -> Task | None:
        """The task being played; None before the first reset."""
        return next(iter(self._columns.tasks), None)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin an episode, or a trial; the info has the id of its task."""
        super().reset(seed=seed)
        columns = self._columns
        goes_on = self._begun and seed is None
        obs = columns.proceed() if goes_on else columns.restart(self.np_random)
        self._begun = False
        return columns.shown.row(obs, 0), {"task_id": columns.tasks[0].id}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One step."""
        obs, reward, terminated, truncated, info = self._columns.step(np.asarray(action)[None])
        over = bool(terminated[0]), bool(truncated[0])
        self._begun = any(over)
        return self._columns.shown.row(obs, 0), float(reward[0]), *over, info

    def take_episodes(self) -> tuple[list[Row], int]:
        """Rows of the episodes that ended since the last call, and steps."""
        return self._columns.take_episodes()


class TaskVectors(VectorEnv[Any, Any, Any]):
    """Columns of a family of fixed length, stepped by one call.

    As RLlib has it, the step after an end begins the next trial and ignores its action.
    """

    def __init__(self, settings: EnvSettings, num_envs: int) -> None:
        self._columns = Columns(settings, num_envs)
        self.num_envs = num_envs
        self.single_observation_space = self._columns.shown.space
        self.single_action_space = self._columns.family.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self._ended = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin a trial in every column."""
        super().reset(seed=seed)
        self._ended = False
        return self._columns.restart(self.np_random), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every column, or begin the next trials."""
        if self._ended:
            self._ended = False
            nothing = np.zeros(self.num_envs, np.bool_)
            reward = np.zeros(self.num_envs, np.float32)
            return self._columns.proceed(), reward, nothing, nothing.copy(), {}
        answer = self._columns.step(np.asarray(actions))
        self._ended = bool(answer[2][0] or answer[3][0])
        return answer

    def take_episodes(self) -> tuple[list[Row], int]:
        """Rows of the episodes that ended since the last call, and steps of all columns."""
        return self._columns.take_episodes()
