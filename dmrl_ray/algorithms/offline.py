"""Common to algorithms that learn from recorded steps: the data, and passes over a batch of them.

`collect` reads, so that rollout workers are data loaders. All else is as it is online: shards,
workers, several learners, commits and exact resume. Steps that are read count as environment steps
of the budget.
"""

from __future__ import annotations

from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.config.components import Number
from dmrl_ray.data.dataset import Dataset
from dmrl_ray.data.sources import DataSettings, source_of
from dmrl_ray.learn.gradients import Batch, Loss
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.networks.base import Memory
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.types import Rollout


def open_dataset(algorithm: Algorithm, settings: DataSettings) -> Dataset:
    """The data that `settings` name, for the algorithm's task family, and among its datasets.

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
        """The recorded steps to learn from."""

        num_steps: Number | None = None
        """Steps read for each environment between updates; null is as many as a trial has, and at
        most 128 for policies without memory."""

        epochs: Number = 1
        """Passes over each batch."""

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
        """Steps read for each environment."""
        steps = self.distribution.trial_steps
        return self.config.num_steps or (steps if self.policy.recurrent else min(128, steps))

    @property
    def collected_steps(self) -> int:
        return self.num_steps

    def read(self, sampler: Sampler) -> Rollout:
        """Whole episodes where the policy has a memory, else steps as they come."""
        rng, envs, steps = sampler.rng, sampler.num_envs, self.num_steps
        if self.policy.recurrent:
            return self.dataset.units(rng, "episode", envs, steps)
        return self.dataset.windows(rng, envs, steps)

    def fit(self, loss: Loss, batch: Batch, rollout: Rollout) -> dict[str, float]:
        """Pass over the batch of a rollout, whose observations then count for the normaliser."""
        config = self.config
        metrics = self.optimize(loss, batch, epochs=config.epochs, minibatches=config.minibatches)
        self.policy.update_norms(rollout, None)
        return metrics


def empty_memory(policy: ActorCritic, batch: Batch) -> Memory:
    """The memory before a minibatch whose sequences all begin with a reset."""
    obs = batch["obs"]
    return tuple(leaf.to(obs.device) for leaf in policy.initial_memory(obs.shape[1]))
