"""Proximal policy optimisation, over one task or many at once.

Source: Schulman et al., "Proximal Policy Optimization Algorithms", 2017 (arXiv:1707.06347),
algorithm 1. With a recurrent encoder this is recurrent PPO: minibatches are whole columns and
memory starts from what the worker had. Left out: the adaptive KL penalty, value clipping.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from dmrl_ray.algorithms.adaptation import Adaptation
from dmrl_ray.algorithms.base import Algorithm, continued
from dmrl_ray.backend import as_kind_of
from dmrl_ray.config.components import Number
from dmrl_ray.learn.minibatches import in_columns, previous_in, shown, step_through
from dmrl_ray.losses.averages import counted_mean, standardized
from dmrl_ray.losses.policy_gradient import ppo_clip_loss
from dmrl_ray.losses.returns import generalized_advantage
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.networks.base import Memory
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Rollout, Task, Trial


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

    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""

    anneal_entropy: bool = False
    """Lower that weight linearly over the budget, as `anneal_lr` does the step size."""


class ClipConfig(ActorCriticConfig):
    """Settings of the clipped update, shared by every algorithm that uses it."""

    epochs: Number = 4
    """Passes over each batch."""

    clip: float = Field(default=0.2, gt=0)  # Schulman et al. 2017, table 3
    """Half-width of the trust interval around ratio 1."""


class PPO(Algorithm):
    """Clipped surrogate on advantages that the worker computed once."""

    class Config(ClipConfig):
        num_steps: Number = 128
        """Steps in each column between updates; episodes go on over updates."""

    config: BatchConfig
    continues_episodes = True
    corrects_for_lag = True
    on_device = True
    compiles = True
    in_precision = True
    labels: tuple[str, ...] = ("action", "log_prob")
    """What the loss reads of a rollout as it is."""

    def __init__(
        self, config: BatchConfig, distribution: TaskDistribution, policy: ActorCritic
    ) -> None:
        super().__init__(config, distribution, policy)
        if policy.recurrent and policy.value_encoder is not None and not self.memory_spans_trial:
            raise ValueError(
                "network.separate_value: a value function with a memory of its own needs whole "
                "trials, which ppo does not collect; use false or null"
            )

    @property
    def collected_steps(self) -> int:
        steps: int = getattr(self.config, "num_steps", 0)
        return steps

    @property
    def epochs(self) -> int:
        """Passes over each batch."""
        assert isinstance(self.config, ClipConfig)
        return self.config.epochs

    @classmethod
    def schedules(cls, config: Any) -> list[str]:
        anneals = isinstance(config, ActorCriticConfig) and config.anneal_entropy
        return super().schedules(config) + (["anneal_entropy"] if anneals else [])

    @property
    def entropy_weight(self) -> float:
        """Of the entropy bonus, at this point of the budget."""
        if not isinstance(self.config, ActorCriticConfig):
            return 0.0
        left = 1.0 - self.progress if self.config.anneal_entropy else 1.0
        return self.config.entropy_coef * left

    def own_adaptation(self) -> Adaptation:
        """Training goes on, unless memory spans the trial and adapts."""
        if self.memory_spans_trial:
            return self
        return continued(self, self.config.gamma)

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        assert isinstance(self.config, PPO.Config)
        sampler.continue_episodes(tasks, self.policy)
        return [self.with_advantage(sampler.rollout(self.policy, self.config.num_steps))]

    def with_advantage(self, rollout: Rollout) -> Rollout:
        """The rollout with its advantages and value targets."""
        arrays = (rollout.reward, rollout.value, rollout.next_value)
        masks = (rollout.terminated, rollout.truncated)
        advantage = generalized_advantage(
            *(torch.as_tensor(x) for x in arrays + masks),
            gamma=self.config.gamma,
            gae_lambda=self.config.gae_lambda,
        )
        rollout.advantage = as_kind_of(rollout.value, advantage)
        rollout.value_target = rollout.advantage + rollout.value
        return rollout

    def update(self, trial: Trial) -> dict[str, float]:
        (rollout,) = trial
        target = rollout.value_target
        first = self.policy.begin_value_norm(target)
        batch = self._batch(rollout)
        skipped = self.skipped_batches
        metrics = step_through(
            self, batch, self._loss, epochs=self.epochs, minibatches=self.config.minibatches
        )
        if self.skipped_batches == skipped:  # else the targets may not be finite either
            self.policy.update_norms(rollout, None if first else target)
        return metrics

    def _batch(self, rollout: Rollout) -> dict[str, Tensor]:
        """Everything the loss reads, (T, B, ...); without memory every step is its own column."""
        mask = None if rollout.all_count else rollout.mask
        batch = {
            **shown(self.policy, rollout),
            **{name: getattr(rollout, name) for name in self.labels},
            "advantage": standardized(rollout.advantage, mask),
            "target": self.policy.normalize_value(rollout.value_target),
        }
        if self.policy.recurrent:
            starts = rollout.reset[0]
            for i, leaf in enumerate(rollout.initial_memory):
                batch[f"memory.{i}"] = (leaf * ~starts.unsqueeze(-1)).unsqueeze(0)
        weight = torch.tensor(self.entropy_weight, device=rollout.reward.device)
        return in_columns(self.policy, batch) | {"entropy_weight": weight}

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a minibatch, and what to report of it."""
        assert isinstance(self.config, ClipConfig)
        mask = batch.get("mask")
        pi, value_loss = self._forward(batch)
        log_prob, entropies = self.policy.policy_head.log_prob_and_entropy(pi, batch["action"])
        policy_loss = ppo_clip_loss(
            log_prob, batch["log_prob"], batch["advantage"], clip=self.config.clip, mask=mask
        )
        entropy = counted_mean(entropies, mask)
        loss = policy_loss + self.config.value_coef * value_loss - batch["entropy_weight"] * entropy
        with torch.no_grad():
            log_ratio = log_prob - batch["log_prob"]
            off_one = log_ratio.expm1()  # the ratio, less 1
            approx_kl = counted_mean(off_one - log_ratio, mask)
            clipped = off_one.abs() > self.config.clip
        report = {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": entropy,
            "approx_kl": approx_kl,
            "clip_fraction": counted_mean(clipped.float(), mask),
        }
        return loss, report

    def _forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Distribution parameters (T, B, P) of a minibatch, and its value loss."""
        previous = previous_in(batch)
        memory: Memory = tuple(x[0] for name, x in batch.items() if name.startswith("memory."))
        reset = batch.get("reset")
        pi, features, _ = self.policy(batch["obs"], previous, memory, reset)
        shared = self.policy.value_encoder is None
        value = self.policy.value(features if shared else None, batch["obs"], previous, reset)
        return pi, self._value_loss(value, batch)

    def _value_loss(self, value: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return 0.5 * counted_mean((value - batch["target"]).square(), batch.get("mask"))
