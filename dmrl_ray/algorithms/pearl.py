"""PEARL: soft actor-critic on a latent task, sampled from a posterior given some transitions.

Source: Rakelly et al., "Efficient Off-Policy Meta-Reinforcement Learning via Probabilistic Context
Variables", 2019 (arXiv:1903.08254), algorithms 1 and 2.

Unlike the paper's, the posterior has the standard normal prior as a factor, factors do not read the
next observation, and contexts are prefixes of stored trials instead of random transitions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import pad, softplus

from dmrl_ray.algorithms.adaptation import Agent
from dmrl_ray.algorithms.base import Algorithm
from dmrl_ray.algorithms.sac import (
    ACTOR,
    CRITIC,
    TEMPERATURE,
    Batch,
    SoftConfig,
    actor_loss,
    critic_loss,
    draw_batch,
    gradient_steps,
    soft_actor_critic,
    target_entropy,
)
from dmrl_ray.config.components import Number, Size, Sizes
from dmrl_ray.data.replay import ReplayBuffer, integers_below
from dmrl_ray.learn.gradients import Report
from dmrl_ray.losses.latent import gaussian_kl, gaussian_sample, product_of_gaussians
from dmrl_ray.losses.soft_actor_critic import temperature_loss
from dmrl_ray.networks.actor_critic import ActorCritic, Previous
from dmrl_ray.networks.base import Memory, linear, stack
from dmrl_ray.rollout.sampler import Actor, Sampler
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Arrays, Rollout, Task, Trial

CONTEXT = ("auxiliary.context_encoder.",)
"""Prefix of the parameters of the posterior, phi in the paper."""


@dataclass(frozen=True)
class Posterior:
    """Posteriors over the latent tasks of B environments, as sums over Gaussian factors."""

    precision: Tensor  # (B, L)
    weighted_mean: Tensor  # (B, L)

    def gaussian(self) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, L) of the product of factors and prior."""
        return product_of_gaussians(self.precision.unsqueeze(1), self.weighted_mean.unsqueeze(1))


