"""Actor-critics that correct for the age of their data: IMPALA, and its clipped variant APPO.

Sources: Espeholt et al., "IMPALA: Scalable Distributed Deep-RL with Importance Weighted
Actor-Learner Architectures", 2018 (arXiv:1802.01561), section 4; Luo et al., "IMPACT: Importance
Weighted Asynchronous Architectures with Clipped Target Networks", 2020 (arXiv:1912.00167), whose
surrogate APPO takes. V-trace sees values and probabilities of the policy as it stands when the
update begins; the value behind a time limit alone is the acting policy's. Advantages are
standardised. Left out: APPO's target network is that same policy, none that outlives an update,
and a batch is learned from once, without a buffer of older ones.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from dmrl_ray.algorithms.ppo import PPO, ActorCriticConfig, ClipConfig
from dmrl_ray.config.components import Number
from dmrl_ray.losses.returns import vtrace
from dmrl_ray.networks.base import Memory
from dmrl_ray.rollout.sampler import Sampler
from dmrl_ray.types import Rollout, Task, Trial


class VTraceConfig(ActorCriticConfig):
    """Settings of actor-critics with V-trace."""

    num_steps: Number = 32
    """Steps in each column between updates; episodes go on over updates."""

    gae_lambda: float = Field(default=1.0, ge=0, le=1)
    """Shortens the traces of V-trace; 1 is the paper's."""

    rho_bar: float = Field(default=1.0, gt=0)
    """Bound of the ratio that weighs a step's own error; decides whose values are learned."""

    c_bar: float = Field(default=1.0, gt=0)
    """Bound of the ratio that carries later errors back; decides only how fast."""


class VTrace(PPO):
    """Batches of whole sequences, with targets and advantages by V-trace."""

    config: VTraceConfig

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        sampler.continue_episodes(tasks, self.policy)
        return [sampler.rollout(self.policy, self.config.num_steps)]

    def update(self, trial: Trial) -> dict[str, float]:
        (rollout,) = trial
        training = self.policy.training
        self.policy.eval()  # as the workers' policy was
        corrected = self._corrected(rollout)
        self.policy.train(training)
        log_ratio = corrected.log_prob - rollout.log_prob
        behaviour_kl = (log_ratio.exp() - 1 - log_ratio).mean()
        return super().update([corrected]) | {"behaviour_kl": float(behaviour_kl)}

    @torch.no_grad()
    def _corrected(self, rollout: Rollout) -> Rollout:
        """The rollout as if the policy of this moment had acted in it."""
        policy, done = self.policy, rollout.terminated | rollout.truncated
        memory: Memory = ()
        reset: Tensor | None = None
        if policy.recurrent:
            memory, reset = rollout.initial_memory, torch.cat([rollout.reset, done[-1:]])
        pi, features, _ = policy(rollout.obs, None, memory, reset)
        shared = policy.value_encoder is None
        value = policy.denormalize_value(policy.value(features if shared else None, rollout.obs))
        log_prob = policy.policy_head.log_prob(pi[:-1], rollout.action)
        target, advantage = vtrace(
            (log_prob - rollout.log_prob).exp(),
            rollout.reward,
            value[:-1],
            torch.where(done, rollout.next_value, value[1:]),
            rollout.terminated,
            rollout.truncated,
            gamma=self.config.gamma,
            gae_lambda=self.config.gae_lambda,
            rho_bar=self.config.rho_bar,
            c_bar=self.config.c_bar,
        )
        return replace(rollout, log_prob=log_prob, advantage=advantage, value_target=target)


class IMPALA(VTrace):
    """One pass over each batch, along the policy gradient."""

    class Config(VTraceConfig):
        """V-trace and nothing else."""

        lr: float = Field(default=5e-4, gt=0)  # CartPole is lost at 2e-3: nothing clips a step
        """Step size."""

    config: Config
    epochs = 1

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The three terms of section 4.2; the advantages carry the weight rho."""
        pi, value_loss = self._forward(batch)
        log_prob, entropies = self.policy.policy_head.log_prob_and_entropy(pi, batch["action"])
        policy_loss = -(log_prob * batch["advantage"]).mean()
        entropy = entropies.mean()
        loss = policy_loss + self.config.value_coef * value_loss - batch["entropy_weight"] * entropy
        return loss, {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}


class APPO(VTrace):
    """PPO's clipped passes over each batch, around the policy that V-trace corrected for."""

    class Config(VTraceConfig, ClipConfig):
        """V-trace and the clipped update."""

        num_steps: Number = 128
        """Steps in each column between updates; episodes go on over updates."""

    config: Config
