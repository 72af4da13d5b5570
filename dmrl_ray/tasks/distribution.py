"""The environment contract: a distribution of tasks and the vector environments that run them.

The author of a task family writes one file with two classes: a `TaskVectorEnv`, which steps many
environments at once, each on its own task, and a `TaskDistribution`, which defines what varies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from dmrl_ray.config.schema import Settings
from dmrl_ray.tasks.score import Reference
from dmrl_ray.types import SPLITS, Array, Arrays, EnvironmentFault, Split, Task


class TaskVectorEnv(VectorEnv[Any, Any, Any], ABC):
    """B environments, stepped together, each on its own task.

    * `set_tasks` takes effect at an environment's next reset.
    * Auto-reset is SAME_STEP: the step that ends an episode returns the first observation of the
      next one, and the true successor in ``infos["final_obs"]`` (B, *obs_shape; rows of
      environments whose episode continues are undefined).
    * Continuous actions lie in [-1, 1]; the environment scales them.
    * All randomness comes from ``self.np_random``; the caller sets it before a reset, so that an
      episode is a function of (task, stream).
    * ``infos["success"]`` (B,) is 1 or True where a step was a success, 0 or False where it was
      not, NaN where it is unknown. An episode is a success if any of its steps was, and a failure
      if none was and at least one is known.
    * A family may implement `step` for tensors too: see `to_device`.

    An author implements `set_tasks`, `begin`, `observe`, `render`, and `step`, which ends with
    `auto_reset`.
    """

    state_fields: ClassVar[tuple[str, ...]] = ()
    """The names of the attributes, each an array (B, ...), that an open episode depends on. They
    include the parameters of the current tasks and of those that start at the next reset."""

    constant_fields: ClassVar[tuple[str, ...]] = ()
    """The names of further arrays that `step` reads and nothing writes."""

    xp: Any = np
    """The array namespace: ``numpy``, or ``torch`` on a device. Functions that both have are those
    of the array API standard (data-apis.org/array-api)."""

    tracks_belief: bool = False
    """Whether `belief` and `expert_action` are available. Set before the first reset; a belief is
    reset to the prior at the first reset after each `set_tasks`."""

    idle: Array | None = None
    """(B,) bool, environments that have finished their episodes while others have not. Their
    outputs are ignored, so that a family that steps environments in a loop may skip them."""

    def __init__(
        self, num_envs: int, observation_space: gym.Space[Any], action_space: gym.Space[Any]
    ):
        self.num_envs = num_envs
        self.single_observation_space = observation_space
        self.single_action_space = action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.env_ids: Array = np.arange(num_envs)
        self.all_false: Array = np.zeros(num_envs, np.bool_)
        self._steps_left: int | None = None  # on a device, until all episodes end

    @abstractmethod
    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """Sets one task per environment, in effect from its next reset on."""

    @abstractmethod
    def begin(self, env_ids: Array) -> None:
        """Starts episodes in the environments of these indices, on the tasks last set for them."""

    @abstractmethod
    def observe(self) -> Array:
        """Returns the observations (B, *obs_shape) in an array that no later step writes to."""

    @abstractmethod
    def render(self) -> Array:
        """Returns a small image (H, W, 3) uint8 of environment 0, drawn in NumPy."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Starts an episode in every environment; sets ``options["tasks"]`` first, if given."""
        super().reset(seed=seed)
        if options and "tasks" in options:
            self.set_tasks(options["tasks"])
        self.begin(self.env_ids)
        if self._steps_left is not None:
            self._steps_left = self._episode_steps
        return self.observe(), {}

    def auto_reset(self, obs: Array, done: Array) -> tuple[Array, dict[str, Any]]:
        """Starts the next episode where one is done; returns the obs and infos of `step`."""
        if self._steps_left is not None:
            return self._reset_together(obs)
        if not done.any():
            return obs, {}
        self.begin(np.flatnonzero(done))
        return self.observe(), {"final_obs": obs}

    def to_device(self, device: Any, episode_steps: int) -> None:
        """Moves the state to a device, as tensors, where all later steps are computed.

        For families whose episodes all have `episode_steps` steps (`TaskDistribution.on_device`):
        the environments are reset together, so that the ends of episodes are known without a
        device synchronization. Beliefs are not moved.
        """
        import torch

        self.xp = torch
        self._device = device
        self._episode_steps = self._steps_left = episode_steps
        for name in (*self.state_fields, *self.constant_fields, "env_ids", "all_false"):
            setattr(self, name, torch.tensor(getattr(self, name), device=device))

    def array(self, values: Any) -> Array:
        """Converts numbers to an array or tensor on the environments' device."""
        values = np.asarray(values)
        return values if self.xp is np else self.xp.asarray(values, device=self._device)

    def take_rows(self, table: Array, index: Array) -> Array:
        """Returns rows of a table."""
        # `take` is NumPy's fastest way, indexing is torch's.
        return table.take(index, axis=0) if self.xp is np else table[index]

    def _reset_together(self, obs: Array) -> tuple[Array, dict[str, Any]]:
        assert self._steps_left is not None
        self._steps_left -= 1
        if self._steps_left:
            return obs, {}
        self.begin(self.env_ids)
        self._steps_left = self._episode_steps
        return self.observe(), {"final_obs": obs}

    def belief(self) -> np.ndarray:
        """Returns the beliefs about the tasks (B, D) float32, of about unit scale.

        A belief is a sufficient statistic of an environment's observations, actions and rewards
        since its first episode on the task. Requires `tracks_belief`.

        Raises:
            NotImplementedError: the family has no belief.
        """
        raise NotImplementedError

    def expert_action(self) -> np.ndarray:
        """Returns the expert actions (B, *action_shape), as labels for imitation learning.

        The expert is the best known policy that conditions on the `belief` alone, never on the
        task. Requires `tracks_belief`.

        Raises:
            NotImplementedError: the family has no expert.
        """
        raise NotImplementedError

    def best_action(self) -> np.ndarray:
        """Returns the optimal actions given the tasks (B, *action_shape), as labels.

        Raises:
            NotImplementedError: the family does not know them.
        """
        raise NotImplementedError

    def take_faults(self) -> list[EnvironmentFault]:
        """Returns the faults since the last call after which episodes were restarted."""
        return []

    def get_state(self) -> Arrays:
        """Returns copies of everything the open episodes depend on, except the random stream."""
        state = {name: self._host(getattr(self, name)) for name in self.state_fields}
        if self._steps_left is not None:
            state["steps_left"] = np.full(self.num_envs, self._steps_left)
        return state

    def set_state(self, state: Arrays) -> None:
        """Restores the state that `get_state` returned."""
        for name in self.state_fields:
            setattr(self, name, self.array(np.array(state[name])))
        if self._steps_left is not None:
            self._steps_left = int(state["steps_left"][0])

    def _host(self, array: Array) -> np.ndarray:
        return np.array(array if self.xp is np else array.cpu().numpy())


