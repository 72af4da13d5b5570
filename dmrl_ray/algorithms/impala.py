"""IMPALA: an actor-critic with off-policy correction for policy lag.

Source: Espeholt et al., "IMPALA: Scalable Distributed Deep-RL with Importance Weighted
Actor-Learner Architectures", 2018 (arXiv:1802.01561), section 4. V-trace takes values and
probabilities of the policy as it is when the update begins; the bootstrap value at a time limit
alone is the behaviour policy's. Advantages are standardised. Left out: a replay buffer.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from dmrl_ray.algorithms.actor_critic import (
    ActorCriticConfig,
    refuse_value_memory,
    sequences,
    updating_norms,
)
from dmrl_ray.algorithms.adaptation import Adaptation
from dmrl_ray.algorithms.base import Algorithm, continued
from dmrl_ray.config.components import Number
from dmrl_ray.learn.gradients import Batch, Report
from dmrl_ray.learn.minibatches import pi_and_value
from dmrl_ray.losses.averages import counted_mean, standardized
from dmrl_ray.losses.policy_gradient import policy_gradient_loss, value_loss
from dmrl_ray.losses.returns import vtrace
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.networks.base import Memory
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Rollout, Task, Trial


class VTraceConfig(ActorCriticConfig):
    """Settings of actor-critics with V-trace."""

    num_steps: Number = 32
    """Steps of each environment between updates; episodes continue over updates."""

    gae_lambda: float = Field(default=1.0, ge=0, le=1)
    """Shortens the traces of V-trace; 1 is the paper's."""

    rho_bar: float = Field(default=1.0, gt=0)
    """Truncation of the importance weight of a step's own error; it sets the fixed point."""

    c_bar: float = Field(default=1.0, gt=0)
    """Truncation of the weights of the trace; it sets the speed of convergence."""


class IMPALA(Algorithm):
    """One pass over each batch of sequences, along the policy gradient that V-trace corrects."""

    class Config(VTraceConfig):
        """V-trace and nothing else."""

        lr: float = Field(default=5e-4, gt=0)  # CartPole is lost at 2e-3: nothing clips a step
        """Step size."""

    config: VTraceConfig
    continues_episodes = True
    corrects_for_lag = True
    on_device = True
    compiles = True

    def __init__(
        self, config: VTraceConfig, distribution: TaskDistribution, policy: ActorCritic
    ) -> None:
        super().__init__(config, distribution, policy)
        refuse_value_memory(policy)

    @property
    def collected_steps(self) -> int:
        return self.config.num_steps

    def own_adaptation(self) -> Adaptation:
        """Training continues on each task by itself."""
        return continued(self, self.config.gamma)

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """Sequences of n steps under the behaviour policy mu (section 3)."""
        sampler.continue_episodes(tasks, self.policy)
        return [sampler.rollout(self.policy, self.config.num_steps)]

    def update(self, trial: Trial) -> dict[str, float]:
        """Section 4.2: V-trace targets once, then a pass over minibatches of the batch."""
        config = self.config
        rollout, behaviour_kl = with_vtrace(self.policy, trial[0], config)
        loss = partial(impala_loss, self.policy, value_coef=config.value_coef)
        with updating_norms(self, rollout):
            batch = impala_batch(self.policy, rollout, config.entropy_weight(self.progress))
            metrics = self.optimize(loss, batch, epochs=1, minibatches=config.minibatches)
        return metrics | {"behaviour_kl": behaviour_kl}


@torch.no_grad()
def with_vtrace(
    policy: ActorCritic, rollout: Rollout, config: VTraceConfig
) -> tuple[Rollout, float]:
    """The rollout with V-trace targets, and the divergence of the policy from the behaviour policy.

    Returns:
        The rollout with the log-probabilities of the policy, V-trace's value targets (eq. 1) and
        advantages (section 4.2); and an estimate of the KL divergence in nats.
    """
    training = policy.training
    policy.eval()  # as the workers' policy was
    log_prob, value = _log_prob_and_value(policy, rollout)
    policy.train(training)
    log_ratio = log_prob - rollout.log_prob
    done = rollout.terminated | rollout.truncated
    target, advantage = vtrace(
        log_ratio.exp(),
        rollout.reward,
        value[:-1],
        torch.where(done, rollout.next_value, value[1:]),
        rollout.terminated,
        rollout.truncated,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        rho_bar=config.rho_bar,
        c_bar=config.c_bar,
    )
    behaviour_kl = float((log_ratio.exp() - 1 - log_ratio).mean())
    rollout = replace(rollout, log_prob=log_prob, advantage=advantage, value_target=target)
    return rollout, behaviour_kl


def _log_prob_and_value(policy: ActorCritic, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Log-probabilities (T, B) and values (T + 1, B) of the policy, in units of return."""
    memory: Memory = ()
    reset: Tensor | None = None
    if policy.recurrent:
        done = rollout.terminated | rollout.truncated
        memory, reset = rollout.initial_memory, torch.cat([rollout.reset, done[-1:]])
    pi, features, _ = policy(rollout.obs, None, memory, reset)
    shared = policy.value_encoder is None
    value = policy.denormalize_value(policy.value(features if shared else None, rollout.obs))
    return policy.policy_head.log_prob(pi[:-1], rollout.action), value


def impala_batch(policy: ActorCritic, rollout: Rollout, entropy_weight: float) -> Batch:
    """All that `impala_loss` reads of a corrected rollout."""
    return sequences(
        policy,
        rollout,
        action=rollout.action,
        advantage=standardized(rollout.advantage, None if rollout.all_count else rollout.mask),
        entropy_weight=torch.tensor(entropy_weight, device=rollout.reward.device),
    )


def impala_loss(policy: ActorCritic, batch: Batch, *, value_coef: float) -> tuple[Tensor, Report]:
    """The three terms of section 4.2; the advantages carry the weight rho."""
    mask = batch.get("mask")
    pi, value = pi_and_value(policy, batch)
    log_prob, entropies = policy.policy_head.log_prob_and_entropy(pi, batch["action"])
    policy_loss = policy_gradient_loss(log_prob, batch["advantage"], mask=mask)
    value_error = value_loss(value, batch["target"], mask=mask)
    entropy = counted_mean(entropies, mask)
    loss = policy_loss + value_coef * value_error - batch["entropy_weight"] * entropy
    return loss, {"policy_loss": policy_loss, "value_loss": value_error, "entropy": entropy}
