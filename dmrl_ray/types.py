"""The data that travels between environments, workers, learners and tables.

Axes: T time steps, B environments. Every per-step array is (T, B, ...).
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""``np.ndarray`` in a rollout worker, ``torch.Tensor`` in a learner."""

Split: TypeAlias = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

Arrays: TypeAlias = dict[str, np.ndarray]
"""Named arrays: weights, optimiser state, the state of a shard."""

Memory: TypeAlias = tuple[Array, ...]
"""A policy's memory: leaves (B, ...); empty for policies without memory."""

Columns: TypeAlias = dict[str, np.ndarray]
"""Rows of a results table, column by column; all columns have one length."""


@dataclass(frozen=True, slots=True)
class Task:
    """One MDP of a family.

    Args:
        id: of the family and the parameters, so that the same task has the same id everywhere,
            whatever its split.
        family: name of the task family.
        split: what it was drawn for; families whose splits overlap draw a task for several.
        params: what the family's environment needs to become this task; numbers and arrays only.
    """

    id: str
    family: str
    split: Split
    params: Mapping[str, float | np.ndarray]

    def to_json(self) -> dict[str, object]:
        """Plain numbers, strings and lists."""
        params = {k: np.asarray(v).tolist() for k, v in self.params.items()}
        return {"id": self.id, "family": self.family, "split": self.split, "params": params}

    @classmethod
    def from_json(cls, record: Mapping[str, object]) -> Task:
        """Inverse of `to_json`; lists become arrays."""
        raw = record["params"]
        assert isinstance(raw, Mapping)
        params = {k: np.asarray(v) if isinstance(v, list) else v for k, v in raw.items()}
        return cls(record["id"], record["family"], record["split"], params)  # type: ignore[arg-type]


def tasks_to_array(tasks: list[Task]) -> np.ndarray:
    """Tasks as one string array, so that they can stand among the arrays of a checkpoint."""
    return np.array(json.dumps([task.to_json() for task in tasks]))


def storable(state: Arrays) -> Arrays:
    """A shard's state as checkpoints hold it: arrays of tasks as text, which takes a while."""
    return {k: tasks_to_array(list(v)) if v.dtype == object else v for k, v in state.items()}


def tasks_from_array(array: np.ndarray) -> list[Task]:
    """Inverse of `tasks_to_array`; an array of tasks is just listed."""
    if array.dtype == object:
        return list(array)
    return [Task.from_json(record) for record in json.loads(str(array))]


