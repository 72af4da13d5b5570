"""Common to actor-critics that learn from minibatches: settings, the batch, the normalisers.

An algorithm composes these functions in its own `update`; none of them calls another algorithm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.backend import as_kind_of
from dmrl_ray.config.components import Number
from dmrl_ray.learn.gradients import Batch
from dmrl_ray.learn.minibatches import as_sequences, observed
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.types import Rollout


class BatchConfig(Algorithm.Config):
    """Settings of an update in minibatches, shared by every algorithm that makes one."""

    minibatches: Number = 4
    """Gradient steps per pass over a batch."""

    gamma: float = Field(default=0.99, ge=0, le=1)
    """Discount per environment step."""

    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """0 trusts the value function, 1 the returns."""

    value_coef: float = Field(default=0.5, ge=0)
    """Weight of the value loss, in units of normalised returns."""


class ActorCriticConfig(BatchConfig):
    """Settings of policy gradients in minibatches."""

    read_with: ClassVar = {"anneal_entropy": ("entropy_coef", ())}
    scheduled: ClassVar = (*BatchConfig.scheduled, "anneal_entropy")

    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""

    anneal_entropy: bool = False
    """Lower that weight linearly over the budget, as `anneal_lr` does the step size."""

    def entropy_weight(self, progress: float) -> float:
        """Weight of the entropy bonus where this share of the budget is spent."""
        return self.entropy_coef * (1.0 - progress if self.anneal_entropy else 1.0)


def refuse_value_memory(policy: ActorCritic) -> None:
    """See that the value function has no memory of its own, which only whole trials can fill.

    Raises:
        ValueError: it has one.
    """
    if policy.recurrent and policy.value_encoder is not None:
        raise ValueError(
            "network.separate_value: a value function with a memory of its own needs whole "
            "trials, which ppo does not collect; use false or null"
        )


def with_targets(rollout: Rollout, advantage: Tensor) -> Rollout:
    """The rollout with these advantages, and the values they add up to as value targets."""
    rollout.advantage = as_kind_of(rollout.value, advantage)
    rollout.value_target = rollout.advantage + rollout.value
    return rollout


@contextmanager
def updating_norms(algorithm: Algorithm, rollout: Rollout) -> Iterator[None]:
    """Update the policy's normalisers with a rollout after the gradient steps within.

    The first value targets of all are seen before the first step, which is in their units. Where
    a step was skipped the targets may not be finite either, and the normalisers stay as they are.
    """
    policy, target, skipped = algorithm.policy, rollout.value_target, algorithm.skipped_batches
    first = policy.begin_value_norm(target)
    yield
    if algorithm.skipped_batches == skipped:
        policy.update_norms(rollout, None if first else target)


def sequences(policy: ActorCritic, rollout: Rollout, **labels: Tensor) -> Batch:
    """The inputs of policy and value function, the memory they begin with, and what is learned.

    Args:
        policy: that is trained.
        rollout: of tensors, with value targets.
        labels: (T, B, ...) or (), what else the loss reads.

    Returns:
        (T, B, ...) by name; without a memory every step is a sequence of its own.
    """
    batch = observed(policy, rollout) | labels
    batch["target"] = policy.normalize_value(rollout.value_target)
    if policy.recurrent:
        starts = rollout.reset[0]
        for i, leaf in enumerate(rollout.initial_memory):
            batch[f"memory.{i}"] = (leaf * ~starts.unsqueeze(-1)).unsqueeze(0)
    return as_sequences(policy, batch)
