"""Learning from recorded steps: `collect` reads them, so that rollout workers are data loaders.

All else is as it is online: shards, workers, several learners, commits and exact resume. Steps that
are read count as environment steps of the budget.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from torch import Tensor

from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.config.components import Number
from dmrl_ray.data.dataset import Dataset
from dmrl_ray.data.sources import DataSettings, source_of
from dmrl_ray.learn.gradients import Batch
from dmrl_ray.learn.minibatches import as_sequences, observed
from dmrl_ray.networks.base import Memory
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.types import Rollout, Task, Trial


def open_dataset(algorithm: Algorithm, settings: DataSettings) -> Dataset:
    """What `settings` name, for the algorithm's task family; it is among the algorithm's datasets.

    Raises:
        ValueError: it is not there, or does not fit the family.
    """
    family = algorithm.distribution
    dataset = Dataset(
        source_of(settings, algorithm.run_folder),
        family.observation_space,
        family.action_space,
        memory_bytes=settings.memory_mb << 20,
    )
    algorithm.datasets = (*algorithm.datasets, dataset)
    return dataset


class Offline(Algorithm):
    """Gradient steps on minibatches of recorded sequences."""

    class Config(Algorithm.Config):
        data: DataSettings
        """What is learned from."""

        num_steps: Number | None = None
        """Steps read into each column between updates; null is as many as a trial has, and at most
        128 for policies without memory."""

        epochs: Number = 1
        """Passes over what was read."""

        minibatches: Number = 4
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

    @property
    def collected_steps(self) -> int:
        return self.num_steps

    def read(self, rng: np.random.Generator, columns: int) -> Trial:
        """A batch of the data: whole episodes where memory reads them, else steps as they come."""
        if self.policy.recurrent:
            return [self.dataset.units(rng, "episode", columns, self.num_steps)]
        return [self.dataset.windows(rng, columns, self.num_steps)]

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
        def loss(batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            value, report = self.loss(batch)
            return value, {"loss": value, **report}

        config, batch = self.config, self.batch(trial)
        metrics = self.optimize(loss, batch, epochs=config.epochs, minibatches=config.minibatches)
        self.policy.update_norms(trial[0], None)
        return metrics

    def inputs(self, rollout: Rollout) -> Batch:
        """The inputs of the policy in a rollout, and the actions."""
        batch = observed(self.policy, rollout) | {"action": rollout.action}
        return as_sequences(self.policy, batch)

    def empty_memory(self, batch: dict[str, Tensor]) -> Memory:
        """The memory before a minibatch: every column begins with a reset."""
        obs = batch["obs"]
        return tuple(m.to(obs.device) for m in self.policy.initial_memory(obs.shape[1]))