@dataclass
class Rollout:
    """T steps of B environments.

    Made of NumPy arrays in a rollout worker, or of tensors where that is on a device, and of
    tensors in a learner.
    """

    task_index: Array  # (B,) int, into the tasks of the trial; envs of a task are contiguous
    policy_version: int  # Learner updates done before these actions were chosen.
    adaptation_step: Array  # (B,) int, adaptation steps done before; 0 = not adapted
    obs: Array  # (T + 1, B, *obs_shape), the last row is what follows the last step
    final_step: Array  # (N,) int, steps at which an episode ended ...
    final_env: Array  # (N,) int, ... in these environments ...
    final_obs: Array  # (N, *obs_shape), ... and the true successor there, before the auto-reset
    action: Array  # (T, B, *action_shape)
    reward: Array  # (T, B) float32
    terminated: Array  # (T, B) bool
    truncated: Array  # (T, B) bool
    mask: Array  # (T, B) bool, steps that count: not those after an environment's last episode
    all_count: bool  # No step is masked, as where all episodes have one length.
    reset: Array  # (T, B) bool, the policy's memory is reset before this step
    log_prob: Array  # (T, B), under the policy that acted
    value: Array  # (T, B), V(obs[t]) under the policy that acted
    next_value: Array  # (T, B), V of the true successor; 0 where terminated
    advantage: Array  # (T, B), set by the algorithm's collect
    value_target: Array  # (T, B), set by the algorithm's collect
    expert_action: Array  # (T, B, *action_shape), the expert's actions, where recorded
    previous_action: Array  # (B, *action_shape), before step 0; -1 or 0 where there is none
    previous_reward: Array  # (B,), before step 0
    previous_done: Array  # (B,) bool, before step 0; True at the start of a trial
    initial_memory: Memory  # leaves (B, ...), before step 0

    @property
    def num_steps(self) -> int:
        """T."""
        return int(self.reward.shape[0])

    @property
    def num_envs(self) -> int:
        """B."""
        return int(self.reward.shape[1])

    @property
    def num_tasks(self) -> int:
        """N, of the tasks that the environments play."""
        return int(self.task_index[-1]) + 1

    def envs_of(self, start: int, stop: int) -> slice:
        """The environments that play the tasks `start` to `stop`."""
        return slice(*(int((self.task_index < task).sum()) for task in (start, stop)))

    def of_tasks(self, start: int, stop: int) -> Rollout:
        """The rollout of the tasks `start` to `stop` alone; its arrays are views where they can."""
        envs = self.envs_of(start, stop)
        ended = (self.final_env >= envs.start) & (self.final_env < envs.stop)
        cut: dict[str, Any] = {}
        for field in fields(Rollout):
            name, value = field.name, getattr(self, field.name)
            if name.startswith("final_"):
                cut[name] = value[ended]
            elif name in ("task_index", "adaptation_step") or name.startswith("previous_"):
                cut[name] = value[envs]
            elif name == "initial_memory":
                cut[name] = tuple(leaf[envs] for leaf in value)
            elif hasattr(value, "dtype"):
                cut[name] = value[:, envs]
        cut["task_index"] = cut["task_index"] - start
        cut["final_env"] = cut["final_env"] - envs.start
        return replace(self, **cut)

    def counted(self, array: Array) -> Array:
        """(N, ...): the steps of an array (T, B, ...) that count."""
        rows = array.reshape(-1, *array.shape[2:])
        return rows if self.all_count else rows[self.mask.reshape(-1)]

    def has_experience(self) -> np.ndarray:
        """(B,) bool, environments on whose task a step counts, in any of its environments."""
        if self.all_count:
            return np.ones(self.num_envs, np.bool_)
        counted = np.bincount(self.task_index, self.mask.any(0)) > 0
        return np.asarray(counted[self.task_index])

    def mean_return(self) -> float:
        """Counted reward per episode, or per environment where episodes continue in later rollouts.

        Environments that had played all their episodes before are left out.
        """
        total, played = self.reward.sum(0), self.num_envs
        if not self.all_count:
            total, played = (self.reward * self.mask).sum(0), int(self.mask.any(0).sum())
        ended = int(((self.terminated | self.truncated) & self.mask).sum())
        return float(total.mean()) * (self.num_envs / max(ended, played, 1))

    def padded(self, num_steps: int) -> Rollout:
        """The same, followed by steps that do not count, up to `num_steps` in all."""
        extra = num_steps - self.num_steps
        if extra == 0:
            return self
        longer: dict[str, Any] = {}
        for field in fields(Rollout):
            value = getattr(self, field.name)
            if field.name == "obs":
                longer["obs"] = np.concatenate([value, np.repeat(value[-1:], extra, 0)])
            elif field.name not in _NOT_BY_STEP:
                longer[field.name] = np.pad(value, [(0, extra), *[(0, 0)] * (value.ndim - 1)])
        return replace(self, **longer, all_count=False)

    def fully_masked(self) -> Rollout:
        """The same with no step that counts: stands in for a rollout that was not needed."""
        return replace(self, mask=np.zeros_like(self.mask), all_count=False)

    def next_obs(self) -> Array:
        """(T, B, *obs_shape): the true successors, also where an episode ended."""
        following = (
            self.obs[1:].copy() if isinstance(self.obs, np.ndarray) else self.obs[1:].clone()
        )
        following[self.final_step, self.final_env] = self.final_obs
        return following

    def map(self, function: Callable[[Array], Array]) -> Rollout:
        """The same rollout with every array replaced by ``function(array)``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        arrays = {k: function(v) for k, v in values.items() if hasattr(v, "dtype")}
        state = tuple(function(leaf) for leaf in self.initial_memory)
        return replace(self, **arrays, initial_memory=state)

    @staticmethod
    def concatenate(rollouts: list[Rollout]) -> Rollout:
        """Shards side by side along B, in the order given, copied into fresh arrays.

        The shorter ones are padded. A single one of tensors is returned as it is.
        """
        longest = max(rollout.num_steps for rollout in rollouts)
        rollouts = [rollout.padded(longest) for rollout in rollouts]
        first = rollouts[0]
        join: Callable[..., Array] = np.concatenate
        if not isinstance(first.reward, np.ndarray):
            if len(rollouts) == 1:
                return first
            import torch

            join = torch.concatenate
        merged: dict[str, Any] = {}
        offset = np.cumsum([0] + [r.num_envs for r in rollouts])
        tasks = np.cumsum([0] + [r.num_tasks for r in rollouts])
        for field in fields(Rollout):
            parts = [getattr(r, field.name) for r in rollouts]
            if field.name == "policy_version":
                continue
            if field.name == "all_count":
                merged[field.name] = all(parts)
                continue
            if field.name == "initial_memory":
                merged[field.name] = tuple(join(leaf) for leaf in zip(*parts, strict=True))
            elif field.name == "adaptation_step":
                merged[field.name] = np.concatenate(parts)
            elif field.name == "task_index":
                merged[field.name] = np.concatenate(
                    [p + n for p, n in zip(parts, tasks, strict=False)]
                )
            elif field.name == "final_env":
                merged[field.name] = join([p + n for p, n in zip(parts, offset, strict=False)])
            elif field.name.startswith(("final_", "previous_")):
                merged[field.name] = join(parts)
            else:
                merged[field.name] = join(parts, axis=1)
        return replace(first, **merged)


_NOT_BY_STEP = {
    *("task_index", "policy_version", "adaptation_step", "all_count", "obs", "initial_memory"),
    *("final_step", "final_env", "final_obs"),
    *("previous_action", "previous_reward", "previous_done"),
}
"""Fields of a rollout that are not (T, B, ...)."""


Trial: TypeAlias = list[Rollout]
"""The rollouts of one trial in order: each environment stays on one task."""


def join_shards(trials: list[Trial]) -> Trial:
    """The trials of all shards side by side, rollout by rollout.

    Where a shard needed fewer rollouts than another, ones that do not count stand in their place.
    """
    most = max(map(len, trials))
    filled = [[*trial, *[trial[-1].fully_masked()] * (most - len(trial))] for trial in trials]
    return [Rollout.concatenate(list(shards)) for shards in zip(*filled, strict=True)]


def join_rows(parts: Sequence[Columns]) -> Columns:
    """The rows of all parts, which have the same columns, in order."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def random_stream(seed: int, *key: int | str) -> np.random.Generator:
    """The random stream that belongs to `key`: a pure function, without history.

    Words such as a stage's name are hashed to 32 bits, so that two different keys never share a
    stream by having been asked for in another order.
    """
    words = tuple(k if isinstance(k, int) else zlib.crc32(k.encode()) for k in key)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=words))


class EnvironmentFault(RuntimeError):
    """An environment broke the contract: it raised, or returned what it must not.

    Attributes:
        detail: plain values for the table of events: the task, its parameters, the environment and
            the step, as far as they are known; of families that step environments one by one
            the seed and the actions of the episode, too, by which it is played again.
        number: of the fault in its run, from 1; None if it is not in the table of events.
    """

    exit_code = 5
    number: int | None = None

    def __init__(self, message: str, detail: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.detail = dict(detail or {})
