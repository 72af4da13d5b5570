"""Any gymnasium environment as a task family: what varies is named in the config.

tasks:
  type: gym
  id: CartPole-v1
  vary: {gravity: [5, 15], length: {choices: [0.25, 0.5, 1.0]}}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from pydantic import Field, model_validator

from dmrl_ray.config.schema import LARGEST_NUMBER, Number, Settings
from dmrl_ray.tasks.distribution import (
    TaskDistribution,
    TaskVectorEnv,
    drawn_from,
    make_tasks,
    split_stream,
    task_id,
)
from dmrl_ray.types import Array, Arrays, Reference, Split, Task

from .gym_check import check_behaviour, check_vary, find_max_episode_steps, first_make
from .gym_column import Apply, GymColumn, Values, close, obs_digest, told_success
from .gym_spaces import action_space, observation_space

MAX_COMBINATIONS = 1_000_000
"""Of choices, where some are held out."""


class GymVectorEnv(TaskVectorEnv):
    """Columns of ordinary environments, stepped one after the other.

    * Observation: the environment's; integers one-hot, other numbers than bytes in float32;
      dictionaries and tuples as named parts of one vector.
    * Action: integers from 0, or [-1, 1] rescaled to the environment's bounds.
    * Reward: the environment's.
    * End: the environment's; truncated at the latest after `max_episode_steps`.
    """

    def __init__(self, family: GymEnv, num_envs: int):
        super().__init__(num_envs, family.observation_space, family.action_space)
        self.family = family
        self.columns = [family.make_column(b) for b in range(num_envs)]
        self.next_params = np.zeros((num_envs, len(family.config.vary)))
        self.params = np.full_like(self.next_params, np.nan)  # equal to no task's
        self.obs = np.zeros(self.observation_space.shape or (), self.observation_space.dtype)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """One task per column, played from that column's next reset on."""
        names = self.family.config.vary
        self.next_params[:] = [[task.params[name] for name in names] for task in tasks]

    def begin(self, columns: np.ndarray) -> None:
        """Reset these columns, each with a seed of its own."""
        seeds = self.np_random.integers(2**31, size=len(columns))
        for b, seed in zip(columns.tolist(), seeds.tolist(), strict=True):
            changed = not np.array_equal(self.params[b], self.next_params[b])
            self.params[b] = self.next_params[b]
            values = self.family.values(self.params[b])
            self.obs[b] = self.columns[b].start(values, seed, changed=changed)

    def observe(self) -> np.ndarray:
        """(B, *obs_shape)."""
        return self.obs.copy()

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step in every column."""
        reward = np.zeros(self.num_envs, np.float32)
        terminated, truncated = np.zeros((2, self.num_envs), np.bool_)
        success = np.full(self.num_envs, np.nan)
        for b, column in enumerate(self.columns):
            if self.idle is not None and self.idle[b]:
                continue
            self.obs[b], reward[b], terminated[b], truncated[b], info = column.step(actions[b])
            success[b] = told_success(info)
        obs, infos = self.auto_reset(self.observe(), terminated | truncated)
        if not np.isnan(success).all():
            infos["success"] = success
        return obs, reward, terminated, truncated, infos

    def get_state(self) -> Arrays:
        """Seeds and actions of the open episodes; they are lived through again by `set_state`."""
        t = np.array([len(column.actions) for column in self.columns])
        shape = self.single_action_space.shape or ()
        actions = np.zeros((self.num_envs, t.max(), *shape), self.single_action_space.dtype)
        for b, column in enumerate(self.columns):
            if column.actions:
                actions[b, : t[b]] = column.actions
        return {
            "seed": np.array([column.seed for column in self.columns]),
            "t": t,
            "actions": actions,
            "params": self.params.copy(),
            "next_params": self.next_params.copy(),
            "digest": np.array([obs_digest(obs) for obs in self.obs], np.uint64),
        }

    def set_state(self, state: Arrays) -> None:
        """Continue from `get_state`'s answer.

        Raises:
            EnvNotDeterministic: an environment did not come to the observation it came to before.
        """
        self.params = np.array(state["params"])
        self.next_params = np.array(state["next_params"])
        for b, column in enumerate(self.columns):
            seed, t = int(state["seed"][b]), int(state["t"][b])
            if seed < 0:
                continue
            values, actions = self.family.values(self.params[b]), state["actions"][b, :t]
            self.obs[b] = column.replay(values, seed, actions, int(state["digest"][b]))

    def render(self) -> Array:
        """The observation of column 0: a picture as it is, numbers as bars around the middle."""
        obs = self.obs[0]
        if obs.ndim == 3 and obs.dtype == np.uint8 and obs.shape[-1] == 3:
            return obs.copy()
        bars = np.rint(16 * np.tanh(obs.ravel()[:64].astype(np.float64))).repeat(4)
        rows = np.arange(16, -17, -1)[:, None]
        drawn = (np.minimum(bars, 0) <= rows) & (rows <= np.maximum(bars, 0))
        return np.where(drawn[..., None], [70, 130, 180], 255).astype(np.uint8)

    def close_extras(self, **kwargs: Any) -> None:
        """Close every environment."""
        for column in self.columns:
            close(column.env)


class Choices(Settings):
    """A finite set of values."""

    choices: list[bool | int | float] = Field(min_length=1)
    """The values, all equally probable."""


class Ends(Settings):
    """Both ends of the score."""

    random: float
    """Expected return of uniformly random actions."""

    oracle: float
    """Expected return of the best policy known."""

    @model_validator(mode="after")
    def _tell_apart(self) -> Ends:
        if self.oracle <= self.random:
            raise ValueError(
                f"oracle: {self.oracle:g} is not more than random, {self.random:g}, so that "
                "nothing lies between them; exchange them, or leave reference out"
            )
        return self


class GymEnv(TaskDistribution):
    """Tasks of an ordinary environment; every split has its own draws of what varies.

    Where all that varies has `choices`, every split draws from the same tasks, unless `held_out`
    keeps some of them for the other splits.
    """

    class Config(Settings):
        """The environment and what varies."""

        read_with: ClassVar = {"apply": ("vary", ())}

        id: str
        """Id for `gymnasium.make`; ``module:Name-v0`` imports the module first."""

        kwargs: dict[str, Any] = Field(default_factory=dict)
        """Further arguments for `gymnasium.make`."""

        vary: dict[str, tuple[float, float] | Choices] = Field(default_factory=dict)
        """What tasks differ in: ``name: [low, high]`` or ``name: {choices: [...]}``."""

        held_out: int = Field(default=0, ge=0, le=LARGEST_NUMBER)
        """Where all that varies has choices: combinations of them kept for the validation split,
        and as many others for the test split; 0 lets every split draw from all."""

        apply: Apply = "attributes"
        """How a task is made: attributes sets them on the unwrapped environment (dotted names
        reach inside; what the environment derives from them when it is built stays), kwargs builds
        the environment anew with these arguments, set_task calls its method of that name with a
        dict."""

        max_episode_steps: Number | None = None
        """Steps after which an episode is truncated; by default the registered number."""

        episodes: Number = 1
        """Episodes in a trial."""

        reference: Ends | None = None
        """Random and oracle return, for scores."""

        @model_validator(mode="after")
        def _can_be_split(self) -> GymEnv.Config:
            choices = [v.choices for v in self.vary.values() if isinstance(v, Choices)]
            if not self.held_out:
                return self
            if len(choices) < len(self.vary) or not choices:
                raise ValueError(
                    "held_out: counts combinations of choices, but something varies over a range, "
                    "whose splits share no task, or nothing varies; leave it out"
                )
            if any(len(set(values)) < len(values) for values in choices):
                raise ValueError("held_out: some choices are there twice; name each once")
            size = math.prod(map(len, choices))
            if not 2 * self.held_out < size <= MAX_COMBINATIONS:
                raise ValueError(
                    f"held_out: of {size} combinations of choices, {self.held_out} for each of two "
                    "splits leave none for training, or they are more than "
                    f"{MAX_COMBINATIONS:,}; hold fewer out, or name other choices"
                )
            return self

    family = "gym"
    fixed_length = False
    vectorized = False

    def __init__(self, config: Config):
        self.config = config
        self.family = f"gym:{config.id}"
        self.episodes_per_trial = config.episodes
        ends = (v.choices[0] if isinstance(v, Choices) else v[0] for v in config.vary.values())
        first = dict(zip(config.vary, ends, strict=True))
        # What is drawn depends on what varies, not on the order in which a file says it.
        self._vary = {
            name: np.sort(over.choices).astype(np.float64) if isinstance(over, Choices) else over
            for name, over in sorted(config.vary.items())
        }
        self._kwargs = {**config.kwargs, **(first if config.apply == "kwargs" else {})}
        env = first_make(self._make, config.id)
        self.max_episode_steps = find_max_episode_steps(env, config.id, config.max_episode_steps)
        try:
            self.observation_space = observation_space(env.observation_space)
            self.action_space = action_space(env.action_space)
        except ValueError as error:
            raise ValueError(f"tasks.id: {config.id}: {error}, so wrap the environment") from None
        check_vary(env, config.id, config.apply, first)
        close(env)
        column = self.make_column(0)
        check_behaviour(column, config.id, config.apply, first)
        close(column.env)

    def make_vec(self, num_envs: int) -> GymVectorEnv:
        """A vector environment that steps `num_envs` environments in a loop."""
        return GymVectorEnv(self, num_envs)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """n tasks of a split; all the same one if nothing varies."""
        stream = split_stream(rng, split)
        if not self.config.vary:
            return [Task(task_id(self.family), self.family, split, {})] * n
        if self.config.held_out:
            return make_tasks(self.family, split, self._combinations(stream, n, split))
        params = {
            name: stream.choice(over, n)
            if isinstance(over, np.ndarray)
            else stream.uniform(*over, n)
            for name, over in self._vary.items()
        }
        return make_tasks(self.family, split, params)

    def _combinations(
        self, stream: np.random.Generator, n: int, split: Split
    ) -> dict[str, np.ndarray]:
        """Parameters of n combinations of choices that belong to a split."""
        choices = {k: v for k, v in self._vary.items() if isinstance(v, np.ndarray)}
        sizes = tuple(map(len, choices.values()))
        mine = drawn_from(math.prod(sizes), self.config.held_out, split)
        picked = np.unravel_index(stream.choice(mine, n), sizes)
        return {
            name: values[index]
            for (name, values), index in zip(choices.items(), picked, strict=True)
        }

    def reference(self, task: Task) -> Reference | None:
        """What the config says."""
        ends, episodes = self.config.reference, self.episodes_per_trial
        if ends is None:
            return None
        return Reference(np.full(episodes, ends.random), np.full(episodes, ends.oracle))

    def make_column(self, column: int) -> GymColumn:
        """One environment."""
        return GymColumn(self._make, self.config.apply, self.max_episode_steps, column)

    def values(self, params: np.ndarray) -> Values:
        """A task's parameters by name; choices in the type in which the config has them."""
        values: dict[str, bool | int | float] = {}
        for (name, over), value in zip(self.config.vary.items(), params.tolist(), strict=True):
            given = over.choices if isinstance(over, Choices) else ()
            values[name] = next((choice for choice in given if choice == value), value)
        return values

    def _make(self, **values: Any) -> gym.Env[Any, Any]:
        # Steps are counted by the column: the limit in the config may exceed the registered one.
        return gym.make(
            self.config.id,
            max_episode_steps=-1,
            disable_env_checker=True,
            **{**self._kwargs, **values},
        )
