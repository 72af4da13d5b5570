"""The environment contract: a distribution of tasks and the vector environments that play them.

An author of a task family writes one file with two classes: a `TaskVectorEnv`, which steps many
columns at once, each on its own task, and a `TaskDistribution`, which says what varies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from dmrl_ray.config.schema import Settings
from dmrl_ray.types import SPLITS, Array, Arrays, Reference, Split, Task


class TaskVectorEnv(VectorEnv[Any, Any, Any], ABC):
    """B environment columns, stepped together, each on its own task.

    * `set_tasks` takes effect at a column's next reset.
    * Auto-reset is SAME_STEP: the step that ends an episode returns the first observation of the
      next one, and the true successor in ``infos["final_obs"]`` (B, *obs_shape; rows of columns
      that did not end are undefined).
    * Continuous actions lie in [-1, 1]; the environment scales them.
    * All randomness comes from ``self.np_random``; the caller sets it before a reset, so that an
      episode is a function of (task, stream).
    * ``infos["success"]`` (B,) is 1 or True where a step was a success, 0 or False where not, NaN
      where the environment does not say. An episode is one if any of its steps was, and none if the
      environment said so at some step.
    * A family may write its `step` for tensors too: see `put_on`.

    An author writes `set_tasks`, `begin`, `observe`, `render`, and `step`, which ends with
    `auto_reset`.
    """

    state_fields: ClassVar[tuple[str, ...]] = ()
    """Attributes, each an array (B, ...), that hold everything an open episode depends on, the
    parameters of the columns' present tasks and those waiting for the next reset included."""

    fixed_fields: ClassVar[tuple[str, ...]] = ()
    """Attributes, arrays too, that steps read and nothing writes."""

    xp: Any = np
    """Where the functions of the arrays are: ``numpy``; ``torch`` on a device. The names that both
    have are those of the array API standard (data-apis.org/array-api)."""

    remembers: bool = False
    """Keep what the present tasks have shown, for `belief` and `expert_action`. Set before the
    first reset; a column forgets at the first reset after each `set_tasks`."""

    idle: Array | None = None
    """(B,) bool, environments that have played their episodes while others still play. Nobody reads
    what they return, so that a family that steps one after the other may leave them as they are."""

    def __init__(
        self, num_envs: int, observation_space: gym.Space[Any], action_space: gym.Space[Any]
    ):
        self.num_envs = num_envs
        self.single_observation_space = observation_space
        self.single_action_space = action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self.everyone: Array = np.arange(num_envs)
        self.never: Array = np.zeros(num_envs, np.bool_)
        self._steps_left: int | None = None  # on a device, until all episodes end

    @abstractmethod
    def set_tasks(self, tasks: Sequence[Task]) -> None:
        """One task per column, played from that column's next reset on."""

    @abstractmethod
    def begin(self, columns: Array) -> None:
        """Start episodes in these columns, given as indices, on the tasks last set for them."""

    @abstractmethod
    def observe(self) -> Array:
        """(B, *obs_shape), in an array that no later step writes to."""

    @abstractmethod
    def render(self) -> Array:
        """(H, W, 3) uint8: a small picture of column 0, drawn without any graphics library."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start an episode in every column; ``options["tasks"]`` are set first, if given."""
        super().reset(seed=seed)
        if options and "tasks" in options:
            self.set_tasks(options["tasks"])
        self.begin(self.everyone)
        if self._steps_left is not None:
            self._steps_left = self._episode_steps
        return self.observe(), {}

    def auto_reset(self, obs: Array, done: Array) -> tuple[Array, dict[str, Any]]:
        """Begin the next episode where one is done; what `step` returns as obs and infos."""
        if self._steps_left is not None:
            return self._reset_together(obs)
        if not done.any():
            return obs, {}
        self.begin(np.flatnonzero(done))
        return self.observe(), {"final_obs": obs}

    def put_on(self, device: Any, episode_steps: int) -> None:
        """Keep the columns as tensors on a device from now on, and step them there.

        For families whose episodes all have `episode_steps` steps (`TaskDistribution.on_device`):
        columns are reset together, so that their ends are known without asking the device, which
        would wait for it. What they keep to be remembered stays behind.
        """
        import torch

        self.xp = torch
        self._device = device
        self._episode_steps = self._steps_left = episode_steps
        for name in (*self.state_fields, *self.fixed_fields, "everyone", "never"):
            setattr(self, name, torch.tensor(getattr(self, name), device=device))

    def array(self, values: Any) -> Array:
        """Numbers, as an array where the columns are."""
        values = np.asarray(values)
        return values if self.xp is np else self.xp.asarray(values, device=self._device)

    def rows(self, table: Array, index: Array) -> Array:
        """Rows of a table, the fastest way there is for each kind of array."""
        return table.take(index, axis=0) if self.xp is np else table[index]

    def _reset_together(self, obs: Array) -> tuple[Array, dict[str, Any]]:
        assert self._steps_left is not None
        self._steps_left -= 1
        if self._steps_left:
            return obs, {}
        self.begin(self.everyone)
        self._steps_left = self._episode_steps
        return self.observe(), {"final_obs": obs}

    def belief(self) -> np.ndarray:
        """(B, D) float32: what can be known of each column's task, as numbers of about unit scale.

        A sufficient statistic of everything the column was shown since its first episode on the
        task; kept only while `remembers`. Families without one raise NotImplementedError.
        """
        raise NotImplementedError

    def expert_action(self) -> np.ndarray:
        """(B, *action_shape): what the best fair policy known would do now, to be imitated.

        Fair: it knows what `belief` knows, never the task. Only while `remembers`; families
        without one raise NotImplementedError.
        """
        raise NotImplementedError

    def best_action(self) -> np.ndarray:
        """(B, *action_shape): what one who knows the task would do now, to learn to guess.

        Families that do not know it raise NotImplementedError.
        """
        raise NotImplementedError

    def get_state(self) -> Arrays:
        """Copies of everything the open episodes depend on, the random stream excepted."""
        state = {name: self._host(getattr(self, name)) for name in self.state_fields}
        if self._steps_left is not None:
            state["steps_left"] = np.full(self.num_envs, self._steps_left)
        return state

    def set_state(self, state: Arrays) -> None:
        """Continue from `get_state`'s answer."""
        for name in self.state_fields:
            setattr(self, name, self.array(np.array(state[name])))
        if self._steps_left is not None:
            self._steps_left = int(state["steps_left"][0])

    def _host(self, array: Array) -> np.ndarray:
        return np.array(array if self.xp is np else array.cpu().numpy())


