"""Replay: a ring of the last trials, each column of a trial in a slot of its own.

A slot holds what one task has shown, in the order in which it was lived through, so that tasks
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
    """Steps of N trials; what a step led to is the true successor, also where an episode ended."""

    obs: Tensor  # (N, K, *obs_shape)
    action: Tensor  # (N, K, *action_shape)
    reward: Tensor  # (N, K)
    next_obs: Tensor  # (N, K, *obs_shape)
    terminated: Tensor  # (N, K) bool
    truncated: Tensor  # (N, K) bool


class TrialReplay:
    """The last `capacity` columns of trials, all of one length; memory is taken at the first `add`.

    Args:
        capacity: slots; the bound of memory, a slot takes its T steps with two observations each.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.size = 0
        self._next = 0
        self._arrays: dict[str, Tensor] = {}

    @property
    def num_steps(self) -> int:
        """T, of every trial."""
        return self._arrays["reward"].shape[1]

    def add(self, trial: Trial) -> None:
        """Put every column of a trial of tensors into a slot, over the oldest where all are full.

        The rollouts follow each other in time. Of more columns than slots the last ones stay.
        """
        new = {}
        for name in _NAMES:
            parts = [_steps(rollout, name) for rollout in trial]
            new[name] = torch.cat(parts).transpose(0, 1)[-self.capacity :]
        columns = len(new["reward"])
        if not self._arrays:
            self._arrays = {
                name: x.new_zeros(self.capacity, *x.shape[1:]) for name, x in new.items()
            }
        slots = (self._next + torch.arange(columns)) % self.capacity
        for name, x in new.items():
            self._arrays[name][slots] = x
        self._next = (self._next + columns) % self.capacity
        self.size = min(self.capacity, self.size + columns)

    def draw(self, rng: np.random.Generator, num_trials: int) -> np.ndarray:
        """(N,) different slots, or as many as there are."""
        return rng.choice(self.size, min(num_trials, self.size), replace=False)

    def take(self, slots: np.ndarray, steps: np.ndarray | slice = slice(None)) -> Transitions:
        """Steps of slots (N,): those given as (N, K), each slot its own, or one slice for all."""
        rows = torch.from_numpy(slots)
        if isinstance(steps, slice):
            return Transitions(**{k: x[rows, steps] for k, x in self._arrays.items()})
        rows, at = rows.unsqueeze(1), torch.from_numpy(steps)
        return Transitions(**{k: x[rows, at] for k, x in self._arrays.items()})

    def get_state(self) -> Arrays:
        """Everything, copied; for a checkpoint."""
        state = {k: x[: self.size].cpu().numpy().copy() for k, x in self._arrays.items()}
        return state | {"next": np.array(self._next)}

    def set_state(self, state: Arrays, device: torch.device) -> None:
        """Continue from `get_state`'s answer.

        Raises:
            ValueError: it holds more trials than this ring has slots, or another number at a wrap.
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


def _steps(rollout: Rollout, name: str) -> Tensor:
    """(T, B, ...) of a rollout of tensors."""
    if name == "next_obs":
        following: Tensor = rollout.next_obs()
        return following
    array: Tensor = getattr(rollout, name)
    return array[: rollout.num_steps]