class PEARL(Algorithm):
    """Soft actor-critic, conditioned on a latent task."""

    class Config(SoftConfig):
        latent: Size = 5
        """Dimensions of the latent task."""

        context_hidden_sizes: Sizes = (64, 64)
        """Width of each layer between a transition and its factor."""

        context_episodes: Number = 1
        """Episodes at the start of a trial from which training contexts are sampled."""

        kl_weight: float = Field(default=0.1, ge=0)  # as in the authors' code; 1 for sparse rewards
        """Weight of the divergence of the posterior from the prior, beta in the paper."""

    config: Config
    network_unread = ("separate_value", "normalize_value", "squashed")

    def __init__(self, config: Config, distribution: TaskDistribution, policy: ActorCritic) -> None:
        super().__init__(config, distribution, policy)
        self.models = soft_actor_critic(config, distribution, policy)
        self.replay = ReplayBuffer(config.replay_trials)
        if config.context_episodes > distribution.episodes_per_trial:
            raise ValueError(
                f"algorithm.context_episodes: {config.context_episodes}, but trials of the family "
                f"have {distribution.episodes_per_trial} episodes"
            )
        width = math.prod(distribution.observation_space.shape or ())
        sizes = (width + policy.policy_head.num_actions + 1, *config.context_hidden_sizes)
        self.context_encoder = nn.Sequential(
            *stack(sizes[0], sizes[1:], "relu"), linear(sizes[-1], 2 * config.latent, gain=1.0)
        )
        policy.auxiliary["context_encoder"] = self.context_encoder

    @classmethod
    def policy_options(cls, config: Any) -> dict[str, Any]:
        return super().policy_options(config) | {"squashed": True, "latent": config.latent}

    @property
    def collected_steps(self) -> int:
        return self.distribution.trial_steps

    def get_state(self) -> Arrays:
        """The replay."""
        return self.replay.get_state()

    def set_state(self, state: Arrays) -> None:
        """Continue from `get_state`'s answer."""
        self.replay.set_state(state, next(self.policy.parameters()).device)

    def initial_state(self, sampler: Sampler, num_tasks: int) -> Posterior:
        """Algorithm 2, line 1: no context, and so the prior."""
        nothing = torch.zeros(sampler.num_envs, self.config.latent)
        return Posterior(nothing, nothing)

    def rounds(self, episodes: int) -> list[int]:
        return [1] * episodes

    def act(self, sampler: Sampler, agent: Agent) -> Rollout:
        """Algorithm 2, lines 3 and 4: an episode on a sample of the posterior."""
        mean, log_var = agent.state.gaussian()
        noise = sampler.rng.standard_normal(tuple(mean.shape), dtype=np.float32)
        latent = gaussian_sample(mean, log_var, torch.from_numpy(noise))
        return sampler.rollout(
            self.policy,
            actor=conditioned(self.policy, latent),
            adaptation_step=agent.adaptation_step,
            with_value=False,
        )

    @torch.no_grad()
    def adapt(self, state: Posterior, experience: Rollout) -> Posterior:
        """Algorithm 2, line 5: every transition is one more factor of the posterior (eq. 2)."""
        seen = (experience.obs[:-1], experience.action, experience.reward)
        factors: tuple[Tensor, ...] = self.factors(*seen)
        if not experience.all_count:
            factors = tuple(factor * experience.mask.unsqueeze(-1) for factor in factors)
        precision, weighted_mean = (factor.sum(0) for factor in factors)
        return replace(
            state,
            precision=state.precision + precision,
            weighted_mean=state.weighted_mean + weighted_mean,
        )

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """Algorithm 1, lines 3 to 10: trials in which the policy adapts, for the replay."""
        agent = self.begin(sampler, tasks)
        return list(self.play(sampler, agent, self.distribution.episodes_per_trial))

    def update(self, trial: Trial) -> dict[str, float]:
        """Algorithm 1, lines 11 to 22, on the replay with what was collected."""
        self.replay.add(trial)
        return gradient_steps(self, trial, self.config.gradient_steps, self.gradient_step)

    def gradient_step(self) -> Report:
        """Algorithm 1, lines 12 to 21: one gradient step on a batch of tasks."""
        config, models = self.config, self.models
        batch = draw_batch(self, self.replay, config)  # line 13
        mean, log_var, noise = self.posterior(batch)
        latent = gaussian_sample(mean, log_var, noise)  # line 14
        prior = torch.zeros_like(mean)
        kl = config.kl_weight * gaussian_kl(mean, log_var, prior, prior).mean()  # line 17
        loss, report = critic_loss(models, batch, gamma=config.gamma, latent=latent)  # eq. 3
        norm = self.step_optimizer((loss + kl) * batch.share, CRITIC + CONTEXT)  # lines 19 and 21
        loss, of_actor = actor_loss(models, batch, latent=latent.detach())  # eq. 4
        self.step_optimizer(loss * batch.share, ACTOR)  # line 20
        if config.temperature is None:
            log, target = models.temperature.log, target_entropy(config, models)
            loss = temperature_loss(log, of_actor["entropy"], target=target).mean()
            self.step_optimizer(loss * batch.share, TEMPERATURE)
        models.targets.polyak_average(models.critics, config.tau)
        report |= of_actor | {"kl_cost": kl}
        return report | {"temperature": models.temperature(), "grad_norm": norm}

    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, log-variance and noise (N, K, L) of posteriors after some steps of trials.

        The number of steps is drawn for each transition of a batch, not for each trial, which gives
        as many posteriors to learn from as transitions, for the same number of factors.
        """
        lengths = self.replay.lengths(batch.slots, self.config.context_episodes)
        shape = (len(batch.slots), self.config.batch_steps)
        known = integers_below(self.rng, lengths + 1, shape[1])[batch.mine]
        noise = self.rng.standard_normal((*shape, self.config.latent), dtype=np.float32)
        context = self.replay.take(batch.slots[batch.mine], slice(int(lengths.max())))
        factors = self.factors(context.obs, context.action, context.reward)
        row = np.arange(len(known))[:, None]
        sums = [pad(x.cumsum(1), (0, 0, 1, 0))[row, known] for x in factors]  # (N, K, L)
        mean, log_var = product_of_gaussians(*(x.unsqueeze(-2) for x in sums))
        return mean, log_var, torch.from_numpy(noise[batch.mine]).to(mean.device)

    def factors(self, obs: Tensor, action: Tensor, reward: Tensor) -> tuple[Tensor, Tensor]:
        """Precision and precision-weighted mean (T, B, L) of every transition's factor."""
        parts = (self.policy.scale(obs).flatten(2), self.policy.policy_head.encode(action))
        x = torch.cat([*parts, reward.unsqueeze(-1)], -1)
        mean, raw = self.context_encoder(x).chunk(2, -1)
        # Small at first: many untrained factors must not make a posterior sharp.
        precision = softplus(raw - 3.0)
        return precision, precision * mean


def conditioned(policy: ActorCritic, latent: Tensor) -> Actor:
    """The actor of B environments on their latent tasks (B, L)."""

    def act(
        obs: Tensor, previous: Previous | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Memory]:
        pi, features, _ = policy(obs, latent=latent.unsqueeze(0))
        return pi, features, memory

    return act
