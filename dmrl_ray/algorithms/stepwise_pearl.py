"""Stepwise PEARL: the posterior is updated within episodes, and exploration noise is correlated.

A variant of PEARL (Rakelly et al., 2019, arXiv:1903.08254) for tasks whose reward is sparse. With
the settings at their defaults, this is PEARL.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dmrl_ray.algorithms.adaptation import Agent
from dmrl_ray.algorithms.pearl import PEARL, Posterior, conditioned
from dmrl_ray.config.components import Number
from dmrl_ray.losses.latent import gaussian_sample
from dmrl_ray.networks.actor_critic import ActorCritic, Previous
from dmrl_ray.networks.base import Memory
from dmrl_ray.networks.heads import CategoricalHead
from dmrl_ray.rollout.sampler import Actor, Sampler
from dmrl_ray.tasks.distribution import TaskDistribution
from dmrl_ray.types import Rollout, Task, Trial


@dataclass(frozen=True)
class EpisodeNoise(Posterior):
    """Posteriors of B environments, with the noise that stays the same for an episode."""

    latent_noise: Tensor | None = None  # (B, L), by which latents are sampled from posteriors
    action_noise: Tensor | None = None  # (B, A), the part of the actions' noise that is kept
    kept: float = 0.0  # its weight


class StepwisePEARL(PEARL):
    """PEARL that updates its posterior every few steps, and explores by correlated noise."""

    class Config(PEARL.Config):
        belief_steps: Number | None = None
        """Steps between updates of the posterior; null is an episode. The noise by which a latent
        is sampled from it stays the same for an episode."""

        kept_noise: float = Field(default=0.0, ge=0, lt=1)
        """Weight of a part of the noise of continuous actions that stays the same for an episode,
        while collecting; its square is the correlation between steps. Correlated noise reaches
        farther than independent noise (Eberhard et al., "Pink noise is all you need", 2023), and
        so tasks that the posterior has not learned to represent."""

    config: Config

    def __init__(self, config: Config, distribution: TaskDistribution, policy: ActorCritic) -> None:
        super().__init__(config, distribution, policy)
        if config.kept_noise and isinstance(policy.policy_head, CategoricalHead):
            raise ValueError("algorithm.kept_noise: discrete actions have no noise to keep; use 0")

    def initial_state(self, sampler: Sampler, num_tasks: int) -> EpisodeNoise:
        return EpisodeNoise(**vars(super().initial_state(sampler, num_tasks)))

    def collect(self, sampler: Sampler, tasks: list[Task]) -> Trial:
        """As PEARL's, with correlated noise."""
        agent = self.begin(sampler, tasks)
        agent.state = replace(agent.state, kept=self.config.kept_noise)
        return list(self.play(sampler, agent, self.distribution.episodes_per_trial))

    def act(self, sampler: Sampler, agent: Agent) -> Rollout:
        """Some steps on a sample of the posterior, by noise that is kept for an episode."""
        state: EpisodeNoise = agent.state
        if sampler.fresh:
            state = agent.state = self._with_noise(sampler, state)
        assert state.latent_noise is not None
        assert state.action_noise is not None
        actor = conditioned(self.policy, gaussian_sample(*state.gaussian(), state.latent_noise))
        if state.kept:
            actor = correlated(actor, state.action_noise, state.kept)
        return sampler.rollout(
            self.policy,
            self.config.belief_steps,
            actor=actor,
            adaptation_step=agent.adaptation_step,
            with_value=False,
        )

    def _with_noise(self, sampler: Sampler, state: EpisodeNoise) -> EpisodeNoise:
        """The noise of an episode."""
        shape = (sampler.num_envs, self.policy.policy_head.num_actions)
        noise = sampler.rng.standard_normal(tuple(state.precision.shape), dtype=np.float32)
        kept = np.zeros(shape, np.float32)
        if state.kept:
            kept = sampler.rng.standard_normal(shape, dtype=np.float32)
        return replace(
            state, latent_noise=torch.from_numpy(noise), action_noise=torch.from_numpy(kept)
        )


def correlated(actor: Actor, noise: Tensor, kept: float) -> Actor:
    """The actor with a part of its Gaussian noise fixed, and its standard deviation as it is.

    Args:
        actor: of a squashed Gaussian policy.
        noise: (B, A), standard normal.
        kept: weight of the fixed part; the rest has the weight ``sqrt(1 - kept^2)``.
    """

    def act(
        obs: Tensor, previous: Previous | None, memory: Memory, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Memory]:
        pi, features, memory = actor(obs, previous, memory, reset)
        mean, log_std = pi.chunk(2, -1)
        mean = mean + kept * log_std.exp() * noise
        pi = torch.cat([mean, log_std + 0.5 * math.log(1 - kept * kept)], -1)
        return pi, features, memory

    return act