class TaskDistribution(ABC):
    """A family of tasks, split into train, validation and test."""

    class Config(Settings):
        """The settings of this family in a YAML file."""

    family: str
    """The family's name in tables, and part of the hash that is a task's id."""

    domain: str = "core"
    """One of core, game, robot, language, recommendation."""

    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]

    max_episode_steps: int
    """The maximum number of steps of an episode."""

    episodes_per_trial: int = 1
    """The number of episodes on one task; the policy's memory survives their ends."""

    fixed_length: bool = True
    """Whether every episode has exactly `max_episode_steps` steps."""

    vectorized: bool = True
    """Whether a step of many environments costs little more than one of a few."""

    restarts_episodes: bool = False
    """Whether environments go on after a fault if `on_fault` says so."""

    on_fault: Literal["stop", "restart_episode", "quarantine_task"] = "stop"
    """The reaction of environments of `make_vec` to a fault: stop raises it."""

    on_device: bool = False
    """Whether the environments of `make_vec` can be moved to a device, which requires
    `fixed_length`."""

    task_bytes: int = 0
    """The size of one task's parameters in bytes, where a setting can make it large, else 0."""

    @abstractmethod
    def __init__(self, config: Config) -> None: ...

    @abstractmethod
    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """Samples n tasks of a split; a small family may share tasks between splits."""

    @abstractmethod
    def make_vec(self, num_envs: int) -> TaskVectorEnv:
        """Returns `num_envs` environments of this family."""

    def reference(self, task: Task) -> Reference | None:
        """Returns a random policy's and the oracle's expected returns for each episode of a trial.

        None where they are unknown.
        """
        return None

    def play_again(self, params: Mapping[str, object], seed: int, actions: Sequence[Any]) -> None:
        """Plays one episode of a task from its seed, so that its fault shows once more.

        For families that step environments one by one, whose faults have seed and actions in their
        `detail`.

        Raises:
            EnvironmentFault: the environment broke the contract again.
        """
        raise NotImplementedError

    @property
    def trial_steps(self) -> int:
        """The maximum number of steps of a trial."""
        return self.episodes_per_trial * self.max_episode_steps