class TaskDistribution(ABC):
    """A family of tasks, split into train, validation and test."""

    class Config(Settings):
        """What a YAML file may set for this family."""

    family: str
    """The name under which the family stands in tables; part of what its tasks are called."""

    domain: str = "core"
    """core, game, robot, language or recommendation."""

    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]

    max_episode_steps: int
    """Every episode ends after at most this many steps."""

    episodes_per_trial: int = 1
    """Episodes an agent lives through on one task; its memory survives their ends."""

    fixed_length: bool = True
    """True if every episode has exactly `max_episode_steps` steps."""

    vectorized: bool = True
    """True if a step of many environments costs little more than one of a few."""

    on_device: bool = False
    """True if `make_vec`'s environments can be put on a device; their episodes have all one length
    then."""

    task_bytes: int = 0
    """Of the parameters of one task, where a setting can make them many."""

    @abstractmethod
    def __init__(self, config: Config) -> None: ...

    @abstractmethod
    def sample(self, rng: np.random.Generator, n: int, split: Split) -> list[Task]:
        """n tasks of a split; a small family may draw a task for several splits, and says so."""

    @abstractmethod
    def make_vec(self, num_envs: int) -> TaskVectorEnv:
        """A vector environment whose columns play tasks of this family."""

    def reference(self, task: Task) -> Reference | None:
        """Expected random and oracle return per episode of a trial, or None where unknown."""
        return None

    @property
    def trial_steps(self) -> int:
        """Steps of the longest trial."""
        return self.episodes_per_trial * self.max_episode_steps


def split_stream(rng: np.random.Generator, split: Split) -> np.random.Generator:
    """A stream of one split's own: a function of `rng`'s state, which it advances, and the split.

    Parameters drawn from it differ between splits even where `rng` is in the same state.
    """
    words = rng.integers(2**32, size=4).tolist()
    return np.random.default_rng([*words, SPLITS.index(split)])


def drawn_from(size: int, held_out: int, split: Split) -> np.ndarray:
    """Which of a finite family's `size` tasks a split draws from, in order; the same in every run.

    Args:
        size: of the family.
        held_out: tasks kept for validation, and as many others for test; with 0 every split draws
            from all of them.
        split: that draws.
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
    """Tasks from arrays of parameters (n, ...), each called by its `task_id`.

    Neither the order of the names nor the sign of a zero makes another task.
    """
    params = {name: _unsigned_zeros(params[name]) for name in sorted(params)}
    flat = [np.ascontiguousarray(v).reshape(len(v), -1) for v in params.values()]
    rows = np.concatenate([v.view(np.uint8) for v in flat], axis=1)
    data, size, names = rows.tobytes(), rows.shape[1], tuple(params)
    named = _named(family, names)
    values = zip(*(v.tolist() if v.ndim == 1 else v for v in params.values()), strict=True)
    return [
        Task(
            _hash(named + data[i * size : (i + 1) * size]),
            family,
            split,
            dict(zip(names, value, strict=True)),
        )
        for i, value in enumerate(values)
    ]


def _unsigned_zeros(values: np.ndarray) -> np.ndarray:
    return values + 0.0 if values.dtype.kind == "f" else values


def task_id(family: str, names: tuple[str, ...] = (), values: bytes = b"") -> str:
    """A hash of a family's name and a task's parameters: 16 digits, in every split and run."""
    return _hash(_named(family, names) + values)


def _named(family: str, names: tuple[str, ...]) -> bytes:
    return "\0".join((family, *names, "")).encode()


def _hash(text: bytes) -> str:
    return blake2b(text, digest_size=8).hexdigest()
