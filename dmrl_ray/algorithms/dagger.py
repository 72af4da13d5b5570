"""DAgger: imitation of an expert in the states that the policy itself comes to.

Source: Ross et al., "A Reduction of Imitation Learning and Structured Prediction to No-Regret
Online Learning", 2011 (arXiv:1011.0686), algorithm 3.1, with the newest iteration's data alone in
place of all data so far: simulated experts answer for free. The expert is fair
(`TaskVectorEnv.expert_action`): it knows what it has observed, so that a policy with memory can
come to do the same. Duan et al. 2016 (arXiv:1611.02779, section 3.1) found that RL^2 is kept from
the Gittins index by its optimisation and not by its network; this is the way around that.

The value function learns the returns of the policy that acts, so that reinforcement learning can
take over without a jump.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from dmrl_ray.algorithms.actor_critic import BatchConfig, sequences, updating_norms
from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.algorithms.rl2 import with_trial_advantage
from dmrl_ray.config.components import Number
from dmrl_ray.learn.gradients import Batch, Report
from dmrl_ray.learn.minibatches import pi_and_value
from dmrl_ray.losses.averages import counted_mean
from dmrl_ray.losses.imitation import expert_action_loss
from dmrl_ray.losses.policy_gradient import value_loss
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.types import Task, Trial


class DAgger(Algorithm):
    """Whole trials, in which every step is labelled with the expert's action."""

    class Config(BatchConfig):
        read_with: ClassVar = {"beta_until": ("beta", ())}
        scheduled: ClassVar = (*BatchConfig.scheduled, "beta")

        lr: float = Field(default=2e-3, gt=0)
        """Step size."""

        epochs: Number = 1
        """Passes over each batch."""

        beta: float = Field(default=0.5, ge=0, le=1)
        """Share of the environments in which the expert acts at first (beta in the paper)."""

        beta_until: float = Field(default=0.5, gt=0, le=1)
        """Share of the budget after which it acts in none; the decline is linear."""

    config: Config
    memory_spans_trial = True
    corrects_for_lag = True
    compiles = True

    @property
    def asked(self) -> str:
        return "expert_action"

    @property
    def collected_steps(self) -> int:
        return self.distribution.trial_steps

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """Act by pi_i = beta_i pi* + (1 - beta_i) pi, and note pi*'s action at every step."""
        config = self.config
        sampler.env.remembers = True
        sampler.begin_trial(tasks, self.policy, self.distribution.episodes_per_trial)
        beta = config.beta * max(0.0, 1 - self.progress / config.beta_until)
        rollout = sampler.rollout(self.policy, beta=beta)
        return [with_trial_advantage(rollout, gamma=config.gamma, gae_lambda=config.gae_lambda)]

    def update(self, trial: Trial) -> dict[str, float]:
        """Train pi_(i + 1) on the labelled steps."""
        (rollout,), config, policy = trial, self.config, self.policy
        loss = partial(dagger_loss, policy, value_coef=config.value_coef)
        with updating_norms(self, rollout):
            batch = sequences(policy, rollout, expert_action=rollout.expert_action)
            return self.optimize(loss, batch, epochs=config.epochs, minibatches=config.minibatches)


def dagger_loss(policy: ActorCritic, batch: Batch, *, value_coef: float) -> tuple[Tensor, Report]:
    """The cross entropy to the expert's action, and the error of the value function."""
    mask = batch.get("mask")
    pi, value = pi_and_value(policy, batch)
    log_prob, entropies = policy.policy_head.log_prob_and_entropy(pi, batch["expert_action"])
    imitation_loss = expert_action_loss(log_prob, mask=mask)
    value_error = value_loss(value, batch["target"], mask=mask)
    return imitation_loss + value_coef * value_error, {
        "imitation_loss": imitation_loss,
        "value_loss": value_error,
        "entropy": counted_mean(entropies, mask),
    }