def split_stream(rng: np.random.Generator, split: Split) -> np.random.Generator:
    """Returns a random generator that depends on `rng`'s state, which it advances, and the split.

    Parameters drawn from it differ between splits even where `rng` is in the same state.
    """
    words = rng.integers(2**32, size=4).tolist()
    return np.random.default_rng([*words, SPLITS.index(split)])


def split_indices(size: int, held_out: int, split: Split) -> np.ndarray:
    """Returns the indices of the tasks of a finite family that belong to a split, in order.

    They are the same in every run.

    Args:
        size: the number of tasks of the family.
        held_out: the number of tasks held out for validation, and as many others for test; with 0
            every split contains all tasks.
        split: the split.
    """
    if held_out == 0:
        return np.arange(size)
    start, stop = {
        "validation": (0, held_out),
        "test": (held_out, 2 * held_out),
        "train": (2 * held_out, size),
    }[split]
    return np.sort(np.random.default_rng(0).permutation(size)[start:stop])


def make_tasks(family: str, split: Split, params: Mapping[str, np.ndarray]) -> list[Task]:
    """Returns the tasks that have these parameters (n, ...), with ids as `task_id` has them.

    An id depends neither on the order of the names nor on the sign of a zero.
    """
    params = {name: _unsigned_zeros(params[name]) for name in sorted(params)}
    flat = [np.ascontiguousarray(v).reshape(len(v), -1) for v in params.values()]
    rows = np.concatenate([v.view(np.uint8) for v in flat], axis=1)
    data, size, names = rows.tobytes(), rows.shape[1], tuple(params)
    prefix = _hash_prefix(family, names)
    values = zip(*(v.tolist() if v.ndim == 1 else v for v in params.values()), strict=True)
    return [
        Task(
            _hash(prefix + data[i * size : (i + 1) * size]),
            family,
            split,
            dict(zip(names, value, strict=True)),
        )
        for i, value in enumerate(values)
    ]


def _unsigned_zeros(values: np.ndarray) -> np.ndarray:
    return values + 0.0 if values.dtype.kind == "f" else values


def task_id(family: str, names: tuple[str, ...] = (), values: bytes = b"") -> str:
    """Returns a task's id, 16 hexadecimal digits: a hash of its family's name and parameters.

    It is the same in every split and run.
    """
    return _hash(_hash_prefix(family, names) + values)


def _hash_prefix(family: str, names: tuple[str, ...]) -> bytes:
    return "\0".join((family, *names, "")).encode()


def _hash(text: bytes) -> str:
    return blake2b(text, digest_size=8).hexdigest()
