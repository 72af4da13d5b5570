"""Any family, with what its agents cannot see shown to them: the task, or what is known of it.

With the task in sight a policy is the privileged reference of its family; shown to the critic
alone (``network.critic_only``) it makes values sharper. With the belief in sight a policy without
memory can be Bayes-optimal (the belief oracle of Zintgraf et al. 2020, arXiv:1910.08348).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from gymnasium.spaces import Box
from pydantic import Field

from dmrl_ray.config.schema import Component, Settings
from dmrl_ray.tasks.distribution import TaskDistribution, TaskVectorEnv
from dmrl_ray.tasks.spaces import Packed
from dmrl_ray.types import Array, Arrays, Reference, Split, Task


class ObserveVectorEnv(TaskVectorEnv):
    """Columns of another environment.

    * Observation: packed parts; ``obs`` is the environment's own, ``task`` the parameters of the
      present task, in order of their names, ``belief`` what `TaskVectorEnv.belief` says. In
      ``final_obs`` the belief is the one after the reset.
    * Action, reward, end: the environment's own.
    """

    def __init__(self, env: TaskVectorEnv, space: Packed):
        super().__init__(env.num_envs, space, env.single_action_space)
        self.env = env
        self.space = space
        env.remembers = "belief" in space.parts
        width = space.parts["task"].shape if "task" in space.parts else (0,)
        self.task = np.zeros((env.num_envs, *(width or ())), np.float32)
        self.next_task = self.task.copy()

    @property
    def np_random(self) -> np.random.Generator:
        """The environment's own stream."""
        return self.env.np_random

    @np_random.setter
    def np_random(self, value: np.random.Generator) -> None:
        self.env.np_random = value

    @property
    def remembers(self) -> bool:
        """Whether the environment keeps what its tasks have shown."""
        return self.env.remembers

    @remembers.setter
    def remembers(self, value: bool) -> None:
        self.env.remembers = value or "belief" in self.space.parts

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """One task per column, played from that column's next reset on."""
        self.env.set_tasks(tasks)
        if "task" in self.space.parts:
            self.next_task[:] = [task_vector(task) for task in tasks]

    def begin(self, columns: np.ndarray) -> None:
        """Start episodes in these columns."""
        self.env.begin(columns)
        self.task[columns] = self.next_task[columns]

    def observe(self) -> np.ndarray:
        """(B, D) packed."""
        return self._pack(self.env.observe())

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode in every column."""
        obs, infos = self.env.reset(seed=seed, options=options)
        self.task[:] = self.next_task
        return self._pack(obs), infos

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step every column."""
        obs, reward, terminated, truncated, infos = self.env.step(actions)
        done = terminated | truncated
        if done.any():
            infos = infos | {"final_obs": self._pack(infos["final_obs"])}
            self.task[done] = self.next_task[done]
        return self._pack(obs), reward, terminated, truncated, infos

    def belief(self) -> np.ndarray:
        """As the environment has it."""
        return self.env.belief()

    def expert_action(self) -> np.ndarray:
        """As the environment has it."""
        return self.env.expert_action()

    def best_action(self) -> np.ndarray:
        """As the environment has it."""
        return self.env.best_action()

    def render(self) -> Array:
        """The environment's picture."""
        return self.env.render()

    def get_state(self) -> Arrays:
        """The environment's own, and the tasks shown."""
        return self.env.get_state() | {
            "shown.task": self.task.copy(),
            "shown.next_task": self.next_task.copy(),
        }

    def set_state(self, state: Arrays) -> None:
        """Continue from `get_state`'s answer."""
        self.task = np.array(state["shown.task"])
        self.next_task = np.array(state["shown.next_task"])
        self.env.set_state({k: v for k, v in state.items() if not k.startswith("shown.")})

    def _pack(self, obs: np.ndarray) -> np.ndarray:
        parts = {"obs": obs, "task": self.task}
        if "belief" in self.space.parts:
            parts["belief"] = self.env.belief()
        return self.space.pack({name: parts[name] for name in self.space.parts})


class Observe(TaskDistribution):
    """Another family's tasks, splits and references."""

    class Config(Settings):
        """Which family, and what of it is shown."""

        of: Component
        """The family."""

        show: tuple[Literal["task", "belief"], ...] = Field(default=("task",), min_length=1)
        """What joins the observation: ``task`` its parameters, ``belief`` what is known of it."""

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
                f"tasks.show: tasks of family {self.family!r} have no parameters to show; let "
                "something vary, or leave out task"
            )
        return width

    def _belief_width(self, task: list[Task]) -> int:
        env = self.inner.make_vec(1)
        env.remembers = True
        env.set_tasks(task)
        env.np_random = np.random.default_rng(0)
        try:
            env.reset()
            return env.belief().shape[1]
        except NotImplementedError as error:
            why = f" ({error})" if str(error) else ""
            raise ValueError(
                f"tasks.show: family {self.family!r} has no belief{why}; show the task instead"
            ) from None

    def make_vec(self, num_envs: int) -> ObserveVectorEnv:
        """The family's vector environment, with more to see."""
        return ObserveVectorEnv(self.inner.make_vec(num_envs), self.observation_space)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """n of the family's tasks."""
        return self.inner.sample(rng, n, split)

    def reference(self, task: Task) -> Reference | None:
        """The family's own."""
        return self.inner.reference(task)


def task_vector(task: Task) -> np.ndarray:
    """(P,) float32 a task's parameters, in order of their names."""
    parts = [np.ravel(np.asarray(task.params[name], np.float32)) for name in sorted(task.params)]
    return np.concatenate([np.empty(0, np.float32), *parts])
