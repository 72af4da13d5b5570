"""Learning from recorded steps: `collect` reads them, so that rollout workers are data loaders.

All else is as it is online: shards, workers, several learners, commits and exact resume. Steps that
are read count as environment steps of the budget.
"""

from __future__ import annotations

from abc import abstractmethod
from itertools import pairwise

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.data_sources import DataSettings, source_of
from dmrl_ray.dataset import Dataset
from dmrl_ray.networks.base import Memory
from dmrl_ray.policy import Previous, previous_inputs
from dmrl_ray.rollout import Sampler
from dmrl_ray.types import Rollout, Task, Trial


def open_dataset(algorithm: Algorithm, settings: DataSettings) -> Dataset:
    """What `settings` name, for the algorithm's task family.

    Raises:
        ValueError: it is not there, or does not fit the family.
    """
    family = algorithm.distribution
    return Dataset(
        source_of(settings, algorithm.run_folder),
        family.observation_space,
        family.action_space,
        memory_bytes=settings.memory_mb << 20,
    )


class Offline(Algorithm):
    """Gradient steps on minibatches of recorded sequences."""

    class Config(Algorithm.Config):
        data: DataSettings
        """What is learned from."""

        num_steps: int | None = Field(default=None, ge=1)
        """Steps read into each column between updates; null is as many as a trial has, and at most
        128 for policies without memory."""

        epochs: int = Field(default=1, ge=1)
        """Passes over what was read."""

        minibatches: int = Field(default=4, ge=1)
        """Gradient steps per pass."""

    config: Config
    recordable = False
    _dataset: Dataset | None = None

    @property
    def dataset(self) -> Dataset:
        """The data, opened when they are first read."""
        if self._dataset is None:
            self._dataset = open_dataset(self, self.config.data)
        return self._dataset

    @property
    def num_steps(self) -> int:
        """Steps read into each column."""
        steps = self.distribution.trial_steps
        return self.config.num_steps or (steps if self.policy.recurrent else min(128, steps))

    @abstractmethod
    def read(self, rng: np.random.Generator, columns: int) -> Trial:
        """A batch of the data."""

    @abstractmethod
    def batch(self, trial: Trial) -> dict[str, Tensor]:
        """What the loss reads, (T, B, ...) each."""

    @abstractmethod
    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a minibatch of columns, and what to report of it."""

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """Nothing is played."""
        return self.read(sampler.rng, sampler.num_envs)

    def update(self, trial: Trial) -> dict[str, float]:
        batch = self.batch(trial)
        columns = next(iter(batch.values())).shape[1]
        count = min(self.config.minibatches, columns)
        bounds = [columns * i // count for i in range(count + 1)]
        steps = []
        for _ in range(self.config.epochs):
            order = torch.from_numpy(self.rng.permutation(columns)).to(trial[0].reward.device)
            shuffled = {name: x.index_select(1, order) for name, x in batch.items()}
            for start, stop in pairwise(bounds):
                mine = slice(start + self.rank, stop, self.world_size)
                loss, report = self.loss({name: x[:, mine] for name, x in shuffled.items()})
                share = len(range(mine.start, stop, self.world_size)) / (stop - start)
                norm = self.step_optimizer(loss * share * self.world_size)
                report = {"loss": loss, **report, "grad_norm": norm}
                steps.append(torch.stack([x.detach() for x in report.values()]))
        self.policy.update_norms(trial[0], None)
        return dict(zip(report, torch.stack(steps).mean(0).tolist(), strict=True))

    def inputs(self, rollout: Rollout) -> dict[str, Tensor]:
        """What the policy is shown in a rollout; without memory every step is its own column."""
        batch = {"obs": rollout.obs[:-1], "action": rollout.action}
        if self.policy.sees_previous:
            names = ("previous_action", "previous_reward", "previous_done")
            batch |= dict(zip(names, previous_inputs(rollout), strict=True))
        if not self.policy.recurrent:
            return {name: x.flatten(0, 1).unsqueeze(0) for name, x in batch.items()}
        if rollout.reset_state[1:].any():
            batch["reset"] = rollout.reset_state
        return batch

    def previous(self, batch: dict[str, Tensor]) -> Previous | None:
        """The previous steps in a minibatch, if the policy sees them."""
        if not self.policy.sees_previous:
            return None
        return batch["previous_action"], batch["previous_reward"], batch["previous_done"]

    def empty_memory(self, batch: dict[str, Tensor]) -> Memory:
        """The memory before a minibatch: every column begins with a reset."""
        obs = batch["obs"]
        return tuple(m.to(obs.device) for m in self.policy.initial_memory(obs.shape[1]))
