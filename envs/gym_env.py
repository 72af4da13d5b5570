"""Any gymnasium environment as a task family: the config names the parameters that vary.

tasks:
  type: gym
  id: CartPole-v1
  vary: {gravity: [5, 15], length: {choices: [0.25, 0.5, 1.0]}}
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, cast

import gymnasium as gym
import numpy as np
from pydantic import Field, model_validator

from dmrl_ray.config.schema import LARGEST_NUMBER, Number, Settings
from dmrl_ray.tasks.distribution import (
    TaskDistribution,
    TaskVectorEnv,
    make_tasks,
    split_indices,
    split_stream,
    task_id,
)
from dmrl_ray.types import Array, Arrays, EnvironmentFault, Reference, Split, Task

from .external_env import Apply, ExternalEnv, Values, close, obs_digest, success_of
from .gym_check import check_steps, check_vary, find_max_episode_steps, first_make
from .gym_spaces import action_space, observation_space

MAX_COMBINATIONS = 1_000_000
"""The maximum number of combinations of choices where some are held out."""


RESETS = 3
"""Resets that may fail one after the other, where episodes may be restarted."""


class GymVectorEnv(TaskVectorEnv):
    """Gymnasium environments, stepped in a loop.

    * Observation: the environment's; integers one-hot, numbers other than bytes as float32;
      dictionaries and tuples as named parts of one vector.
    * Action: integers from 0, or [-1, 1] rescaled to the environment's bounds.
    * Reward: the environment's.
    * End: the environment's; truncated after `max_episode_steps` at the latest.
    """

    def __init__(self, family: GymEnv, num_envs: int):
        super().__init__(num_envs, family.observation_space, family.action_space)
        self.family = family
        self.envs = [family.make_single(b) for b in range(num_envs)]
        self.next_params = np.zeros((num_envs, len(family.config.vary)))
        self.params = np.full_like(self.next_params, np.nan)  # differs from every task's
        self.faults: list[EnvironmentFault] = []
        self.obs = np.zeros(self.observation_space.shape or (), self.observation_space.dtype)

    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Sets one task per environment, in effect from its next reset on."""
        names = self.family.config.vary
        self.next_params[:] = [[task.params[name] for name in names] for task in tasks]

    def begin(self, env_ids: np.ndarray) -> None:
        """Resets the environments of these indices, each with its own seed."""
        seeds = self.np_random.integers(2**31, size=len(env_ids))
        for b, seed in zip(env_ids.tolist(), seeds.tolist(), strict=True):
            changed = not np.array_equal(self.params[b], self.next_params[b])
            self.params[b] = self.next_params[b]
            values = self.family.values(self.params[b])
            self.obs[b] = self.reset_single(b, values, seed, changed=changed)

    def observe(self) -> np.ndarray:
        """Returns the observations (B, *obs_shape)."""
        return self.obs.copy()

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Steps every environment."""
        reward = np.zeros(self.num_envs, np.float32)
        terminated, truncated = np.zeros((2, self.num_envs), np.bool_)
        success = np.full(self.num_envs, np.nan)
        for b, env in enumerate(self.envs):
            if self.idle is not None and self.idle[b]:
                continue
            try:
                self.obs[b], reward[b], terminated[b], truncated[b], info = env.step(actions[b])
            except EnvironmentFault as fault:
                self.replace(b, fault)
                truncated[b] = True
            else:
                success[b] = success_of(info)
        obs, infos = self.auto_reset(self.observe(), terminated | truncated)
        if not np.isnan(success).all():
            infos["success"] = success
        return obs, reward, terminated, truncated, infos

    def reset_single(self, b: int, values: Values, seed: int, *, changed: bool) -> np.ndarray:
        """Resets an environment; where episodes may be restarted, with other seeds after faults."""
        params = self.params[b].copy()
        for _ in range(RESETS):
            try:
                return self.envs[b].reset(values, seed, changed=changed)
            except EnvironmentFault as fault:
                self.replace(b, fault)
                self.params[b], changed = params, True
                seed = int(self.np_random.integers(2**31))
        raise self.faults.pop()

    def replace(self, b: int, fault: EnvironmentFault) -> None:
        """Puts a new environment in the place of one that failed, if episodes may be restarted.

        Raises:
            EnvironmentFault: they may not.
        """
        named = self.name_episode(fault, b)
        if self.family.on_fault == "stop":
            raise named from fault.__cause__
        self.faults.append(named)
        with suppress(Exception):  # It is broken already.
            close(self.envs[b].env)
        self.envs[b] = self.family.make_single(b)
        self.params[b] = np.nan  # The next reset sets the task.

    def take_faults(self) -> list[EnvironmentFault]:
        """Returns the faults since the last call after which episodes were restarted."""
        faults, self.faults = self.faults, []
        return faults

    def name_episode(self, fault: EnvironmentFault, b: int) -> EnvironmentFault:
        """Adds the task, the seed and the actions of the open episode of an environment."""
        env, task = self.envs[b], self.family.task(self.params[b])
        values = dict(self.family.values(self.params[b]))
        after = f" after action {env.actions[-1]}" if env.actions else ""
        detail = {
            "task_id": task.id,
            "params": values,
            "environment": b,
            "episode_seed": env.seed,
            "step": len(env.actions),
            "actions": [np.asarray(action).tolist() for action in env.actions],
        }
        return type(fault)(f"{fault}{after}, on task {task.id} {values}", detail)

    def get_state(self) -> Arrays:
        """Returns the seeds and actions of the open episodes, which `set_state` replays."""
        t = np.array([len(env.actions) for env in self.envs])
        shape = self.single_action_space.shape or ()
        actions = np.zeros((self.num_envs, t.max(), *shape), self.single_action_space.dtype)
        for b, env in enumerate(self.envs):
            if env.actions:
                actions[b, : t[b]] = env.actions
        return {
            "seed": np.array([env.seed for env in self.envs]),
            "t": t,
            "actions": actions,
            "params": self.params.copy(),
            "next_params": self.next_params.copy(),
            "digest": np.array([obs_digest(obs) for obs in self.obs], np.uint64),
        }

    def set_state(self, state: Arrays) -> None:
        """Restores the state that `get_state` returned.

        Raises:
            EnvNotDeterministic: replaying an episode led to another observation.
        """
        self.params = np.array(state["params"])
        self.next_params = np.array(state["next_params"])
        for b, env in enumerate(self.envs):
            seed, t = int(state["seed"][b]), int(state["t"][b])
            if seed < 0:
                continue
            values, actions = self.family.values(self.params[b]), state["actions"][b, :t]
            self.obs[b] = env.replay(values, seed, actions, int(state["digest"][b]))

    def render(self) -> Array:
        """Draws the observation of environment 0: an image unchanged, numbers as bars."""
        obs = self.obs[0]
        if obs.ndim == 3 and obs.dtype == np.uint8 and obs.shape[-1] == 3:
            return obs.copy()
        bars = np.rint(16 * np.tanh(obs.ravel()[:64].astype(np.float64))).repeat(4)
        rows = np.arange(16, -17, -1)[:, None]
        drawn = (np.minimum(bars, 0) <= rows) & (rows <= np.maximum(bars, 0))
        return np.where(drawn[..., None], [70, 130, 180], 255).astype(np.uint8)

    def close_extras(self, **kwargs: Any) -> None:
        """Closes every environment."""
        for env in self.envs:
            close(env.env)


class Choices(Settings):
    """A finite set of values."""

    choices: list[bool | int | float] = Field(min_length=1)
    """The values, all equally probable."""


class ReferenceReturns(Settings):
    """The reference returns of a score, (return - random) / (oracle - random)."""

    random: float
    """Expected return of uniformly random actions."""

    oracle: float
    """Expected return of the best known policy."""

    @model_validator(mode="after")
    def _differ(self) -> ReferenceReturns:
        if self.oracle <= self.random:
            raise ValueError(
                f"oracle: {self.oracle:g} is not more than random, {self.random:g}, so that scores "
                "are undefined; exchange them, or leave reference out"
            )
        return self


class GymEnv(TaskDistribution):
    """Tasks of a gymnasium environment, sampled separately for each split.

    Where all varied parameters have `choices`, splits share all tasks, unless `held_out` reserves
    some for the other splits.
    """

    class Config(Settings):
        """The environment and the parameters that vary."""

        read_with: ClassVar = {"apply": ("vary", ())}

        id: str
        """The id for `gymnasium.make`; ``module:Name-v0`` imports the module first."""

        kwargs: dict[str, Any] = Field(default_factory=dict)
        """Further arguments for `gymnasium.make`."""

        vary: dict[str, tuple[float, float] | Choices] = Field(default_factory=dict)
        """The parameters that vary: ``name: [low, high]`` or ``name: {choices: [...]}``."""

        held_out: int = Field(default=0, ge=0, le=LARGEST_NUMBER)
        """Where all varied parameters have choices: the number of their combinations held out for
        validation, and as many others for test; with 0 splits share all."""

        apply: Apply = "attributes"
        """How parameters are applied: attributes sets them on the unwrapped environment (dotted
        names reach nested objects; values derived from them in the constructor do not change),
        kwargs rebuilds the environment with them as arguments, set_task passes them as a dict to
        the environment's method of that name."""

        max_episode_steps: Number | None = None
        """The number of steps after which an episode is truncated; by default as registered."""

        episodes: Number = 1
        """The number of episodes in a trial."""

        reference: ReferenceReturns | None = None
        """The random and oracle returns, for scores."""

        @model_validator(mode="after")
        def _can_be_split(self) -> GymEnv.Config:
            choices = [v.choices for v in self.vary.values() if isinstance(v, Choices)]
            if not self.held_out:
                return self
            if len(choices) < len(self.vary) or not choices:
                raise ValueError(
                    "held_out: counts combinations of choices, but a parameter varies over a "
                    "range, where splits share no task, or nothing varies; leave it out"
                )
            if any(len(set(values)) < len(values) for values in choices):
                raise ValueError("held_out: some choices are given twice; name each once")
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
    restarts_episodes = True

    def __init__(self, config: Config):
        self.config = config
        self.family = f"gym:{config.id}"
        self.episodes_per_trial = config.episodes
        lowest = (v.choices[0] if isinstance(v, Choices) else v[0] for v in config.vary.values())
        first = dict(zip(config.vary, lowest, strict=True))
        # Sorted, so that sampled tasks do not depend on the order of the parameters in a file.
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
        check_steps(self.make_single, config.id, config.apply, first)

    def make_vec(self, num_envs: int) -> GymVectorEnv:
        """Returns a vector environment that steps `num_envs` environments in a loop."""
        return GymVectorEnv(self, num_envs)

    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """Samples n tasks of a split; all are the same if nothing varies."""
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
        """Samples n combinations of choices of a split; returns their parameters."""
        choices = {k: v for k, v in self._vary.items() if isinstance(v, np.ndarray)}
        sizes = tuple(map(len, choices.values()))
        indices = split_indices(math.prod(sizes), self.config.held_out, split)
        picked = np.unravel_index(stream.choice(indices, n), sizes)
        return {
            name: values[index]
            for (name, values), index in zip(choices.items(), picked, strict=True)
        }

    def reference(self, task: Task) -> Reference | None:
        """Returns the reference returns of the config."""
        given, episodes = self.config.reference, self.episodes_per_trial
        if given is None:
            return None
        return Reference(np.full(episodes, given.random), np.full(episodes, given.oracle))

    def make_single(self, index: int) -> ExternalEnv:
        """Returns a single environment, of this index in a vector environment."""
        return ExternalEnv(self._make, self.config.apply, self.max_episode_steps, index)

    def values(self, params: np.ndarray) -> Values:
        """Returns a task's parameters by name; choices keep their type in the config."""
        values: dict[str, bool | int | float] = {}
        for (name, over), value in zip(self.config.vary.items(), params.tolist(), strict=True):
            given = over.choices if isinstance(over, Choices) else ()
            values[name] = next((choice for choice in given if choice == value), value)
        return values

    def task(self, params: np.ndarray) -> Task:
        """Returns the task that has these values of what varies."""
        if not self.config.vary:
            return Task(task_id(self.family), self.family, "train", {})
        columns = dict(zip(self.config.vary, params[:, None], strict=True))
        return make_tasks(self.family, "train", columns)[0]

    def play_again(self, params: Mapping[str, object], seed: int, actions: Sequence[Any]) -> None:
        """Plays one episode in an environment of its own.

        Raises:
            EnvironmentFault: the environment broke the contract again.
        """
        env = self.make_single(0)
        env.reset(cast(Values, params), seed, changed=True)
        for action in actions:
            env.step(np.asarray(action, self.action_space.dtype))
        close(env.env)

    def _make(self, **values: Any) -> gym.Env[Any, Any]:
        # `ExternalEnv` counts steps, as the config's limit may exceed the registered one.
        return gym.make(
            self.config.id,
            max_episode_steps=-1,
            disable_env_checker=True,
            **{**self._kwargs, **values},
        )
