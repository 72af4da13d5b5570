"""Behaviour cloning: the recorded actions are made likely.

Source: Pomerleau, "ALVINN: An Autonomous Land Vehicle in a Neural Network", 1988, as maximum
likelihood. A policy with memory reads whole episodes; `TrialCloning` whole trials, with previous
actions and rewards, so that a policy comes to adapt as the recorded one did.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from dmrl_ray.algorithms.offline import Offline, empty_memory
from dmrl_ray.learn.gradients import Batch, Report
from dmrl_ray.learn.minibatches import as_sequences, observed, previous_in
from dmrl_ray.losses.averages import counted_mean
from dmrl_ray.losses.imitation import expert_action_loss
from dmrl_ray.networks.actor_critic import ActorCritic
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.types import Rollout, Task, Trial


class BehaviorCloning(Offline):
    """Maximum likelihood of actions, given the observation or the episode so far."""

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """Read episodes, or steps as they come where there is no memory."""
        return [self.read(sampler)]

    def update(self, trial: Trial) -> dict[str, float]:
        """Maximise the likelihood of the recorded actions."""
        (rollout,), policy = trial, self.policy
        return self.fit(partial(cloning_loss, policy), cloning_batch(policy, rollout), rollout)


class TrialCloning(Offline):
    """Maximum likelihood of actions, given the trial so far."""

    memory_spans_trial = True

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """Read whole trials."""
        return [self.dataset.units(sampler.rng, "trial", sampler.num_envs, self.num_steps)]

    def update(self, trial: Trial) -> dict[str, float]:
        """Maximise the likelihood of the recorded actions."""
        (rollout,), policy = trial, self.policy
        return self.fit(partial(cloning_loss, policy), cloning_batch(policy, rollout), rollout)


def cloning_batch(policy: ActorCritic, rollout: Rollout) -> Batch:
    """The inputs of the policy in a rollout, and the recorded actions."""
    return as_sequences(policy, observed(policy, rollout) | {"action": rollout.action})


def cloning_loss(policy: ActorCritic, batch: Batch) -> tuple[Tensor, Report]:
    """The negative log-likelihood of the recorded actions."""
    memory, previous, mask = empty_memory(policy, batch), previous_in(batch), batch.get("mask")
    pi, _, _ = policy(batch["obs"], previous, memory, batch.get("reset"))
    head = policy.policy_head
    loss = expert_action_loss(head.log_prob(pi, batch["action"]), mask=mask)
    return loss, {"loss": loss, "entropy": counted_mean(head.entropy(pi), mask)}
