"""Replay buffer: a ring of the last trials, each environment's in a slot of its own.

A slot holds the transitions of one task in the order in which they were collected, so that tasks
never mix. Batches are (N, K, ...): N slots with K steps each.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from dmrl_ray.types import Arrays, Rollout, Trial


@dataclass(frozen=True)
class Transitions:
    """Steps of N trials; next observations are true successors, also where an episode ended."""

    obs: Tensor  # (N, K, *obs_shape)
    action: Tensor  # (N, K, *action_shape)
    reward: Tensor  # (N, K)
    next_obs: Tensor  # (N, K, *obs_shape)
    terminated: Tensor  # (N, K) bool
    truncated: Tensor  # (N, K) bool
    mask: Tensor  # (N, K) bool, steps that count; trials shorter than the longest are padded


class ReplayBuffer:
    """The last `capacity` trials of an environment each; memory is allocated at the first `add`.

    Only steps that count are kept. A slot has room for the longest trial so far.

    Args:
        capacity: slots, of T steps with two observations each; bounds the memory.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        self._next = 0
        self._arrays: dict[str, Tensor] = {}

    @property
    def num_steps(self) -> int:
        """T, of the longest trial."""
        return self._arrays["reward"].shape[1]

    def lengths(self, slots: np.ndarray, episodes: int | None = None) -> np.ndarray:
        """(N,) steps of the trials in slots, or of their first episodes."""
        mask = self._arrays["mask"][torch.from_numpy(slots)]
        if episodes is not None:
            done = (self._arrays["terminated"] | self._arrays["truncated"])[torch.from_numpy(slots)]
            before = done.cumsum(1) - done.to(torch.int64)  # episodes that ended before a step
            mask = mask & (before < episodes)
        lengths: np.ndarray = mask.sum(1).cpu().numpy()
        return lengths

    def add(self, trial: Trial) -> None:
        """Store every environment of a trial of tensors in a slot, over the oldest if all are full.

        The rollouts follow each other in time. Of more environments than slots the last ones stay.
        """
        new = {}
        for name in _NAMES:
            parts = [_steps(rollout, name) for rollout in trial]
            new[name] = torch.cat(parts).transpose(0, 1)[-self.capacity :]
        if not all(rollout.all_count for rollout in trial):
            new = _counted_first(new)
        num_envs, length = new["reward"].shape
        if not self._arrays:
            self._arrays = {
                name: x.new_zeros(self.capacity, *x.shape[1:]) for name, x in new.items()
            }
        elif length > self.num_steps:
            self._arrays = {
                name: torch.cat([x, x.new_zeros(len(x), length - x.shape[1], *x.shape[2:])], 1)
                for name, x in self._arrays.items()
            }
        slots = (self._next + torch.arange(num_envs)) % self.capacity
        for name, x in new.items():
            if length < self.num_steps:
                self._arrays[name][slots] = 0
            self._arrays[name][slots, :length] = x
        self._next = (self._next + num_envs) % self.capacity
        self.size = min(self.capacity, self.size + num_envs)

    def sample(self, rng: np.random.Generator, num_trials: int) -> np.ndarray:
        """(N,) different slots at random, or as many as there are."""
        return rng.choice(self.size, min(num_trials, self.size), replace=False)

    def sample_steps(self, rng: np.random.Generator, slots: np.ndarray, count: int) -> np.ndarray:
        """(N, count) steps of slots (N,), each uniform over those of its trial."""
        return integers_below(rng, self.lengths(slots), count)

    def take(self, slots: np.ndarray, steps: np.ndarray | slice = slice(None)) -> Transitions:
        """Transitions of slots (N,): at steps (N, K), or at one slice of all of them."""
        rows = torch.from_numpy(slots)
        if isinstance(steps, slice):
            return Transitions(**{k: x[rows, steps] for k, x in self._arrays.items()})
        rows, at = rows.unsqueeze(1), torch.from_numpy(steps)
        return Transitions(**{k: x[rows, at] for k, x in self._arrays.items()})

    def get_state(self) -> Arrays:
        """A copy of all arrays, for a checkpoint."""
        state = {k: x[: self.size].cpu().numpy().copy() for k, x in self._arrays.items()}
        return state | {"next": np.array(self._next)}

    def set_state(self, state: Arrays, device: torch.device) -> None:
        """Continue from `get_state`'s answer.

        Raises:
            ValueError: it has more trials than this buffer has slots, or wrapped at another number.
        """
        arrays = {k: torch.tensor(v, device=device) for k, v in state.items() if k != "next"}
        self._next = int(state["next"])
        self.size = len(arrays["reward"]) if arrays else 0
        if self.size > self.capacity or (self.size < self.capacity) != (self._next == self.size):
            raise ValueError(f"replay: {self.size} trials do not fit into {self.capacity} slots")
        self._arrays = {}
        for name, x in arrays.items():
            self._arrays[name] = x.new_zeros(self.capacity, *x.shape[1:])
            self._arrays[name][: self.size] = x


_NAMES = tuple(field.name for field in fields(Transitions))


def integers_below(rng: np.random.Generator, bounds: np.ndarray, count: int) -> np.ndarray:
    """(N, count) integers, those of a row uniform below its bound."""
    shape = (len(bounds), count)
    if (bounds == bounds[0]).all():
        return rng.integers(bounds[0], size=shape)
    return (rng.random(shape) * bounds[:, None]).astype(np.int64)


def _steps(rollout: Rollout, name: str) -> Tensor:
    """(T, B, ...) of a rollout of tensors."""
    if name == "next_obs":
        following: Tensor = rollout.next_obs()
        return following
    array: Tensor = getattr(rollout, name)
    return array[: rollout.num_steps]


def _counted_first(new: dict[str, Tensor]) -> dict[str, Tensor]:
    """Arrays (B, T, ...) with the steps that count first, and as little padding as possible."""
    order = (~new["mask"]).to(torch.uint8).argsort(dim=1, stable=True)
    order = order[:, : int(new["mask"].sum(1).max())]
    row = torch.arange(len(order), device=order.device).unsqueeze(1)
    return {name: x[row, order] for name, x in new.items()}
