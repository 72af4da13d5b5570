"""Any family with privileged observations: the task's parameters, or the belief about them.

A policy that observes the task is a privileged baseline; a critic that does (an asymmetric critic,
``network.critic_only``) estimates values more accurately. A memoryless policy that observes the
belief can be Bayes-optimal (the belief oracle of Zintgraf et al. 2020, arXiv:1910.08348).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from gymnasium.spaces import Box
from pydantic import Field

from dmrl_ray.config.schema import Component, Settings
from dmrl_ray.tasks.distribution import TaskDistribution, TaskVectorEnv
from dmrl_ray.tasks.score import Reference
from dmrl_ray.tasks.spaces import Packed
from dmrl_ray.types import Array, Arrays, Split, Task


class ObserveVectorEnv(TaskVectorEnv):
    """Environments of another family with more to observe.

    * Observation: packed parts; ``obs`` is the wrapped environment's, ``task`` the parameters of
      the current task, in order of their names, ``belief`` that of `TaskVectorEnv.belief`. In
      ``final_obs`` the belief is the one after the reset.
    * Action, reward, end: the wrapped environment's.
    """

    def __init__(self, env: TaskVectorEnv, space: Packed):
        super().__init__(env.num_envs, space, env.single_action_space)
        self.env = env
        self.space = space
        env.tracks_belief = "belief" in space.parts
        width = space.parts["task"].shape if "task" in space.parts else (0,)
        self.task = np.zeros((env.num_envs, *(width or ())), np.float32)
        self.next_task = self.task.copy()

    @property
    def np_random(self) -> np.random.Generator:
        """The random generator of the wrapped environment."""
        return self.env.np_random

    @np_random.setter
    def np_random(self, value: np.random.Generator) -> None:
        self.env.np_random = value

    @property
    def tracks_belief(self) -> bool:
        """Whether the wrapped environment tracks its belief."""
        return self.env.tracks_belief

    @tracks_belief.setter
    def tracks_belief(self, value: bool) -> None:
        self.env.tracks_belief = value or "belief" in self.space.parts

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Sets one task per environment, in effect from its next reset on."""
        self.env.set_tasks(tasks)
        if "task" in self.space.parts:
            self.next_task[:] = [task_vector(task) for task in tasks]

    def begin(self, env_ids: np.ndarray) -> None:
        """Starts episodes in the environments of these indices."""
        self.env.begin(env_ids)
        self.task[env_ids] = self.next_task[env_ids]

    def observe(self) -> np.ndarray:
        """Returns packed observations (B, D)."""
        return self._pack(self.env.observe())

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Starts an episode in every environment."""
        obs, infos = self.env.reset(seed=seed, options=options)
        self.task[:] = self.next_task
        return self._pack(obs), infos

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Steps every environment."""
        obs, reward, terminated, truncated, infos = self.env.step(actions)
        done = terminated | truncated
        if done.any():
            infos = infos | {"final_obs": self._pack(infos["final_obs"])}
            self.task[done] = self.next_task[done]
        return self._pack(obs), reward, terminated, truncated, infos

    def belief(self) -> np.ndarray:
        """Returns the wrapped environment's beliefs."""
        return self.env.belief()

    def expert_action(self) -> np.ndarray:
        """Returns the wrapped environment's expert actions."""
        return self.env.expert_action()

    def best_action(self) -> np.ndarray:
        """Returns the wrapped environment's optimal actions."""
        return self.env.best_action()

    def render(self) -> Array:
        """Returns the wrapped environment's image."""
        return self.env.render()

    def get_state(self) -> Arrays:
        """Returns the wrapped environment's state and the observed tasks."""
        return self.env.get_state() | {
            "observed.task": self.task.copy(),
            "observed.next_task": self.next_task.copy(),
        }

    def set_state(self, state: Arrays) -> None:
        """Restores the state that `get_state` returned."""
        self.task = np.array(state["observed.task"])
        self.next_task = np.array(state["observed.next_task"])
        self.env.set_state({k: v for k, v in state.items() if not k.startswith("observed.")})

    def _pack(self, obs: np.ndarray) -> np.ndarray:
        parts = {"obs": obs, "task": self.task}
        if "belief" in self.space.parts:
            parts["belief"] = self.env.belief()
        return self.space.pack({name: parts[name] for name in self.space.parts})


class Observe(TaskDistribution):
    """The tasks, splits and references of another family."""

    class Config(Settings):
        """The family and the additional observations."""

        of: Component
        """The family."""

        show: tuple[Literal["task", "belief"], ...] = Field(default=("task",), min_length=1)
        """The additional observations: ``task``, the task's parameters; ``belief``, the belief."""

    def __init__(self, config: Config):
        self.inner: TaskDistribution = config.of.load("tasks")(config.of.settings)
        inner = self.inner
        self.family, self.domain = inner.family, inner.domain
        self.fixed_length = inner.fixed_length
        self.vectorized = inner.vectorized
        self.action_space = inner.action_space
        self.max_episode_steps = inner.max_episode_steps
        self.episodes_per_trial = inner.episodes_per_trial
        self.task_bytes = inner.task_bytes
        self.observation_space: Packed = self._space(config.show)

    def _space(self, show: tuple[str, ...]) -> Packed:
        inner = self.inner
        parts = {"obs": inner.observation_space}
        task = inner.sample(np.random.default_rng(0), 1, "train")
        for name in show:
            width = self._task_width(task[0]) if name == "task" else self._belief_width(task)
            parts[name] = Box(-np.inf, np.inf, (width,), np.float32)
        return Packed(parts)

    def _task_width(self, task: Task) -> int:
        try:
            width = len(task_vector(task))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"tasks.show: parameters of family {self.family!r} are not all numbers; leave out "
                f"task ({error})"
            ) from None
        if not width:
            raise ValueError(
                f"tasks.show: tasks of family {self.family!r} have no parameters; vary some, or "
                "leave out task"
            )
        return width

    def _belief_width(self, task: list[Task]) -> int:
        env = self.inner.make_vec(1)
        env.tracks_belief = True
        env.set_tasks(task)
        env.np_random = np.random.default_rng(0)
        try:
            env.reset()
            return env.belief().shape[1]
        except NotImplementedError as error:
            why = f" ({error})" if str(error) else ""
            raise ValueError(
                f"tasks.show: family {self.family!r} has no belief{why}; use task instead"
            ) from None

    def make_vec(self, num_envs: int) -> ObserveVectorEnv:
        """Returns the family's vector environment with the additional observations."""
        return ObserveVectorEnv(self.inner.make_vec(num_envs), self.observation_space)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """Samples n tasks of the family."""
        return self.inner.sample(rng, n, split)

    def play_again(self, params: Mapping[str, object], seed: int, actions: Sequence[Any]) -> None:
        """Plays one episode of the inner family."""
        self.inner.play_again(params, seed, actions)

    def reference(self, task: Task) -> Reference | None:
        """Returns the family's reference returns."""
        return self.inner.reference(task)


def task_vector(task: Task) -> np.ndarray:
    """Returns a task's parameters in order of their names, (P,) float32."""
    parts = [np.ravel(np.asarray(task.params[name], np.float32)) for name in sorted(task.params)]
    return np.concatenate([np.empty(0, np.float32), *parts])
